"""OpenTelemetry spans, as an OTLP/HTTP server receives them."""

import asyncio
import json
import logging
import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import pytest
import websockets
from batches_test import BatchBackend
from faults import send_raw
from functions import RecordingFunction
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from service import DEADLINE, RecordingBackend, Service, eventually, refusal, tcp_server
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from backends import Attempt, AttemptOutcome
from handlers.telemetry.spans import Tracing

pytestmark = pytest.mark.gen_test(timeout=60)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01"
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

KINDS = ProtoSpan.SpanKind
ERROR = 2  # of a span's status
COARSE = 0.05  # seconds


class Span(NamedTuple):
    """A span as it was exported; ids in hexadecimal digits."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    status: int
    began: float
    ended: float
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    resource: dict[str, Any]
    links: list[tuple[str, str]]  # trace and span ids


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as Python has them."""
    return {
        attribute.key: getattr(
            attribute.value, attribute.value.WhichOneof("value") or "string_value"
        )
        for attribute in attributes
    }


class Collector:
    """Takes what is exported by OTLP over HTTP, for as long as the block runs."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.status = 200

    async def __aenter__(self) -> Self:
        collector = self

        class TracesHandler(RequestHandler):
            def post(self) -> None:
                assert self.request.headers["Content-Type"] == "application/x-protobuf"
                self.set_status(collector.status)
                if collector.status == 200:
                    collector.take(self.request.body, self.request.headers)
                    self.finish(ExportTraceServiceResponse().SerializeToString())

        sockets = bind_sockets(0, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self.server = HTTPServer(
            Application([("/v1/traces", TracesHandler)], log_function=lambda h: None)
        )
        self.server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.stop()
        await self.server.close_all_connections()

    def take(self, body: bytes, headers: Mapping[str, str]) -> None:
        self.bodies.append(body)
        self.headers.append(headers)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = plain(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                assert of_scope.scope.name == "socketdock"
                for span in of_scope.spans:
                    self.spans.append(
                        Span(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.kind,
                            span.status.code,
                            span.start_time_unix_nano / 1e9,
                            span.end_time_unix_nano / 1e9,
                            plain(span.attributes),
                            [(e.name, plain(e.attributes)) for e in span.events],
                            resource,
                            [
                                (link.trace_id.hex(), link.span_id.hex())
                                for link in span.links
                            ],
                        )
                    )

    def environment(self, **more: str) -> dict[str, str]:
        """Of a relay that exports to this collector, ten times a second."""
        return otel(self.port, **more)

    def of(self, event: str) -> list[Span]:
        """The spans of an event of that kind."""
        return [s for s in self.spans if s.attributes.get("socketdock.event") == event]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def otel(port: int, **more: str) -> dict[str, str]:
    """The environment of a relay that exports to that port."""
    # What the machine's own environment says must not reach what is tested.
    return {
        **{name: "" for name in os.environ if name.startswith("OTEL_")},
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


def traces_at(backend: RecordingBackend) -> dict[str, tuple[str, str, str]]:
    """What the backend got with each event, by webhook-id: trace, span and flags."""
    found = {}
    for _, _, headers in backend.events:
        parts = TRACEPARENT.fullmatch(headers["Traceparent"])
        assert parts is not None
        found[headers["Webhook-Id"]] = parts.groups()
    return found


def check_traces(collector: Collector, backend: RecordingBackend) -> None:
    """Each event has one span, with the ids that its backend received."""
    spans = {
        span.attributes["socketdock.event_id"]: (span.trace_id, span.span_id, "01")
        for span in collector.spans
        if "socketdock.event" in span.attributes
    }
    assert spans == traces_at(backend)


async def visit(service: Service, *messages: str, **headers: str) -> None:
    async with websockets.connect(
        service.ws_url, additional_headers=headers
    ) as client:
        for message in messages:
            await client.send(message)


async def sent(url: str, body: bytes, content_type: str, *more: str) -> int:
    """The status of a send on a connection that is kept: then no handler is made."""
    lines = (
        f"POST {urlsplit(url).path} HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *more,
    )
    request = "\r\n".join((*lines, "", "")).encode() + body
    received = await send_raw(url, request, answers=1, deadline=DEADLINE)
    return received.statuses[0]


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_one_trace_from_the_client_to_the_backend_and_back(io_loop, server):
    """The client's span is the parent of the handshake's, that of the events'."""
    by_backend = f"00-{TRACE_ID}-00f067aa0ba902b7-01"

    async def reply(handler: RequestHandler, event: dict) -> None:
        # As the backend's own spans would: below that of the event.
        url, trace = event["meta"]["send"], f"Traceparent: {by_backend}"
        assert await sent(url, b"{}", "text/plain", trace) == 200
        assert await sent(url, b"{}", "text/plain", trace, "Connection: close") == 200
        assert await sent(url, b"\xff", "text/plain", trace) == 400

    async with Collector() as collector, RecordingBackend() as backend:
        backend.answers["message"] = reply
        async with Service(
            *backend.flags(),
            "--otel",
            f"--http_server={server}",
            "--instance_name=relay-7",
            environment=collector.environment(),
        ) as service:
            async with websockets.connect(
                service.ws_url, additional_headers={"traceparent": SAMPLED}
            ) as client:
                await client.send("hello")
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "{}"
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "{}"
            await backend.wait_for("disconnect", 1)
            await eventually(lambda: len(collector.spans) == 7)
        assert len(collector.spans) == 7
        check_traces(collector, backend)
    (connect_event, *_) = backend.of("connect")
    connection_id = connect_event["meta"]["connection_id"]

    (handshake,) = collector.named("GET /ws")
    assert handshake.trace_id == TRACE_ID
    assert (handshake.parent_id, handshake.kind) == (SPAN_ID, KINDS.SPAN_KIND_SERVER)
    assert handshake.status == 0
    assert handshake.attributes == {
        "http.request.method": "GET",
        "http.route": "/ws",
        "http.response.status_code": 101,
        "url.path": "/ws",
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "socketdock.outcome": "opened",
        "socketdock.connection_id": connection_id,
    }
    for event in ("connect", "message", "disconnect"):
        (span,) = collector.of(event)
        assert (span.trace_id, span.parent_id) == (TRACE_ID, handshake.span_id)
        assert (span.name, span.kind) == (f"POST /{event}", KINDS.SPAN_KIND_CLIENT)
        assert (span.status, span.events) == (0, [])
        number = {"message": "1"}.get(event, event)
        assert span.attributes == {
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "server.address": "127.0.0.1",
            "server.port": backend.port,
            "url.full": backend.url(event),
            "url.template": f"/{event}",
            "socketdock.event": event,
            "socketdock.event_id": f"{connection_id}-{number}",
            "socketdock.connection_id": connection_id,
            "socketdock.outcome": "delivered",
        }
    (connect,), (message,) = collector.of("connect"), collector.of("message")
    # Attempts are measured by the loop's clock, which may be coarse.
    assert handshake.began - COARSE <= connect.began <= connect.ended
    assert connect.ended <= handshake.ended + COARSE
    assert abs(handshake.began - time.time()) < DEADLINE
    sends = collector.named("POST /socket/{id}/send")
    assert sorted(s.attributes["http.response.status_code"] for s in sends) == [
        200, 200, 400,
    ]
    for send in sends:
        assert (send.trace_id, send.parent_id) == (TRACE_ID, "00f067aa0ba902b7")
        assert (send.kind, send.status) == (KINDS.SPAN_KIND_SERVER, 0)
        assert message.began - COARSE <= send.began <= send.ended
        assert send.ended <= message.ended + COARSE
        del send.attributes["http.response.status_code"]
        assert send.attributes == {
            "http.request.method": "POST",
            "http.route": "/socket/{id}/send",
            "url.path": f"/socket/{connection_id}/send",
            "url.scheme": "http",
            "socketdock.connection_id": connection_id,
        }
    (resource,) = {json.dumps(span.resource) for span in collector.spans}
    attributes = json.loads(resource)
    assert attributes["service.name"] == "socketdock"
    assert attributes["service.instance.id"].startswith("relay-7/")
    assert attributes["service.version"]
    assert len({span.span_id for span in collector.spans}) == 7


