-- Keeps a finished response, unless it was deleted. ARGV: id, record, id of the one before it or '', ttl_ms. Those
-- before it live as long.

if redis.call('HGET', key('response', ARGV[1]), 'record') == 'deleted' then
  return
end
redis.call('HSET', key('response', ARGV[1]), 'record', ARGV[2], 'previous', ARGV[3])
local id, known = ARGV[1], {}
while id and id ~= '' and not known[id] do
  known[id] = true
  redis.call('PEXPIRE', key('response', id), ARGV[4])
  id = redis.call('HGET', key('response', id), 'previous')
end
