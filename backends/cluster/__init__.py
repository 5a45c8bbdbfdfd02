"""Leases in Redis: when an instance dies, another sends its disconnect events.

With `--cluster`, for any backend. `lease` holds the lease of this run, `ids` records
its connections, `leased` wraps the backend, `stall` holds events back after a stall,
and `reaper` sends the events of the dead. `keys` has the scripts that decide.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Backend, Connection
from backends.check import Check
from backends.cluster.check import ClusterCheck
from backends.cluster.keys import Keys
from backends.cluster.lease import Lease, LeaseSettings
from backends.cluster.leased import LeasedBackend
from backends.cluster.reaper import Living, OwnDeadRuns, Reaper, Redis
from backends.cluster.stall import StallHold
from backends.redis_client import RedisClient
from backends.redis_url import RedisAddress, read_address

define("cluster", type=str, metavar="URL",
       help="Redis that keeps the leases of all instances, so that others send the "
            "disconnect events of one that dies; none: no leases")
define("cluster_file", type=str, metavar="PATH",
       help="file that contains the URL of --cluster, with its password")
define("cluster_prefix", default="socketdock", metavar="NAME",
       help="beginning of the keys of --cluster in Redis")
define("lease_ttl", default=15.0, metavar="SECONDS",
       help="time after which an instance of --cluster that renews nothing is dead")

MIN_LEASE_TTL, MAX_LEASE_TTL = 1.0, 3600.0  # seconds


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


def make_cluster(instance: str, peer_address: str) -> Cluster | None:
    """Make the leases of this process from the options; None: without --cluster.

    `peer_address` is `--peer_address` in the form of `has_lease`, or empty.
    """
    if not is_used():
        return None
    address, ttl = _settings()
    settings = LeaseSettings(ttl, peer_address)
    return Cluster(address, options.cluster_prefix, instance, settings)


def make_cluster_check() -> Check:
    """Make what `socketdock check` checks of --cluster."""
    if not is_used():
        return Check()
    address, ttl = _settings()
    return ClusterCheck(address, Keys(options.cluster_prefix), ttl)


def is_used() -> bool:
    """Whether there are leases."""
    return bool(options.cluster or options.cluster_file)


def _settings() -> tuple[RedisAddress, float]:
    address = read_address("cluster", options.cluster, options.cluster_file)
    if options.lease_ttl < MIN_LEASE_TTL:
        raise OptionError(f"--lease_ttl is below {MIN_LEASE_TTL:g} s")
    if options.lease_ttl > MAX_LEASE_TTL:
        raise OptionError(f"--lease_ttl is above {MAX_LEASE_TTL:g} s")
    if not options.cluster_prefix or set(options.cluster_prefix) & set("{}"):
        raise OptionError("--cluster_prefix must have a character, and no { or }")
    return address, options.lease_ttl
