-- Returns {queued, running, info of each live worker}.

local num_running, infos = 0, {}
for _, worker in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
  num_running = num_running + redis.call('HLEN', key('worker', worker))
end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. now, '+inf')) do
  infos[#infos + 1] = redis.call('HGET', workers, worker)
end
return {redis.call('ZCARD', queue) + redis.call('ZCARD', suspects), num_running, infos}
