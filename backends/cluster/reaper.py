"""Sends the disconnect events of instances whose lease has run out."""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable
from typing import Any

from backends import Backend, BackendError
from backends.cluster.keys import DONE, KEEP, REAP, TOMBSTONE_TTL, Keys
from backends.cluster.lease import Lease
from backends.cluster.stall import StallHold, now
from backends.redis_client import RedisClient, RedisError

logger = logging.getLogger(__name__)

RATE = 500  # events per second, behind those of living connections
AT_ONCE = 32  # so that living connections find free connections to the backend
STOP_TIMEOUT = 2.0  # seconds for events that are being sent when the relay stops
RETRY_INTERVAL = 0.5  # seconds between two attempts to get a lock
LOOK_INTERVAL = 3.0  # seconds, at most, between two looks for dead instances
LOCK_TTL = 5.0  # seconds, at most, after which a reaper that has died is replaced


class Lock:
    """The lock of the reaper of `instance`, kept while this object is open."""

    def __init__(self, redis: "Redis", instance: str, owner: str, ttl: float) -> None:
        self.instance = instance
        self.owner = owner
        self._redis = redis
        self._ttl = min(ttl, LOCK_TTL)  # seconds
        self._until = 0.0  # as `now()`
        self._keeping: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Whether another may have it."""
        return now() > self._until

    async def take(self, own_dead_run: bool = False) -> str:
        """Return `taken`, `busy` (another reaper has it), or `alive`.

        Raises `RedisError`.
        """
        keys, began = self._redis.keys, now()
        result = await self._redis.execute(
            "EVAL", REAP, 4,
            keys.lease(self.instance), keys.connections(self.instance),
            keys.dead(self.instance), keys.reaper(self.instance),
            self.owner, round(self._ttl * 1000), TOMBSTONE_TTL, int(own_dead_run),
        )  # fmt: skip
        if result == b"taken":
            self._until = began + self._ttl
            self._keeping = asyncio.create_task(self._keep())
        return str(result.decode())

    async def _keep(self) -> None:
        while not self.lost:
            await asyncio.sleep(self._ttl / 3)
            began = now()
            with contextlib.suppress(RedisError):
                kept = await self._redis.execute(
                    "EVAL", KEEP, 1, self._redis.keys.reaper(self.instance),
                    self.owner, round(self._ttl * 1000),
                )  # fmt: skip
                self._until = began + self._ttl if kept else 0.0

    async def give_back(self, finished: bool) -> None:
        """Let others have it; `finished`: nothing is left to send."""
        if self._keeping is None:
            return
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        keys = self._redis.keys
        with contextlib.suppress(RedisError):
            if (
                await self._redis.execute(
                    "EVAL", DONE, 2, keys.reaper(self.instance),
                    keys.connections(self.instance), self.owner, int(finished),
                )
                and finished
            ):  # fmt: skip
                await self._redis.execute("HDEL", keys.instances, self.instance)


class Redis:
    """Commands of the reaper, each bounded by a timeout."""

    def __init__(self, client: RedisClient, keys: Keys, timeout: float) -> None:
        self.keys = keys
        self._client = client
        self._timeout = timeout

    async def execute(self, *command: str | int) -> Any:
        """Run one command. Raises `RedisError`."""
        return await self._client.execute(*command, timeout=self._timeout)

    async def ids(self, key: str) -> set[str]:
        """Return the members of a set of ids."""
        return {id_.decode() for id_ in await self.execute("SMEMBERS", key)}

    async def known(self) -> dict[str, str]:
        """Return the address for peers by instance, of all instances."""
        found = await self.execute("HGETALL", self.keys.instances)
        return {name.decode(): where.decode() for name, where in found.items()}

    async def is_alive(self, instance: str) -> bool:
        """Whether the instance holds a lease."""
        return bool(await self.execute("EXISTS", self.keys.lease(instance)))

    async def close(self) -> None:
        """Close the connections; a further command opens one."""
        await self._client.close()


class Living:
    """Knows whether an instance of a given address for peers lives."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        # By address, while Redis is asked; awaited by all that ask meanwhile.
        self._asking: dict[str, asyncio.Task[bool | None]] = {}

    async def has_lease(self, address: str) -> bool | None:
        """Return it; None if Redis does not answer."""
        asking = self._asking.get(address)
        if asking is None:
            asking = self._asking[address] = asyncio.create_task(self._ask(address))
            asking.add_done_callback(lambda task: self._asking.pop(address))
        return await asyncio.shield(asking)

    async def _ask(self, address: str) -> bool | None:
        try:
            for instance, where in (await self._redis.known()).items():
                if where == address and await self._redis.is_alive(instance):
                    return True
        except RedisError:
            return None
        return False


