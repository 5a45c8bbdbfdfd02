"""The backend `redis` while Redis is away, full, slow, or another one."""

import asyncio
import contextlib
import json
from collections import defaultdict

import pytest
import websockets
from redis_server import RedisServer
from redis_streams import Entry, Streams
from service import DEADLINE, RecordingBackend, eventually

pytestmark = [pytest.mark.gen_test(timeout=120), pytest.mark.once]

CLIENTS, MESSAGES = 200, 20


class Consumers:
    """Workers of one group that come and go, each for some partitions.

    `seen` has the events of each connection in the order in which they were read.
    """

    GROUP = "workers"

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.seen: dict[str, list[Entry]] = defaultdict(list)
        self.present = False
        self.tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        for stream in self.streams.names:
            await self.streams.redis.client.xgroup_create(
                stream, self.GROUP, "0", mkstream=True
            )

    def come(self) -> None:
        """Start a worker for each partition."""
        self.present = True
        self.tasks = [
            asyncio.create_task(self.read(stream)) for stream in self.streams.names
        ]

    async def go(self) -> None:
        """Stop them: what they are reading is not acknowledged."""
        self.present = False
        await asyncio.gather(*self.tasks)

    async def read(self, stream: str) -> None:
        start = "0"  # what an earlier worker has not acknowledged
        while self.present:
            client = self.streams.redis.client
            with contextlib.suppress(Exception):  # Redis is away
                read = await client.xreadgroup(
                    self.GROUP, "worker", {stream: start}, count=50, block=100
                )
                entries = read[stream][0] if read else []
                for entry_id, fields in entries:
                    entry = Entry(entry_id, fields)
                    self.seen[entry.connection_id].append(entry)
                if entries and self.present:
                    ids = [entry_id for entry_id, _ in entries]
                    await client.xack(stream, self.GROUP, *ids)
                elif not entries:
                    start = ">"
                continue
            await asyncio.sleep(0.05)

    def count(self, name: str) -> int:
        """Return the number of different events."""
        return len(
            {entry.id for seen in self.seen.values() for entry in seen
             if entry.name == name}
        )  # fmt: skip

    def first(self, connection_id: str) -> list[Entry]:
        """Return the events of a connection in the order of first appearance."""
        found: dict[str, Entry] = {}
        for entry in self.seen[connection_id]:
            found.setdefault(entry.id, entry)
        return list(found.values())


@pytest.mark.long
@pytest.mark.parametrize("server", ["redis", "valkey"])
async def test_restart_of_redis_loses_and_reorders_nothing(io_loop, tmp_path, server):
    """While consumers come and go, Redis is killed; an append-only file keeps all."""
    async with RedisServer(tmp_path, server, aof=True) as redis:
        streams = Streams(redis)
        consumers = Consumers(streams)
        await consumers.begin()
        consumers.come()
        async with streams.relay() as service:
            clients = []
            for _ in range(CLIENTS):
                clients.append(await websockets.connect(service.ws_url))

            async def send(first: int, last: int) -> None:
                for number in range(first, last):
                    await asyncio.gather(*(c.send(f"{number}") for c in clients))

            half = MESSAGES // 2
            await send(0, half)
            await eventually(lambda: consumers.count("message") > CLIENTS)
            await consumers.go()
            sending = asyncio.create_task(send(half, MESSAGES))
            await redis.kill()
            await eventually(lambda: any("unavailable" in line for line in service.log))
            await redis.start()
            consumers.come()
            await sending
            await consumers.go()
            consumers.come()
            await asyncio.gather(*(client.close() for client in clients))
            await eventually(lambda: consumers.count("disconnect") == CLIENTS, 60)
            await consumers.go()
            assert any("available again" in line for line in service.log)
        assert len(consumers.seen) == CLIENTS
        for id_ in consumers.seen:
            connect, *messages, disconnect = consumers.first(id_)
            assert connect.id == f"{id_}-connect"
            assert disconnect.id == f"{id_}-disconnect"
            assert disconnect.meta["undelivered"] == 0
            assert [message.id for message in messages] == [
                f"{id_}-{number}" for number in range(1, MESSAGES + 1)
            ]
            assert [message.payload["message"] for message in messages] == [
                f"{number}" for number in range(MESSAGES)
            ]


