"""`socketdock redis-partitions N`: grows the number of partitions."""

from tornado.options import Error as OptionError

from backends import Unavailable
from backends.redis.keys import Keys
from backends.redis_client import RedisClient, RedisError

REPLY = 5.0  # seconds

# KEYS: the number of partitions. ARGV: the new number. Returns the old one, or 0.
GROW = """\
local stored = tonumber(redis.call('GET', KEYS[1]) or '0')
if stored < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return stored
"""


async def grow(client: RedisClient, keys: Keys, number: int) -> str:
    """Store a larger number of partitions. Returns a sentence.

    Raises `OptionError` if it is smaller: what is in the other streams would never be
    read. Raises `Unavailable` if Redis cannot be reached.
    """
    try:
        before = int(
            await client.execute(
                "EVAL", GROW, 1, keys.partitions, number, timeout=REPLY
            )
        )
    except RedisError as error:
        raise Unavailable(f"{client.address}: {error}") from error
    finally:
        await client.close()
    if before > number:
        raise OptionError(
            f"{keys.partitions} is {before}: it can only grow, since nobody would"
            " read the other streams"
        )
    if before == number:
        return f"{keys.partitions} is {number} already"
    return (
        f"{keys.partitions} is {number} now, and was {before or 'not set'}: let"
        " consumers read the new streams, then start each relay again with"
        f" --redis_partitions={number}"
    )
