-- One worker's round trip per engine step.
-- ARGV: worker, worker_id, info, lease_ms, capacity, is_first, known, num_final, events, tokens, encoded, logprobs,
--       preemptible.
--   known: '' or, to resynchronise, a msgpack map of what the worker holds once these events are in: id -> attempt.
--   events: one flat msgpack array of id, attempt, index, number of tokens, bytes of the encoded TokenEvent, of its log
--     probabilities and of those of the prompt for each event; the num_final last ones are final. tokens (packed), encoded
--     and logprobs (an event's, then the prompt's): those of all events, one after another. (Server arguments for each
--     event would cost more than all the rest.)
--   preemptible: '' or a msgpack list of this worker's requests, each of which may give its place to one of the queue that
--     is to be served before it.
-- Returns {must_resync, dropped ids, request and attempt and tokens of each assignment, counters}.

local worker, worker_id, info, lease_ms, capacity = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local is_first, known, num_final, events = ARGV[6] == '1', ARGV[7], tonumber(ARGV[8]), cmsgpack.unpack(ARGV[9])
local NUM_PER_EVENT = 7

local held, tokens_prefix = key('worker', worker), key('tokens', '')
local dropped, dropped_set, assignments = {}, {}, {}

local function drop(id)
  if not dropped_set[id] then
    dropped_set[id] = true
    dropped[#dropped + 1] = id
  end
end

-- The lease first: a worker that is late but was not missed by anyone just goes on.
local function renew()
  if is_first then  -- a worker of this name that is still there is a process that this one replaces
    for _, other in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
      if other ~= worker and string.sub(other, 1, #worker_id + 1) == worker_id .. '#' then
        forget_worker(other, true)
      end
    end
  end
  redis.call('HSET', workers, worker, info)
  return redis.call('ZADD', leases, now + lease_ms, worker) == 1 and not is_first
end

-- What this worker holds: id -> "<attempt>:<gateways>". A step mostly has events of all that is held, and one HGETALL is
-- much cheaper than looking each up in a hash that the server keeps as a list (to 512 fields).
local fences = {}
local function read_fences()
  local fields = redis.call('HGETALL', held)
  for i = 1, #fields, 2 do
    fences[fields[i]] = fields[i + 1]
  end
end

-- Not ours (any more). Counted as fenced when another attempt has begun; otherwise the request was aborted or lost, or
-- this is the repeat of a final event whose reply was lost.
local function refuse(id, attempt)
  local current = redis.call('HGET', key('state', id), 'attempt')
  if current and tonumber(current) > attempt then
    count('fenced', 1)
  end
  drop(id)
end

-- The log did not end at byte `start` when `packed` was appended. True if it now ends right: a repeat of what it has
-- already (a lost reply) or of a part of it. False after a gap, which leaves the log as it was.
local function repair(log, start, packed, length)
  local before = length - #packed
  local content = redis.call('GETRANGE', log, 0, -1)
  local overlap = before - start
  if overlap < 0 then
    packed = ''
  else
    packed = string.sub(packed, overlap + 1)
  end
  if before + #packed == 0 then
    redis.call('DEL', log)
  else
    redis.call('SET', log, string.sub(content, 1, before) .. packed)
  end
  return overlap >= 0
end

local function append(log, start, packed)
  if #packed == 0 then
    return redis.call('STRLEN', log) >= start
  end
  local length = redis.call('APPEND', log, packed)
  return length == start + #packed or repair(log, start, packed, length)
end

-- Records of one length, one for each token; those of the prompt come once.
local function append_logprobs(id, index, num_tokens, logprobs, prompt_logprobs)
  if #logprobs > 0 then
    append(key('logprobs', id), index * #logprobs / num_tokens, logprobs)
  end
  if #prompt_logprobs > 0 then
    redis.call('SET', key('prompt_logprobs', id), prompt_logprobs)
  end
end

-- Fences repeat (same attempt, same gateway), so that each distinct one is taken apart once.
local parts = {}
local function split(fence)
  local attempt, gateways = string.match(fence, '^(%d+):(.*)$')
  parts[fence] = {attempt = tonumber(attempt), gateways = gateways}
  return parts[fence]
end

-- Appends an event's tokens; its gateways, or nil where it is refused.
local function accept(id, attempt, index, packed)
  local fence = fences[id]
  local part = fence and (parts[fence] or split(fence))
  if not part or part.attempt ~= attempt then
    refuse(id, attempt)
    return nil
  end
  if append(tokens_prefix .. id, index * 4, packed) then
    return part.gateways
  end
  -- Tokens are missing: this server lost its last writes. Some worker generates them again.
  fences[id] = nil
  redis.call('HDEL', held, id)
  requeue(id, true)
  drop(id)
  return nil
end

local function record_events()
  read_fences()
  local tokens, encoded, logprobs, sub = ARGV[10], ARGV[11], ARGV[12], string.sub
  local tokens_at, encoded_at, logprobs_at, first_final = 1, 1, 1, #events - num_final * NUM_PER_EVENT + 1
  for at = 1, #events, NUM_PER_EVENT do
    local id, index, num_tokens = events[at], events[at + 2], events[at + 3]
    local tokens_end, encoded_end = tokens_at + num_tokens * 4, encoded_at + events[at + 4]
    local prompt_at = logprobs_at + events[at + 5]
    local logprobs_end = prompt_at + events[at + 6]
    local gateways = accept(id, events[at + 1], index, sub(tokens, tokens_at, tokens_end - 1))
    if gateways then
      if logprobs_end > logprobs_at then
        append_logprobs(id, index, num_tokens, sub(logprobs, logprobs_at, prompt_at - 1),
          sub(logprobs, prompt_at, logprobs_end - 1))
      end
      local event = sub(encoded, encoded_at, encoded_end - 1)
      if at >= first_final then
        fences[id] = nil
        close_log(id, event)
      end
      tell(gateways, event)
    end
    tokens_at, encoded_at, logprobs_at = tokens_end, encoded_end, logprobs_end
  end
end

local function measure_rate()
  local fields = redis.call('HMGET', rate, 'weight', 'at_ms', 'first_ms')
  local weight = fields[1] and fields[1] * math.exp(-(now - fields[2]) / RATE_WINDOW_MS) or 0
  redis.call('HSET', rate, 'weight', weight + num_final, 'at_ms', now, 'first_ms', fields[3] or now)
end

local function read_dropped()
  local ids = redis.call('SMEMBERS', key('dropped', worker))
  if #ids > 0 then
    redis.call('DEL', key('dropped', worker), key('wake', worker))
  end
  for _, id in ipairs(ids) do
    drop(id)
  end
end

local function send(id, attempt)
  assignments[#assignments + 1] = redis.call('GET', key('request', id))
  assignments[#assignments + 1] = attempt
  assignments[#assignments + 1] = redis.call('GET', key('tokens', id)) or ''
end

-- After a lost reply or a restart, on either side: assigns again what the worker does not know that it holds, drops
-- what it does not hold.
local function resynchronise()
  known = cmsgpack.unpack(known)
  local fields = redis.call('HGETALL', held)
  for i = 1, #fields, 2 do
    local id, attempt = fields[i], split(fields[i + 1]).attempt
    if known[id] == attempt then
      known[id] = nil
    else
      send(id, attempt)
    end
  end
  for id in pairs(known) do
    drop(id)
  end
end

local function assign(id)
  local state = key('state', id)
  local fields = redis.call('HMGET', state, 'attempt', 'gateways')
  redis.call('HSET', state, 'status', 'running', 'worker', worker)
  redis.call('HSET', held, id, fields[1] .. ':' .. fields[2])
  send(id, fields[1])
end

local function fetch_suspect()
  local last = redis.call('HGET', suspect_of, worker)
  if last and redis.call('HEXISTS', held, last) == 1 then
    return 0
  end
  local popped = redis.call('ZPOPMIN', suspects)
  if #popped == 0 then
    return 0
  end
  redis.call('HSET', suspect_of, worker, popped[1])
  assign(popped[1])
  return 1
end

local function fetch()
  if redis.call('EXISTS', suspects) == 1 then
    capacity = capacity - fetch_suspect()
  end
  if capacity > 0 then
    local popped = redis.call('ZPOPMIN', queue, capacity)
    for i = 1, #popped, 2 do
      assign(popped[i])
    end
  end
end

-- For a worker that has no room left, but has requests that are to be served later: it makes room by itself.
local function fetch_urgent(preemptible)
  local first = redis.call('ZRANGE', queue, 0, #preemptible - 1, 'WITHSCORES')
  for i, other in ipairs(preemptible) do
    local id, score = first[2 * i - 1], redis.call('HGET', key('state', other), 'score')
    if not id or not score or tonumber(first[2 * i]) >= tonumber(score) then
      return
    end
    redis.call('ZREM', queue, id)
    assign(id)
  end
end

-- Leaves one wake-up behind if there is still work (this worker may have taken the one meant for another), none if not.
local function settle_wakeups()
  if redis.call('EXISTS', queue, suspects) == 0 then
    redis.call('DEL', wakeups)
  elseif redis.call('EXISTS', wakeups) == 0 then
    wake_any()
  end
end

local must_resync = renew()
sweep()
if #events > 0 then
  record_events()
end
if num_final > 0 then
  measure_rate()
end
read_dropped()
if known ~= '' then
  resynchronise()
end
if capacity > 0 then
  fetch()
elseif ARGV[13] ~= '' then
  fetch_urgent(cmsgpack.unpack(ARGV[13]))
end
settle_wakeups()
publish_all()
local counted = redis.call('HGETALL', counters)
if #counted > 0 then
  redis.call('DEL', counters)
end
return {must_resync and 1 or 0, dropped, assignments, counted}
