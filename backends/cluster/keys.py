"""The keys of leases in Redis, and the scripts that decide on them.

Each decision is one script on the keys of one instance, which share a slot of a
Cluster. Only Redis' clock counts: that of its expiry, and `TIME`.
"""

from dataclasses import dataclass

# Takes or renews the lease, unless there is a tombstone. Returns the state (below) and
# the time in milliseconds. Each renewal writes a value of its own, and says which one
# was the last that Redis has confirmed: it may have carried out others meanwhile, whose
# replies are lost.
RENEW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[2]) == 1 then return {0, now} end
local held = redis.call('GET', KEYS[1]) == ARGV[3]
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {held and 1 or 2, now}
"""
FENCED, HELD, TAKEN = 0, 1, 2  # TAKEN: it was not held since the confirmed renewal

# Adds the first ARGV[1] ids and removes the others, unless there is a tombstone: then
# it returns 0.
CHANGE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local added = tonumber(ARGV[1]) + 1
for i = 2, added, 1000 do
  redis.call('SADD', KEYS[2], unpack(ARGV, i, math.min(i + 999, added)))
end
for i = added + 1, #ARGV, 1000 do
  redis.call('SREM', KEYS[2], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
return 1
"""
# Replaces all ids by the given ones, unless there is a tombstone.
REPLACE = f"""
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('DEL', KEYS[2]) end
{CHANGE}
"""

# Gives the lease back, and leaves the given ids for others to send, unless there is a
# tombstone, which has them. Returns how many are left.
RELEASE = """
redis.call('DEL', KEYS[1])
if redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('DEL', KEYS[2])
  for i = 1, #ARGV, 1000 do
    redis.call('SADD', KEYS[2], unpack(ARGV, i, math.min(i + 999, #ARGV)))
  end
end
return redis.call('SCARD', KEYS[2])
"""

# Takes the lock of the reaper, and sets the tombstone, only where no lease is; a start
# ends the lease of its own dead run (ARGV[4] is 1).
REAP = """
local reaper = redis.call('GET', KEYS[4])
if reaper and reaper ~= ARGV[1] then return 'busy' end
if ARGV[4] == '1' then redis.call('DEL', KEYS[1])
elseif redis.call('EXISTS', KEYS[1]) == 1 then return 'alive' end
redis.call('SET', KEYS[4], ARGV[1], 'PX', ARGV[2])
if redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('SADD', KEYS[3], '')
  redis.call('SUNIONSTORE', KEYS[3], KEYS[3], KEYS[2])
end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
return 'taken'
"""
# Keeps the lock of the reaper. Returns whether it is still this one's.
KEEP = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# Gives the lock back; ARGV[2] is 1 if every id was sent.
DONE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '1' then redis.call('DEL', KEYS[2]) end
return redis.call('DEL', KEYS[1])
"""

TOMBSTONE_TTL = 24 * 3600 * 1000  # milliseconds; an instance may be paused as long


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of keys; `prefix` is `--cluster_prefix`."""

    prefix: str

    @property
    def instances(self) -> str:
        """A hash: the address for peers by instance."""
        return f"{self.prefix}:instances"

    def lease(self, instance: str) -> str:
        """It exists while the instance lives."""
        return f"{self.prefix}:{{{instance}}}:lease"

    def connections(self, instance: str) -> str:
        """A set: ids of connections whose disconnect event is due."""
        return f"{self.prefix}:{{{instance}}}:connections"

    def reaper(self, instance: str) -> str:
        """A lock: the instance that sends the events of this one."""
        return f"{self.prefix}:{{{instance}}}:reaper"

    def dead(self, instance: str) -> str:
        """The tombstone, a set: all ids that were due when it was set, and ''."""
        return f"{self.prefix}:{{{instance}}}:dead"