async def test_long_outage_closes_with_1013_and_is_accounted_for(io_loop, tmp_path):
    """Messages that are given up are counted in the disconnect event."""
    async with RedisServer(tmp_path, aof=True) as redis:
        streams = Streams(redis, partitions=1)
        async with streams.relay("--delivery_timeout=1") as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("delivered")
                await streams.wait_for("message")
                await redis.kill()
                for number in range(3):
                    await client.send(f"given up {number}")
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
                assert client.close_code == 1013
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(service.ws_url)
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
            assert any("delivery failed" in line for line in service.log)
            await redis.start()
            (disconnect,) = await streams.wait_for("disconnect")
            assert disconnect.meta["code"] == 1013
            assert disconnect.meta["undelivered"] == 3
            async with asyncio.timeout(DEADLINE):
                while True:
                    with contextlib.suppress(websockets.InvalidStatus):
                        async with websockets.connect(service.ws_url) as client:
                            await client.send("back")
                            break
                    await asyncio.sleep(0.05)
            await streams.wait_for("disconnect", 2)
        events = [event.fields for event in await streams.all("message")]
        texts = {json.loads(event["payload"])["message"] for event in events}
        assert {"delivered", "back"} <= texts


async def test_full_stream_counts_as_an_outage(io_loop, tmp_path):
    """Handshakes get 503, then clients 1013; when it was read, it goes on."""
    async with RedisServer(tmp_path) as redis, RecordingBackend() as operator:
        streams = Streams(redis, partitions=1)
        (stream,) = streams.names
        flags = ("--redis_backlog=4", "--delivery_timeout=2",
                 "--ready_breaker_timeout=0.1")  # fmt: skip
        async with streams.relay(*flags) as service:
            ready = f"{service.callback_url}/readyz"
            async with websockets.connect(service.ws_url) as client:
                for number in range(1, 5):  # and the connect event: one too many
                    await client.send("x")
                    await streams.wait_for("message", number)
                await client.send("too many")
                async with asyncio.timeout(DEADLINE):
                    while (await operator.call(ready, "GET")).code != 503:
                        await asyncio.sleep(0.02)
                with pytest.raises(websockets.InvalidStatus) as refused:
                    await websockets.connect(service.ws_url)
                assert refused.value.response.status_code == 503
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
                assert client.close_code == 1013
            assert await streams.all("disconnect") == []
            assert "too many" not in str(await streams.all())
            await redis.client.xtrim(stream, maxlen=0)
            (disconnect,) = await streams.wait_for("disconnect")
            assert disconnect.meta["undelivered"] == 1
            async with asyncio.timeout(DEADLINE):
                while (await operator.call(ready, "GET")).code != 200:
                    await asyncio.sleep(0.02)
            async with websockets.connect(service.ws_url) as client:
                await client.send("again")
            await streams.wait_for("disconnect", 2)


async def test_full_memory_keeps_the_order(io_loop, tmp_path):
    """Redis rejects writes for a while; what it rejected goes before what follows."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis, partitions=1)
        async with streams.relay() as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("0")
                await streams.wait_for("message")
                await redis.client.config_set("maxmemory", "1")
                for number in range(1, 20):
                    await client.send(f"{number}")
                await eventually(lambda: any("OOM" in line for line in service.log))
                await redis.client.config_set("maxmemory", "0")
                await client.send("20")
            await streams.wait_for("disconnect")
        texts = [event.payload["message"] for event in await streams.all("message")]
        assert texts == [f"{number}" for number in range(21)]


async def test_stopped_redis_delays_and_loses_nothing(io_loop, tmp_path):
    """It hangs for longer than a reply may take, then goes on."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis, partitions=1)
        async with streams.relay() as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("0")
                await streams.wait_for("message")
                redis.pause()
                try:
                    for number in range(1, 5):
                        await client.send(f"{number}")
                    await eventually(
                        lambda: any("unavailable" in line for line in service.log)
                    )
                finally:
                    redis.resume()
                await client.send("5")
            await streams.wait_for("disconnect")
        first: dict[str, str] = {}
        for event in await streams.all("message"):
            first.setdefault(event.id, event.payload["message"])
        assert list(first.values()) == [f"{number}" for number in range(6)]


