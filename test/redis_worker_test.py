"""`socketdock worker`: from Redis to a backend that speaks only HTTP."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from zlib import crc32

import pytest
import websockets
from redis_server import RedisServer
from redis_streams import Streams
from service import DEADLINE, RecordingBackend, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=120), pytest.mark.once]

REPLY = "application/vnd.socketdock+json"


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module")
def redis(module_io_loop, shared, tmp_path_factory) -> RedisServer:
    """One Redis for the tests of this module; each has its own prefix."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    return module_io_loop.run_sync(lambda: shared.enter_async_context(server))


class WorkerService(Service):
    """`socketdock worker` during the block."""

    def __init__(self, streams: Streams, *flags: str) -> None:
        super().__init__(
            "worker",
            f"--redis_url={streams.redis.url}",
            f"--redis_prefix={streams.prefix}",
            *flags,
        )
        self.flags.remove("worker")  # the first word, before TEST_FLAGS
        self.flags.insert(0, "worker")


def uris(backend: RecordingBackend, *kinds: str) -> list[str]:
    return [f"--{kind}uri={backend.url(kind)}" for kind in kinds]


@contextlib.asynccontextmanager
async def relayed(
    redis: RedisServer, *flags: str, kinds: tuple[str, ...] = ("message", "disconnect")
) -> AsyncIterator[tuple[RecordingBackend, Streams, Service, Service]]:
    """A backend, and a relay and a worker with a Redis between them."""
    streams = Streams(redis)
    async with (
        RecordingBackend() as backend,
        streams.relay() as relay,
        WorkerService(streams, *uris(backend, *kinds), *flags) as worker,
    ):
        yield backend, streams, relay, worker


async def until_acknowledged(streams: Streams) -> None:
    """Wait until each event is acknowledged by the workers, and so removed."""
    async with asyncio.timeout(DEADLINE):
        while await streams.length():
            await asyncio.sleep(0.05)


async def test_events_and_replies(io_loop, redis):
    """Each event as the http backend would send it; replies reach the client."""
    async with relayed(redis) as (backend, streams, relay, _):

        async def answer(handler, event):
            handler.set_header("Content-Type", REPLY)
            text = f"you said: {event['message']}"
            handler.write(json.dumps({"commands": [{"send": text}]}))

        backend.answers["message"] = answer
        async with websockets.connect(relay.ws_url) as client:
            for number in range(5):
                await client.send(f"{number}")
                reply = await asyncio.wait_for(client.recv(), DEADLINE)
                assert reply == f"you said: {number}"
        (disconnect,) = await backend.wait_for("disconnect", 1)
        assert disconnect["meta"]["code"] == 1000
        assert [event["message"] for event in backend.of("message")] == list("01234")
        ids = [headers["Webhook-Id"] for _, _, headers in backend.events]
        id_ = disconnect["connection_id"]
        assert ids == [*(f"{id_}-{n}" for n in range(1, 6)), f"{id_}-disconnect"]
        await until_acknowledged(streams)


async def test_commands_for_others_name_their_stream(io_loop, redis):
    """`reply` beside `connection_id`: another connection gets the frame."""
    async with relayed(redis) as (backend, _, relay, _):
        first: dict[str, str] = {}

        async def answer(handler, event):
            meta = event["meta"]
            if not first:
                first.update(connection_id=meta["connection_id"], reply=meta["reply"])
                return
            handler.set_header("Content-Type", REPLY)
            command = {**first, "send": "/w==", "type": "binary", "encoding": "base64"}
            handler.write(json.dumps({"commands": [command]}))

        backend.answers["message"] = answer
        async with websockets.connect(relay.ws_url) as one:
            await one.send("a")
            await backend.wait_for("message", 1)
            async with websockets.connect(relay.ws_url) as two:
                await two.send("b")
                assert await asyncio.wait_for(one.recv(), DEADLINE) == b"\xff"


async def test_connect_events_decide_later(io_loop, redis):
    """A refusal closes the connection with 1008; commands of others count."""
    kinds = ("connect", "message", "disconnect")
    async with relayed(redis, kinds=kinds) as (backend, streams, relay, _):

        async def decide(handler, event):
            if event["meta"]["query"]:
                handler.set_status(403)
            else:
                handler.set_header("Content-Type", REPLY)
                handler.write(json.dumps({"commands": [{"send": "welcome"}]}))

        backend.answers["connect"] = decide
        async with websockets.connect(relay.ws_url) as client:
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "welcome"
        async with websockets.connect(f"{relay.ws_url}?no") as client:
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert client.close_code == 1008
        await backend.wait_for("disconnect", 2)
        await until_acknowledged(streams)


