"""A Redis for the mode `up-redis`, and a consumer of its streams."""

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import redis.asyncio

from bench.relays import Start, find_program, free_port, wait_for_start

PARTITIONS = 16  # as by default
COUNT = 200  # events of a stream that are read at once
PAUSE = 0.001  # seconds, when there was none
START, TAIL = 400, 8  # bytes of an event that are returned

# Reads and removes events. Returns the beginning and the end of each: a consumer that
# reads everything would take more processor time than the relay.
READ = """\
local found = {}
for _, stream in ipairs(KEYS) do
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', ARGV[1])) do
    local payload = entry[2][8]
    if entry[2][2] == 'message' then
      found[#found + 1] = string.sub(payload, 1, ARGV[2])
      found[#found + 1] = string.sub(payload, -ARGV[3])
    end
    redis.call('XDEL', stream, entry[1])
  end
end
return found
"""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Run a Redis on the load's processor during the block; yield its URL."""
    program, port = find_program("redis-server", "redis-server"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--save", "", "--dir", folder]
        log = Path(folder) / "log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for_start(Start(command, port), process, log)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


async def events(url: str) -> AsyncIterator[tuple[bytes, bytes]]:
    """Yield the beginning and the end of each message event."""
    client = redis.asyncio.from_url(url)
    streams = [f"socketdock:events:{{{number}}}" for number in range(PARTITIONS)]
    try:
        while True:
            found = await client.eval(READ, len(streams), *streams, COUNT, START, TAIL)
            for start, tail in zip(found[::2], found[1::2], strict=True):
                yield start, tail
            if not found:
                await asyncio.sleep(PAUSE)
    finally:
        await client.aclose()
