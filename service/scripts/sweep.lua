-- Forget targets that are too old to be scored or restated.
--
-- KEYS  targets
-- ARGV  unit of a slot in ms, oldest timestamp to keep
-- reply {targets forgotten, steps whose candle never came}

local SLOTS, RECORD = 500, 56
local EMPTY = string.rep('\0', 8)
local stem, unit = string.sub(KEYS[1], 1, -2), tonumber(ARGV[1])
local forgotten, expired = 0, 0

if redis.call('TYPE', KEYS[1]).ok ~= 'zset' then return {0, 0} end  -- none, or damaged: the next write drops it
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[2])) do
  local slot = math.floor((string.find(member, '^%d+$') and tonumber(member) or 0) / unit)
  local block, offset = math.floor(slot / SLOTS), (slot % SLOTS) * RECORD
  local record = redis.pcall('GETRANGE', stem .. 'c:' .. string.format('%.0f', block), offset, offset + RECORD - 1)
  local waiting = redis.pcall('HLEN', stem .. 't:' .. member)
  local came = type(record) == 'string' and #record == RECORD and string.sub(record, 1, 8) ~= EMPTY
  if not came and type(waiting) == 'number' then expired = expired + waiting end
  redis.call('DEL', stem .. 't:' .. member)
  redis.call('ZREM', KEYS[1], member)
  forgotten = forgotten + 1
end
return {forgotten, expired}
