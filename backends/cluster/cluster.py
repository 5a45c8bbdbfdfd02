"""Cluster: the leases of one process, as one object for the relay."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from backends import Backend, Connection
from backends.cluster.keys import Keys
from backends.cluster.lease import Lease, LeaseSettings
from backends.cluster.leased import LeasedBackend
from backends.cluster.reaper import Living, OwnDeadRuns, Reaper, Redis
from backends.cluster.stall import StallHold
from backends.redis_client import RedisClient
from backends.redis_url import RedisAddress


class Cluster:
    """The leases of one process. Raises `OptionError` if redis-py is missing.

    `hold` and `dead_runs` are those of `backends.Relay`.
    """

    def __init__(
        self,
        address: RedisAddress,
        prefix: str,
        instance: str,
        settings: LeaseSettings,
    ) -> None:
        self._address = address
        client = RedisClient(address, "--cluster")
        redis = Redis(client, Keys(prefix), settings.ttl / 3)
        self.hold = StallHold(settings.ttl)
        self.dead_runs = OwnDeadRuns(redis, instance, settings.ttl)
        self._lease = Lease(client, redis.keys, instance, settings, self.hold)
        self._reaper = Reaper(redis, self._lease, self.hold)
        self._living = Living(redis)

    def wrap(self, backend: Backend) -> Backend:
        """Return `backend` with leases."""
        self._backend = LeasedBackend(backend, self._lease, self.hold, self._reaper)
        self._reaper.begin(backend)
        return self._backend

    def begin(
        self, connections: Iterable[Connection], rename: Callable[[str], None]
    ) -> None:
        """Close `connections` when this run was taken for dead, and call `rename`.

        `rename` gets the `instance` under which it goes on.
        """

        def on_fenced(instance: str, ended: Collection[str]) -> None:
            rename(instance)
            self._backend.rename(instance)
            self._backend.fence(connections, ended)

        self._lease.on_fenced = on_fenced

    async def has_lease(self, peer_address: str) -> bool | None:
        """Whether a living instance has this `--peer_address`; None: not known."""
        return await self._living.has_lease(peer_address)

    def describe(self) -> dict[str, Any]:
        """Return the state for `/status`."""
        return {
            "redis": str(self._address),
            "lease": self._lease.held,
            "instances": self._reaper.instances,
            "connections": len(self._lease.ids),
            "reaped": self._reaper.reaped,
            "fenced": self._lease.fenced,
        }
