"""The backend `redis`: events in streams, and commands from a stream."""

import asyncio
import contextlib
import itertools
import signal
from zlib import crc32

import pytest
import websockets
from console_test import live
from redis_server import RedisServer
from redis_streams import PARTITIONS, Streams
from service import DEADLINE, RecordingBackend, Service, eventually, refusal
from tracing_test import KINDS, Collector

from backends.events import Event
from backends.redis.janitor import TRIM
from backends.redis.keys import Keys
from backends.redis.writer import StreamWriter
from backends.redis_client import RedisClient
from backends.redis_url import read_address

GREETINGS = itertools.count()

pytestmark = [pytest.mark.gen_test(timeout=120), pytest.mark.once]


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module")
def redis(module_io_loop, shared, tmp_path_factory) -> RedisServer:
    """One Redis for the tests of this module; each has its own prefix."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    return module_io_loop.run_sync(lambda: shared.enter_async_context(server))


@pytest.fixture(scope="module")
def relayed(module_io_loop, shared, redis) -> tuple[Streams, Service]:
    """A relay for all tests that need nothing special."""
    streams = Streams(redis)
    relay = module_io_loop.run_sync(
        lambda: shared.enter_async_context(streams.relay())
    )
    return streams, relay


async def of(streams: Streams, connection_id: str, number: int) -> list:
    """Wait until a connection has `number` events, and return them."""
    async with asyncio.timeout(DEADLINE):
        while True:
            found = [
                entry
                for entry in await streams.all()
                if entry.connection_id == connection_id
            ]
            if len(found) >= number:
                return found
            await asyncio.sleep(0.02)


async def greeted(streams: Streams, service: Service, client) -> dict:
    """Send a message, and return `meta` of its event."""
    text = f"hello {next(GREETINGS)}"
    await client.send(text)
    async with asyncio.timeout(DEADLINE):
        while True:
            for entry in await streams.all("message"):
                if entry.payload["message"] == text:
                    return entry.meta
            await asyncio.sleep(0.02)


# Events.


async def test_events_of_a_connection_are_in_one_stream(io_loop, relayed):
    """Connect, messages, disconnect: with the fields of the contract, in order."""
    streams, service = relayed
    async with websockets.connect(service.ws_url) as client:
        meta = await greeted(streams, service, client)
        await client.send(b"\xff")
    id_ = meta["connection_id"]
    events = await of(streams, id_, 4)
    assert [event.name for event in events] == [
        "connect", "message", "message", "disconnect"
    ]  # fmt: skip
    assert [event.id for event in events] == [
        f"{id_}-connect", f"{id_}-1", f"{id_}-2", f"{id_}-disconnect"
    ]  # fmt: skip
    stream = streams.names[crc32(id_.encode()) % PARTITIONS]
    assert [event.entry_id for event in events] == [
        entry_id
        for entry_id, fields in await streams.redis.client.xrange(stream)
        if fields["connection_id"] == id_
    ]
    names = ["event", "id", "connection_id", "payload", "traceparent"]
    assert all(list(event.fields) == names for event in events)
    assert events[0].meta["path"] == "/ws"
    assert events[2].payload["message"] == "/w=="
    assert events[3].meta["code"] == 1000
    for event in events:
        assert event.meta["reply"].startswith(f"{streams.prefix}:commands:{{")
        assert event.meta["reply"].endswith(f"{{{event.meta['instance']}}}")


async def test_console_shows_the_entry_of_an_event(io_loop, relayed):
    """Its stream and its id there; and how many entries the longest stream has."""
    streams, service = relayed
    async with live(service) as (stream, _):
        async with websockets.connect(service.ws_url) as client:
            id_ = (await greeted(streams, service, client))["connection_id"]
            attempt = await stream.until("attempt", event="message", id=id_)
            _, message = await of(streams, id_, 2)
            name = streams.names[crc32(id_.encode()) % PARTITIONS]
            assert attempt["place"] == f"{name} {message.entry_id}"
            assert (attempt["outcome"], attempt["attempt"]) == ("delivered", 1)
            snapshot = await stream.until("snapshot")
            assert snapshot["backend"]["entries"] >= 2


async def test_event_has_the_span_of_a_producer(io_loop, redis):
    """With the stream, the id of the entry, and the trace of its `traceparent`."""
    streams = Streams(redis)
    async with Collector() as collector:
        flags = streams.flags("--otel")
        async with Service(*flags, environment=collector.environment()) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
            await streams.wait_for("disconnect")
            await eventually(lambda: collector.of("disconnect"))
    for entry in await streams.all():
        (span,) = collector.of(entry.name)
        stream = streams.names[crc32(entry.connection_id.encode()) % PARTITIONS]
        assert (span.name, span.kind) == (f"send {stream}", KINDS.SPAN_KIND_PRODUCER)
        traceparent = f"00-{span.trace_id}-{span.span_id}-01"
        assert entry.fields["traceparent"] == traceparent
        expected = {
            "messaging.system": "redis",
            "messaging.operation.type": "send",
            "messaging.destination.name": stream,
            "messaging.message.id": entry.entry_id,
            "socketdock.event_id": entry.id,
            "socketdock.outcome": "delivered",
        }
        assert expected.items() <= span.attributes.items()


async def test_send_url_of_an_event_works(io_loop, relayed):
    """`meta.send` is there where callbacks can be reached."""
    streams, service = relayed
    async with RecordingBackend() as backend:
        async with websockets.connect(service.ws_url) as client:
            meta = await greeted(streams, service, client)
            assert (await backend.call(meta["send"], body=b"hi")).code == 200
            assert await asyncio.wait_for(client.recv(), DEADLINE) == b"hi"


async def test_trace_of_a_handshake_continues_in_its_events(io_loop, relayed):
    """The field `traceparent` has the trace of the client."""
    streams, service = relayed
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    async with websockets.connect(
        service.ws_url, additional_headers=headers
    ) as client:
        meta = await greeted(streams, service, client)
    events = await of(streams, meta["connection_id"], 3)
    assert {event.fields["traceparent"].split("-")[1] for event in events} == {trace}


async def test_verdicts_stay_http(io_loop, redis):
    """With --connecturi no connect event is added, and a refusal leaves nothing."""
    streams = Streams(redis)
    async with RecordingBackend() as backend:

        async def decide(handler, event):
            if event["meta"]["query"]:
                handler.set_status(403)

        backend.answers["connect"] = decide
        flag = f"--connecturi={backend.url('connect')}"
        async with streams.relay(flag) as service:
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(f"{service.ws_url}?no")
            assert refused.value.response.status_code == 403
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
            await streams.wait_for("disconnect")
    assert [event.name for event in await streams.all()] == ["message", "disconnect"]
    assert len(backend.of("connect")) == 2


# Commands.


async def test_commands_are_carried_out_and_removed(io_loop, relayed):
    """Send and close; the stream is empty afterwards, and is still there."""
    streams, service = relayed
    async with websockets.connect(service.ws_url) as client:
        meta = await greeted(streams, service, client)
        reply, id_ = meta["reply"], meta["connection_id"]
        for number in range(20):
            assert await streams.command(
                reply, {"connection_id": id_, "send": f"{number}"}
            )
        received = [await asyncio.wait_for(client.recv(), DEADLINE) for _ in range(20)]
        assert received == [f"{number}" for number in range(20)]
        binary = {"send": "/w==", "type": "binary", "encoding": "base64"}
        await streams.command(reply, {"connection_ids": [id_], **binary})
        assert await asyncio.wait_for(client.recv(), DEADLINE) == b"\xff"
        await streams.command(reply, {"connection_id": id_, "state": {"step": 2}})
        await streams.command(reply, {"connection_id": id_, "close": {"code": 3001}})
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 3001
    *_, last = await of(streams, id_, 3)
    assert last.meta["state"] == {"step": 2}
    async with asyncio.timeout(DEADLINE):
        while await streams.redis.client.xlen(reply):
            await asyncio.sleep(0.02)
    assert 0 < await streams.redis.client.pttl(reply) <= 30_000


@pytest.mark.parametrize(
    ("command", "name", "status", "connection_id"),
    [
        ({"connection_id": "nobody", "send": "x"}, "send", 410, "nobody"),
        ({"connection_id": "nobody", "close": True}, "close", 410, "nobody"),
        ({"connection_id": "nobody", "send": "x", "type": "?"}, "none", 400, "nobody"),
        ({"send": "x"}, "none", 400, ""),
        ("no JSON", "none", 400, ""),
        ("[1]", "none", 400, ""),
        ({"connection_id": "n", "send": "x" * 5_000_000}, "send", 413, "n"),
        ({"connection_id": "n", "state": "x" * 5_000}, "state", 413, "n"),
    ],
    ids=["send", "close", "type", "no id", "no JSON", "list", "large", "large state"],
)
async def test_command_that_cannot_be_carried_out_comes_back(
    io_loop, relayed, command, name, status, connection_id
):
    """As an event `undelivered`; those behind it are carried out."""
    streams, service = relayed
    async with websockets.connect(service.ws_url) as client:
        meta = await greeted(streams, service, client)
        entry = await streams.command(meta["reply"], command)
        await streams.command(
            meta["reply"], {"connection_id": meta["connection_id"], "send": "next"}
        )
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "next"
    async with asyncio.timeout(DEADLINE):
        while True:
            found = [e for e in await streams.all("undelivered")
                     if e.id == f"{entry}-undelivered"]  # fmt: skip
            if found:
                break
            await asyncio.sleep(0.02)
    (event,) = found
    assert event.connection_id == connection_id
    assert event.payload == {
        "connection_id": connection_id, "command": name, "status": status
    }  # fmt: skip


async def test_command_for_many_comes_back_for_each(io_loop, relayed):
    """The events have different ids, since consumers compare them."""
    streams, service = relayed
    async with websockets.connect(service.ws_url) as client:
        meta = await greeted(streams, service, client)
        ids = ["gone1", meta["connection_id"], "gone2"]
        entry = await streams.command(
            meta["reply"], {"connection_ids": ids, "send": "all"}
        )
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "all"
    async with asyncio.timeout(DEADLINE):
        while True:
            found = {e.id: e.connection_id for e in await streams.all("undelivered")
                     if e.id.startswith(f"{entry}-")}  # fmt: skip
            if len(found) == 2:
                break
            await asyncio.sleep(0.02)
    assert sorted(found.values()) == ["gone1", "gone2"]


async def test_stopped_instance_takes_no_more_commands(io_loop, redis):
    """Its stream is gone, so that senders get nil, and what was in it comes back."""
    streams = Streams(redis)
    async with streams.relay() as service:
        async with websockets.connect(service.ws_url) as client:
            meta = await greeted(streams, service, client)
    command = {"connection_id": meta["connection_id"], "send": "x"}
    assert await streams.command(meta["reply"], command) is None
    assert not await redis.client.exists(meta["reply"])


async def test_command_at_the_stop_is_carried_out_or_comes_back(io_loop, redis):
    """Those that arrive while the relay stops are not lost without a word."""
    streams = Streams(redis)
    async with streams.relay("--drain_timeout=20") as service:
        async with websockets.connect(service.ws_url) as client:
            meta = await greeted(streams, service, client)
            service.process.send_signal(signal.SIGSTOP)
            sent = [
                await streams.command(
                    meta["reply"],
                    {"connection_id": meta["connection_id"], "send": f"{number}"},
                )
                for number in range(10)
            ]
            service.process.send_signal(signal.SIGTERM)
            service.process.send_signal(signal.SIGCONT)
            received = [f"{message}" async for message in client]
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
    returned = [event.id for event in await streams.all("undelivered")]
    assert sorted(returned + [f"{sent[int(n)]}-undelivered" for n in received]) == [
        f"{entry}-undelivered" for entry in sent
    ]


class Leaving:
    """The sender of an event, which calls `on_added` when Redis has added it."""

    name = "message"
    timeout = 60.0
    connection_id = "0" * 32

    def __init__(self) -> None:
        self.on_added = None

    def on_accepted(self, entry, place, seconds):
        self.on_added()

    def on_failed(self, entry, error, seconds):
        raise AssertionError(error)

    def give_up(self, error):
        raise AssertionError(error)


async def test_stop_may_end_its_wait_in_the_moment_of_the_reply(io_loop, redis):
    """Nothing else fails then: the event was added."""
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    client = RedisClient(read_address("redis_url", redis.url, None), "--redis_url")
    writer = StreamWriter(client, Keys("leaving"), 1, 100, 60.0)
    writer.begin()
    try:
        await asyncio.wait_for(writer.tried, DEADLINE)
        owner = Leaving()
        writer.add(owner, Event(f"{owner.connection_id}-1", b"{}", "", None))
        waiting = asyncio.create_task(writer.emptied())
        owner.on_added = waiting.cancel
        await asyncio.wait({waiting}, timeout=DEADLINE)
        assert waiting.cancelled()
        await asyncio.wait_for(writer.emptied(), DEADLINE)
    finally:
        await writer.close()
        await client.close()
        loop.set_exception_handler(None)
    assert errors == []


async def test_crash_is_reported_by_the_next_start(io_loop, redis, tmp_path):
    """With --state_dir: code 1006, and the instance that has crashed."""
    streams = Streams(redis)
    state = f"--state_dir={tmp_path / 'state'}"
    async with streams.relay(state) as service:
        client = await websockets.connect(service.ws_url)
        meta = await greeted(streams, service, client)
        service.process.kill()
        await service.process.wait()
    async with streams.relay(state):
        (disconnect,) = await streams.wait_for("disconnect")
    assert disconnect.connection_id == meta["connection_id"]
    assert disconnect.meta["code"] == 1006
    assert disconnect.meta["instance"] == meta["instance"]
    with contextlib.suppress(websockets.ConnectionClosed):
        await client.recv()


async def test_commands_are_counted(io_loop, relayed):
    """By source, command and outcome."""
    streams, service = relayed
    async with RecordingBackend() as backend:
        async with websockets.connect(service.ws_url) as client:
            meta = await greeted(streams, service, client)
            await streams.command(
                meta["reply"], {"connection_id": meta["connection_id"], "send": "x"}
            )
            await asyncio.wait_for(client.recv(), DEADLINE)
        response = await backend.call(f"{service.callback_url}/metrics", "GET")
    count = 'commands_total{command="send",outcome="done",source="broker"}'
    (line,) = [li for li in response.body.decode().splitlines() if count in li]
    assert float(line.split()[1]) >= 1


# Trimming.


async def test_only_what_every_group_has_acknowledged_is_trimmed(io_loop, redis):
    """Nothing without a group; then up to the oldest entry that one has not."""
    client, stream = redis.client, "trimmed:events:{0}"

    async def left() -> list[str]:
        await client.eval(TRIM, 1, stream)
        return [entry_id for entry_id, _ in await client.xrange(stream)]

    assert await left() == []  # no stream
    ids = [f"{n}-{n}" for n in range(1, 12)]
    for id_ in ids:
        await client.xadd(stream, {"n": id_}, id=id_)
    assert await left() == ids  # no group
    await client.xgroup_create(stream, "fast", "0")
    await client.xgroup_create(stream, "slow", "0")
    assert await left() == ids  # nothing is read
    await client.xreadgroup("fast", "c", {stream: ">"})
    await client.xack(stream, "fast", *ids)
    assert await left() == ids  # `slow` has read nothing
    await client.xreadgroup("slow", "c", {stream: ">"}, count=6)
    assert await left() == ids  # it has acknowledged nothing
    await client.xack(stream, "slow", *ids[:2], ids[3])
    assert await left() == ids[2:]
    await client.xack(stream, "slow", ids[2], *ids[4:6])
    assert await left() == ids[6:]
    await client.xreadgroup("slow", "c", {stream: ">"})
    await client.xack(stream, "slow", *ids[6:])
    assert await left() == []


async def test_acknowledged_events_are_removed(io_loop, redis):
    """A relay trims its streams from time to time."""
    streams = Streams(redis, partitions=1)
    (stream,) = streams.names
    async with streams.relay() as service:
        await redis.client.xgroup_create(stream, "workers", "0", mkstream=True)
        async with websockets.connect(service.ws_url) as client:
            await greeted(streams, service, client)
        await streams.wait_for("disconnect")
        read = await redis.client.xreadgroup("workers", "c", {stream: ">"})
        (entries,) = read.values()
        await redis.client.xack(stream, "workers", *(id_ for id_, _ in entries[0]))
        async with asyncio.timeout(DEADLINE):
            while await streams.length():
                await asyncio.sleep(0.05)


async def test_one_instance_at_a_time_trims(io_loop, redis):
    """Another takes over when it stops."""
    streams = Streams(redis, partitions=1)
    lock = f"{streams.prefix}:janitor"
    async with contextlib.AsyncExitStack() as others:
        async with streams.relay() as first:
            async with websockets.connect(first.ws_url) as client:
                meta = await greeted(streams, first, client)
            async with asyncio.timeout(DEADLINE):
                while await redis.client.get(lock) != meta["instance"]:
                    await asyncio.sleep(0.02)
            await others.enter_async_context(streams.relay())
            assert await redis.client.get(lock) == meta["instance"]
        async with asyncio.timeout(DEADLINE):
            while await redis.client.get(lock) in (None, meta["instance"]):
                await asyncio.sleep(0.02)


# The number of partitions.


async def test_another_number_of_partitions_stops_the_start(io_loop, redis):
    """It is stored by the first relay, and grows by a command only."""
    streams = Streams(redis, partitions=2)
    async with streams.relay():
        pass
    assert await redis.client.get(f"{streams.prefix}:partitions") == "2"
    wrong = Streams(redis, 4, streams.prefix)
    line = await asyncio.to_thread(refusal, *wrong.flags())
    assert "--redis_partitions=4" in line
    assert f"{streams.prefix}:partitions is 2" in line
    for number, status, text in (
        ("4", 0, "is 4 now, and was 2"), ("4", 0, "is 4 already"),
        ("3", 2, "it can only grow"), ("many", 2, "needs a number"),
    ):  # fmt: skip
        found = await run("redis-partitions", number, *streams.flags())
        assert found[0] == status
        assert text in found[1]
    async with wrong.relay():
        pass


async def test_stored_number_that_is_none_stops_the_start(io_loop, redis):
    """With one line; `check` says it, too, and no such number can be stored."""
    streams = Streams(redis)
    for number in "0", "16385":
        status, output = await run(
            "redis-partitions", number, f"--redis_url={redis.url}",
            f"--redis_prefix={streams.prefix}",
        )  # fmt: skip
        assert status == 2 and "16384" in output
    await redis.client.set(f"{streams.prefix}:partitions", "many")
    with pytest.raises(RuntimeError, match="partitions is many: give the same"):
        async with streams.relay():
            pass
    status, output = await run("check", *streams.flags())
    assert status == 1 and "partitions is many;" in output


async def run(*words: str) -> tuple[int | None, str]:
    """Run a command of `socketdock`; return its status and its output."""
    service = Service()
    process = await asyncio.create_subprocess_exec(
        *service.command, *words,
        cwd=service.cwd, env=service.environment, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "--redis_url"),
        (("--redis_url=http://s3cret@h",), "--redis_url"),
        (("--redis_url=redis://h", "--redis_prefix={x}"), "--redis_prefix"),
        (("--redis_url=redis://h", "--redis_url_file=/x"), "exclude"),
        (("--redis_url=redis://h", "--redis_partitions=16385"), "16384"),
    ],
    ids=str,
)
def test_invalid_options_are_rejected(flags, text):
    """With one sentence, which has no secret."""
    line = refusal("--backend=redis", *flags)
    assert text in line
    assert "s3cret" not in line
