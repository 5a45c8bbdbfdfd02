"""Trims the streams of events: what each group of consumers has acknowledged.

One instance at a time does it, since that is enough: each trim is one script, which
decides and trims at once, so that two of them would do no harm.
"""

import asyncio
import logging

from backends.redis.keys import Keys
from backends.redis_client import RedisClient, RedisError

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds
LOCK_EXPIRY = 10.0  # seconds after which another instance takes over
REPLY = 5.0  # seconds for each reply

# KEYS: the lock. ARGV: the instance, milliseconds until the lock expires. Returns 1 if
# the instance has the lock now.
LOCK = """\
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if holder then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: the lock. ARGV: the instance.
UNLOCK = """\
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

# KEYS: a stream. Removes what precedes the oldest entry that some group has not
# acknowledged; nothing if there is no group. Of a group that is the oldest pending
# entry, or what follows the last delivered one. Returns the number of removed entries.
TRIM = """\
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq), ms
end
local first, first_ms, first_seq
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
  local id = info['last-delivered-id']
  local ms, seq, digits = parts(id)
  if info['pending'] > 0 then
    id = redis.call('XPENDING', KEYS[1], info['name'])[2]
    ms, seq = parts(id)
  else
    seq = seq + 1
    id = digits .. '-' .. string.format('%.0f', seq)
  end
  if not first or ms < first_ms or (ms == first_ms and seq < first_seq) then
    first, first_ms, first_seq = id, ms, seq
  end
end
if not first then return 0 end
return redis.call('XTRIM', KEYS[1], 'MINID', first)
"""


class Janitor:
    """Trims the streams of `partitions` partitions while it has the lock."""

    def __init__(
        self, client: RedisClient, keys: Keys, instance: str, partitions: int
    ) -> None:
        self._client = client
        self._lock = keys.janitor
        self._streams = [keys.events(number) for number in range(partitions)]
        self._instance = instance
        self._holds_lock = False
        self._working: asyncio.Task[None] | None = None  # cancelled by `end`

    def begin(self) -> None:
        """Trim from now on."""
        self._working = asyncio.create_task(self._work())

    async def end(self) -> None:
        """Leave the trimming to others."""
        if self._working is None:
            return
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        if self._holds_lock:
            try:
                await self._execute("EVAL", UNLOCK, 1, self._lock, self._instance)
            except RedisError as error:
                logger.debug("the janitor's lock expires: %s", error)

    async def _work(self) -> None:
        while True:
            try:
                await self._trim()
            except RedisError as error:  # the writer says when Redis is away
                logger.debug("not trimmed: %s", error)
            except Exception:
                logger.exception("bug while trimming")
            await asyncio.sleep(INTERVAL)

    async def _trim(self) -> None:
        self._holds_lock = False
        expiry = int(LOCK_EXPIRY * 1000)
        is_full = False
        try:
            self._holds_lock = bool(
                await self._execute("EVAL", LOCK, 1, self._lock, self._instance, expiry)
            )
        except RedisError as error:
            is_full = error.code == "OOM"  # then nobody gets the lock
            if not is_full:
                raise
        if self._holds_lock or is_full:
            for stream in self._streams:
                await self._execute("EVAL", TRIM, 1, stream)

    async def _execute(self, *command: str | int) -> object:
        return await self._client.execute(*command, timeout=REPLY)