async def test_relay_starts_without_redis(io_loop, tmp_path):
    """Clients get 503 until it is there."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis)
        await redis.kill()
        async with streams.relay() as service:
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(service.ws_url)
            assert refused.value.response.status_code == 503
            await redis.start()
            await eventually(lambda: any("again" in line for line in service.log))
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
            (message,) = await streams.wait_for("message")
            async with asyncio.timeout(DEADLINE):
                while not await redis.client.exists(message.meta["reply"]):
                    await asyncio.sleep(0.02)


async def test_emptied_redis_gets_its_keys_again(io_loop, tmp_path):
    """After a restart without persistence commands arrive, too."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis)
        async with streams.relay() as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                (message,) = await streams.wait_for("message")
                await redis.kill()
                await redis.start()
                await client.send("y")
                await streams.wait_for("message")
                assert await redis.client.get(f"{streams.prefix}:partitions") == "4"
                id_, reply = message.connection_id, message.meta["reply"]
                async with asyncio.timeout(DEADLINE):
                    while not await streams.command(
                        reply, {"connection_id": id_, "send": "hi"}
                    ):
                        await asyncio.sleep(0.05)
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "hi"


async def test_stop_delivers_what_it_has(io_loop, tmp_path):
    """SIGTERM: all messages, then disconnect events with 1001."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis)
        async with streams.relay() as service:
            clients = [await websockets.connect(service.ws_url) for _ in range(20)]
            for client in clients:
                for number in range(50):
                    await client.send(f"{number}")
            await streams.wait_for("message", 20 * 50)
        disconnects = await streams.all("disconnect")
        assert len(disconnects) == 20
        assert {event.meta["code"] for event in disconnects} == {1001}
        for client in clients:
            await client.wait_closed()


async def test_survivor_adds_the_disconnect_events_of_a_crashed_relay(
    io_loop, tmp_path
):
    """With --cluster: one for each connection, behind its messages."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis)
        flags = (f"--cluster={redis.url}", "--lease_ttl=2")
        async with streams.relay(*flags) as dead, streams.relay(*flags) as survivor:
            clients = [await websockets.connect(dead.ws_url) for _ in range(10)]
            for client in clients:
                await client.send("x")
            messages = await streams.wait_for("message", 10)
            async with websockets.connect(survivor.ws_url) as living:
                dead.process.kill()
                await dead.process.wait()
                disconnects = await streams.wait_for("disconnect", 10)
                await living.send("alive")
                await streams.wait_for("message", 11)
        ended = {event.connection_id: event.meta for event in disconnects}
        assert set(ended) == {event.connection_id for event in messages}
        assert {meta["code"] for meta in ended.values()} == {1006}
        assert {meta["instance"] for meta in ended.values()} == {
            messages[0].meta["instance"]
        }
        assert len(await streams.all("disconnect")) == 11
        for client in clients:
            with contextlib.suppress(websockets.ConnectionClosed):
                await client.recv()


async def test_large_messages_of_many_clients(io_loop, tmp_path):
    """They go in several writes, each of which Redis must answer in time."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis)
        text = "x" * 2_000_000
        async with streams.relay() as service:
            clients = [
                await websockets.connect(service.ws_url, compression=None)
                for _ in range(8)
            ]
            await asyncio.gather(*(client.send(text) for client in clients))
            await asyncio.gather(*(client.close() for client in clients))
            await eventually_length(streams, 3 * 8)
        messages = await streams.all("message")
        assert [len(event.payload["message"]) for event in messages] == 8 * [len(text)]


async def eventually_length(streams: Streams, length: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while await streams.length() != length:
            await asyncio.sleep(0.05)