async def test_sends_that_wait_for_a_slow_client_have_spans(io_loop):
    """Each one gets its span when it is answered."""
    async with Collector() as collector, RecordingBackend() as backend:
        async with Service(
            *backend.flags("message"),
            "--otel",
            "--max_send_buffer=100000000",
            environment=collector.environment(),
        ) as service:
            async with websockets.connect(
                service.ws_url, max_queue=1, max_size=None
            ) as client:
                await client.send("hello")
                (event,) = await backend.wait_for("message", 1)
                sends = [
                    asyncio.create_task(
                        sent(event["meta"]["send"], bytes(2**20), "text/plain")
                    )
                    for _ in range(24)  # MiB, of which the kernel takes some
                ]
                info = event["meta"]["send"].removesuffix("/send")
                while True:  # until the relay has all of them
                    answer = await backend.call(info, "GET")
                    if json.loads(answer.body)["messages_out"] == len(sends):
                        break
                for _ in sends:
                    await asyncio.wait_for(client.recv(), DEADLINE)
                assert {await send for send in sends} == {200}
            route = "POST /socket/{id}/send"
            await eventually(lambda: len(collector.named(route)) == len(sends))
        assert len(collector.named(route)) == len(sends)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
async def test_bulk_callback_has_a_span(io_loop, connection):
    """It is a child of the backend's; a handler answers if the connection is closed."""
    token, trace, parent = "0123456789abcdef", "ab" * 16, "cd" * 8
    async with Collector() as collector, RecordingBackend() as backend:
        flags = ("--otel", f"--callback_token={token}")
        async with Service(*flags, environment=collector.environment()) as service:
            answer = await backend.call(
                f"{service.callback_url}/commands",
                body=b'{"commands": []}',
                headers={
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/json",
                    "traceparent": f"00-{trace}-{parent}-01",
                    "Connection": connection,
                },
            )
            assert answer.code == 200
        (span,) = collector.named("POST /commands")
    assert (span.trace_id, span.parent_id) == (trace, parent)
    assert span.attributes["http.route"] == span.attributes["url.path"] == "/commands"
    assert span.attributes["http.response.status_code"] == 200


