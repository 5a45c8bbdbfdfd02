"""Batches: one request to the backend with the events of many connections."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import websockets
from faults import ScriptedBackend
from service import DEADLINE, Service, eventually
from standardwebhooks import Webhook
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from backends.http.replies import READ_AT_ONCE

pytestmark = pytest.mark.gen_test(timeout=60)

MEDIA_TYPE = "application/vnd.socketdock+json"


@dataclass
class Batch:
    """A batch as it arrived, and how many times before."""

    id: str
    body: bytes
    headers: dict[str, str]
    earlier: int

    @property
    def events(self) -> list[dict[str, Any]]:
        return json.loads(self.body)["events"]

    @property
    def messages(self) -> list[str]:
        return [each["message"] for each in self.events if each["event"] == "message"]


# A status, or the JSON of a response with commands, or a coroutine of either.
Answer = Callable[[Batch], Any]


@dataclass
class BatchBackend:
    """An HTTP server that records batches; `answer` makes each response."""

    answer: Answer = lambda batch: 200
    batches: list[Batch] = field(default_factory=list)
    # The events that were accepted, each time.
    accepted: list[dict[str, Any]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        backend = self

        class BatchHandler(RequestHandler):
            async def post(self) -> None:
                headers = dict(self.request.headers)
                id_ = headers["Webhook-Id"]
                earlier = sum(batch.id == id_ for batch in backend.batches)
                batch = Batch(id_, self.request.body, headers, earlier)
                backend.batches.append(batch)
                answer = backend.answer(batch)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                failed: list[str] = []
                if isinstance(answer, int):
                    self.set_status(answer)
                else:
                    failed = answer.get("failed", [])
                    self.set_header("Content-Type", MEDIA_TYPE)
                    self.write(json.dumps(answer))
                if self.get_status() == 200:
                    backend.accept(batch, failed)

        application = Application([("/", BatchHandler)], log_function=lambda _: None)
        sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
        self.port = sockets[0].getsockname()[1]
        self.server = HTTPServer(application)
        self.server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.stop()
        await self.server.close_all_connections()

    def accept(self, batch: Batch, failed: list[str]) -> None:
        """Stop at a connection's first failure, as the contract says."""
        stopped = set()
        for event in batch.events:
            id_ = event["meta"]["connection_id"]
            if event["id"] in failed or id_ in stopped:
                stopped.add(id_)
            else:
                self.accepted.append(event)

    def flags(self) -> list[str]:
        return ["--backend=http", f"--batchuri=http://127.0.0.1:{self.port}/"]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the accepted events of a kind."""
        return [event for event in self.accepted if event["event"] == kind]

    async def wait_for(self, kind: str, number: int) -> list[dict[str, Any]]:
        """Wait until `number` events of a kind are accepted, and return them."""
        await eventually(lambda: len(self.of(kind)) >= number)
        return self.of(kind)


class Gate:
    """Accepts batches once it is open; until then they wait."""

    def __init__(self) -> None:
        self._is_open = asyncio.Event()
        self.open = self._is_open.set

    async def __call__(self, batch: Batch) -> int:
        await self._is_open.wait()
        return 200


@contextlib.asynccontextmanager
async def relay(
    answer: Answer = lambda batch: 200, *flags: str
) -> AsyncIterator[tuple[BatchBackend, Service]]:
    async with BatchBackend(answer) as backend:
        async with Service(*backend.flags(), *flags) as service:
            yield backend, service


async def talk(service: Service, *messages: str) -> None:
    """Send messages, and leave."""
    async with websockets.connect(service.ws_url) as client:
        for message in messages:
            await client.send(message)


async def test_event_of_a_batch_is_the_single_event_and_more(io_loop):
    """Messages and the disconnect event, and what the request has."""
    async with relay() as (backend, service):
        await talk(service, "été")
        (disconnect,) = await backend.wait_for("disconnect", 1)
        (message,) = backend.of("message")
    id_ = message["meta"]["connection_id"]
    assert message["id"] == message["meta"]["message_id"] == f"{id_}-1"
    assert message["message"] == "été"
    assert message["meta"]["send"].endswith(f"/socket/{id_}/send")
    assert disconnect["id"] == f"{id_}-disconnect"
    assert disconnect["connection_id"] == id_
    assert disconnect["meta"]["code"] == 1000
    assert len(message["traceparent"]) == len(disconnect["traceparent"]) == 55
    first, second = backend.batches
    boot, lane, number = first.id.split("-")
    assert message["meta"]["instance"].endswith(f"/{boot}")
    assert second.id == f"{boot}-{lane}-{int(number) + 1}"
    assert first.headers["Content-Type"] == "application/json; charset=utf-8"


async def test_state_and_signature_are_those_of_single_events(io_loop):
    """The state is in the next event; the signature is over the batch."""
    def answer(batch: Batch) -> dict[str, Any]:
        (event,) = batch.events
        if event["event"] == "disconnect":
            return {}
        own = {"connection_id": event["meta"]["connection_id"]}
        state = json.loads(event["message"])
        return {"commands": [{"state": state, **own}, {"send": "kept", **own}]}

    secret = "whsec_" + "a" * 32
    async with relay(answer, f"--webhook_secret={secret}") as (backend, service):
        async with websockets.connect(service.ws_url) as client:
            for message in ('{"é": 1}', "null", "[2]"):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "kept"
        (disconnect,) = await backend.wait_for("disconnect", 1)
    states = [event["meta"].get("state") for event in backend.of("message")]
    assert states == [None, {"é": 1}, None]
    assert "state" not in backend.of("message")[2]["meta"]
    assert disconnect["meta"]["state"] == [2]
    for batch in backend.batches:
        assert Webhook(secret).verify(batch.body, batch.headers)["events"]


async def test_events_gather_while_a_batch_is_under_way(io_loop):
    """At most as many as permitted leave together, in the order of each connection."""
    gate = Gate()
    flags = ("--batch_lanes=1", "--batch_max_events=5")
    async with relay(gate, *flags) as (backend, service):
        async with websockets.connect(service.ws_url) as client:
            await client.send("0")
            await eventually(lambda: len(backend.batches) == 1)
            for number in range(1, 12):
                await client.send(f"{number}")
            pong = await client.ping()
            await asyncio.wait_for(pong, DEADLINE)
            gate.open()
            await backend.wait_for("message", 12)
        sizes = [len(batch.messages) for batch in backend.batches if batch.messages]
        assert sizes == [1, 5, 5, 1]
        assert [e["message"] for e in backend.of("message")] == [
            f"{number}" for number in range(12)
        ]
        await backend.wait_for("disconnect", 1)


async def test_failed_events_and_later_ones_are_retried(io_loop):
    """Outside the lane: other connections go on."""
    async def answer(batch: Batch) -> dict[str, Any]:
        failed = [
            event["id"]
            for event in batch.events
            if event.get("message") == "bad 1" and len(backend.batches) < 6
        ]
        return {"failed": failed, "commands": []}

    async with relay(answer, "--batch_lanes=1") as (backend, service):
        await asyncio.gather(
            talk(service, "bad 0", "bad 1", "bad 2", "bad 3"),
            *(talk(service, f"{n} 0", f"{n} 1") for n in range(5)),
        )
        disconnects = await backend.wait_for("disconnect", 6)
    by_name = defaultdict(list)
    accepted = set()
    for event in backend.of("message"):
        if event["id"] not in accepted:  # at least once
            accepted.add(event["id"])
            name, number = event["message"].split()
            by_name[name].append(int(number))
    assert by_name.pop("bad") == [0, 1, 2, 3]
    assert all(numbers == [0, 1] for numbers in by_name.values())
    assert all(event["meta"]["undelivered"] == 0 for event in disconnects)


@pytest.mark.parametrize("status", [400, 413, 422, 500])
async def test_batch_with_a_bad_event_is_split(io_loop, status):
    """Only that event is refused, or retried until its own deadline."""
    def answer(batch: Batch) -> int:
        return status if "bad" in batch.messages else 200

    flags = ("--batch_lanes=1", "--delivery_timeout=1")
    async with relay(answer, *flags) as (backend, service):
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(websockets.connect(service.ws_url))
                for _ in range(9)
            ]
            for number, client in enumerate(clients):
                await client.send("bad" if number == 4 else f"{number}")
            await backend.wait_for("message", 8)
            if status == 500:
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await asyncio.wait_for(clients[4].recv(), DEADLINE)
                assert closed.value.rcvd.code == 1013
        disconnects = await backend.wait_for("disconnect", 9)
    counts = [
        (event["meta"]["refused"], event["meta"]["undelivered"])
        for event in disconnects
    ]
    assert sorted(counts) == [(0, 0)] * 8 + [(1, 0) if status < 500 else (0, 1)]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 302])
async def test_batch_is_refused_unsplit(io_loop, status):
    """The configuration is wrong, not an event."""
    async with relay(
        lambda batch: status if batch.messages else 200, "--batch_lanes=1"
    ) as (backend, service):
        await talk(service, "one", "two")
        (disconnect,) = await backend.wait_for("disconnect", 1)
        assert disconnect["meta"]["refused"] == 2
        assert all(batch.earlier == 0 for batch in backend.batches)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_unavailable_backend_gets_the_same_batch_again(io_loop, status):
    """With the same id and the same body."""
    async with relay(
        lambda batch: status if batch.earlier < 2 else 200, "--batch_lanes=1"
    ) as (backend, service):
        await talk(service, "one")
        await backend.wait_for("disconnect", 1)
    first, second, third = backend.batches[:3]
    assert first.id == second.id == third.id
    assert first.body == second.body == third.body


@pytest.mark.parametrize("size", [0, READ_AT_ONCE])
async def test_commands_of_a_batch_are_carried_out(io_loop, size):
    """Echoes for all, by connection id; each command must have one."""
    def answer(batch: Batch) -> dict[str, Any]:
        return {
            "unknown": "x" * size,
            "commands": [
                {
                    "connection_id": event["meta"]["connection_id"],
                    "send": event["message"],
                }
                for event in batch.events
                if event["event"] == "message"
            ],
        }

    async def echoes(service: Service, name: int) -> None:
        async with websockets.connect(service.ws_url) as client:
            for number in range(20):
                await client.send(f"{name} {number}")
            for number in range(20):
                got = await asyncio.wait_for(client.recv(), DEADLINE)
                assert got == f"{name} {number}"

    async with relay(answer) as (backend, service):
        await asyncio.gather(*(echoes(service, name) for name in range(20)))
        await backend.wait_for("disconnect", 20)
        assert len(backend.batches) < 400


async def until_closed(client: websockets.ClientConnection) -> int:
    """Return the close code."""
    with pytest.raises(websockets.ConnectionClosed) as closed:
        while True:
            await asyncio.wait_for(client.recv(), DEADLINE)
    return closed.value.rcvd.code


async def expect_1013(service: Service, clients: int) -> None:
    """Send a message from each of so many clients, which must be closed with 1013."""
    connected = [await websockets.connect(service.ws_url) for _ in range(clients)]
    for client in connected:
        await client.send("one")
    for client in connected:
        assert await until_closed(client) == 1013


async def test_disconnect_event_is_in_no_batch_with_messages(io_loop):
    """Not of its connection, which may fail."""
    async def answer(batch: Batch) -> int:
        await asyncio.sleep(0.01)  # so that events gather
        return 200

    async with relay(answer, "--batch_lanes=1") as (backend, service):
        await asyncio.gather(*(talk(service, "a", "b", "c") for _ in range(30)))
        await backend.wait_for("disconnect", 30)
    assert max(len(batch.events) for batch in backend.batches) > 3
    for batch in backend.batches:
        ids: dict[str, set[str]] = defaultdict(set)
        for event in batch.events:
            ids[event["event"]].add(event["meta"]["connection_id"])
        assert not ids["message"] & ids["disconnect"]


async def test_batch_has_at_most_so_many_bytes(io_loop):
    """A single event may exceed them."""
    gate = Gate()
    flags = ("--batch_lanes=1", "--batch_max_bytes=5000")
    async with relay(gate, *flags) as (backend, service):
        async with websockets.connect(service.ws_url) as client:
            for size in (1, 2000, 2000, 2000, 9000, 1):
                await client.send("x" * size)
            await asyncio.wait_for(await client.ping(), DEADLINE)
            gate.open()
            await backend.wait_for("message", 6)
    sizes = [[len(m) for m in batch.messages] for batch in backend.batches]
    # The first may have left alone, before the others were read.
    assert [size for each in sizes for size in each] == [1, 2000, 2000, 2000, 9000, 1]
    assert [9000] in sizes
    assert all(sum(each) <= 5000 or len(each) == 1 for each in sizes)


async def test_bytes_of_a_batch_are_those_of_its_body(io_loop):
    """With all that it adds to its events, so that a limit of the backend fits."""
    gate = Gate()
    flags = ("--batch_lanes=1", "--batch_max_bytes=5000")
    async with relay(gate, *flags) as (backend, service):
        async with websockets.connect(service.ws_url) as client:
            for number in range(100):
                await client.send("é" * (number % 7))
            await asyncio.wait_for(await client.ping(), DEADLINE)
            gate.open()
            await backend.wait_for("message", 100)
    lengths = [len(batch.body) for batch in backend.batches if len(batch.events) > 1]
    assert 4400 < max(lengths) <= 5000


async def test_silent_backend_gets_halves(io_loop):
    """One event that makes it silent does not stop the others."""
    async def answer(batch: Batch) -> int:
        if "bad" in batch.messages:
            await asyncio.sleep(2)
        return 200

    flags = ("--batch_lanes=1", "--backend_timeout=1", "--delivery_timeout=2")
    async with relay(answer, *flags) as (backend, service):
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(websockets.connect(service.ws_url))
                for _ in range(4)
            ]
            for number, client in enumerate(clients):
                await client.send("bad" if number == 1 else f"{number}")
            await eventually(
                lambda: {"0", "2", "3"} <= {e["message"] for e in backend.of("message")}
            )
            assert await until_closed(clients[1]) == 1013


async def test_unavailable_backend_closes_clients_with_1013(io_loop):
    """With all their messages as undelivered; the disconnect event comes later."""
    is_away = True
    async with relay(
        lambda batch: 503 if is_away else 200, "--delivery_timeout=1"
    ) as (backend, service):
        clients = [await websockets.connect(service.ws_url) for _ in range(3)]
        for client in clients:
            await client.send("one")
            await client.send("two")
        for client in clients:
            assert await until_closed(client) == 1013
        is_away = False
        disconnects = await backend.wait_for("disconnect", 3)
        assert [event["meta"]["undelivered"] for event in disconnects] == [2, 2, 2]
        assert not backend.of("message")


@pytest.mark.parametrize("answer", [500, "failed"])
async def test_backend_that_takes_no_event_closes_clients_with_1013(io_loop, answer):
    """Each event waits longer for each attempt, and fails by its own deadline."""
    def reject(batch: Batch) -> int | dict[str, Any]:
        if not batch.messages:
            return 200
        ids = [event["id"] for event in batch.events]
        return {"failed": ids} if answer == "failed" else 500

    flags = ("--batch_lanes=1", "--delivery_timeout=1")
    async with relay(reject, *flags) as (backend, service):
        await expect_1013(service, 6)
        await backend.wait_for("disconnect", 6)
    assert not backend.of("message")
    # At once, then within 0.2, 0.4, 0.8 s and so on: about 40 with all parts.
    assert len(backend.batches) < 200


async def test_silent_backend_is_not_asked_about_each_event(io_loop):
    """When two events have failed alone, all that are late are given up."""
    async def answer(batch: Batch) -> int:
        if batch.messages:
            await asyncio.sleep(1)
        return 200

    flags = ("--batch_lanes=1", "--backend_timeout=0.3", "--delivery_timeout=0.5")
    async with relay(answer, *flags) as (backend, service):
        await expect_1013(service, 16)
        attempts = sum(bool(batch.messages) for batch in backend.batches)
    # 16, 16, 8, 4, 2, 1, 1; with all parts 33.
    assert attempts < 25


async def test_event_waits_as_long_as_the_backend_wants(io_loop):
    """Outside the lane, after it has failed alone."""
    times = []
    answers = [
        b"HTTP/1.1 500 Internal Server Error\r\nRetry-After: 1\r\n"
        b"Content-Length: 0\r\n\r\n"
    ]

    def script(kind: str) -> bytes:
        times.append(asyncio.get_running_loop().time())
        return answers.pop() if answers else b"HTTP/1.1 204 No Content\r\n\r\n"

    async with ScriptedBackend(script) as backend:
        flags = ("--backend=http", f"--batchuri={backend.url('batch')}")
        async with Service(*flags) as service:
            await talk(service, "one")
            await backend.wait_for("batch", 3)
    assert times[1] - times[0] > 0.9


async def test_cut_response_is_no_answer(io_loop):
    """It may have named failed events: the same batch is sent again."""
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.socketdock+json\r\n"
        b"Content-Length: 99\r\n\r\n{\"failed\": [" + ScriptedBackend.CUT
    ]
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    script = lambda kind: answers.pop() if answers else ok  # noqa: E731
    async with ScriptedBackend(script) as backend:
        async with Service(
            "--backend=http", f"--batchuri={backend.url('batch')}"
        ) as service:
            await talk(service, "one")
            await eventually(lambda: len(backend.of("batch")) >= 3)
    first, second, *_ = backend.of("batch")
    assert first == second


UNUSABLE = {
    "failed-string": {"failed": "x"},
    "failed-numbers": {"failed": [1]},
    "command-for-nobody": {"commands": [{"send": "x"}]},
    "malformed-command": {"commands": [{}]},
}


@pytest.mark.parametrize("answer", UNUSABLE.values(), ids=UNUSABLE)
async def test_malformed_response_accepts_the_batch(io_loop, answer):
    """Its status is valid: a repetition would get the same response."""
    answers = [answer]
    async with relay(
        lambda batch: answers.pop() if answers else 200, "--batch_lanes=1"
    ) as (backend, service):
        await talk(service, "one")
        await backend.wait_for("disconnect", 1)
        assert len({batch.id for batch in backend.batches}) == len(backend.batches) == 2
        await eventually(
            lambda: sum("cannot be used" in line for line in service.log) == 1
        )


async def test_slow_client_delays_its_own_messages_only(io_loop):
    """It gets all that the commands send; then its next message is posted."""
    large = "x" * 100_000

    def answer(batch: Batch) -> dict[str, Any]:
        return {
            "commands": [
                {
                    "connection_id": event["meta"]["connection_id"],
                    "send": large if event["message"].startswith("large") else "small",
                }
                for event in batch.events
                if event["event"] == "message"
                for _ in range(300 if event["message"] == "large 1" else 1)
            ]
        }

    # 30 MB: more than the kernels keep.
    flags = ("--batch_lanes=1", "--max_reply_size=40000000", "--send_timeout=60")
    async with relay(answer, *flags) as (backend, service):
        slow = await websockets.connect(service.ws_url, max_queue=1)
        slow.transport.pause_reading()
        await slow.send("large 1")
        await backend.wait_for("message", 1)
        async with websockets.connect(service.ws_url) as other:
            await slow.send("large 2")
            for _ in range(5):
                await other.send("hello")
                assert await asyncio.wait_for(other.recv(), DEADLINE) == "small"
            assert "large 2" not in [e["message"] for e in backend.of("message")]
        slow.transport.resume_reading()
        for _ in range(301):
            assert await asyncio.wait_for(slow.recv(), DEADLINE) == large
        await slow.close()


async def test_stop_waits_for_batches(io_loop):
    """Messages that were read are delivered, then the disconnect events."""
    gate = Gate()
    async with relay(gate, "--batch_lanes=1") as (backend, service):
        clients = [await websockets.connect(service.ws_url) for _ in range(5)]
        for client in clients:
            await client.send("one")
            await client.send("two")
            await asyncio.wait_for(await client.ping(), DEADLINE)
        service.process.terminate()
        for client in clients:
            assert await until_closed(client) == 1001
        gate.open()
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
    assert len(backend.of("message")) == 10
    disconnects = backend.of("disconnect")
    assert [event["meta"]["undelivered"] for event in disconnects] == [0] * 5


@pytest.mark.parametrize("flag", ["order_wait=3", "order_wait=inf", "max_unanswered=1"])
async def test_options_for_held_responses_have_no_effect(io_loop, flag):
    """The log says so, and nothing is demanded for them."""
    async with relay(lambda batch: 200, f"--{flag}") as (_, service):
        name = flag.partition("=")[0]
        assert any(f"--{name} has no effect" in line for line in service.log)


@pytest.mark.parametrize("option", ["messageuri", "disconnecturi"])
async def test_batches_exclude_single_events(io_loop, option):
    """The relay does not start."""
    service = Service(
        "--backend=http", "--batchuri=http://127.0.0.1:1/",
        f"--{option}=http://127.0.0.1:1/",
    )
    with pytest.raises(RuntimeError, match=f"--batchuri and --{option} exclude each"):
        await service.__aenter__()
    assert await service.process.wait() == 2
