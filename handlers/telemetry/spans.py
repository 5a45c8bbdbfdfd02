"""Makes OpenTelemetry spans of handshakes, events and sends.

Imported with `--otel` only. Spans are made on the loop's thread; a thread of the SDK
exports them through `handlers.telemetry.exporter`. See docs/tracing.md.
"""

import asyncio
import logging
import random
import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from http import HTTPStatus
from time import time_ns
from typing import NamedTuple
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from tornado.httputil import HTTPServerRequest
from tornado.options import Error as OptionError

from backends import Attempt, BatchEnd, HandshakeOutcome, Observer, TraceContext
from backends.hosts import DEFAULT_PORTS
from handlers.http.fast import FastResponse
from handlers.http.request import FastHandler, Request
from handlers.telemetry.exporter import (
    CountingExporter,
    SDKLogHandler,
    make_resource,
)
from handlers.telemetry.trace_context import trace_context

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT = 3.0  # seconds at the stop for the last spans to be exported
MAX_FAILED = 10_000  # events that may be retried, whose spans have not ended
MAX_FAILURES = 100  # failed attempts of one event that its span lists
MAX_ENDED = 10_000  # spans that wait for the SDK
MAKE_AFTER = 0.1  # seconds
MADE_AT_ONCE = 50  # spans, which take about 2 ms

SEND_ROUTE, BULK_ROUTE = "/socket/{id}/send", "/commands"
SDK_ROUTE = "/@connections/{id}"  # sends of AWS's SDKs
SEND, BULK, SDK_SEND = (f"POST {each}" for each in (SEND_ROUTE, BULK_ROUTE, SDK_ROUTE))
_SEND_PATH = re.compile(r".{0,200}/socket/[0-9a-f]{32,84}/send")
_BULK_PATH = re.compile(r".{0,200}/commands")
_SDK_PATH = re.compile(r".{0,200}/(?:@|%(?:25)?40)connections/([0-9a-f]{32,84})")

Attributes = Mapping[str, str | int]


