-- Admits a request and puts it into the queue, or restores one that a gateway holds and this server has lost.
-- ARGV: id, request, gateway, nonce, priority_ms, deadline_ms or '', log_ttl_ms, max_attempts, max_queued, needs_worker,
--       attempt, tokens, log probabilities and those of the prompt of a restored request ('' for each of a new one),
--       context, claim, fingerprint, quota (msgpack, see common.lua) ('' for none), its costs: requests, tokens.
-- Returns {'ok', remaining and ms to reset of each limit}, {'duplicate'}, {'claimed', id, fingerprint},
-- {'queue_full', queued, retry_after_ms}, {'no_worker', 0, retry_after_ms} or {'over_quota', limit, retry_after_ms, as ok}.

local id, request, gateway, nonce, priority_ms, deadline_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local log_ttl_ms, max_attempts, max_queued, needs_worker = ARGV[7], ARGV[8], tonumber(ARGV[9]), ARGV[10] == '1'
local is_restore, attempt, tokens, logprobs, prompt_logprobs = ARGV[11] ~= '', ARGV[11], ARGV[12], ARGV[13], ARGV[14]

local context, claim, fingerprint = ARGV[15], ARGV[16], ARGV[17]
local quota, costs = nil, {requests = tonumber(ARGV[19]), tokens = tonumber(ARGV[20])}
if ARGV[18] ~= '' then
  quota = cmsgpack.unpack(ARGV[18])
end

local ARRIVALS_PER_MS = 1024  -- told apart by their order; scores stay exact doubles for two centuries
local UNKNOWN_RETRY_MS, MIN_RETRY_MS, MAX_RETRY_MS = 5000, 1000, 60000

-- The time to serve half of what waits, so that the queue has room and has not run dry when the client returns.
local function retry_after_ms(queued)
  local fields = redis.call('HMGET', rate, 'weight', 'at_ms', 'first_ms')
  if not fields[1] then
    return UNKNOWN_RETRY_MS
  end
  local weight = fields[1] * math.exp(-(now - fields[2]) / RATE_WINDOW_MS)
  local window_ms = RATE_WINDOW_MS * (1 - math.exp(-math.max(now - fields[3], 1000) / RATE_WINDOW_MS))
  local served_per_ms = weight / window_ms
  return math.floor(math.min(MAX_RETRY_MS, math.max(MIN_RETRY_MS, queued / 2 / served_per_ms)))
end

local function set_log()
  local contents = {tokens = tokens, logprobs = logprobs, prompt_logprobs = prompt_logprobs, context = context}
  for kind, content in pairs(contents) do
    if #content > 0 then
      redis.call('SET', key(kind, id), content)
    end
  end
end

local function merge_restored()
  local known = redis.call('HMGET', key('state', id), 'status')
  if known[1] == 'queued' and #tokens > redis.call('STRLEN', key('tokens', id)) then
    set_log()
  end
  watch(id, gateway)
  return {'ok'}
end

local function refusal()
  local queued = redis.call('ZCARD', queue) + redis.call('ZCARD', suspects)
  if needs_worker and redis.call('ZCOUNT', leases, '(' .. now, '+inf') == 0 then
    return {'no_worker', 0, UNKNOWN_RETRY_MS}
  end
  if queued >= max_queued then
    return {'queue_full', queued, retry_after_ms(queued)}
  end
end

-- The request that holds the claim, unless it is gone or has failed.
local function claimed()
  local held = redis.call('GET', key('claim', claim))
  if not held then
    return nil
  end
  local its_fingerprint, holder = string.match(held, '^(%x*):(.*)$')
  local fields = redis.call('HMGET', key('state', holder), 'status', 'final')
  local reason = fields[2] and cmsgpack.unpack(fields[2])[4]
  if fields[1] and reason ~= 'error' and reason ~= 'abort' then
    return {'claimed', holder, its_fingerprint}
  end
end

local function levels()
  local found = {}
  for _, limit in ipairs(quota and quota[2] or {}) do
    local used_ms = full_at(quota, limit) - now
    found[#found + 1] = math.max(0, math.floor((limit[3] - used_ms) * limit[2] / limit[3]))
    found[#found + 1] = math.ceil(used_ms)
  end
  return found
end

-- More than all of a limit is taken when nothing of it is used: otherwise it could never be.
local function over_quota()
  for i, limit in ipairs(quota and quota[2] or {}) do
    local cost = math.min(costs[limit[1]], limit[2])
    local wait_ms = full_at(quota, limit) - now + cost * limit[3] / limit[2] - limit[3]
    if cost > 0 and wait_ms > 0 then
      return {'over_quota', i, math.ceil(wait_ms), levels()}
    end
  end
end

local known = redis.call('HGET', key('state', id), 'nonce')
if known and is_restore then
  return merge_restored()
elseif known then
  return {known == nonce and 'ok' or 'duplicate', levels()}  -- the same nonce: a repeat after a lost reply
end
local refused = not is_restore and (claim ~= '' and claimed() or refusal() or over_quota())
if refused then
  return refused
end

local arrival = redis.call('INCR', ns .. ':arrivals') % ARRIVALS_PER_MS
local score = (now + priority_ms) * ARRIVALS_PER_MS + arrival
redis.call('SET', key('request', id), request)
set_log()
redis.call('HSET', key('state', id), 'status', 'queued', 'attempt', is_restore and attempt or 1, 'crashes', 0,
  'worker', '', 'gateways', gateway, 'score', score, 'submitted_ms', now, 'nonce', nonce, 'deadline_ms', deadline_ms,
  'max_attempts', max_attempts, 'log_ttl_ms', log_ttl_ms)
redis.call('ZADD', queue, score, id)
if deadline_ms ~= '' then
  redis.call('ZADD', deadlines, deadline_ms, id)
end
if claim ~= '' then
  redis.call('SET', key('claim', claim), fingerprint .. ':' .. id)
  redis.call('HSET', key('state', id), 'claim', claim)
end
if quota then
  redis.call('HSET', key('state', id), 'quota', ARGV[18])
  if not is_restore then
    charge(quota, costs)
  end
end
wake_any()
return {'ok', levels()}
