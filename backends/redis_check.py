"""What `socketdock check` reports of a Redis: version, memory, persistence, access."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from backends.check import Finding
from backends.redis_client import RedisClient, RedisError, Word

OLDEST = (6, 2)  # version
REPLY = 5.0  # seconds for each reply
NO_PERMISSION = "NOPERM"


async def server_findings(
    client: RedisClient, option: str, *, durable: bool
) -> AsyncIterator[Finding]:
    """Yield findings about the server that `option` names.

    `durable`: messages wait in it, which must survive its restart. A single finding
    means that it cannot be reached.
    """
    where = f"{option}: {client.address}"
    try:
        info = await read_info(client)
    except RedisError as error:
        yield Finding("error", f"{where}: {error}; start Redis, or correct the URL")
        return
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "0")
    if version_of(info.get("redis_version", "0")) < OLDEST:
        yield Finding(
            "error", f"{where}: {name} {version} is too old; upgrade it to 6.2 or later"
        )
    else:
        yield Finding("ok", f"{where} is reached: {name} {version}")
    yield _access_finding(client, where)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Finding(
            "error" if policy.startswith("allkeys") else "warning",
            f"{where}: maxmemory-policy is {policy}: it may remove keys of relays; set"
            " it to noeviction",
        )
    if durable and not (
        info.get("aof_enabled") == "1" or int(info.get("connected_slaves", "0"))
    ):
        yield Finding(
            "warning",
            f"{where}: neither an append-only file nor a replica: what waits is lost"
            " when it restarts; set appendonly to yes",
        )


def _access_finding(client: RedisClient, where: str) -> Finding:
    address = client.address
    if address.is_local:
        return Finding("ok", f"{where} is on this machine")
    missing = [
        what
        for what, has in (
            ("a user", address.username is not None),
            ("TLS (rediss://)", address.tls),
        )
        if not has
    ]
    if not missing:
        return Finding("ok", f"{where} is used with a user and TLS")
    return Finding(
        "warning",
        f"{where} is used without {' and without '.join(missing)}: whoever can write to"
        " it can send to every client",
    )


async def permission_finding(
    client: RedisClient, option: str, commands: Sequence[Sequence[Word]]
) -> Finding:
    """Run `commands`, which change nothing, and name those that are not permitted."""
    denied = []
    for command in commands:
        try:
            await client.execute(*command, timeout=REPLY)
        except RedisError as error:
            if NO_PERMISSION in (error.code, *str(error).split()):
                denied.append(str(command[0]).lower())
    if denied:
        return Finding(
            "error",
            f"{option}: its user may not run {', '.join(dict.fromkeys(denied))} on the"
            " keys of this relay; see the line for users in docs/redis.md",
        )
    return Finding("ok", f"{option}: its user has the permissions that a relay needs")


async def read_info(client: RedisClient) -> Mapping[str, str]:
    """Return the fields of INFO. Raises `RedisError`."""
    reply: Any = await client.execute("INFO", timeout=REPLY)
    if isinstance(reply, dict):  # of the nodes of a Cluster
        reply = next(iter(reply.values()))
    lines = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value for name, _, value in lines}


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