async def test_send_of_an_sdk_has_a_span(io_loop):
    """Like any other send; a description has none."""
    trace, parent = "ab" * 16, "cd" * 8
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    async with Collector() as collector, RecordingBackend() as backend:
        async with RecordingFunction() as function:
            flags = ("--otel", "--backend=apigateway", f"--functionuri={function.url}")
            async with Service(*flags, environment=collector.environment()) as service:
                async with websockets.connect(service.ws_url) as client:
                    event = await function.event("CONNECT")
                    connection_id = event["requestContext"]["connectionId"]
                    path = f"/local/%40connections/{connection_id}"
                    url = f"{service.callback_url}{path}"
                    answer = await backend.call(url, "GET", headers=headers)
                    assert answer.code == 200
                    answer = await backend.call(url, headers=headers, body=b"hello")
                    assert answer.code == 200
                    assert await client.recv() == "hello"
        (span,) = collector.named("POST /@connections/{id}")
    assert (span.trace_id, span.parent_id) == (trace, parent)
    assert span.attributes["url.path"] == path
    assert span.attributes["socketdock.connection_id"] == connection_id
    assert span.attributes["http.response.status_code"] == 200


async def test_without_a_client_trace_each_event_begins_one(io_loop):
    """Except the connect event, which belongs to the handshake's trace."""
    async with Collector() as collector, RecordingBackend() as backend:
        async with Service(
            *backend.flags(), "--otel", environment=collector.environment()
        ) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("one")
                await client.send("two")
                events = await backend.wait_for("message", 2)
                assert await sent(events[0]["meta"]["send"], b"", "text/plain") == 200
            await backend.wait_for("disconnect", 1)
            await eventually(lambda: len(collector.spans) == 6)
        check_traces(collector, backend)
    (handshake,), (connect,) = collector.named("GET /ws"), collector.of("connect")
    assert (connect.trace_id, connect.parent_id) == (
        handshake.trace_id,
        handshake.span_id,
    )
    others = [span for span in collector.spans if span is not connect]
    assert {span.parent_id for span in others} == {""}
    assert len({span.trace_id for span in others}) == 5