class Reaper:
    """Looks for dead instances, and sends their events by `backend`."""

    def __init__(self, redis: Redis, lease: Lease, hold: StallHold) -> None:
        self.reaped = 0  # events sent, or given up
        self.instances = 1  # as many are known
        self._redis = redis
        self._lease = lease
        self._hold = hold
        self._ttl = lease.settings.ttl
        self._stopping = False
        self._next = 0.0  # when the next event may be sent, on the loop's clock
        self._limit = asyncio.Semaphore(AT_ONCE)
        # Awaited by stop(), cancelled by close().
        self._running: asyncio.Task[None] | None = None

    def begin(self, backend: Backend) -> None:
        """Look for dead instances from now on."""
        self._backend = backend
        self._running = asyncio.create_task(self._run())

    async def stop(self, timeout: float) -> None:
        """Begin no more events, and wait a little for those that are being sent."""
        self._stopping = True
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=min(timeout, STOP_TIMEOUT))

    async def close(self) -> None:
        """Give up what is being sent; others send it."""
        self._stopping = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running}, timeout=STOP_TIMEOUT)

    async def release(self) -> None:
        """Close the connections to Redis."""
        await self._redis.close()

    async def _run(self) -> None:
        while not self._stopping:
            await asyncio.sleep(min(self._ttl / 3, LOOK_INTERVAL))
            if not self._lease.may_reap:
                continue
            try:
                known = await self._redis.known()
                self.instances = len(known)
                for instance in known:
                    if instance != self._lease.instance and not self._stopping:
                        await self._look_at(instance)
            except RedisError as error:  # the lease logs outages
                logger.debug("dead instances are not looked for: %s", error)
            except Exception:  # others would never be looked for
                logger.exception("bug in the reaper")

    async def _look_at(self, instance: str) -> None:
        if await self._redis.is_alive(instance) or not self._lease.may_reap:
            return
        lock = Lock(self._redis, instance, self._lease.instance, self._ttl)
        if await lock.take() != "taken":
            return
        finished = False
        try:
            ids = await self._redis.ids(self._redis.keys.connections(instance))
            logger.log(
                logging.WARNING if ids else logging.DEBUG,
                "the lease of %s has run out: sending disconnect events of %d"
                " connections", instance, len(ids), extra={"event": "reaping"},
            )  # fmt: skip
            finished = await self._send_all(lock, ids)
        finally:
            await lock.give_back(finished)

    async def _send_all(self, lock: Lock, ids: Iterable[str]) -> bool:
        """Return whether all were sent, or given up."""
        async with asyncio.TaskGroup() as tasks:
            for connection_id in ids:
                await self._limit.acquire()
                await self._wait_for_turn()
                if not self._may_go_on(lock):
                    self._limit.release()
                    return False
                tasks.create_task(self._send(lock.instance, connection_id))
        return self._may_go_on(lock)

    def _may_go_on(self, lock: Lock) -> bool:
        """Whether the lock is still that of this run, which may have a new name."""
        return not (
            self._stopping or lock.lost or lock.owner != self._lease.instance
        )

    async def _wait_for_turn(self) -> None:
        loop = asyncio.get_running_loop()
        self._next = max(self._next, loop.time()) + 1 / RATE
        await asyncio.sleep(self._next - loop.time())
        while self._hold.active:
            await self._hold.passed()

    async def _send(self, instance: str, connection_id: str) -> None:
        try:
            await self._backend.lost(connection_id, instance)
        except BackendError as error:
            if self._stopping:
                return
            logger.error(
                "connection %s: disconnect notification failed: %s",
                connection_id, error,
                extra={"event": "disconnect_failed", "connection_id": connection_id},
            )  # fmt: skip
        finally:
            self._limit.release()
        self.reaped += 1
        with contextlib.suppress(RedisError):  # the end of all removes it, too
            connections = self._redis.keys.connections(instance)
            await self._redis.execute("SREM", connections, connection_id)


class OwnDeadRuns:
    """Takes the lock of this process's own dead runs, which `--state_dir` knows.

    Between `claim` and `finish` nobody else sends their events.
    """

    def __init__(self, redis: Redis, instance: str, ttl: float) -> None:
        self._redis = redis
        self._instance = instance
        self._ttl = ttl
        self._locks: dict[str, Lock] = {}

    async def claim(self, instance: str, ids: Collection[str]) -> set[str]:
        """Return those of `ids` whose events are due here.

        Waits while another reaper sends them. If Redis is away for one ttl, all are
        due: nobody can tell.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._ttl
        lock = Lock(self._redis, instance, self._instance, self._ttl)
        while True:
            try:
                if await lock.take(own_dead_run=True) == "taken":
                    keys = self._redis.keys
                    left = await self._redis.ids(keys.connections(instance))
                    reaped = await self._redis.ids(keys.dead(instance)) - left
                    self._locks[instance] = lock
                    return set(ids) - reaped
                deadline = loop.time() + self._ttl
            except RedisError:
                if loop.time() >= deadline:
                    return set(ids)
            await asyncio.sleep(RETRY_INTERVAL)

    async def sent(self, instance: str, connection_id: str) -> None:
        """Remove a connection whose event was accepted or given up."""
        if instance in self._locks:
            with contextlib.suppress(RedisError):
                connections = self._redis.keys.connections(instance)
                await self._redis.execute("SREM", connections, connection_id)

    async def finish(self, instance: str, finished: bool) -> None:
        """Give the lock back; `finished`: all events were sent or given up."""
        if (lock := self._locks.pop(instance, None)) is not None:
            await lock.give_back(finished)
