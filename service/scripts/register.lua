-- Note the steps of one served forecast under the candles that will close them.
--
-- KEYS  targets, names of models
-- ARGV  unit of a slot in ms, model, forecast, origin in ms, last close, now in ms, ms to keep a target after its
--       candle opens, then all steps as one string: the timestamp of its candle and 50 bytes each
-- reply {new, duplicate, late, unreadable}; nil where the history holds another close at the origin
--
-- `unreadable` counts what lay in the ledger and was no part of it: it is dropped, so that it stops no forecast.
-- A step whose candle is stored already is late: it is never scored.

local SLOTS, RECORD, STEP = 500, 56, 58
local EMPTY = string.rep('\0', 8)
local SAME = 1e-9                                             -- relative difference of one close written twice

local targets, names = unpack(KEYS)
local unit, model, forecast = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local origin, last_close = tonumber(ARGV[4]), tonumber(ARGV[5])
local now, kept = tonumber(ARGV[6]), tonumber(ARGV[7])
local stem = string.sub(targets, 1, -2)

local function stored(time)
  local slot = math.floor(time / unit)
  local block, offset = math.floor(slot / SLOTS), (slot % SLOTS) * RECORD
  local record = redis.pcall('GETRANGE', stem .. 'c:' .. string.format('%.0f', block), offset, offset + RECORD - 1)
  if type(record) == 'table' or #record < RECORD or string.sub(record, 1, 8) == EMPTY then return end
  local its, close = struct.unpack('<i8', record), struct.unpack('<d', record, 33)
  if math.floor(its / unit) == slot and close > 0 and close < math.huge then return record end
end

local unreadable = 0

local function drop(...)
  redis.call('DEL', ...)
  unreadable = unreadable + 1
end

local function kind(key) return redis.call('TYPE', key).ok end

local function number(value)
  local found = value and string.find(value, '^%d+$') and tonumber(value) or 0
  return found >= 1 and found < 65536 and found or nil
end

local known = stored(origin)
if known and math.abs(struct.unpack('<d', known, 33) / last_close - 1) > SAME then return false end

if not (kind(targets) == 'zset' or kind(targets) == 'none') then drop(targets) end
if kind(names) ~= 'hash' and redis.call('EXISTS', names, targets, stem .. 'b', stem .. 'q') > 0 then
  for _, member in ipairs(redis.call('ZRANGE', targets, 0, -1)) do redis.call('DEL', stem .. 't:' .. member) end
  drop(names, targets, stem .. 'b', stem .. 'q')              -- which models they are of is not known any more
end

local named = redis.call('HGET', names, model)
local id = number(named)
if not id then
  if named then unreadable = unreadable + 1 end
  id = redis.call('HLEN', names)                              -- a number that no model has had
  for _, other in ipairs(redis.call('HVALS', names)) do id = math.max(id, number(other) or 0) end
  id = id + 1
  redis.call('HSET', names, model, id)
end

local new, duplicate, late, newest = 0, 0, 0, nil
local steps = ARGV[8]
for at = 1, #steps, STEP do
  local time = struct.unpack('<i8', steps, at)
  local member = string.format('%.0f', time)
  local target = stem .. 't:' .. member
  local waits = redis.pcall('HEXISTS', target, forecast)
  if type(waits) == 'table' then drop(target) end
  if waits == 1 then
    duplicate = duplicate + 1
  elseif stored(time) then
    late = late + 1
  else
    redis.call('HSET', target, forecast, struct.pack('<I2', id) .. string.sub(steps, at + 8, at + STEP - 1))
    redis.call('PEXPIRE', target, string.format('%.0f', time - now + kept))
    redis.call('ZADD', targets, member, member)
    new, newest = new + 1, time
  end
end
-- A series without candles may be anybody's invention: it is forgotten with the last of its targets.
if redis.call('EXISTS', stem .. 'i') == 0 and newest then
  local left = string.format('%.0f', newest - now + kept)
  for _, name in ipairs(KEYS) do
    if redis.call('PTTL', name) < tonumber(left) then redis.call('PEXPIRE', name, left) end
  end
end
return {new, duplicate, late, unreadable}
