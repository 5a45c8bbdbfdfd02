"""The `redis` backend: events go into streams of Redis, commands come from streams.

`backend` has the backend, and `writer` adds the events, by `partition`; `delivery` has
a connection's messages, `single` other events; `commands` reads commands, `janitor`
trims. Decisions on handshakes are those of the `http` backend.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Relay

if TYPE_CHECKING:
    from backends.redis.backend import RedisBackend
    from backends.redis.check import RedisCheck
    from backends.redis.keys import Keys
    from backends.redis_client import RedisClient

# The shared modules whose options this backend reads.
OPTION_MODULES = (
    "backends.breaker",
    "backends.client",
    "backends.http.credentials",
    "backends.http.decisions",
    "backends.http.deliveries",
    "backends.http.disconnects",
    "backends.http.replies",
    "backends.journal",
)

define("redis_url", type=str, metavar="URL",
       help="Redis for --backend=redis: redis://[user:password@]host[:port][/db],"
            " rediss:// with TLS, redis+sentinel:// or redis+cluster://")
define("redis_url_file", type=str, metavar="PATH",
       help="file with --redis_url, which may contain a password")
define("redis_prefix", default="socketdock", metavar="NAME",
       help="beginning of the names of all keys in Redis")
define("redis_partitions", default=16, metavar="COUNT",
       help="streams that the events of all connections are divided among; the same "
            "for all instances")
define("redis_backlog", default=100_000, metavar="COUNT",
       help="most entries of a stream; with more, clients are treated as if Redis were "
            "unreachable")
define("redis_group", default="socketdock-worker", metavar="NAME",
       help="socketdock worker: the group of consumers that workers share")
define("event_timeout", default=60.0, metavar="SECONDS",
       help="socketdock worker: how long an event may fail while others are accepted, "
            "until it is dead")
define("replay_dead", default=False,
       help="socketdock worker: send dead events again, at the start")


def make_keys() -> "Keys":
    """Return the keys from the options. Raises `OptionError`."""
    from backends.redis.keys import Keys

    prefix = options.redis_prefix
    if not prefix or any(character in prefix for character in "{}"):
        raise OptionError(f"--redis_prefix={prefix} is empty or has a brace")
    return Keys(prefix)


def make_redis_client() -> "RedisClient":
    """Return the client from the options. Raises `OptionError`."""
    from backends.redis_client import RedisClient
    from backends.redis_url import read_address

    address = read_address("redis_url", options.redis_url, options.redis_url_file)
    return RedisClient(address, "--backend=redis")


def check_partitions(number: int) -> int:
    """Return a number of partitions. Raises `OptionError` if none may have it."""
    from backends.redis.keys import MAX_PARTITIONS

    if not 0 < number <= MAX_PARTITIONS:
        raise OptionError(
            f"there are 1 to {MAX_PARTITIONS} partitions in Redis, not {number}"
        )
    return number


async def grow_partitions(number: int) -> str:
    """Store a larger number of partitions; see `growth.grow`."""
    from backends.redis.growth import grow

    check_partitions(number)
    return await grow(make_redis_client(), make_keys(), number)


def make_check(relay: Relay) -> "RedisCheck":
    """Make the checks of `socketdock check`, from the options."""
    from backends.redis.check import RedisCheck
    from backends.redis.verdicts import make_verdicts_check

    return RedisCheck(
        make_redis_client(),
        make_keys(),
        check_partitions(options.redis_partitions),
        Path(options.state_dir) if options.state_dir else None,
        make_verdicts_check(),
    )


def make_backend(relay: Relay) -> "RedisBackend":
    """Make the backend for `--backend=redis`, from the options."""
    from backends.journal import StateDirectory
    from backends.redis.backend import RedisBackend, StreamSettings
    from backends.redis.verdicts import make_verdicts

    client, keys, verdicts = make_redis_client(), make_keys(), make_verdicts(relay)
    state = None
    if options.state_dir:
        state = StateDirectory(Path(options.state_dir), relay.instance)
    settings = StreamSettings(
        check_partitions(options.redis_partitions),
        options.redis_backlog,
        options.handshake_timeout,
        options.delivery_timeout,
        options.disconnect_timeout,
    )
    return RedisBackend(relay, client, keys, settings, verdicts, state)
