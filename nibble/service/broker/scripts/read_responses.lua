-- ARGV: id, how many at most. Returns the record of a response and those before it, newest first: '' for one that is not
-- known (any more), 'deleted' for one that was; both end the list.

local id, records = ARGV[1], {}
while id ~= '' and #records < tonumber(ARGV[2]) do
  local fields = redis.call('HMGET', key('response', id), 'record', 'previous')
  records[#records + 1] = fields[1] or ''
  id = fields[2] or ''
end
return records
