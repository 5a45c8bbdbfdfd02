"""`--replay_dead`: dead events go into the streams again."""

import logging

from backends.redis.keys import Keys, partition_of
from backends.redis.worker.entry import REPLAYED, StoredEvent
from backends.redis_client import RedisClient

logger = logging.getLogger(__name__)

COUNT = 100  # events at once
REPLY = 5.0  # seconds for each reply


async def replay(client: RedisClient, keys: Keys, partitions: int) -> int:
    """Move all dead events into the streams of their partitions, in order.

    Returns their number. If it fails in between, the next call moves the rest; one
    event may then be there twice. Raises `RedisError`.
    """
    dead, moved = f"{keys.prefix}:dead", 0
    while True:
        entries = await client.execute(
            "XRANGE", dead, "-", "+", "COUNT", COUNT, timeout=REPLY
        )
        if not entries:
            return moved
        for entry_id, fields in entries:
            stored = StoredEvent(entry_id.decode(), fields)
            stream = keys.events(partition_of(stored.connection_id, partitions))
            pairs = dict(zip(fields[::2], fields[1::2], strict=True))
            pairs.pop(b"error", None)
            pairs[REPLAYED] = b"1"
            words = [word for pair in pairs.items() for word in pair]
            await client.execute("XADD", stream, "*", *words, timeout=REPLY)
            await client.execute("XDEL", dead, entry_id, timeout=REPLY)
            moved += 1
