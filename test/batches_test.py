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
from service import DEADLINE, Service, eventually
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

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


async def test_events_gather_while_a_batch_is_under_way(io_loop):
    """At most as many as permitted leave together, in the order of each connection."""
    free = asyncio.Event()

    async def answer(batch: Batch) -> int:
        await free.wait()
        return 200

    flags = ("--batch_lanes=1", "--batch_max_events=5")
    async with relay(answer, *flags) as (backend, service):
        async with websockets.connect(service.ws_url) as client:
            await client.send("0")
            await eventually(lambda: len(backend.batches) == 1)
            for number in range(1, 12):
                await client.send(f"{number}")
            pong = await client.ping()
            await asyncio.wait_for(pong, DEADLINE)
            free.set()
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


async def test_commands_of_a_batch_are_carried_out(io_loop):
    """Echoes for all, by connection id; each command must have one."""
    def answer(batch: Batch) -> dict[str, Any]:
        return {
            "commands": [
                {
                    "connection_id": event["meta"]["connection_id"],
                    "send": event["message"],
                }
                for event in batch.events
                if event["event"] == "message"
            ]
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
