-- Spend `cost` of a quota of `limit` in a window of `window` ms, if it fits; service/api/quotas.py does the same.
-- A hash keeps the window that was spent in last, what was spent in it and in the one before.
local limit, window, cost, now = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local kept = redis.call('HMGET', KEYS[1], 'window', 'spent', 'before')
local index = math.floor(now / window)
local last, spent, before = tonumber(kept[1] or index), tonumber(kept[2] or 0), tonumber(kept[3] or 0)
if last < index then
  before = last == index - 1 and spent or 0
  spent = 0
elseif last > index then  -- the clock of whoever asked before is ahead
  index, now = last, last * window
end
local used = spent + before * (window - (now - index * window)) / window
if used + cost <= limit then
  spent = spent + cost
  redis.call('HSET', KEYS[1], 'window', index, 'spent', spent, 'before', before)
  redis.call('PEXPIRE', KEYS[1], 2 * window)
  return {1, index, spent, before}
end
return {0, index, spent, before}
