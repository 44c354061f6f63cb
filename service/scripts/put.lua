-- Store candles of one series and score the forecasts that they close, in one step.
--
-- KEYS  index of blocks, revision, sums, trackers, targets
-- ARGV  'ingest' or 'restate', revision that the caller has read ('' for any), mark of this write, interval in ms,
--       unit of a slot in ms, event to note if anything changed ('' for none), then all records as one string:
--       timestamp and six columns, 56 bytes each
-- reply {new, duplicate, restated, quarantined, scored, rescored, unreadable}; nil where the revision was another
--
-- `unreadable` counts what lay in the ledger and was no part of it: it is dropped, so that it stops no candle. An error
-- would leave candles stored and not scored: whatever can raise one comes before the first write.
--
-- Keys of blocks and of targets are made here, since which targets a candle closes is known only here: all share one
-- hash tag. What lies in them: service/engine/history.py and service/score/ledger.py.

local SLOTS, RECORD = 500, 56
local EMPTY = string.rep('\0', 8)
local ENTRY = '<I2I2i8dI4fffffff'
local ENTRY_BYTES = struct.size(ENTRY)
local FIELDS, UNITS, MOST = 14, 1e9, 100
local SUMS = '<' .. string.rep('d', FIELDS)
local JUMP = math.log(1.2)                                    -- a close restated by more is put in quarantine
local LAST_STEPS, MIN_BLOCK, KEPT_BLOCKS, KEPT_EVENTS = {8, 30, 64, 512}, 24, 600, 1000
local MISS, RATE, LOWEST, HIGHEST = 0.2, 0.25, math.log(0.25), math.log(8)
local FARTHEST = 700                                          -- logarithm of a price that is still a number

local index, revision, sums, trackers, targets = unpack(KEYS)
local mode, expected, mark = ARGV[1], ARGV[2], ARGV[3]
local interval, unit, records = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[7]
local stem = string.sub(targets, 1, -2)                       -- every key of the series begins with it

if expected ~= '' and redis.call('GET', revision) ~= expected then return false end

local function key(kind, number) return stem .. kind .. ':' .. string.format('%.0f', number) end

local function place(time)
  local slot = math.floor(time / unit)
  return math.floor(slot / SLOTS), (slot % SLOTS) * RECORD
end

local function close_of(record) return (struct.unpack('<d', record, 33)) end

-- The candle that lies in a time's slot; or nil, and whether something else lies there.
local function stored(time)
  local block, offset = place(time)
  local record = redis.call('GETRANGE', key('c', block), offset, offset + RECORD - 1)
  if #record < RECORD or string.sub(record, 1, 8) == EMPTY then return nil, false end
  local close, its = close_of(record), struct.unpack('<i8', record)
  if math.floor(its / unit) == math.floor(time / unit) and close > 0 and close < math.huge then return record end
  return nil, true
end

-- Damage ------------------------------------------------------------------------------------------

local unreadable = 0

local function drop(command, ...)
  redis.call(command, ...)
  unreadable = unreadable + 1
end

local function require_kind(name, kind)
  local found = redis.call('TYPE', name).ok
  if found ~= kind and found ~= 'none' then drop('DEL', name) end
end

redis.call('ZCARD', index)                                    -- an error if it is something else, as below
local checked
for at = 1, #records, RECORD do
  local block = place(struct.unpack('<i8', records, at))
  if block ~= checked then
    redis.call('STRLEN', key('c', block))
    checked = block
  end
end
require_kind(sums, 'hash')
require_kind(trackers, 'hash')
require_kind(targets, 'zset')
require_kind(stem .. 'e', 'list')

-- Candles -----------------------------------------------------------------------------------------

local new, duplicate, restated, quarantined = 0, 0, 0, 0
local changed, before, shifts = {}, {}, {}                    -- times; closes until now; what a restated origin moved by