class Tracing(Observer):
    """Decides which new traces are recorded, and makes their spans.

    Raises `OptionError` if the SDK rejects the variables OTEL_*.
    """

    def __init__(self, version: str, instance: str) -> None:
        sdk = SDKLogHandler()
        for name in ("opentelemetry", "urllib3"):
            sdk_logger = logging.getLogger(name)
            sdk_logger.propagate = False
            sdk_logger.handlers[:] = [sdk]
        self._ids = _GivenIds()
        # Sampling is decided before a span is made, since the backend gets its
        # `traceparent` first. So the SDK records every span that it is given.
        try:
            self._sampler = TracerProvider(shutdown_on_exit=False).sampler
            self._exporter = CountingExporter(OTLPSpanExporter(), sdk)
            processor = BatchSpanProcessor(self._exporter)
        except Exception as error:
            raise OptionError(f"--otel: {type(error).__name__}: {error}") from error
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=make_resource(version, instance),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("socketdock", version)
        if isinstance(self._tracer, NoOpTracer):  # OTEL_SDK_DISABLED
            self._sampler = ALWAYS_OFF
        self._bound = _bound(self._sampler)
        self._loop = asyncio.get_running_loop()
        self._failed: dict[str, _Event] = {}  # events that may be retried, by id
        self._ended: deque[_Span] = deque()
        self._timer: asyncio.Handle | None = None

    # Sampling, and ids of spans.

    def sample(self, trace_id: str) -> bool:
        """Whether a trace that begins with this id is recorded."""
        bound = self._bound
        if bound is not None:  # no call of the SDK: this runs for each message
            return int(trace_id[16:], 16) < bound
        return self._is_chosen(_NOWHERE, int(trace_id, 16), "event", SpanKind.CLIENT)

    def _is_chosen(
        self, parent: Context, trace_id: int, name: str, kind: SpanKind
    ) -> bool:
        result = self._sampler.should_sample(parent, trace_id, name, kind)
        return result.decision is Decision.RECORD_AND_SAMPLE

    def _place(
        self, parent: TraceContext | None, name: str, kind: SpanKind
    ) -> TraceContext:
        """Return the context of a new span, below `parent` or first of a trace."""
        if parent is None:
            new_id = random.randbytes(16).hex()
            flags = "01" if self.sample(new_id) else "00"
            return TraceContext(new_id, flags, _new_span_id())
        # Only a server span has a parent outside the relay.
        context = _context(parent, remote=kind is SpanKind.SERVER)
        sampled = self._is_chosen(context, int(parent.trace_id, 16), name, kind)
        kept = int(parent.flags, 16) & ~TraceFlags.SAMPLED
        flags = f"{kept | (TraceFlags.SAMPLED if sampled else 0):02x}"
        return TraceContext(parent.trace_id, flags, _new_span_id())

    # Handshakes.

    def handshake(
        self, client: TraceContext | None, scheme: str, path: str, seconds: float
    ) -> "HandshakeSpan":
        """See `handlers.telemetry.trace_context.Tracer`."""
        place = self._place(client, f"GET {path}", SpanKind.SERVER)
        return HandshakeSpan(self, place, client, scheme, path, _ago(seconds))

    # Events: one span for all attempts, with the id that the backend received.

    def attempted(self, attempt: Attempt) -> None:
        """An event's span ends with its last attempt."""
        traceparent = attempt.traceparent
        if traceparent:
            if traceparent[-1] in _EVEN:  # not sampled, as most may be
                return
            _, trace_id, span_id, flags = traceparent.split("-")
            place = TraceContext(trace_id, flags, span_id)
        else:  # an attempt without a trace
            place = self._place(attempt.trace, attempt.event, SpanKind.INTERNAL)
            if not _is_sampled(place.flags):
                return
        event = self._failed.pop(attempt.event_id, None)
        if event is None:
            event = _Event(attempt, place)
        if (
            attempt.outcome in ("error", "unreachable", "timeout")
            and attempt.event != "connect"
            and attempt.event_id
        ):
            event.failed(attempt)
            if len(self._failed) >= MAX_FAILED:
                self.given_up(next(iter(self._failed)))
            self._failed[attempt.event_id] = event
        else:
            self.add(event.ended(attempt))

    def given_up(self, event_id: str) -> None:
        """An event's span ends here, where no attempt follows."""
        event = self._failed.pop(event_id, None)
        if event is not None:
            self.add(event.given_up())

    def batch_ended(self, batch: BatchEnd) -> None:
        """The span of a batch links those of its events."""
        _, trace_id, span_id, flags = batch.traceparent.split("-")
        if not _is_sampled(flags):
            return
        name, of_url = _of_url(batch.url)
        attributes: dict[str, str | int] = {
            **of_url,
            "messaging.batch.message_count": len(batch.events),
            "socketdock.batch_id": batch.batch_id,
            "socketdock.outcome": batch.outcome,
        }
        if batch.status is not None:
            attributes["http.response.status_code"] = batch.status
        if batch.outcome != "delivered":
            attributes["error.type"] = str(batch.status or batch.outcome)
        self.add(
            _Span(
                name,
                SpanKind.CLIENT,
                TraceContext(trace_id, flags, span_id),
                None,
                _ago(batch.seconds),
                time_ns(),
                attributes,
                links=batch.events,
            )
        )

    # Sends.

    def fast(
        self, fast: Callable[[Request], FastHandler | None], scheme: str
    ) -> Callable[[Request], FastHandler | None]:
        """Wrap `fast`: each send or bulk callback that it answers gets a span."""
        bound = self._bound

        def traced(request: Request) -> FastHandler | None:
            answer = fast(request)
            if answer is None:
                return None
            is_bulk = request.target.endswith(BULK_ROUTE.encode())
            traceparents = None
            for name, value in request.headers:
                if name == b"traceparent":
                    traceparents = [*(traceparents or ()), value.decode("latin-1")]
            if traceparents is None and bound is not None:
                # Most new traces are not recorded: decide with as little as possible.
                lower = random.getrandbits(64)
                if lower >= bound:
                    return answer
                trace_id = f"{random.randbytes(8).hex()}{lower:016x}"
                parent, place = None, TraceContext(trace_id, "01", _new_span_id())
            else:
                parent = trace_context(traceparents or ())
                place = self._place(parent, BULK if is_bulk else SEND, SpanKind.SERVER)
                if not _is_sampled(place.flags):
                    return answer
            began = time_ns()
            path = request.target.partition(b"?")[0].decode()
            make = _bulk if is_bulk else _send

            def record(given: FastResponse) -> FastResponse:
                self.add(make(place, parent, began, scheme, path, given.status))
                return given

            async def record_later(given: Awaitable[FastResponse]) -> FastResponse:
                return record(await given)

            def traced_answer(
                body: bytes,
            ) -> FastResponse | Awaitable[FastResponse] | None:
                given = answer(body)
                if given is None:
                    return None  # a handler answers it
                if isinstance(given, Awaitable):
                    return record_later(given)
                return record(given)

            return traced_answer

        return traced

    def answered(self, request: HTTPServerRequest, status: int) -> None:
        """A handler has answered a send that `fast` left to it, or a bulk callback."""
        scheme, path = request.protocol, request.path
        found = next((each for each in _CALLBACKS if each[0].fullmatch(path)), None)
        if found is None:
            return
        _, name, make = found
        parent = trace_context(request.headers.get_list("traceparent"))
        place = self._place(parent, name, SpanKind.SERVER)
        if _is_sampled(place.flags):
            began = _ago(request.request_time())
            self.add(make(place, parent, began, scheme, path, status))

    # Ended spans are passed to the SDK a little later, several at once, which costs
    # less; but not so many that clients would have to wait.

    def add(self, span: "_Span") -> None:
        """Queue `span` for the SDK."""
        self._exporter.made += 1
        if len(self._ended) >= MAX_ENDED:
            return  # counted as not exported
        self._ended.append(span)
        if self._timer is None:
            self._timer = self._loop.call_later(MAKE_AFTER, self._make_some)

    def _make_some(self) -> None:
        for _ in range(min(len(self._ended), MADE_AT_ONCE)):
            self._make(self._ended.popleft())
        self._timer = None
        if self._ended:
            self._timer = self._loop.call_soon(self._make_some)

    def _make(self, span: "_Span") -> None:
        place = span.place
        self._ids.trace_id = int(place.trace_id, 16)
        self._ids.span_id = int(place.span_id, 16)
        made = self._tracer.start_span(
            span.name,
            _context(span.parent, remote=span.kind is SpanKind.SERVER),
            span.kind,
            span.attributes,
            [Link(_linked(each)) for each in span.links],
            start_time=span.began,
        )
        for at, attributes in span.failures:
            made.add_event("attempt failed", attributes, at)
        if "error.type" in span.attributes:
            made.set_status(StatusCode.ERROR)
        made.end(span.ended)

    # Shutdown.

    async def close(self) -> None:
        """Export the remaining spans, for at most `FLUSH_TIMEOUT`."""
        if self._timer is not None:
            self._timer.cancel()
        for event_id in list(self._failed):
            self.given_up(event_id)
        while self._ended:
            self._make(self._ended.popleft())
        done = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed: it took too long
                self._loop.call_soon_threadsafe(done.set)

        # Not in an executor: the end of the loop would wait for it.
        threading.Thread(target=shut_down, daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await done.wait()
        self._exporter.log_summary()


class _Span(NamedTuple):
    """A span that has ended; times in ns since 1970.

    An attribute `error.type` marks a failure.
    """

    name: str
    kind: SpanKind
    place: TraceContext
    parent: TraceContext | None
    began: int
    ended: int
    attributes: Attributes
    failures: Sequence[tuple[int, Attributes]] = ()
    links: Sequence[str] = ()  # `traceparent` of other spans


class HandshakeSpan:
    """See `handlers.telemetry.trace_context.HandshakeSpan`."""

    __slots__ = ("_began", "_client", "_path", "_scheme", "_tracing", "trace")

    def __init__(
        self,
        tracing: Tracing,
        trace: TraceContext,
        client: TraceContext | None,
        scheme: str,
        path: str,
        began: int,
    ) -> None:
        self.trace = trace
        self._tracing = tracing
        self._client = client
        self._scheme = scheme
        self._path = path
        self._began = began

    def end(
        self,
        outcome: HandshakeOutcome,
        status: int,
        remote_ip: str,
        connection_id: str | None,
    ) -> None:
        """The handshake was answered, or its client has disconnected."""
        if not _is_sampled(self.trace.flags):
            return
        attributes: dict[str, str | int] = {
            "http.request.method": "GET",
            "http.route": self._path,
            "url.path": self._path,
            "url.scheme": self._scheme,
            "client.address": remote_ip,
            "socketdock.outcome": outcome,
            **_of_status(status),
        }
        if connection_id is not None:
            attributes["socketdock.connection_id"] = connection_id
        self._tracing.add(
            _Span(
                f"GET {self._path}",
                SpanKind.SERVER,
                self.trace,
                self._client,
                self._began,
                time_ns(),
                attributes,
            )
        )


def _send(
    place: TraceContext,
    parent: TraceContext | None,
    began: int,
    scheme: str,
    path: str,
    status: int,
) -> _Span:
    attributes = {
        **_of_callback(SEND_ROUTE, scheme, path, status),
        "socketdock.connection_id": path.split("/")[-2],
    }
    return _Span(SEND, SpanKind.SERVER, place, parent, began, time_ns(), attributes)


def _sdk_send(
    place: TraceContext,
    parent: TraceContext | None,
    began: int,
    scheme: str,
    path: str,
    status: int,
) -> _Span:
    attributes = {
        **_of_callback(SDK_ROUTE, scheme, path, status),
        "socketdock.connection_id": path.rpartition("/")[2],
    }
    return _Span(SDK_SEND, SpanKind.SERVER, place, parent, began, time_ns(), attributes)


def _bulk(
    place: TraceContext,
    parent: TraceContext | None,
    began: int,
    scheme: str,
    path: str,
    status: int,
) -> _Span:
    attributes = _of_callback(BULK_ROUTE, scheme, path, status)
    return _Span(BULK, SpanKind.SERVER, place, parent, began, time_ns(), attributes)


# Path, name and span of each callback that a handler may answer.
_CALLBACKS = (
    (_SEND_PATH, SEND, _send),
    (_BULK_PATH, BULK, _bulk),
    (_SDK_PATH, SDK_SEND, _sdk_send),
)


def _of_callback(route: str, scheme: str, path: str, status: int) -> Attributes:
    return {
        "http.request.method": "POST",
        "http.route": route,
        "url.path": path,
        "url.scheme": scheme,
        **_of_status(status),
    }


def _of_status(status: int) -> Attributes:
    """Attributes of a response, by the HTTP conventions: 4xx is not a failure."""
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return {"http.response.status_code": status}
    return {"http.response.status_code": status, "error.type": str(status)}


class _Event:
    """An event with a failed attempt, which may be retried."""

    __slots__ = ("_began", "_first", "_place", "_resent", "_seen")

    def __init__(self, first: Attempt, place: TraceContext) -> None:
        self._first = first
        self._place = place
        self._began = _ago(first.seconds)
        self._resent = 0
        self._seen: list[tuple[int, Attributes]] = []  # its first failures

    def failed(self, attempt: Attempt) -> None:
        """An attempt failed; another may follow."""
        self._resent += 1
        if len(self._seen) < MAX_FAILURES:
            attributes: dict[str, str | int] = {"socketdock.outcome": attempt.outcome}
            if attempt.status is not None:
                attributes["http.response.status_code"] = attempt.status
            self._seen.append((time_ns(), attributes))

    def ended(self, attempt: Attempt) -> _Span:
        """Return the span after the last attempt."""
        status, outcome = attempt.status, attempt.outcome
        attributes: dict[str, str | int] = {}
        if status is not None:
            attributes["http.response.status_code"] = status
        decision = attempt.event == "connect" and outcome == "refused"
        if outcome not in ("delivered", "abandoned") and not decision:
            attributes["error.type"] = str(status or outcome)
        return self._span(outcome, self._resent, attributes, attempt.place)

    def given_up(self) -> _Span:
        """Return the span of an event that is not retried any more."""
        return self._span("given_up", self._resent - 1, {"error.type": "given_up"})

    def _span(
        self, outcome: str, resent: int, attributes: Attributes, place: str = ""
    ) -> _Span:
        first = self._first
        details: dict[str, str | int] = {
            "socketdock.event": first.event,
            "socketdock.connection_id": first.connection_id,
            "socketdock.outcome": outcome,
            **attributes,
        }
        if first.event_id:
            details["socketdock.event_id"] = first.event_id
        if resent:
            details["http.request.resend_count"] = resent
        if place:
            name, kind, of_url = _of_place(place)
        elif first.url:
            kind = SpanKind.CLIENT
            name, of_url = _of_url(first.url)
        else:
            name, kind, of_url = first.event, SpanKind.INTERNAL, {}
        return _Span(
            name,
            kind,
            self._place,
            first.trace,
            self._began,
            time_ns(),
            {**of_url, **details},
            self._seen,
        )


class _GivenIds(IdGenerator):
    """Gives each span the ids that were chosen for it before."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


_NOWHERE = Context()
_ROOT = re.compile(
    r"(?:ParentBased\{root:)?"
    r"(AlwaysOnSampler|AlwaysOffSampler|TraceIdRatioBased)(?:\{([-+.e\d]+)\})?(?:,.*|)"
)
_EVEN = "02468ace"  # hexadecimal digits whose lowest bit is not set


def _linked(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return _span_context(trace_id, span_id, flags)


def _span_context(
    trace_id: str, span_id: str, flags: str, remote: bool = False
) -> SpanContext:
    return SpanContext(
        int(trace_id, 16), int(span_id, 16), remote, TraceFlags(int(flags, 16))
    )


def _context(place: TraceContext | None, remote: bool) -> Context:
    """Return the parent context for the SDK; None begins a trace."""
    if place is None or not place.span_id:
        return _NOWHERE
    span_context = _span_context(place.trace_id, place.span_id, place.flags, remote)
    return set_span_in_context(NonRecordingSpan(span_context), _NOWHERE)


def _bound(sampler: Sampler) -> int | None:
    """Return the bound of the lower half of the id of traces that are recorded.

    None if the sampler decides otherwise. The SDK's own samplers are recognized by
    their descriptions.
    """
    described = _ROOT.fullmatch(sampler.get_description())
    if described is None:
        return None
    name, rate = described.groups()
    if name == "TraceIdRatioBased":
        return TraceIdRatioBased.get_bound_for_rate(float(rate))
    return 2**64 if name == "AlwaysOnSampler" else 0


def _new_span_id() -> str:
    return random.randbytes(8).hex()


def _is_sampled(flags: str) -> bool:
    return flags[-1] not in _EVEN


def _ago(seconds: float) -> int:
    return time_ns() - int(seconds * 1e9)


def _of_place(place: str) -> tuple[str, SpanKind, Attributes]:
    """Return name, kind and attributes of a span for an entry of a stream."""
    stream, _, entry_id = place.partition(" ")
    return f"send {stream}", SpanKind.PRODUCER, {
        "messaging.system": "redis",
        "messaging.operation.type": "send",
        "messaging.destination.name": stream,
        "messaging.message.id": entry_id,
    }


@lru_cache(maxsize=16)
def _of_url(url: str) -> tuple[str, Attributes]:
    """Return name and attributes of a span for POSTs to `url`."""
    parts = urlsplit(url)
    return f"POST {parts.path}", {
        "http.request.method": "POST",
        "url.full": url,
        "url.template": parts.path,
        "server.address": parts.hostname or "",
        "server.port": parts.port or DEFAULT_PORTS[parts.scheme],
    }