async def test_span_of_a_batch_links_its_events(io_loop):
    """Each event keeps its own trace; the request has that of the batch."""
    async with Collector() as collector, BatchBackend() as backend:
        async with Service(
            *backend.flags(), "--otel", environment=collector.environment()
        ) as service:
            await visit(service, "one", "two", traceparent=SAMPLED)
            await backend.wait_for("disconnect", 1)
        batches = {batch.id: batch for batch in backend.batches}
        spans = {
            span.attributes["socketdock.batch_id"]: span
            for span in collector.spans
            if "socketdock.batch_id" in span.attributes
        }
        assert spans.keys() == batches.keys()
        for batch_id, span in spans.items():
            batch = batches[batch_id]
            _, trace_id, span_id, _ = batch.headers["Traceparent"].split("-")
            assert (span.trace_id, span.span_id) == (trace_id, span_id)
            assert span.links == [
                tuple(event["traceparent"].split("-")[1:3]) for event in batch.events
            ]
            assert {trace for trace, _ in span.links} == {TRACE_ID}
        assert len(collector.of("message")) == 2


async def test_retried_event_has_one_span(io_loop):
    """From its first attempt to its last; failures are events of the span."""
    statuses = iter([503, 500, 200, 404])

    async def answer(handler: RequestHandler, event: dict) -> None:
        handler.set_status(next(statuses))

    async def never(handler: RequestHandler, event: dict) -> None:
        handler.set_status(500)

    async with Collector() as collector, RecordingBackend() as backend:
        backend.answers["message"], backend.answers["disconnect"] = answer, never
        async with Service(
            *backend.flags(),
            "--otel",
            "--disconnect_timeout=0.5",
            environment=collector.environment(),
        ) as service:
            await visit(service, "one", "two", traceparent=SAMPLED)
            await eventually(lambda: len(collector.spans) == 5)
        check_traces(collector, backend)
        attempts = len(backend.of("disconnect"))
    first, second = collector.of("message")
    assert first.status == 0
    assert first.attributes["http.request.resend_count"] == 2
    assert first.attributes["http.response.status_code"] == 200
    assert first.events == [
        (
            "attempt failed",
            {"socketdock.outcome": "unreachable", "http.response.status_code": 503},
        ),
        (
            "attempt failed",
            {"socketdock.outcome": "error", "http.response.status_code": 500},
        ),
    ]
    assert second.attributes["socketdock.outcome"] == "refused"
    assert second.attributes["error.type"] == "404"
    assert (second.status, second.events) == (ERROR, [])
    (disconnect,) = collector.of("disconnect")
    assert disconnect.attributes["socketdock.outcome"] == "given_up"
    assert disconnect.attributes["error.type"] == "given_up"
    assert disconnect.attributes["http.request.resend_count"] == attempts - 1
    assert (disconnect.status, len(disconnect.events)) == (ERROR, attempts)
    assert disconnect.ended - disconnect.began >= 0.4


async def test_message_that_is_given_up_has_a_span(io_loop):
    """Those behind it were never attempted, and have none."""
    async with Collector() as collector, RecordingBackend() as backend:
        # Nobody listens there.
        flags = (
            "--backend=http",
            f"--messageuri=http://127.0.0.1:{backend.port}/nowhere",
        )
        async with Service(
            *flags,
            "--otel",
            "--delivery_timeout=0.5",
            environment=collector.environment(),
        ) as service:
            backend.server.stop()
            async with websockets.connect(service.ws_url) as client:
                await client.send("one")
                await client.send("two")
                await client.wait_closed()
            assert client.close_code == 1013
            await eventually(lambda: bool(collector.of("message")))
    (span,) = collector.of("message")
    assert span.attributes["socketdock.outcome"] == "given_up"
    assert span.attributes["socketdock.event_id"].endswith("-1")
    assert "http.response.status_code" not in span.attributes
    assert {tuple(e.values()) for _, e in span.events} == {("unreachable",)}