for at = 1, #records, RECORD do
  local record = string.sub(records, at, at + RECORD - 1)
  local time = struct.unpack('<i8', record)
  local old, damaged = stored(time)
  if old == record then
    duplicate = duplicate + 1
  else
    local moved = old and math.log(close_of(record) / close_of(old)) or 0
    if mode == 'ingest' and math.abs(moved) > JUMP then
      quarantined = quarantined + 1
    else
      local block, offset = place(time)
      redis.call('SETRANGE', key('c', block), offset, record)
      redis.call('ZADD', index, block, string.format('%.0f', block))
      changed[#changed + 1] = time
      if old then
        restated, before[time] = restated + 1, close_of(old)
        if mode == 'restate' and moved ~= 0 then shifts[time] = moved end
      else
        new = new + 1
        if not damaged then before[time] = false end          -- or its steps may have been scored
      end
    end
  end
end

if new > 0 then
  redis.call('PERSIST', targets)
  redis.call('PERSIST', stem .. 'n')
end
if new + restated > 0 and ARGV[6] ~= '' then
  redis.call('RPUSH', stem .. 'e', ARGV[6])
  redis.call('LTRIM', stem .. 'e', -KEPT_EVENTS, -1)
end
if new + restated > 0 or expected ~= '' then
  local now = redis.call('TIME')
  redis.call('SET', revision, mark .. now[1] .. '.' .. now[2])
end

-- Scores ------------------------------------------------------------------------------------------

local function units(value) return math.floor(math.min(value, MOST) * UNITS + 0.5) end

local function pinball(level, error) return math.max(level * error, (level - 1) * error) end

local function group_of(step)
  for group, last in ipairs(LAST_STEPS) do if step <= last then return group end end
end

-- What one step of a forecast adds to the sums of its block, and whether its calibrated band held.
local function score(entry, close)
  local y, naive = math.log(close), entry.naive
  local point, low, high = naive + entry.point, naive + entry.low, naive + entry.high
  local wide_low, wide_high = point + (low - point) * entry.scale, point + (high - point) * entry.scale
  local function held(from, to) return from <= y and y <= to and from < to and 1 or 0 end
  local wrong, naively, anchor = math.abs(y - point), math.abs(y - naive), math.exp(naive)
  local bias = y - point
  return {
    1, units(wrong), units(naively), units(wrong * entry.inverse), units(naively * entry.inverse),
    bias < 0 and -units(-bias) or units(bias), held(low, high), held(wide_low, wide_high),
    units(pinball(0.1, y - low)), units(pinball(0.9, y - high)),
    units(pinball(0.1, y - wide_low)), units(pinball(0.9, y - wide_high)),
    units(math.abs(close - math.exp(point)) / anchor), units(math.abs(close - anchor) / anchor),
  }
end

local function numbers(from, to, ...)
  for _, value in ipairs({...}) do
    if not (from <= value and value <= to) then return false end  -- NaN neither
  end
  return true
end

-- A step of a forecast; nil where the value is none.
local function unpacked(value)
  if #value ~= ENTRY_BYTES then return end
  local model, step, origin, naive, issued, point, low, high, top, bottom, inverse, scale = struct.unpack(ENTRY, value)
  if not (numbers(1, LAST_STEPS[#LAST_STEPS], step) and numbers(0, 1e12, inverse, scale)
          and numbers(-FARTHEST / 2, FARTHEST / 2, naive, point, low, high, top, bottom)) then return end
  return {model = model, step = step, origin = origin, naive = naive, issued = issued, point = point, low = low,
          high = high, top = top, bottom = bottom, inverse = inverse, scale = scale}
end

local function packed(e)
  return struct.pack(ENTRY, e.model, e.step, e.origin, e.naive, e.issued, e.point, e.low, e.high, e.top, e.bottom,
                     e.inverse, e.scale)
end

-- The forecasts that wait for the candle of a time, or were scored by it.
local function waiting(time)
  local target, entries = key('t', time), {}
  local found = redis.pcall('HGETALL', target)
  if found.err then
    drop('DEL', target)
    return entries
  end
  for i = 1, #found, 2 do
    local entry = unpacked(found[i + 1])
    if entry then
      entry.forecast, entries[#entries + 1] = found[i], entry
    else
      drop('HDEL', target, found[i])
    end
  end
  return entries
end

-- The sums of a block.
local function known_sums(field)
  local value = redis.call('HGET', sums, field)
  if value and #value == 8 * FIELDS then
    local sum, whole = {struct.unpack(SUMS, value)}, true
    for i = 1, FIELDS do whole = whole and sum[i] % 1 == 0 end  -- of infinity and NaN it is NaN
    if whole then return sum end
  end
  if value then unreadable = unreadable + 1 end
  return {struct.unpack(SUMS, string.rep('\0', 8 * FIELDS))}
end

local function add(entry, time, amounts, sign)
  local group = group_of(entry.step)
  local owner = entry.model .. ':' .. group .. ':'
  local block = math.floor(time / (math.max(LAST_STEPS[group], MIN_BLOCK) * interval))
  local field = owner .. string.format('%.0f', block)
  local sum = known_sums(field)
  for i = 1, FIELDS do sum[i] = sum[i] + sign * amounts[i] end
  redis.call('HSET', sums, field, struct.pack(SUMS, unpack(sum, 1, FIELDS)))
  redis.call('HDEL', sums, owner .. string.format('%.0f', block - KEPT_BLOCKS))
end

-- One step of the log quantile tracker per candle and group, with the group's mean miss, in the order of targets.
-- Misses of overlapping forecasts come in runs as long as the horizon: the step is as much smaller.
local function track(owner, group, time, miss)
  local known = redis.call('HGET', trackers, owner)
  local level, last = 0, -1
  if known and #known == 16 then level, last = struct.unpack('<di8', known) end
  if known and (#known ~= 16 or not numbers(LOWEST, HIGHEST, level)) then
    level, last, unreadable = 0, -1, unreadable + 1
  end
  if time > last then
    level = math.max(LOWEST, math.min(HIGHEST, level + RATE / LAST_STEPS[group] * (miss - MISS)))
    redis.call('HSET', trackers, owner, struct.pack('<di8', level, time))
  end
end

-- Whether a forecast was made from prices of something else, before the candle of its origin was stored.
local function is_foreign(entry, shift)
  local origin = stored(entry.origin)
  return origin and math.abs(math.log(close_of(origin)) - entry.naive - shift) > JUMP
end

local scored, rescored = 0, 0

local function settle(time)
  local after = stored(time)
  if not after then return end
  local now, past = close_of(after), before[time]
  if past == nil then past = now end                          -- this candle is as it was
  local groups, misses, counts = {}, {}, {}
  for _, entry in ipairs(waiting(time)) do
    local shift = shifts[entry.origin] or 0
    if not past and is_foreign(entry, shift) then
      drop('HDEL', key('t', time), entry.forecast)
    elseif past ~= now or shift ~= 0 then
      if past then
        add(entry, time, score(entry, past), -1)
        rescored = rescored + 1
      else
        scored = scored + 1
      end
      entry.naive = entry.naive + shift
      local amounts = score(entry, now)
      add(entry, time, amounts, 1)
      if not past then
        local group = group_of(entry.step)
        local owner = entry.model .. ':' .. group
        groups[owner] = group
        counts[owner] = (counts[owner] or 0) + 1
        misses[owner] = (misses[owner] or 0) + 1 - amounts[8]
      end
    end
  end
  for owner, count in pairs(counts) do track(owner, groups[owner], time, misses[owner] / count) end
end

local function open_targets()
  local times = {}
  for _, member in ipairs(redis.call('ZRANGE', targets, 0, -1)) do
    if string.find(member, '^%d+$') then
      times[#times + 1] = tonumber(member)
    else
      drop('ZREM', targets, member)
    end
  end
  return times
end

if redis.call('EXISTS', targets) == 1 then
  if next(shifts) then
    local times = open_targets()
    for _, time in ipairs(times) do settle(time) end
    for _, time in ipairs(times) do
      for _, entry in ipairs(waiting(time)) do
        if shifts[entry.origin] then
          entry.naive = entry.naive + shifts[entry.origin]
          redis.call('HSET', key('t', time), entry.forecast, packed(entry))
        end
      end
    end
  else
    for _, time in ipairs(changed) do settle(time) end
  end
end

return {new, duplicate, restated, quarantined, scored, rescored, unreadable}
