-- Reads token logs from given positions on, and makes the caller a receiver of their live events.
-- ARGV: gateway, wants_request, then id and first index of each.
-- Returns {number of live workers, one entry per id}: {} if the id is unknown, else {packed tokens, final event or '',
-- status, request if wanted or '', the tokens' log probabilities or '', those of the prompt or '', context if wanted}.

local gateway, wants_request = ARGV[1], ARGV[2] == '1'

-- Records are of one length, one for each token.
local function logprobs_from(id, index)
  local length = redis.call('STRLEN', key('logprobs', id))
  if length == 0 then
    return ''
  end
  local record_bytes = length / (redis.call('STRLEN', key('tokens', id)) / 4)
  return redis.call('GETRANGE', key('logprobs', id), index * record_bytes, -1)
end

sweep()
local entries = {}
for i = 3, #ARGV, 2 do
  local id, entry = ARGV[i], {}
  local fields = redis.call('HMGET', key('state', id), 'status', 'final')
  if fields[1] then
    if fields[1] ~= 'finished' then
      watch(id, gateway)
    end
    entry[1] = redis.call('GETRANGE', key('tokens', id), ARGV[i + 1] * 4, -1)
    entry[2] = fields[2] or ''
    entry[3] = fields[1]
    entry[4] = wants_request and redis.call('GET', key('request', id)) or ''
    entry[5] = logprobs_from(id, tonumber(ARGV[i + 1]))
    entry[6] = redis.call('GET', key('prompt_logprobs', id)) or ''
    entry[7] = wants_request and redis.call('GET', key('context', id)) or ''
  end
  entries[#entries + 1] = entry
end
publish_all()
return {redis.call('ZCOUNT', leases, '(' .. now, '+inf'), entries}