async def test_event_that_keeps_failing_is_dead_and_can_be_replayed(io_loop, redis):
    """Others go on, those of its own connection, too; then it is sent again."""
    broken = True

    async def answer(handler, event):
        if broken and event["message"] == "bad":
            handler.set_status(500)

    async with relayed(redis, "--event_timeout=1") as (backend, streams, relay, _):
        backend.answers["message"] = answer
        async with (
            websockets.connect(relay.ws_url) as client,
            websockets.connect(relay.ws_url) as other,
        ):
            for text in ("before", "bad", "after"):
                await client.send(text)
            dead = f"{streams.prefix}:dead"
            async with asyncio.timeout(DEADLINE):
                while not await redis.client.exists(dead):
                    await other.send("other")
                    await asyncio.sleep(0.2)
            await eventually(
                lambda: "after" in [event["message"] for event in backend.of("message")]
            )
        await backend.wait_for("disconnect", 2)
        ((_, fields),) = await redis.client.xrange(dead)
        assert json.loads(fields["payload"])["message"] == "bad"
        assert "answered 500" in fields["error"]
        await until_acknowledged(streams)
        broken = False
        flags = (*uris(backend, "message"), "--replay_dead")
        before = len(backend.of("message"))
        async with WorkerService(streams, *flags):
            await backend.wait_for("message", before + 1)
            assert backend.of("message")[-1]["message"] == "bad"
            await until_acknowledged(streams)
        assert not await redis.client.xlen(dead)


@pytest.mark.long
async def test_workers_share_and_take_over(io_loop, redis):
    """The backend is away, one of two workers is killed: all arrives, in order."""
    streams = Streams(redis)
    clients, messages = 20, 30
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(RecordingBackend())
        relay = await stack.enter_async_context(streams.relay())
        away = True

        async def answer(handler, event):
            if away:
                handler.set_status(503)

        backend.answers["message"] = backend.answers["disconnect"] = answer
        # While nothing is accepted, --delivery_timeout counts.
        flags = [*uris(backend, "message", "disconnect"), "--event_timeout=0.5"]
        one = await stack.enter_async_context(WorkerService(streams, *flags))
        two = await stack.enter_async_context(WorkerService(streams, *flags))
        for worker in (one, two):  # each has a share
            await eventually(lambda w=worker: any("is read" in li for li in w.log))
        connected = [await websockets.connect(relay.ws_url) for _ in range(clients)]
        for number in range(messages):
            await asyncio.gather(*(c.send(f"{number}") for c in connected))
        await eventually(lambda: len(backend.of("message")) > 0)
        one.process.kill()
        await one.process.wait()
        away = False
        accepted = len(backend.events)
        await asyncio.gather(*(client.close() for client in connected))
        assert {client.close_code for client in connected} == {1000}
        await until_acknowledged(streams)
        assert not await redis.client.exists(f"{streams.prefix}:dead")
        first: dict[str, list[str]] = defaultdict(list)
        for _, event, headers in backend.events[accepted:]:
            id_ = event["meta"]["connection_id"]
            if headers["Webhook-Id"] not in first[id_]:
                first[id_].append(headers["Webhook-Id"])
        assert len(first) == clients
        for id_, seen in first.items():
            assert seen == [
                *(f"{id_}-{n}" for n in range(1, messages + 1)), f"{id_}-disconnect"
            ]  # fmt: skip


async def test_worker_takes_no_clients(io_loop, redis):
    """It has the relay's probes and metrics."""
    async with relayed(redis) as (backend, _, _, worker):
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(worker.ws_url)
        assert refused.value.response.status_code == 404
        for path in ("livez", "readyz", "metrics", "status"):
            response = await backend.call(f"{worker.callback_url}/{path}", "GET")
            assert response.code == 200, path


