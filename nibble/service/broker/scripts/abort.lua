-- Ends a request for its client's or its gateway's sake. ARGV: id, finish reason, error message or ''.
-- Returns 1 if this ended it, 0 if it had ended before or is unknown.

local status = redis.call('HGET', key('state', ARGV[1]), 'status')
if not status or status == 'finished' then
  return 0
end
finish(ARGV[1], ARGV[2], ARGV[3] ~= '' and ARGV[3] or nil)
publish_all()
return 1
