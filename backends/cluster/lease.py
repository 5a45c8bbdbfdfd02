"""The lease of this run in Redis; `ids` has those of its connections."""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from backends.cluster.ids import RecordedIds
from backends.cluster.keys import (
    FENCED,
    RELEASE,
    RENEW,
    TAKEN,
    Keys,
)
from backends.cluster.stall import StallHold, now
from backends.redis_client import RedisAway, RedisClient, RedisError

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT = 2.0  # seconds, at the stop

# What to do when a run was taken for dead: its new name, and the ids of those of its
# connections whose disconnect events others send.
OnFenced = Callable[[str, Collection[str]], None]


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """`ttl` in seconds; `address` is how peers reach this instance, or empty."""

    ttl: float = 15.0
    address: str = ""


class Lease:
    """Keeps the lease of `instance`, and tells whether it is `held`.

    `ids` are written whenever Redis may lack some. A run that finds itself taken for
    dead goes on under a new name, see `OnFenced`.
    """

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        instance: str,
        settings: LeaseSettings,
        hold: StallHold,
    ) -> None:
        self.instance = instance
        self.keys = keys
        self.settings = settings
        self.held = False
        self.fenced = 0  # how many times
        self.on_fenced: OnFenced = lambda instance, ended: None
        self._hold = hold
        self._client = client
        self._redis = client.pipeline(
            self._on_connected, self._on_lost, reply_timeout=settings.ttl / 3
        )
        self._stalled = False  # since the last renewal
        self._held_since: int | None = None  # without a break, in Redis' milliseconds
        self._time = 0  # Redis' time of the last renewal
        self._renewed_at = 0.0  # as `now()`
        self._renewals = itertools.count(1)
        self._confirmed = 0  # the latest renewal with a reply
        self._failing = False  # logged
        self._kicked = asyncio.Event()
        self.ids = RecordedIds(
            self._redis, keys, instance, self._log_failure, self._kicked.set
        )
        self._released = False
        hold.on_stall = self._on_stall
        # Cancelled by release().
        self._running = asyncio.create_task(self._run())

    @property
    def may_reap(self) -> bool:
        """Whether it is held, and was for one ttl without a late renewal."""
        since = self._held_since
        return (
            self.held
            and since is not None
            and self._time - since >= self.settings.ttl * 1000
        )

    def _own_keys(self, *names: str) -> list[str]:
        return [getattr(self.keys, name)(self.instance) for name in names]

    # The lease.

    async def _run(self) -> None:
        while True:
            self._kicked.clear()
            try:
                await self._renew()
            except Exception:  # the lease would run out
                logger.exception("bug in a lease")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._kicked.wait(), self.settings.ttl / 3)

    async def _renew(self) -> None:
        self._stalled = self._hold.active or self._stalled
        began = now()
        lease, dead = self._own_keys("lease", "dead")
        address, ttl = self.settings.address, round(self.settings.ttl * 1000)
        number = next(self._renewals)
        renewal = self._redis.execute(
            "EVAL", RENEW, 2, lease, dead, number, ttl, self._confirmed
        )
        if not self.ids.complete:  # others find it from its first connection on
            self._redis.execute("HSET", self.keys.instances, self.instance, address)
        try:
            state, self._time = await renewal
            if self._hold.active and not self._stalled:  # a reply from before the stall
                self._kicked.set()
                return
            if state == FENCED:
                reaped = await self._redis.execute("SMEMBERS", dead)
                self._fence({id_.decode() for id_ in reaped})
                return
            if state == TAKEN and self._stalled:
                await self._leave_old_name()
                self._fence(())
                return
            self._confirmed = number
            late = began - self._renewed_at > self.settings.ttl * 2 / 3
            if state == TAKEN or late or self._held_since is None:
                self._held_since = self._time
            self._renewed_at = began
            if state == TAKEN or not self.ids.complete:
                register = ("HSET", self.keys.instances, self.instance, address)
                registered = self._redis.execute(*register)
                await self.ids.write_all()
                await registered
        except RedisError as error:
            self._log_failure(error)
            self.held, self._held_since = False, None
            self._hold.extend()
            return
        if not self.held:
            logger.info("%s holds its lease in Redis", self.instance)
        self.held, self._stalled, self._failing = True, False, False
        if self._hold.active:
            self._hold.release()
        self._hold.extend()

    async def _leave_old_name(self) -> None:
        lease, connections = self._own_keys("lease", "connections")
        await self._redis.execute("DEL", lease, connections)
        await self._redis.execute("HDEL", self.keys.instances, self.instance)

    def _fence(self, reaped: Collection[str]) -> None:
        """Go on under a new name, without the connections that others have ended."""
        old = self.instance
        self.instance = f"{old.rpartition('/')[0]}/{secrets.token_hex(8)}"
        ended = self.ids.rename(self.instance, reaped)
        self.held = self._stalled = False
        self._held_since = None
        self._confirmed = 0
        self.fenced += 1
        logger.error(
            "%s was taken for dead: it goes on as %s, and closes its connections with"
            " 1012; others have sent the disconnect events of %d",
            old, self.instance, len(reaped) - ("" in reaped),
            extra={"event": "fenced"},
        )  # fmt: skip
        self.on_fenced(self.instance, ended)
        self._hold.release()
        self._kicked.set()

    def _on_stall(self) -> None:
        logger.warning("this process stood still for longer than its lease: events wait"
                       " until Redis has answered")
        self._kicked.set()

    def _on_connected(self) -> None:
        self.ids.complete = False
        self._kicked.set()

    def _on_lost(self, error: RedisAway) -> None:
        self._log_failure(error)
        self.held, self._held_since = False, None

    def _log_failure(self, error: BaseException) -> None:
        """Log the first failure of an outage."""
        if not self._failing and not self._released:
            self._failing = True
            logger.warning(
                "Redis of --cluster is away, relaying goes on; crashes are not noticed"
                " meanwhile: %s", error, extra={"event": "cluster_away"},
            )  # fmt: skip

    async def release(self) -> None:
        """Give the lease back; what is left are ids whose event others must send."""
        self._released = True
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._redis.close()
        # On a new connection: Redis may be back, and the pipeline not connected yet.
        keys = self._own_keys("lease", "connections", "dead")
        with contextlib.suppress(TimeoutError, RedisError):
            async with asyncio.timeout(RELEASE_TIMEOUT):
                if not await self._client.execute("EVAL", RELEASE, 3, *keys, *self.ids):
                    await self._client.execute(
                        "HDEL", self.keys.instances, self.instance
                    )