async def test_slow_connection_delays_no_other(io_loop, redis):
    """The backend holds the answer to one connection's message."""
    release = asyncio.Event()

    async def answer(handler, event):
        if event["message"] == "slow":
            await release.wait()

    async with relayed(redis) as (backend, streams, relay, _):
        backend.answers["message"] = answer
        async with (
            websockets.connect(relay.ws_url) as slow,
            websockets.connect(relay.ws_url) as quick,
        ):
            await slow.send("slow")
            await backend.wait_for("message", 1)
            for number in range(50):
                await quick.send(f"{number}")
            await backend.wait_for("message", 51)
            release.set()
        await backend.wait_for("disconnect", 2)
        await until_acknowledged(streams)


async def test_event_that_was_added_twice_is_sent_once(io_loop, redis):
    """A relay may add an event again after a lost reply."""
    async with relayed(redis) as (backend, streams, relay, _):
        async with websockets.connect(relay.ws_url) as client:
            await client.send("one")
            await backend.wait_for("message", 1)
            id_ = backend.of("message")[0]["meta"]["connection_id"]
            stream = streams.names[crc32(id_.encode()) % streams.partitions]
            again = {
                "event": "message", "id": f"{id_}-1", "connection_id": id_,
                "payload": json.dumps(backend.of("message")[0]), "traceparent": "",
            }  # fmt: skip
            await redis.client.xadd(stream, again)
            await client.send("two")
        await backend.wait_for("disconnect", 1)
        await until_acknowledged(streams)
        assert [event["message"] for event in backend.of("message")] == ["one", "two"]


async def test_stopped_worker_leaves_its_partitions(io_loop, redis):
    """With SIGTERM another one reads them at once, and nothing is sent twice."""
    streams = Streams(redis)
    async with RecordingBackend() as backend, streams.relay() as relay:
        flags = uris(backend, "message", "disconnect")
        async with websockets.connect(relay.ws_url) as client:
            async with WorkerService(streams, *flags):
                await client.send("one")
                await backend.wait_for("message", 1)
            assert await redis.client.keys(f"{streams.prefix}:worker:*") == []
            async with WorkerService(streams, *flags):
                await client.send("two")
                await backend.wait_for("message", 2)
        texts = [event["message"] for event in backend.of("message")]
    assert texts == ["one", "two"]


@pytest.mark.long
async def test_worker_survives_a_restart_of_redis(io_loop, tmp_path):
    """What is not acknowledged is read again, and nothing is missing."""
    async with RedisServer(tmp_path, aof=True) as redis:
        async with relayed(redis) as (backend, streams, relay, _):
            async with websockets.connect(relay.ws_url) as client:
                for number in range(20):
                    await client.send(f"{number}")
                await backend.wait_for("message", 1)
                await redis.kill()
                await redis.start()
                for number in range(20, 40):
                    await client.send(f"{number}")
                await eventually(
                    lambda: len({e["message"] for e in backend.of("message")}) == 40
                )
            await backend.wait_for("disconnect", 1)
            first = dict.fromkeys(e["message"] for e in backend.of("message"))
            assert list(first) == [f"{number}" for number in range(40)]
            await until_acknowledged(streams)


@pytest.mark.long
async def test_paused_worker_gives_its_partitions_up(io_loop, redis):
    """Another one takes over; back, the paused one sends nothing out of order."""
    streams = Streams(redis)
    async with (
        RecordingBackend() as backend,
        streams.relay() as relay,
        WorkerService(streams, *uris(backend, "message", "disconnect")) as paused,
    ):
        await eventually(lambda: sum("is read" in line for line in paused.log) == 4)
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(websockets.connect(relay.ws_url))
                for _ in range(10)
            ]
            async with paused.stalled(0):
                for number in range(5):
                    await asyncio.gather(*(c.send(f"{number}") for c in clients))
                flags = uris(backend, "message", "disconnect")
                await stack.enter_async_context(WorkerService(streams, *flags))
                await backend.wait_for("message", 50)
            await eventually(lambda: any("is lost" in line for line in paused.log))
            for number in range(5, 10):
                await asyncio.gather(*(c.send(f"{number}") for c in clients))
            await asyncio.gather(*(client.close() for client in clients))
            await until_acknowledged(streams)
    first: dict[str, list[str]] = defaultdict(list)
    for _, event, headers in backend.events:
        id_ = event["meta"]["connection_id"]
        if headers["Webhook-Id"] not in first[id_]:
            first[id_].append(headers["Webhook-Id"])
    for id_, seen in first.items():
        assert seen == [*(f"{id_}-{n}" for n in range(1, 11)), f"{id_}-disconnect"]


