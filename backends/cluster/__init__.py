"""Leases in Redis: when an instance dies, another sends its disconnect events.

With `--cluster`, for any backend; only then these modules are imported. `cluster` makes
the parts: `lease` holds the lease of this run, `ids` records its connections, `leased`
wraps the backend, `stall` holds events back after a stall, and `reaper` sends the
events of the dead. `keys` has the scripts that decide.
"""

from typing import TYPE_CHECKING

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends.check import Check

if TYPE_CHECKING:
    from backends.cluster.cluster import Cluster
    from backends.redis_url import RedisAddress

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


def make_cluster(instance: str, peer_address: str) -> "Cluster | None":
    """Make the leases of this process from the options; None: without --cluster.

    `peer_address` is `--peer_address` in the form of `has_lease`, or empty.
    """
    if not is_used():
        return None
    from backends.cluster.cluster import Cluster
    from backends.cluster.lease import LeaseSettings

    address, ttl = _settings()
    settings = LeaseSettings(ttl, peer_address)
    return Cluster(address, options.cluster_prefix, instance, settings)


def make_cluster_check() -> Check:
    """Make what `socketdock check` checks of --cluster."""
    if not is_used():
        return Check()
    from backends.cluster.check import ClusterCheck
    from backends.cluster.keys import Keys

    address, ttl = _settings()
    return ClusterCheck(address, Keys(options.cluster_prefix), ttl)


def is_used() -> bool:
    """Whether there are leases."""
    return bool(options.cluster or options.cluster_file)


def _settings() -> "tuple[RedisAddress, float]":
    from backends.redis_url import read_address

    address = read_address("cluster", options.cluster, options.cluster_file)
    if options.lease_ttl < MIN_LEASE_TTL:
        raise OptionError(f"--lease_ttl is below {MIN_LEASE_TTL:g} s")
    if options.lease_ttl > MAX_LEASE_TTL:
        raise OptionError(f"--lease_ttl is above {MAX_LEASE_TTL:g} s")
    if not options.cluster_prefix or set(options.cluster_prefix) & set("{}"):
        raise OptionError("--cluster_prefix must have a character, and no { or }")
    return address, options.lease_ttl
