"""Relays that share leases in Redis, and their clients, for the tests."""

import asyncio
import contextlib
import itertools
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import websockets
from redis_server import RedisServer
from service import DEADLINE, RecordingBackend, Service, eventually

TTL = 2.0  # seconds
CLIENTS = 20  # of each relay
NUMBERS = itertools.count(1)  # of messages that tell a connection's id


@contextlib.asynccontextmanager
async def relays(
    redis: RedisServer, backend: RecordingBackend, number: int, *flags: str
) -> AsyncIterator[list[Service]]:
    """Run `number` relays that hold their leases, and may reap soon."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(relay(redis, backend, name, *flags))
            for name in range(number)
        ]


@contextlib.asynccontextmanager
async def relay(
    redis: RedisServer, backend: RecordingBackend, name: int, *flags: str
) -> AsyncIterator[Service]:
    """Run a relay that holds its lease."""
    async with Service(
        *backend.flags("message", "disconnect"),
        f"--cluster={redis.url}", f"--lease_ttl={TTL}",
        f"--instance_name=relay-{name}", *flags,
    ) as service:  # fmt: skip
        await eventually(lambda: "holds its lease" in str(service.log))
        yield service


async def clients_of(
    relay: Service, number: int = CLIENTS
) -> list[websockets.ClientConnection]:
    return await asyncio.gather(
        *(websockets.connect(relay.ws_url) for _ in range(number))
    )


async def ids_of(
    backend: RecordingBackend, clients: list[websockets.ClientConnection]
) -> dict[str, websockets.ClientConnection]:
    """Return the clients by the id of their connection, from a message of each."""
    words = {f"I am number {next(NUMBERS)}": client for client in clients}
    found: dict[str, websockets.ClientConnection] = {}
    seen = len(backend.events)
    for text, client in words.items():
        await client.send(text)

    def all_came() -> bool:
        nonlocal seen
        new, seen = backend.events[seen:], len(backend.events)
        for kind, event, _ in new:
            if kind == "message" and event["message"] in words:
                found[event["meta"]["connection_id"]] = words[event["message"]]
        return len(found) == len(clients)

    await eventually(all_came)
    return found


def lost(backend: RecordingBackend) -> Counter[str]:
    """Count the disconnect events of lost connections, by their ids."""
    return Counter(
        event["connection_id"]
        for event in backend.of("disconnect")
        if event["meta"]["reason"] == "instance lost"
    )


async def instance_of(relay: Service, backend: RecordingBackend) -> str:
    return str((await status_of(relay, backend))["instance"])


async def status_of(relay: Service, backend: RecordingBackend) -> dict[str, Any]:
    response = await backend.call(f"{relay.callback_url}/status", "GET")
    return dict(json.loads(response.body))


async def no_keys(
    redis: RedisServer, instance: str, deadline: float = DEADLINE
) -> None:
    """Wait until nothing of an instance is left but its tombstone."""
    async with asyncio.timeout(deadline):
        while not set(await redis.client.keys(f"*{instance}*")) <= {
            f"socketdock:{{{instance}}}:dead"
        } or instance in await redis.client.hkeys("socketdock:instances"):
            await asyncio.sleep(0.05)


def kill(*dead: Service) -> None:
    """Send SIGKILL; some may have ended already."""
    for service in dead:
        with contextlib.suppress(ProcessLookupError):
            service.process.send_signal(signal.SIGKILL)
