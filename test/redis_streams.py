"""A relay with `--backend=redis`, and consumers of its streams, for the tests."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from redis_server import RedisServer
from service import DEADLINE, Service

PARTITIONS = 4
PREFIXES = itertools.count(1)


@dataclass
class Entry:
    """An event in a stream."""

    entry_id: str
    fields: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.fields["event"]

    @property
    def id(self) -> str:
        return self.fields["id"]

    @property
    def connection_id(self) -> str:
        return self.fields["connection_id"]

    @property
    def payload(self) -> dict[str, Any]:
        return json.loads(self.fields["payload"])

    @property
    def meta(self) -> dict[str, Any]:
        return self.payload["meta"]


class Streams:
    """The streams of the relays that use `prefix`; each test may have its own."""

    def __init__(
        self, redis: RedisServer, partitions: int = PARTITIONS, prefix: str = ""
    ) -> None:
        self.redis = redis
        self.partitions = partitions
        self.prefix = prefix or f"test{next(PREFIXES)}"
        self.names = [f"{self.prefix}:events:{{{n}}}" for n in range(partitions)]

    def flags(self, *flags: str, url: str = "") -> list[str]:
        """The relay's flags."""
        return [
            "--backend=redis",
            f"--redis_url={url or self.redis.url}",
            f"--redis_prefix={self.prefix}",
            f"--redis_partitions={self.partitions}",
            *flags,
        ]

    @contextlib.asynccontextmanager
    async def relay(self, *flags: str, url: str = "") -> AsyncIterator[Service]:
        async with Service(*self.flags(*flags, url=url)) as service:
            yield service

    async def all(self, name: str = "") -> list[Entry]:
        """Return all entries, or those of one event, in the order of the streams."""
        found = []
        for stream in self.names:
            for entry_id, fields in await self.redis.client.xrange(stream):
                entry = Entry(entry_id, fields)
                if not name or entry.name == name:
                    found.append(entry)
        return found

    async def wait_for(self, name: str, number: int = 1) -> list[Entry]:
        """Wait for entries of an event, and return all of them."""
        async with asyncio.timeout(DEADLINE):
            while len(found := await self.all(name)) < number:
                await asyncio.sleep(0.02)
        return found

    async def length(self) -> int:
        """Return the number of all entries."""
        return sum([await self.redis.client.xlen(stream) for stream in self.names])

    async def command(self, stream: str, command: Any) -> str | None:
        """Send a command to an instance; return its entry, or None: it is gone."""
        payload = command if isinstance(command, str) else json.dumps(command)
        entry: str | None = await self.redis.client.xadd(
            stream, {"payload": payload}, nomkstream=True
        )
        return entry
