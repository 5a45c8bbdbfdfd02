"""Trace context: which trace an event belongs to."""

import asyncio
import re
import signal
import sys

import pytest
import websockets
from service import DEADLINE, RecordingBackend, Service, ended, refusal
from tornado.web import RequestHandler

from handlers.telemetry.trace_context import trace_context

pytestmark = pytest.mark.gen_test(timeout=60)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"
GOOD = f"00-{TRACE_ID}-{SPAN_ID}-01"

# As they come, and the flags that go on with them.
WELL_FORMED = [
    (GOOD, "01"),
    (f"00-{TRACE_ID}-{SPAN_ID}-00", "00"),
    (f"00-{TRACE_ID}-{SPAN_ID}-03", "03"),  # sampled, and the id is random
    (f"00-{TRACE_ID}-{SPAN_ID}-02", "02"),
    (f"00-{TRACE_ID}-{SPAN_ID}-ff", "03"),  # unknown flags are cleared
    (f"00-{TRACE_ID}-{SPAN_ID}-fc", "00"),
    (f"01-{TRACE_ID}-{SPAN_ID}-01", "01"),  # of a version to come, only "sampled"
    (f"cc-{TRACE_ID}-{SPAN_ID}-ff", "01"),
    (f"cc-{TRACE_ID}-{SPAN_ID}-fe-what-the-future-will-be-like", "00"),
    (f"fe-{TRACE_ID}-{SPAN_ID}-01-", "01"),
    (f"  {GOOD}\t", "01"),  # as HTTP has it, a header's value is without these
]

MALFORMED = [
    "",
    "nonsense",
    TRACE_ID,
    GOOD[:-1],
    GOOD[:-3],
    f"{GOOD}0",
    f"{GOOD}-",
    f"{GOOD}-00",
    f"{GOOD}, {GOOD}",
    GOOD[1:],
    GOOD.upper(),
    GOOD.replace("-", "_"),
    GOOD.replace("-", ""),
    f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{SPAN_ID.upper()}-01",
    f"00-{TRACE_ID}-{SPAN_ID}-0A",
    f"0X-{TRACE_ID}-{SPAN_ID}-01",
    f"00-{TRACE_ID[:-1]}g-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{SPAN_ID[:-1]}g-01",
    f"00-{TRACE_ID}-{SPAN_ID}-0g",
    f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
    f"00-{TRACE_ID}0-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{SPAN_ID[:-1]}-01",
    f"00-{TRACE_ID}-{SPAN_ID}0-01",
    f"00-{'0' * 32}-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{'0' * 16}-01",
    f"ff-{TRACE_ID}-{SPAN_ID}-01",
    f"ff-{TRACE_ID}-{SPAN_ID}-01-more",
    f"cc-{TRACE_ID}-{SPAN_ID}-01.more",
    f"cc-{TRACE_ID}-{SPAN_ID}-011",
    f"00 -{TRACE_ID}-{SPAN_ID}-01",
]

TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def traces(backend: RecordingBackend) -> list[tuple[str, str, str, str]]:
    """Of each event that came: its kind, and its trace id, span id and flags."""
    found = []
    for kind, _, headers in backend.events:
        parts = TRACEPARENT.fullmatch(headers["Traceparent"])
        assert parts is not None, headers["Traceparent"]
        found.append((kind, *parts.groups()))
    return found


async def visit(
    service: Service, backend: RecordingBackend, *traceparents: str
) -> list[tuple[str, str, str, str]]:
    """The traces of the events of a client that sends two messages and leaves."""
    before, ended = len(backend.events), len(backend.of("disconnect"))
    headers = [("traceparent", value) for value in traceparents]
    async with websockets.connect(
        service.ws_url, additional_headers=headers, compression=None
    ) as client:
        await client.send("one")
        await client.send("two")
    await backend.wait_for("disconnect", ended + 1)
    found = traces(backend)[before:]
    assert [kind for kind, *_ in found] == [
        "connect", "message", "message", "disconnect",
    ]
    return found


def are_new(found: list[tuple[str, str, str, str]]) -> bool:
    """Whether each event began its own trace, which is not recorded."""
    trace_ids = {trace_id for _, trace_id, _, _ in found}
    return (
        len(trace_ids) == len(found)
        and TRACE_ID not in trace_ids
        and {flags for *_, flags in found} == {"00"}
    )


