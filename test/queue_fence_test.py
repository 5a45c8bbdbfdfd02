"""A relay with `--backend=redis` that was taken for dead while Redis was away."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import pytest
import websockets
from redis_server import RedisServer
from redis_streams import Streams
from service import DEADLINE, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=120), pytest.mark.once, pytest.mark.long]

HOLD = 5.0  # seconds that events of other backends wait after a stall
FLAGS = ("--lease_ttl=1", "--drain_timeout=1")


@pytest.fixture
def streams(tmp_path):
    return Streams(RedisServer(tmp_path, aof=True))


@contextlib.asynccontextmanager
async def pair(streams: Streams) -> AsyncIterator[Service]:
    """Run two relays; yields one, whose connections the other one may end."""
    flags = (f"--cluster={streams.redis.url}", *FLAGS)
    async with (
        streams.redis,
        streams.relay(*flags) as paused,
        streams.relay(*flags) as other,
    ):
        for relay in (paused, other):
            await eventually(lambda r=relay: "holds its lease" in str(r.log))
        yield paused


async def test_nothing_follows_the_disconnect_event_of_another(io_loop, streams):
    """Redis goes away before the relay wakes, and stays so for longer than 5 s.

    What waited in the sockets of the relay is not added, also when its stream is
    reached before its lease.
    """
    async with pair(streams) as paused:
        clients = [await websockets.connect(paused.ws_url) for _ in range(10)]
        async with paused.stalled(0):
            for client in clients:
                await client.send("too late")
            await streams.wait_for("disconnect", len(clients))
            await streams.redis.kill()
        await asyncio.sleep(HOLD + 1)  # for which nothing is to happen
        await streams.redis.start()
        for client in clients:
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert {client.close_code for client in clients} == {1012}
        await assert_only_new_messages(streams, paused)


async def test_nothing_follows_for_clients_that_have_left(io_loop, streams):
    """Their messages wait for Redis, when the relay is paused, and it comes back."""
    async with pair(streams) as paused:
        clients = [await websockets.connect(paused.ws_url) for _ in range(10)]
        await streams.redis.kill()
        for client in clients:
            await client.send("too late")
            await client.close()
            assert client.close_code == 1000
        async with paused.stalled(0):
            await streams.redis.start()
            await streams.wait_for("disconnect", len(clients))
        await eventually(lambda: "was taken for dead" in str(paused.log))
        await assert_only_new_messages(streams, paused)


async def assert_only_new_messages(streams: Streams, relay: Service) -> None:
    """Assert that what a new client sends is the only message in the streams."""
    async with await accepted(relay) as client:
        await client.send("in time")
        await streams.wait_for("message")
    ended = await streams.wait_for("disconnect", 11)
    assert len({entry.connection_id for entry in ended}) == len(ended) == 11
    texts = [entry.payload["message"] for entry in await streams.all("message")]
    assert texts == ["in time"]


async def test_relay_ends_in_time_without_redis(io_loop, streams):
    """With 1, since events are left: others send the disconnect event."""
    async with streams.redis as redis:
        async with streams.relay(f"--cluster={redis.url}", *FLAGS) as relay:
            await eventually(lambda: "holds its lease" in str(relay.log))
            client = await websockets.connect(relay.ws_url)
            async with relay.stalled(2):
                await redis.kill()
            await client.send("held")
            await eventually(lambda: "stood still" in str(relay.log))
            relay.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(relay.process.wait(), DEADLINE) == 1
        await asyncio.wait_for(client.wait_closed(), DEADLINE)


async def accepted(relay: Service) -> websockets.ClientConnection:
    """Connect as soon as the relay has noticed that Redis is back."""
    async with asyncio.timeout(DEADLINE):
        while True:
            with contextlib.suppress(websockets.InvalidStatus):
                return await websockets.connect(relay.ws_url)
            await asyncio.sleep(0.1)
