-- Renews a worker's lease between two exchanges. ARGV: worker, lease_ms. Returns 0 if the lease is lost already.

if not redis.call('ZSCORE', leases, ARGV[1]) then
  return 0
end
redis.call('ZADD', leases, now + ARGV[2], ARGV[1])
return 1
