-- Shared by all scripts: scripts.py puts this text before each of them. Key names and fields: see keys.py.
-- KEYS[1] is the namespace with its braces; all other keys share its slot. Times are ms of the server's clock.

local ns = KEYS[1]
local queue, suspects, suspect_of = ns .. ':queue', ns .. ':suspects', ns .. ':suspect_of'
local leases, workers, deadlines = ns .. ':leases', ns .. ':workers', ns .. ':deadlines'
local wakeups, counters, rate = ns .. ':wake', ns .. ':counters', ns .. ':rate'

local MAX_WAKEUPS = 64        -- more idle workers than this look again by themselves (worker_side.wait)
local MAX_SWEPT_DEADLINES = 100  -- per call, so that no call takes long
local RATE_WINDOW_MS = 30000  -- time constant of the service rate's exponential decay

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function key(kind, id)
  return ns .. ':' .. kind .. ':' .. id
end

local function count(name, n)
  redis.call('HINCRBY', counters, name, n)
end

-- Live events: collected per list of gateways, published once at the end of the script.

local outbox = {}

local function tell(gateways, event)
  local events = outbox[gateways]
  if events then
    events[#events + 1] = event
  else
    outbox[gateways] = {event}
  end
end

local function publish_all()
  for gateways, events in pairs(outbox) do
    local message = '\221' .. struct.pack('>I4', #events) .. table.concat(events)  -- \221 = 0xdd, array32
    for gateway in string.gmatch(gateways, '[^,]+') do
      redis.call('PUBLISH', ns .. ':events:' .. gateway, message)
    end
  end
end

-- Wake-ups. A list element outlives the moment, so a worker that is about to wait cannot miss it.

local function wake_any()
  if redis.call('LLEN', wakeups) < MAX_WAKEUPS then
    redis.call('RPUSH', wakeups, '1')
  end
end

local function tell_to_drop(worker, id)
  redis.call('SADD', key('dropped', worker), id)
  redis.call('RPUSH', key('wake', worker), '1')
end

-- Quotas: {name, {{unit, amount, period_ms}, ...}}. Of each limit the moment is kept at which all of it will be free again:
-- every unit that is used moves it by period_ms / amount. What was used beyond the limit is a debt.

local function full_at(quota, limit)
  return math.max(now, tonumber(redis.call('HGET', key('quota', quota[1]), limit[1] .. '/' .. limit[3]) or 0))
end

-- costs: unit -> how many.
local function charge(quota, costs)
  local bucket, last = key('quota', quota[1]), now
  for _, limit in ipairs(quota[2]) do
    local at = full_at(quota, limit) + (costs[limit[1]] or 0) * limit[3] / limit[2]
    redis.call('HSET', bucket, limit[1] .. '/' .. limit[3], at)
    last = math.max(last, at)
  end
  redis.call('PEXPIRE', bucket, math.ceil(last - now) + 1)
end

-- The end of a request: `event` is its encoded final TokenEvent, which the caller tells. Returns the worker that held
-- it ('' if none) and its gateways.

local function close_log(id, event)
  local state = key('state', id)
  local fields = redis.call('HMGET', state, 'worker', 'log_ttl_ms', 'deadline_ms', 'gateways', 'claim', 'quota')
  redis.call('HSET', state, 'status', 'finished', 'worker', '', 'final', event)
  if fields[1] ~= '' then
    redis.call('HDEL', key('worker', fields[1]), id)
  else
    redis.call('ZREM', queue, id)
    redis.call('ZREM', suspects, id)
  end
  if fields[3] ~= '' then
    redis.call('ZREM', deadlines, id)
  end
  for _, kind in ipairs({'state', 'tokens', 'logprobs', 'prompt_logprobs', 'request', 'context'}) do
    redis.call('PEXPIRE', key(kind, id), fields[2])
  end
  if fields[5] then
    redis.call('PEXPIRE', key('claim', fields[5]), fields[2])
  end
  if fields[6] then
    charge(cmsgpack.unpack(fields[6]), {tokens = redis.call('STRLEN', key('tokens', id)) / 4})
  end
  return fields[1], fields[4]
end

-- Ends a request from outside its worker, which is told to drop it.
local function finish(id, reason, message)
  local index = redis.call('STRLEN', key('tokens', id)) / 4
  local event = cmsgpack.pack({id, index, {}, reason, message})
  local worker, gateways = close_log(id, event)
  if worker ~= '' then
    tell_to_drop(worker, id)
  end
  tell(gateways, event)
end

-- Puts a request back into the queue, at its old place and under a new attempt: what the old attempt still sends is
-- refused from now on. A request whose workers keep dying is given up in the end. One crash before that it is a
-- suspect: a worker gets at most one suspect at a time, so that the innocent ones which were merely served beside
-- the culprit outlive it.
local function requeue(id, is_crash)
  local state = key('state', id)
  local fields = redis.call('HMGET', state, 'score', 'crashes', 'max_attempts')
  local crashes, max_attempts = tonumber(fields[2]), tonumber(fields[3])
  redis.call('HINCRBY', state, 'attempt', 1)
  redis.call('HSET', state, 'status', 'queued', 'worker', '')
  if is_crash then
    crashes = redis.call('HINCRBY', state, 'crashes', 1)
    if crashes >= max_attempts then
      count('quarantined', 1)
      finish(id, 'error', 'given up: ' .. crashes .. ' workers in a row were lost while serving this request')
      return
    end
    count('recovered', 1)
  end
  local is_suspect = crashes > 0 and crashes >= max_attempts - 1
  redis.call('ZADD', is_suspect and suspects or queue, fields[1], id)
  wake_any()
end

local function forget_worker(worker, is_crash)
  local held = key('worker', worker)
  local ids = redis.call('HKEYS', held)
  redis.call('DEL', held)
  for _, id in ipairs(ids) do
    requeue(id, is_crash)
  end
  redis.call('DEL', key('dropped', worker), key('wake', worker))
  redis.call('ZREM', leases, worker)
  redis.call('HDEL', workers, worker)
  redis.call('HDEL', suspect_of, worker)
end

-- Expired leases and deadlines. Whoever calls notices: any worker's exchange, any gateway's look at the log.
local function sweep()
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now)) do
    forget_worker(worker, true)
  end
  local late = redis.call('ZRANGEBYSCORE', deadlines, '-inf', now, 'LIMIT', 0, MAX_SWEPT_DEADLINES)
  for _, id in ipairs(late) do
    count('expired', 1)
    finish(id, 'error', 'the deadline of this request has passed')
  end
end

-- Adds a gateway to those that get a request's live events.
local function watch(id, gateway)
  local state = key('state', id)
  local fields = redis.call('HMGET', state, 'gateways', 'worker', 'attempt')
  local gateways = fields[1]
  if string.find(',' .. gateways .. ',', ',' .. gateway .. ',', 1, true) then
    return
  end
  gateways = gateways .. ',' .. gateway
  redis.call('HSET', state, 'gateways', gateways)
  if fields[2] ~= '' then
    redis.call('HSET', key('worker', fields[2]), id, fields[3] .. ':' .. gateways)
  end
end
