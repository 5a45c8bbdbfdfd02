"""What `socketdock check` checks for the `redis` backend."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from backends.check import Check, Finding
from backends.http.check import HTTPCheck, folder_finding
from backends.redis.keys import Keys, count_in
from backends.redis_check import REPLY, permission_finding, server_findings
from backends.redis_client import RedisClient, RedisError, Word

OPTION = "--redis_url"
DAY = 24 * 3600 * 1000  # milliseconds; a group that has read nothing for longer


class RedisCheck(Check):
    """Checks Redis, the number of partitions and the groups of consumers."""

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        partitions: int,
        state_dir: Path | None,
        verdicts: HTTPCheck | None,
    ) -> None:
        """`verdicts` checks `--connecturi`; None: it is not used."""
        self._client = client
        self._keys = keys
        self._partitions = partitions
        self._state_dir = state_dir
        self._verdicts = verdicts
        if verdicts is not None:
            self.certificates = verdicts.certificates
            self.descriptors = verdicts.descriptors

    async def findings(self) -> AsyncIterator[Finding]:
        """Yield what was found; changes nothing in Redis."""
        client = self._client
        try:
            found = 0
            async for finding in server_findings(client, OPTION, durable=True):
                yield finding
                found += 1
            if found > 1:  # it is reached
                yield await permission_finding(client, OPTION, self._harmless())
                async for finding in self._about_streams():
                    yield finding
        finally:
            await client.close()
        if self._state_dir is not None:
            yield folder_finding(self._state_dir)
        if self._verdicts is not None:
            async for finding in self._verdicts.findings():
                yield finding

    async def _about_streams(self) -> AsyncIterator[Finding]:
        try:
            yield await self._partitions_finding()
            dead = f"{self._keys.prefix}:dead"
            if count := await self._client.execute("XLEN", dead, timeout=REPLY):
                yield Finding(
                    "warning",
                    f"{dead} has {count} events that could not be delivered; send them"
                    " again with `socketdock worker --replay_dead`, or delete it",
                )
            for number in range(self._partitions):
                for finding in await self._group_findings(self._keys.events(number)):
                    yield finding
        except RedisError as error:
            yield Finding("error", f"{OPTION}: {error}; see docs/redis.md")

    async def _partitions_finding(self) -> Finding:
        key = self._keys.partitions
        stored = await self._client.execute("GET", key, timeout=REPLY)
        if stored is None:
            return Finding("ok", f"{key} is not set yet: this is a new prefix")
        text = stored.decode(errors="replace")
        if count_in(text) == self._partitions:
            return Finding("ok", f"{key} is --redis_partitions={self._partitions}")
        return Finding(
            "error",
            f"--redis_partitions={self._partitions}, but {key} is {text[:40]}; give"
            " the same number, or grow it with `socketdock redis-partitions`",
        )

    async def _group_findings(self, stream: str) -> list[Finding]:
        """Return a finding for each group that keeps entries and reads none."""
        try:
            groups = await self._client.execute(
                "XINFO", "GROUPS", stream, timeout=REPLY
            )
        except RedisError:  # there is no stream yet
            return []
        if not groups:
            length = await self._client.execute("XLEN", stream, timeout=REPLY)
            return [
                Finding(
                    "warning",
                    f"{stream} has {length} entries and no group of consumers: nothing"
                    " reads or removes them; start a consumer, or delete the stream",
                )
            ] * bool(length)
        found = []
        for group in map(named, groups):
            name = group["name"].decode()
            consumers = await self._client.execute(
                "XINFO", "CONSUMERS", stream, name, timeout=REPLY
            )
            idle = min((named(each)["idle"] for each in consumers), default=None)
            behind = group["pending"] or group.get("lag") != 0
            if behind and (idle is None or idle > DAY):
                since = (
                    "has no consumer" if idle is None
                    else f"has read nothing for {idle // DAY} days"
                )
                found.append(
                    Finding(
                        "warning",
                        f"{stream}: group {name} {since}, and keeps all entries since;"
                        f" if it is abandoned: XGROUP DESTROY {stream} {name}",
                    )
                )
        return found

    def _harmless(self) -> Sequence[Sequence[Word]]:
        """Return commands that need the relay's permissions, and change nothing."""
        # Nobody uses these keys. Scripts run with the permissions of their user.
        events, commands = self._keys.events(-1), self._keys.commands("check")
        return (
            ("XADD", events, "NOMKSTREAM", "*", "event", "check"),
            ("XTRIM", events, "MAXLEN", 0),
            ("XLEN", events),
            ("XRANGE", commands, "-", "+"),
            ("XREAD", "STREAMS", commands, "0"),
            ("XINFO", "GROUPS", events),
            ("XPENDING", events, "check"),
            ("EXISTS", events),
            ("DEL", commands),
            ("PEXPIRE", commands, 1),
            ("GET", self._keys.partitions),
            ("SET", self._keys.events(-1), "", "XX"),
            ("EVAL", "return 1", 1, self._keys.janitor),
        )


def named(pairs: Any) -> dict[str, Any]:
    """Return a map of a reply, as Redis 7 or Redis 6 writes it."""
    if not isinstance(pairs, dict):
        pairs = dict(zip(pairs[::2], pairs[1::2], strict=True))
    return {key.decode(): value for key, value in pairs.items()}
