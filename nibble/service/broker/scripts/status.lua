-- Returns {queued, running, info of each live worker, ms since what is served next was submitted (0: none waits)}.

local num_running, infos = 0, {}
for _, worker in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
  num_running = num_running + redis.call('HLEN', key('worker', worker))
end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. now, '+inf')) do
  infos[#infos + 1] = redis.call('HGET', workers, worker)
end
local age_ms = 0
for _, waiting in ipairs({queue, suspects}) do
  local id = redis.call('ZRANGE', waiting, 0, 0)[1]
  local submitted_ms = id and redis.call('HGET', key('state', id), 'submitted_ms')
  if submitted_ms then
    age_ms = math.max(age_ms, now - submitted_ms)
  end
end
return {redis.call('ZCARD', queue) + redis.call('ZCARD', suspects), num_running, infos, age_ms}
