-- A worker stops in good order: what it holds goes back to its place in the queue, which counts against no request.
-- ARGV: worker. Returns the number of requests handed back.

local num_held = redis.call('HLEN', key('worker', ARGV[1]))
forget_worker(ARGV[1], false)
return num_held
