-- Forgets a response. ARGV: id, ttl_ms: for so long it cannot be stored (again), as its gateway may be about to do.

redis.call('HSET', key('response', ARGV[1]), 'record', 'deleted', 'previous', '')
redis.call('PEXPIRE', key('response', ARGV[1]), ARGV[2])