async def test_valid_trace_is_continued(io_loop):
    """Each event has its trace id and flags, and a new span id."""
    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        for value, flags in WELL_FORMED:
            found = await visit(service, backend, value)
            assert {(trace_id, f) for _, trace_id, _, f in found} == {(TRACE_ID, flags)}
            spans = {span_id for _, _, span_id, _ in found}
            assert len(spans - {SPAN_ID, "0" * 16}) == 4
        headers = backend.of("connect")[0]["meta"]["headers"]
        assert headers["traceparent"] == GOOD  # as any other header


async def test_malformed_traceparent_is_ignored(io_loop):
    """The client is served as without one, and each event has a new trace."""
    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        assert are_new(await visit(service, backend))
        for value in MALFORMED:
            assert are_new(await visit(service, backend, value)), value
        for values in ((GOOD, GOOD), (GOOD, "nonsense"), (GOOD, "")):
            assert are_new(await visit(service, backend, *values)), values
        assert len({trace_id for _, trace_id, _, _ in traces(backend)}) == len(
            backend.events
        )


async def test_untrusted_traceparent_is_ignored(io_loop):
    """With `--trust_traceparent=off` each event has a new trace."""
    async with (
        RecordingBackend() as backend,
        Service(*backend.flags(), "--trust_traceparent=off") as service,
    ):
        assert are_new(await visit(service, backend, GOOD))


@pytest.mark.parametrize("value", [GOOD, None])
async def test_each_attempt_of_an_event_has_the_same_span(io_loop, value):
    """So that the backend sees one event."""
    refused: dict[str, int] = {}

    async def refuse_twice(handler: RequestHandler, event: dict) -> None:
        event_id = handler.request.headers["webhook-id"]
        refused[event_id] = refused.get(event_id, 0) + 1
        if refused[event_id] <= 2:
            handler.set_status(500)

    async with RecordingBackend() as backend:
        backend.answers["message"] = backend.answers["disconnect"] = refuse_twice
        async with Service(*backend.flags()) as service:
            headers = {"traceparent": value} if value else None
            async with websockets.connect(
                service.ws_url, additional_headers=headers
            ) as client:
                await client.send("hello")
            await backend.wait_for("disconnect", 3)
        by_event: dict[str, set[tuple]] = {}
        for (_, _, headers), (_, *trace) in zip(
            backend.events, traces(backend), strict=True
        ):
            by_event.setdefault(headers["Webhook-Id"], set()).add(tuple(trace))
        assert len(backend.events) == 1 + 3 + 3
        assert len(by_event) == 3
        assert all(len(of_one) == 1 for of_one in by_event.values())
        trace_ids = {trace_id for _, trace_id, _, _ in traces(backend)}
        assert trace_ids == {TRACE_ID} if value else len(trace_ids) == 3


async def test_disconnects_of_a_dead_run_begin_traces(io_loop, tmp_path):
    """The client's trace was lost with the dead run."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), f"--state_dir={tmp_path}")
        async with Service(*flags) as service:
            clients = [
                await websockets.connect(
                    service.ws_url, additional_headers={"traceparent": GOOD}
                )
                for _ in range(2)
            ]
            service.process.send_signal(signal.SIGKILL)
            await service.process.wait()
            for client in clients:
                await client.wait_closed()
        async with Service(*flags):
            await backend.wait_for("disconnect", 2)
        disconnects = [trace for trace in traces(backend) if trace[0] == "disconnect"]
        assert are_new(disconnects)


def test_parent_span_is_kept():
    """The relay's own spans are below the client's."""
    assert trace_context([GOOD]).span_id == SPAN_ID
    assert trace_context([]) is None


async def test_opentelemetry_is_not_imported_when_off(io_loop):
    """`--otel` is off by default, and then costs nothing."""
    command = [sys.executable, "-X", "importtime", "socketdock.py"]
    async with Service(command=command) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("hello")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
    imported = "\n".join(line for line in service.log if line.startswith("import time"))
    assert "handlers.program.service" in imported
    tracing = "handlers.telemetry.spans"
    for name in ("opentelemetry", "google.protobuf", "requests", tracing):
        assert name not in imported


def test_otel_without_its_extra_is_one_line(tmp_path):
    """Exit status 2, as for each invalid option."""
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not here')")
    sentence = refusal("--otel", PYTHONPATH=str(tmp_path))
    assert "socketdock[otel]" in sentence
    check = ended("check", "--bindport=0", "--otel", PYTHONPATH=str(tmp_path))
    assert check.returncode == 1
    assert "socketdock[otel]" in check.stdout
