# A backend that reads events from Redis streams, and answers by the commands' stream.
#
#     .venv/bin/python examples/redis_consumer.py
#     .venv/bin/socketdock --backend=redis --redis_url=redis://127.0.0.1:6379
#
# Start as many as you like, each with partitions of its own: --partitions 0-7.
import argparse
import json
import time
from typing import Any

import redis

GROUP = "echo"  # all consumers of one application


def handle(event: str, payload: dict[str, Any]) -> dict[str, Any] | None:
    """Return a command, or nothing. An event may come again: compare its `id`."""
    if event != "message":
        return None
    return {"send": f"you said: {payload['message']}"}


parser = argparse.ArgumentParser()
parser.add_argument("--url", default="redis://127.0.0.1:6379")
parser.add_argument("--prefix", default="socketdock")
parser.add_argument("--partitions", default="0-15")
arguments = parser.parse_args()
first, last = map(int, arguments.partitions.split("-"))
streams = [
    f"{arguments.prefix}:events:{{{number}}}" for number in range(first, last + 1)
]
server: Any = redis.Redis.from_url(arguments.url, decode_responses=True, protocol=2)
for stream in streams:
    try:
        server.xgroup_create(stream, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):  # the group is there already
            raise

# First what an earlier run has read and not acknowledged, then what is new.
positions = dict.fromkeys(streams, "0")
print(f"consumer of {len(streams)} partitions", flush=True)
while True:
    try:
        found = server.xreadgroup(GROUP, "reader", positions, count=100, block=5000)
    except redis.ConnectionError:
        time.sleep(1)
        continue
    for stream, entries in found or []:
        if not entries:
            positions[stream] = ">"
        for entry_id, event in entries:
            payload = json.loads(event["payload"])
            command = handle(event["event"], payload)
            if command is not None:
                command["connection_id"] = event["connection_id"]
                # None: the instance is gone, and its connections with it.
                server.xadd(
                    payload["meta"]["reply"],
                    {"payload": json.dumps(command)},
                    nomkstream=True,
                )
            server.xack(stream, GROUP, entry_id)
            if positions[stream] != ">":
                positions[stream] = entry_id
