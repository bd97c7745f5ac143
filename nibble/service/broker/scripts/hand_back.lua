-- A worker leaves, and what it holds goes back to its place in the queue. ARGV: worker, is_crash. In good order that
-- counts against no request; a worker that broke down says so, and each of its requests may be the reason.
-- Returns the number of requests handed back.

local num_held = redis.call('HLEN', key('worker', ARGV[1]))
forget_worker(ARGV[1], ARGV[2] == '1')
publish_all()
return num_held