async def test_rejected_handshakes_have_spans(io_loop):
    """Rejected by the backend, by the relay, and without a decision."""
    statuses = iter([403, 500])

    async def answer(handler: RequestHandler, event: dict) -> None:
        handler.set_status(next(statuses))

    async with Collector() as collector, RecordingBackend() as backend:
        backend.answers["connect"] = answer
        async with Service(
            *backend.flags(), "--otel", environment=collector.environment()
        ) as service:
            for headers in ({}, {}, {"Origin": "https://evil.example"}):
                with pytest.raises(websockets.InvalidStatus):
                    await visit(service, **headers)
            await backend.wait_for("disconnect", 1)
            await eventually(lambda: len(collector.spans) == 6)
        check_traces(collector, backend)
    assert [
        (
            span.attributes["socketdock.outcome"],
            span.attributes["http.response.status_code"],
            span.attributes.get("error.type"),
            span.status,
            "socketdock.connection_id" in span.attributes,
        )
        for span in collector.named("GET /ws")
    ] == [
        ("refused", 403, None, 0, True),
        ("no_decision", 503, "503", ERROR, True),
        ("rejected", 403, None, 0, False),
    ]
    refusal, failure = collector.of("connect")
    assert (refusal.attributes["socketdock.outcome"], refusal.status) == ("refused", 0)
    assert (failure.attributes["error.type"], failure.status) == ("500", ERROR)


async def test_in_process_backend_has_spans(io_loop):
    """For each event, without HTTP."""
    async with Collector() as collector:
        async with Service("--otel", environment=collector.environment()) as service:
            await visit(service, "hello", traceparent=SAMPLED)
            await eventually(lambda: len(collector.spans) == 4)
            await visit(service, "hello")
            await eventually(lambda: len(collector.spans) == 8)
    traced, untraced = collector.named("GET /ws")
    for event in ("connect", "message", "disconnect"):
        span, other = collector.named(event)
        assert (span.trace_id, span.parent_id) == (TRACE_ID, traced.span_id)
        assert other.parent_id == (untraced.span_id if event == "connect" else "")
        assert span.kind == other.kind == KINDS.SPAN_KIND_INTERNAL
        assert span.attributes["socketdock.outcome"] == "delivered"


async def test_unsampled_spans_are_not_exported(io_loop):
    """The sampler decides; the flags pass its decision to the backend."""
    async with Collector() as collector, RecordingBackend() as backend:
        environment = collector.environment(OTEL_TRACES_SAMPLER="always_off")
        async with Service(
            *backend.flags(), "--otel", environment=environment
        ) as service:
            await visit(service, "one", traceparent=SAMPLED)
            async with websockets.connect(service.ws_url) as client:
                await client.send("one")
                url = (await backend.wait_for("message", 2))[1]["meta"]["send"]
                traceparent = f"traceparent: {SAMPLED}"
                for more in ((), (traceparent,), (traceparent, "Connection: close")):
                    assert await sent(url, b"", "text/plain", *more) == 200
            await backend.wait_for("disconnect", 2)
            found = list(traces_at(backend).values())
            assert {flags for *_, flags in found} == {"00"}
            assert [trace_id for trace_id, *_ in found].count(TRACE_ID) == 3
        assert not collector.bodies


async def test_client_sampling_decision_counts_by_default(io_loop):
    """As with `parentbased_always_on`: an unsampled trace stays unsampled."""
    async with Collector() as collector, RecordingBackend() as backend:
        async with Service(
            *backend.flags(), "--otel", environment=collector.environment()
        ) as service:
            for count, flags in enumerate(("00", "02"), 1):
                await visit(service, "one", traceparent=f"{SAMPLED[:-2]}{flags}")
                await backend.wait_for("disconnect", count)
            assert [flags for *_, flags in traces_at(backend).values()] == [
                "00", "00", "00", "02", "02", "02",
            ]
        assert not collector.spans


async def test_share_of_traces_is_sampled(io_loop):
    """Exactly those whose flags the backend got as sampled."""
    async with Collector() as collector, RecordingBackend() as backend:
        environment = collector.environment(
            OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.3"
        )
        async with Service(
            *backend.flags("message", "disconnect"), "--otel", environment=environment
        ) as service:
            await visit(service, *map(str, range(300)))
            await backend.wait_for("disconnect", 1)
            sampled = {
                (trace_id, span_id)
                for trace_id, span_id, flags in traces_at(backend).values()
                if flags == "01"
            }
        events = [s for s in collector.spans if "socketdock.event" in s.attributes]
        assert {(span.trace_id, span.span_id) for span in events} == sampled
        assert 30 < len(sampled) < 180  # 90, more or less