async def test_entries_with_odd_fields_do_no_harm(io_loop, redis):
    """Nothing of an entry gets into other headers, and nothing else stays behind."""
    async with relayed(redis) as (backend, streams, _, worker):
        entries: list[dict[str, str | bytes]] = [
            {"id": "a\r\nEvil: 1"},
            {"id": "b", "traceparent": "00\r\nEvil: 1"},
            {"id": b"\xff", "connection_id": b"\xff"},
            {"id": "", "connection_id": "one"},
            {"connection_id": "two"},
            {"id": "\u00fc"},
            {"id": "x" * 10_000},
            {"id": "long-" + "9" * 5_000},
            {"event": "unknown"},
            {"event": "undelivered", "connection_id": "a\nb"},
            {"id": "c-1", "connection_id": "c", "payload": '{"meta": 5}'},
        ]
        pipeline = redis.client.pipeline()
        for entry in entries:
            fields = {"event": "message", "payload": "{}", **entry}
            pipeline.xadd(streams.names[0], fields)
        await pipeline.execute()
        await until_acknowledged(streams)
        headers = [headers for _, _, headers in backend.events]
        ids = [each["Webhook-Id"] for each in headers]
        assert len(set(ids)) == 9 and all(id_.isascii() for id_ in ids)
        assert not any("Evil" in each for each in headers)
        assert "Traceback" not in str(worker.log)


async def test_partition_that_cannot_be_read_is_logged_once(io_loop, redis):
    """A worker that reads nothing must not look well."""
    streams = Streams(redis)
    async with RecordingBackend() as backend, streams.relay():
        await redis.client.set(streams.names[0], "no stream")
        async with WorkerService(streams, *uris(backend, "message")) as worker:
            await eventually(lambda: "WRONGTYPE" in str(worker.log))
            await redis.client.delete(streams.names[0])
            await eventually(lambda: "works again" in str(worker.log))
            fields = {"event": "message", "id": "a-1", "payload": "{}"}
            await redis.client.xadd(streams.names[0], fields)
            await backend.wait_for("message", 1)
            assert str(worker.log).count("WRONGTYPE") == 1


async def test_full_redis_is_emptied(io_loop, tmp_path):
    """Without memory in Redis the worker keeps its partitions, and what is read goes.

    An event that is dead waits for memory.
    """
    async with RedisServer(tmp_path) as redis:
        setup = relayed(redis, "--event_timeout=0.5")
        async with setup as (backend, streams, relay, worker):
            refusing = True

            async def answer(handler, event):
                if refusing or event["message"] == "bad":
                    handler.set_status(500)

            backend.answers["message"] = answer
            async with (
                websockets.connect(relay.ws_url) as first,
                websockets.connect(relay.ws_url) as second,
            ):
                await first.send("good")
                await streams.wait_for("message", 1)
                await second.send("bad")
                # Both are read: without memory no group of readers can be made.
                await eventually(
                    lambda: {e["message"] for _, e, _ in backend.events}
                    == {"good", "bad"}
                )
                leases = [f"{streams.prefix}:worker:{{{n}}}" for n in range(4)]
                async with asyncio.timeout(DEADLINE):
                    while await redis.client.exists(*leases) != len(leases):
                        await asyncio.sleep(0.02)
                await redis.client.config_set("maxmemory", 1)
                began = await redis.client.pttl(leases[0])
                async with asyncio.timeout(DEADLINE):  # it falls until it is renewed
                    while (left := await redis.client.pttl(leases[0])) <= began:
                        assert left > 0, "the lease was not renewed"
                        began = left
                        await asyncio.sleep(0.05)
                refusing = False
                await eventually(lambda: "waits to be put among" in str(worker.log))
                async with asyncio.timeout(DEADLINE):
                    while await streams.length() > 1:
                        await asyncio.sleep(0.05)
                await redis.client.config_set("maxmemory", 0)
                async with asyncio.timeout(DEADLINE):
                    while not await redis.client.xlen(f"{streams.prefix}:dead"):
                        await asyncio.sleep(0.05)
            assert "Traceback" not in str(worker.log)
