"""Divides the partitions among workers: each holds a lease for those that it reads.

Workers list themselves in Redis, so that each knows its share. Only Redis' clock
counts for what others see; a worker gives a lease up by its own clock if it could not
renew it in time.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from backends.redis.keys import Keys
from backends.redis.worker.failures import FailureLog
from backends.redis_client import RedisClient, RedisError

logger = logging.getLogger(__name__)

LEASE = 6.0  # seconds after the last renewal
RENEWAL = 1.5  # seconds between renewals
REPLY = 2.0  # seconds for each reply

# Redis that is full takes nothing new, and gets room only if workers read on: what they
# have must be renewed without a command that needs memory.

# KEYS: the sorted set of workers. ARGV: this worker, seconds of a lease. Returns the
# number of workers.
ENTER = """\
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
redis.pcall('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
return redis.call('ZCARD', KEYS[1])
"""

# KEYS: a lease. ARGV: this worker, milliseconds. Returns 1 if it holds the lease.
TAKE = """\
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if holder then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: a lease. ARGV: this worker.
RELEASE = """\
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class Reader(Protocol):
    """Reads one partition while this worker has its lease."""

    async def finish(self) -> None:
        """Take nothing new, and wait for what is under way."""

    def cut(self) -> None:
        """Stop immediately: another worker may have the lease."""


class Leases:
    """Takes a share of the partitions, and calls `read` for each of them."""

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        worker: str,
        partitions: int,
        read: Callable[[int], Reader],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._keys = keys
        self._worker = worker
        self._partitions = partitions
        self._read = read
        self._failures = FailureLog("renewing the leases of partitions")
        self.held: dict[int, Reader] = {}
        self._renewed_at: dict[int, float] = {}  # on the loop's clock
        # Partitions that others shall have: what is under way ends first.
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._working: asyncio.Task[None] | None = None  # cancelled by `end`

    def begin(self) -> None:
        """Take partitions from now on."""
        self._working = asyncio.create_task(self._work())

    async def end(self, timeout: float) -> None:
        """Finish what is under way, at most `timeout` seconds, and release all."""
        if self._working is None:
            return
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        self._working = None
        for number in list(self.held):
            self._leave(number)
        if self._leaving:
            await asyncio.wait(self._leaving.values(), timeout=timeout)
        for number, reader in list(self.held.items()):
            reader.cut()
            await self._release(number)
        for task in list(self._leaving.values()):
            task.cancel()

    async def _work(self) -> None:
        while True:
            try:
                await self._renew_all()
                self._failures.succeeded()
            except RedisError as error:
                self._failures.failed(error)
            except Exception:
                logger.exception("bug while renewing leases")
            self._cut_late_ones()
            await asyncio.sleep(RENEWAL)

    async def _renew_all(self) -> None:
        workers = await self._run(ENTER, f"{self._keys.prefix}:workers", LEASE)
        share = -(-self._partitions // max(1, workers))
        for number in list(self.held):
            began = self._loop.time()
            if await self._take(number):
                self._renewed_at[number] = began
            else:
                self._lose(number)
        for number in self._mine_first():
            if len(self.held) - len(self._leaving) >= share:
                break
            began = self._loop.time()
            if number not in self.held and await self._take(number):
                self._renewed_at[number] = began
                self.held[number] = self._read(number)
                logger.info("partition %d is read", number)
        for number in sorted(self.held):
            if len(self.held) - len(self._leaving) <= share:
                break
            self._leave(number)

    def _mine_first(self) -> list[int]:
        """Return all partitions in an order that differs between workers."""
        start = hash(self._worker) % self._partitions
        return [(start + n) % self._partitions for n in range(self._partitions)]

    def _cut_late_ones(self) -> None:
        for number, renewed_at in list(self._renewed_at.items()):
            if self._loop.time() > renewed_at + LEASE - RENEWAL:
                self._lose(number)

    def _lose(self, number: int) -> None:
        reader = self.held.pop(number, None)
        self._renewed_at.pop(number, None)
        if reader is not None:
            logger.warning("the lease of partition %d is lost", number)
            reader.cut()

    def _leave(self, number: int) -> None:
        if number not in self._leaving:
            self._leaving[number] = asyncio.create_task(self._finish(number))

    async def _finish(self, number: int) -> None:
        try:
            reader = self.held.get(number)
            if reader is not None:
                await reader.finish()
                if self.held.get(number) is reader:
                    await self._release(number)
        finally:
            self._leaving.pop(number, None)

    async def _release(self, number: int) -> None:
        self.held.pop(number, None)
        self._renewed_at.pop(number, None)
        try:
            await self._client.execute(
                "EVAL", RELEASE, 1, self._key(number), self._worker, timeout=REPLY
            )
        except RedisError as error:
            logger.debug("the lease of partition %d expires: %s", number, error)

    async def _take(self, number: int) -> bool:
        return bool(await self._run(TAKE, self._key(number), int(LEASE * 1000)))

    async def _run(self, script: str, key: str, argument: float) -> int:
        reply = await self._client.execute(
            "EVAL", script, 1, key, self._worker, argument, timeout=REPLY
        )
        return int(reply)

    def _key(self, number: int) -> str:
        return f"{self._keys.prefix}:worker:{{{number}}}"
