-- Append weights to an ensemble's list, unless somebody else has appended since it was read.
--
-- KEYS  list
-- ARGV  the last entry as it was read, '' where there was none; the new entry; most entries to keep
-- reply 1 where it was appended, else 0

if (redis.call('LINDEX', KEYS[1], -1) or '') ~= ARGV[1] then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[2])
redis.call('LTRIM', KEYS[1], -tonumber(ARGV[3]), -1)
return 1