def tracing_in_process(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]
) -> Tracing:
    """In the test's own process; it has to be closed."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    return Tracing("0", "test/0")


def failure(number: int) -> Attempt:
    """Make an attempt of an event that may be retried."""
    return attempt(number, "unreachable")


def attempt(
    number: int, outcome: AttemptOutcome, status: int | None = None
) -> Attempt:
    """Make an attempt of an event."""
    traceparent = f"00-{number:032x}-{number:016x}-01"
    return Attempt(
        "message", "c", f"c-{number}", traceparent, outcome, status, 0.0, "http://a/b"
    )


async def test_events_that_may_be_retried_are_bounded(io_loop, monkeypatch):
    """The span of the oldest ends early; the remaining ones end at the stop."""
    monkeypatch.setattr("handlers.telemetry.spans.MAX_FAILED", 3)
    async with Collector() as collector:
        tracing = tracing_in_process(monkeypatch, collector.environment())
        for number in range(1, 6):
            tracing.attempted(failure(number))
            tracing.attempted(failure(number))
        assert len(tracing._failed) == 3
        await eventually(lambda: len(collector.spans) == 2)
        await tracing.close()
    assert [span.attributes["socketdock.event_id"] for span in collector.spans] == [
        "c-1", "c-2", "c-3", "c-4", "c-5",
    ]
    for span in collector.spans:
        assert span.attributes["socketdock.outcome"] == "given_up"
        assert span.attributes["http.request.resend_count"] == 1


async def test_failures_of_one_event_are_bounded(io_loop, monkeypatch):
    """All are counted, and the first ones are listed."""
    monkeypatch.setattr("handlers.telemetry.shapes.MAX_FAILURES", 3)
    async with Collector() as collector:
        tracing = tracing_in_process(monkeypatch, collector.environment())
        for _ in range(10):
            tracing.attempted(failure(1))
        tracing.attempted(attempt(1, "delivered", 200))
        await tracing.close()
    (span,) = collector.spans
    assert len(span.events) == 3
    assert span.attributes["http.request.resend_count"] == 10


async def test_queued_spans_are_bounded(io_loop, monkeypatch, caplog):
    """More spans at once are dropped, and counted."""
    monkeypatch.setattr("handlers.telemetry.spans.MAX_ENDED", 300)
    async with Collector() as collector:
        tracing = tracing_in_process(monkeypatch, collector.environment())
        for number in range(1, 501):
            tracing.attempted(attempt(number, "delivered"))
        await eventually(lambda: len(collector.spans) == 300)
        await tracing.close()
    assert "200 of 500 spans were not exported" in caplog.text


async def test_warnings_of_the_sdk_are_logged_once(io_loop, monkeypatch, caplog):
    """Without their arguments; the number of different warnings is limited."""
    monkeypatch.setattr("handlers.telemetry.exporter.MAX_WARNINGS", 3)
    tracing = tracing_in_process(monkeypatch, otel(9))
    sdk_logger = logging.getLogger("opentelemetry.sdk.trace")
    try:
        for number in range(5):
            sdk_logger.warning("the value %-5.1f of %s is none", number, "leak")
            sdk_logger.info("nobody needs to know")
        assert [record.getMessage() for record in caplog.records] == [
            "OpenTelemetry: the value … of … is none"
        ]
        for number in range(5):
            sdk_logger.warning(f"sentence {number}")
        assert len(caplog.records) == 3
    finally:
        await tracing.close()


SAMPLERS = (
    ("always_on", ""),
    ("always_off", ""),
    ("traceidratio", "0.3"),
    ("traceidratio", "1e-9"),
    ("parentbased_always_on", ""),
    ("parentbased_always_off", ""),
    ("parentbased_traceidratio", "0.3"),
    ("parentbased_traceidratio", "1.0"),
)


@pytest.mark.parametrize(("name", "argument"), SAMPLERS)
async def test_new_traces_are_sampled_as_the_sdk_would(
    io_loop, monkeypatch, name, argument
):
    """Without calling it for each; an unknown sampler is called."""
    tracing = tracing_in_process(
        monkeypatch,
        otel(9, OTEL_TRACES_SAMPLER=name, OTEL_TRACES_SAMPLER_ARG=argument),
    )
    try:
        ids = [f"{number:032x}" for number in (1, 2**63, 2**64 - 1, 2**64, 2**128 - 1)]
        ids += [random.Random(number).randbytes(16).hex() for number in range(1000)]
        assert tracing._bound is not None
        decided = [tracing.sample(trace_id) for trace_id in ids]
        tracing._bound = None
        assert decided == [tracing.sample(trace_id) for trace_id in ids]
    finally:
        await tracing.close()


async def test_last_spans_are_exported_at_the_stop(io_loop):
    """The SDK's batches are flushed."""
    async with Collector() as collector, RecordingBackend() as backend:
        environment = collector.environment(OTEL_BSP_SCHEDULE_DELAY="3600000")
        async with Service(
            *backend.flags(), "--otel", environment=environment
        ) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                await backend.wait_for("message", 1)
                assert not collector.spans
                service.process.terminate()
                await client.wait_closed()
            await asyncio.wait_for(service.process.wait(), DEADLINE)
            assert len(collector.spans) == 4
        check_traces(collector, backend)


