"""Connections to Redis, by redis-py: the one module that imports it.

`backends.redis_client` uses it. What redis-py would repeat by itself is not repeated,
and its errors leave here as `RedisError`, without secrets.
"""

import asyncio
import contextlib
import importlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from backends.redis_client import Command, RedisAway, RedisError, Wire
from backends.redis_url import RedisAddress

CONNECT_TIMEOUT = 3.0  # seconds
LOGIN_TIMEOUT = 8.0  # seconds, for all of asking Sentinels, connecting, and login

# The first words of replies of a server that can't serve now, but another may, or
# it later: a failover, a start, a Cluster that changes.
AWAY = frozenset(
    {"LOADING", "READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "MOVED", "ASK",
     "BUSY"}
)  # fmt: skip

# redis-py takes the first word off the replies that it has classes for.
CODES = {
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.AuthenticationError: "WRONGPASS",
    exceptions.ExecAbortError: "EXECABORT",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
}

# Of redis-py's conversions of replies, those that it needs itself for a Cluster.
CLUSTER_CALLBACKS = frozenset({"CLUSTER SLOTS", "COMMAND"})


def make_wire(address: RedisAddress) -> Wire:
    """Return what a `TurnPipeline` to `address` sends through."""
    return ClusterWire(address) if address.kind == "cluster" else ServerWire(address)


class Commands:
    """Runs single commands; a connection is used by one at a time."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._client: Redis | RedisCluster | None = None

    async def execute(self, command: Command) -> Any:
        """Raises `RedisError`."""
        if self._client is None:
            self._client = make_client(self._address)
        with _translated():
            return await self._client.execute_command(*command)

    async def close(self) -> None:
        """Close the connections that are not used now."""
        client, self._client = self._client, None
        await _close(client)


class ServerWire:
    """One connection to one server, which Sentinels may have named."""

    def __init__(self, address: RedisAddress) -> None:
        self.address = address
        self._connection: Connection | None = None
        # Keeps the Sentinels' connections.
        self._client: Redis | RedisCluster | None = None

    async def connect(self) -> None:
        if self._client is None:
            self._client = make_client(self.address)
        pool = self._client.connection_pool  # type: ignore[union-attr]
        connection = pool.make_connection()
        try:
            with _translated():
                async with asyncio.timeout(LOGIN_TIMEOUT):
                    await connection.connect()
        except RedisError as error:
            await _disconnect(connection)
            raise _away(error) from error
        self._connection = connection

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        connection = self._connection
        assert connection is not None
        replies: list[Any] = []
        with _translated():
            await connection.send_packed_command(connection.pack_commands(commands))
        for _ in commands:
            try:
                with _translated():
                    replies.append(await connection.read_response())
            except RedisAway:
                raise
            except RedisError as error:
                replies.append(error)
        return replies

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await _disconnect(connection)
        client, self._client = self._client, None
        await _close(client)


class ClusterWire:
    """A Cluster: redis-py sends each node its commands, in their order."""

    def __init__(self, address: RedisAddress) -> None:
        self.address = address
        self._client: RedisCluster | None = None

    async def connect(self) -> None:
        client: Any = make_client(self.address)
        try:
            with _translated():
                async with asyncio.timeout(LOGIN_TIMEOUT):
                    await client.initialize()
        except RedisError as error:
            await _close(client)
            raise _away(error) from error
        self._client = client

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        assert self._client is not None
        pipeline = self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        with _translated():
            found = await pipeline.execute(raise_on_error=False)
        replies: list[Any] = []
        for reply in found:
            if isinstance(reply, Exception):
                error = _translate(reply)
                if isinstance(error, RedisAway):
                    raise error
                replies.append(error)
            else:
                replies.append(reply)
        return replies

    async def close(self) -> None:
        client, self._client = self._client, None
        await _close(client)


def make_client(address: RedisAddress) -> Redis | RedisCluster:
    """Return redis-py's client; it is not connected yet."""
    limits: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_timeout": None,  # blocking commands read for long
        "socket_keepalive": True,
        "protocol": 3,
    }
    settings: dict[str, Any] = {
        **limits,
        "username": address.username,
        "password": address.password,
        "retry": Retry(NoBackoff(), 0),
        **_without_extra_commands(),
    }
    tls: dict[str, Any] = {}
    if address.tls:
        tls = {
            "ssl": True,
            "ssl_check_hostname": True,
            **{k: v for k, v in address.parameters.items() if k.startswith("ssl_")},
        }
    if address.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        cluster = RedisCluster(startup_nodes=nodes, **settings, **tls)
        callbacks = cluster.response_callbacks
        for name in [name for name in callbacks if name not in CLUSTER_CALLBACKS]:
            del callbacks[name]
        return cluster
    if address.kind == "sentinel":
        named = {
            k.removeprefix("sentinel_"): v
            for k, v in address.parameters.items()
            if k.startswith("sentinel_")
        }
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            address.hosts,
            sentinel_kwargs={**limits, "socket_timeout": CONNECT_TIMEOUT,
                             "retry": Retry(NoBackoff(), 0), **named, **tls},
            db=address.db,
            **settings,
            **tls,
        )  # fmt: skip
        client: Redis = sentinel.master_for(address.service)
    elif address.path:
        client = Redis(unix_socket_path=address.path, db=address.db, **settings)
    else:
        ((host, port),) = address.hosts
        client = Redis(host=host, port=port, db=address.db, **settings, **tls)
    client.response_callbacks.clear()  # replies as they come
    return client


def _without_extra_commands() -> dict[str, Any]:
    """Leave out commands at the login that need permissions.

    They tell Redis the client's version (named differently before redis-py 7.1), and
    ask for notifications (redis-py 8).
    """
    known = inspect.signature(Redis.__init__).parameters
    settings: dict[str, Any] = {"lib_name": None, "lib_version": None}
    if "driver_info" in known:
        settings = {"driver_info": None}
    if (name := "maint_notifications_config") in known:
        module = importlib.import_module("redis.maint_notifications")
        settings[name] = module.MaintNotificationsConfig(enabled=False)
    return settings


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise redis-py's errors, and those of the system, as `RedisError`."""
    try:
        yield
    except Exception as error:
        raise _translate(error) from error


def _translate(error: Exception) -> RedisError:
    if isinstance(error, RedisError):
        return error
    code = _code(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if code and not text.startswith(code):
        text = f"{code} {text}"
    if code in AWAY or not isinstance(error, exceptions.ResponseError):
        return RedisAway(text, code)
    return RedisError(text, code)


def _code(error: Exception) -> str:
    """The first word of an error reply, which redis-py takes off some."""
    for kind, code in CODES.items():
        if isinstance(error, kind):
            return code
    if isinstance(error, exceptions.ResponseError):
        first = str(error).partition(" ")[0]
        return first if first.isupper() else ""
    return ""


def _away(error: RedisError) -> RedisAway:
    """An error while connecting: wrong passwords too are corrected in Redis."""
    return RedisAway(str(error), error.code)


async def _disconnect(connection: Connection) -> None:
    with contextlib.suppress(Exception):
        await connection.disconnect(nowait=True)


async def _close(client: Redis | RedisCluster | None) -> None:
    if client is None:
        return
    pool = getattr(client, "connection_pool", None)
    manager: Sentinel | None = getattr(pool, "sentinel_manager", None)
    for each in (client, *(manager.sentinels if manager is not None else ())):
        with contextlib.suppress(Exception):
            await each.aclose()
