"""What `socketdock check` checks of `--cluster`."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

from backends.check import Check, Finding
from backends.cluster.keys import CHANGE, DONE, KEEP, REAP, RELEASE, RENEW, Keys
from backends.redis_client import RedisAway, RedisClient, RedisError
from backends.redis_url import RedisAddress

TIMEOUT = 10.0  # seconds for each command
OLDEST = (6, 2)  # version of Redis; Valkey says 7.2
PERMISSIONS = (
    "+eval +exists +get +set +del +pexpire +sadd +srem +scard +smembers +sunionstore"
    " +hset +hdel +hgetall +time +info +ping +hello"
)


class ClusterCheck(Check):
    """Checks Redis with an instance of its own, which it removes again."""

    descriptors = 8

    def __init__(self, address: RedisAddress, keys: Keys, ttl: float) -> None:
        self._address = address
        self._keys = keys
        self._ttl = round(ttl * 1000)
        self._client = RedisClient(address, "--cluster")

    async def findings(self) -> AsyncIterator[Finding]:
        """Yield what was found."""
        what = f"--cluster: {self._address}"
        try:
            info: dict[str, Any] = parse_info(await self._execute("INFO"))
            version = info.get("redis_version", "")
            yield Finding("ok", f"{what} is reached: version {version}")
            for finding in server_findings(what, info):
                yield finding
        except RedisAway as error:
            yield Finding(
                "error",
                f"{what}: {error}; start Redis there, or correct the URL. The relay"
                " starts nevertheless, without leases until then",
            )
            return
        except RedisError as error:
            why = f"its settings can't be checked: {error}; permit INFO"
            yield Finding("warning", f"{what}: {why}")
        finally:
            await self._client.close()
        if not self._address.is_local:
            for finding in exposure_findings(what, self._address):
                yield finding
        try:
            await self._try_scripts()
            yield Finding("ok", f"{what}: this user may do what leases need")
        except RedisError as error:
            yield Finding(
                "error",
                f"{what}: {error}; permit ~{self._keys.prefix}:* {PERMISSIONS}",
            )
        finally:
            await self._client.close()

    async def _execute(self, *command: str | int) -> Any:
        return await self._client.execute(*command, timeout=TIMEOUT)

    async def _try_scripts(self) -> None:
        keys, me = self._keys, f"check/{secrets.token_hex(8)}"
        lease, ids = keys.lease(me), keys.connections(me)
        dead, reaper = keys.dead(me), keys.reaper(me)
        try:
            await self._execute("EVAL", RENEW, 2, lease, dead, 1, 1000, 0)
            await self._execute("EVAL", CHANGE, 2, dead, ids, 1, "added", "removed")
            await self._execute("SREM", ids, "added")
            await self._execute("EVAL", RELEASE, 3, lease, ids, dead, "left")
            await self._execute(
                "EVAL", REAP, 4, lease, ids, dead, reaper, me, 1000, 1000, 0
            )
            await self._execute("EVAL", KEEP, 1, reaper, me, 1000)
            await self._execute("SMEMBERS", dead)
            await self._execute("EVAL", DONE, 2, reaper, ids, me, 1)
            await self._execute("EXISTS", lease)
            await self._execute("HSET", f"{keys.prefix}:{{{me}}}:connections", me, "")
            await self._execute("HDEL", f"{keys.prefix}:{{{me}}}:connections", me)
            await self._execute("HGETALL", keys.instances)
        finally:
            await self._execute("DEL", lease, ids, dead, reaper)


def parse_info(text: bytes) -> dict[str, str]:
    """Return the lines of INFO by name."""
    lines = (line.partition(":") for line in text.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}


def server_findings(what: str, info: dict[str, str]) -> list[Finding]:
    """Return what is wrong with the server's version and settings."""
    findings = []
    version = tuple(map(int, info.get("redis_version", "0").split(".")[:2]))
    if version < OLDEST:
        findings.append(
            Finding("error", f"{what}: Redis 6.2 or later is needed, or Valkey")
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", "0") != "0" and policy != "noeviction":
        findings.append(
            Finding(
                "error",
                f"{what}: maxmemory-policy is {policy}, so Redis may drop the lease of"
                " a living instance; set noeviction",
            )
        )
    if info.get("role", "master") != "master":
        findings.append(
            Finding("error", f"{what}: it is a replica; name the master, or Sentinels")
        )
    if info.get("aof_enabled") == "1":
        findings.append(Finding("ok", f"{what}: it keeps an append-only file"))
    else:
        findings.append(
            Finding(
                "ok",
                f"{what}: without an append-only file it comes back empty; then each"
                " instance writes its connections again, and those of instances that"
                " died meanwhile are lost",
            )
        )
    return findings


def exposure_findings(what: str, address: RedisAddress) -> list[Finding]:
    """Return what is wrong with a server that other machines reach."""
    findings = []
    if address.password is None:
        findings.append(
            Finding(
                "warning",
                f"{what}: it needs no password, and whoever reaches it can close the"
                " sessions of every client; set a user and put it into --cluster_file",
            )
        )
    if not address.tls:
        findings.append(
            Finding(
                "warning",
                f"{what}: the password and the ids of connections are sent in clear;"
                " use rediss://",
            )
        )
    return findings