@pytest.mark.parametrize("status", [0, 401, 503])
async def test_failing_collector_is_logged_once(io_loop, status):
    """The relay works; lost spans are counted, and the recovery is logged."""
    async with Collector() as collector, RecordingBackend() as backend:
        environment = collector.environment(OTEL_EXPORTER_OTLP_TIMEOUT="3")
        if status == 0:  # nobody listens there
            collector.server.stop()
        collector.status = status
        async with Service(
            *backend.flags(), "--otel", environment=environment
        ) as service:
            for count in range(1, 6):
                await visit(service, "hello")
                await backend.wait_for("disconnect", count)
                if count == 1:
                    await eventually(
                        lambda: any("can't be exported" in line for line in service.log)
                    )
            began = time.monotonic()
            service.process.terminate()
            await asyncio.wait_for(service.process.wait(), DEADLINE)
            assert time.monotonic() - began < 7.5
        lines = [line for line in service.log if "xported" in line]
        assert len(lines) == 2, service.log
        # On a machine that is that slow, its time may be over before it is refused.
        reasons = (
            [f"the collector answered {status}"]
            if status
            else ["Connection refused", "timed out"]
        )
        assert any(reason in lines[0] for reason in reasons), lines[0]
        assert "20 of 20 spans were not exported" in lines[1]
        assert not any("OpenTelemetry:" in line for line in service.log)


async def test_collector_that_is_back_gets_spans(io_loop):
    """The log reports the failure and the recovery."""
    async with Collector() as collector, RecordingBackend() as backend:
        collector.status = 400
        async with Service(
            *backend.flags(), "--otel", environment=collector.environment()
        ) as service:
            await visit(service, "hello")
            await eventually(
                lambda: any("can't be exported" in line for line in service.log)
            )
            collector.status = 200
            await visit(service, "hello")
            await eventually(
                lambda: any("exported again" in line for line in service.log)
            )
        assert collector.spans
        assert any("spans were not exported" in line for line in service.log)


async def test_hanging_collector_delays_the_stop_for_seconds(io_loop):
    """It delays nothing else: spans that it does not accept are lost."""

    async def say_nothing(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.read(-1)

    async with tcp_server(say_nothing) as port, RecordingBackend() as backend:
        environment = otel(port, OTEL_EXPORTER_OTLP_TIMEOUT="600")
        async with Service(
            *backend.flags(), "--otel", environment=environment
        ) as service:
            await visit(service, "hello")
            await backend.wait_for("disconnect", 1)
            service.process.terminate()
            await asyncio.wait_for(service.process.wait(), DEADLINE)
        assert service.process.returncode == 0
        assert any("4 of 4 spans were not exported" in line for line in service.log)


async def test_queue_of_the_sdk_is_bounded(io_loop):
    """More spans are dropped and counted; the SDK's warning is logged once."""
    async with Collector() as collector, RecordingBackend() as backend:
        environment = collector.environment(
            OTEL_BSP_SCHEDULE_DELAY="3600000",
            OTEL_BSP_MAX_QUEUE_SIZE="20",
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE="20",
            OTEL_EXPORTER_OTLP_TIMEOUT="1",
        )
        collector.server.stop()
        async with Service(
            *backend.flags("message"), "--otel", environment=environment
        ) as service:
            await visit(service, *map(str, range(200)))
            await backend.wait_for("message", 200)
        lines = [line for line in service.log if "spans were not exported" in line]
        assert len(lines) == 1
        assert " 201 of 201 spans" in lines[0]
        assert sum("Queue full" in line for line in service.log) <= 1


async def test_no_span_holds_a_secret(io_loop):
    """No body, header value or query; and the log has no text of the collector."""
    async with Collector() as collector, RecordingBackend() as backend:
        flags = [
            f"{flag}?key=leak-target" if "uri=" in flag else flag
            for flag in backend.flags()
        ]
        environment = collector.environment(
            OTEL_EXPORTER_OTLP_ENDPOINT="",
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=(
                f"http://127.0.0.1:{collector.port}/v1/traces?key=leak-endpoint"
            ),
            OTEL_EXPORTER_OTLP_HEADERS="x-api-key=leak-key,leak-no-pair",
            OTEL_TRACES_SAMPLER="leak-sampler",
            SOCKETDOCK_CALLBACK_TOKEN="leak-token-0123456789",
        )
        async with Service(
            *flags,
            "--otel",
            "--logging=debug",
            "--callback_capability",
            environment=environment,
        ) as service:
            async with websockets.connect(
                f"{service.ws_url}?leak-query",
                additional_headers={
                    "Cookie": "leak-cookie",
                    "tracestate": "leak=state",
                    "baggage": "leak=baggage",
                    "User-Agent": "leak-agent",
                },
            ) as client:
                await client.send("leak-message")
                (event,) = await backend.wait_for("message", 1)
                url, _, key = event["meta"]["send"].partition("?key=")
                for token, query in (
                    ("leak-token-0123456789", f"key={key}"),
                    ("leak-wrong", f"key={key[:-1]}"),
                ):
                    await backend.call(
                        f"{url}?{query}&type=text&leak-key",
                        body=b"leak-answer",
                        headers={"Authorization": f"Bearer {token}"},
                    )
                # A path chosen by a peer must not be exported.
                strange = f"{service.callback_url}/socket/stranger/send"
                answer = await backend.call(strange)
                assert answer.code == 401
            await backend.wait_for("disconnect", 1)
            await eventually(lambda: len(collector.spans) == 6)
        assert collector.headers[0]["x-api-key"] == "leak-key"
        exported = b"".join(collector.bodies)
        assert b"leak" not in exported
        assert key[:-1].encode() not in exported
        assert b"stranger" not in exported
        assert "leak" not in "\n".join(service.log)
        sdk = [line for line in service.log if "OpenTelemetry:" in line]
        assert len(sdk) == 2  # the header that is no pair, and the sampler
        statuses = [
            span.attributes["http.response.status_code"]
            for span in collector.named("POST /socket/{id}/send")
        ]
        assert statuses == [200, 401]


async def test_service_names_can_be_set(io_loop):
    """By OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES."""
    async with Collector() as collector:
        environment = collector.environment(
            OTEL_SERVICE_NAME="edge",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test,service.version=mine",
        )
        async with Service("--otel", environment=environment) as service:
            await visit(service)
            await eventually(lambda: bool(collector.spans))
    resource = collector.spans[0].resource
    assert resource["service.name"] == "edge"
    assert resource["deployment.environment"] == "test"
    assert resource["service.version"] == "mine"
    assert resource["service.instance.id"]


async def test_disabled_sdk_records_nothing(io_loop):
    """By OTEL_SDK_DISABLED."""
    async with Collector() as collector, RecordingBackend() as backend:
        environment = collector.environment(OTEL_SDK_DISABLED="true")
        async with Service(
            *backend.flags(), "--otel", environment=environment
        ) as service:
            await visit(service, "hello")
            await backend.wait_for("disconnect", 1)
            assert {flags for *_, flags in traces_at(backend).values()} == {"00"}
        assert not collector.bodies


def test_invalid_otel_variable_is_one_line():
    """Exit status 2, if the SDK rejects it."""
    sentence = refusal("--otel", OTEL_BSP_MAX_QUEUE_SIZE="0")
    assert "--otel" in sentence
    assert "max_queue_size" in sentence
