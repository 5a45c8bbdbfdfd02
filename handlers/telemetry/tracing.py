"""Spans of handshakes, events and sends, by the OpenTelemetry SDK.

Imported only where `--otel` says so. Spans are made on the loop's thread, and
exported by one of the SDK's. See docs/tracing.md.
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
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace import (
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

from backends import Attempt, HandshakeOutcome, Observer, TraceContext
from backends.hosts import DEFAULT_PORTS
from handlers.http.request import FastHandler, FastResponse, Request
from handlers.telemetry.trace import trace_context

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT = 3.0  # seconds at the stop for the last spans to be exported
MAX_FAILED = 10_000  # events that may go again, and whose spans have not ended
MAX_FAILURES = 100  # of one event that its span tells of
MAX_ENDED = 10_000  # spans that are still to be made
MAKE_AFTER = 0.1  # seconds
MADE_AT_ONCE = 50  # spans, in some 2 ms
MAX_TOLD = 100  # warnings of the SDK that are told apart

SEND_ROUTE = "/socket/{id}/send"
SEND = f"POST {SEND_ROUTE}"
_SEND_PATH = re.compile(r".{0,200}/socket/[0-9a-f]{32}/send")

Attributes = Mapping[str, str | int]


class Tracing(Observer):
    """Says of new traces whether they are recorded, and makes the spans of those.

    Raises `OptionError` where the variables OTEL_* make no sense to the SDK.
    """

    def __init__(self, version: str, instance: str) -> None:
        sdk = _SDKHandler()
        for name in ("opentelemetry", "urllib3"):
            sdk_logger = logging.getLogger(name)
            sdk_logger.propagate = False
            sdk_logger.handlers[:] = [sdk]
        self._ids = _GivenIds()
        # What is recorded is decided before a span is made, since a backend is told
        # by its `traceparent` before; so the SDK is given what was decided on.
        try:
            self._sampler = TracerProvider(shutdown_on_exit=False).sampler
            self._exporter = _Exporter(OTLPSpanExporter(), sdk)
            processor = BatchSpanProcessor(self._exporter)
        except Exception as error:
            raise OptionError(f"--otel: {type(error).__name__}: {error}") from error
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=_resource(version, instance),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("socketdock", version)
        if isinstance(self._tracer, NoOpTracer):  # OTEL_SDK_DISABLED
            self._sampler = ALWAYS_OFF
        self._bound = _bound(self._sampler)
        self._loop = asyncio.get_running_loop()
        self._failed: dict[str, _Event] = {}  # those that may go again
        self._ended: deque[_Span] = deque()
        self._timer: asyncio.Handle | None = None

    # Before: what is recorded, and by which ids.

    def sample(self, trace_id: str) -> bool:
        """Whether what begins a trace of that id is recorded."""
        bound = self._bound
        if bound is not None:  # no call of the SDK, since it is asked all the time
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
        """A new span's, below `parent` or the first of a trace."""
        if parent is None:
            new_id = random.randbytes(16).hex()
            flags = "01" if self.sample(new_id) else "00"
            return TraceContext(new_id, flags, _new_span_id())
        # What is inside the relay hangs below what is of others.
        context = _context(parent, remote=kind is SpanKind.SERVER)
        sampled = self._is_chosen(context, int(parent.trace_id, 16), name, kind)
        kept = int(parent.flags, 16) & ~TraceFlags.SAMPLED
        flags = f"{kept | (TraceFlags.SAMPLED if sampled else 0):02x}"
        return TraceContext(parent.trace_id, flags, _new_span_id())

    # Handshakes.

    def handshake(
        self, client: TraceContext | None, scheme: str, path: str, seconds: float
    ) -> "HandshakeSpan":
        """See `handlers.telemetry.trace.Tracer`."""
        place = self._place(client, f"GET {path}", SpanKind.SERVER)
        return HandshakeSpan(self, place, client, scheme, path, _ago(seconds))

    # Events: one span for all attempts, with the id that the backend was told.

    def attempted(self, attempt: Attempt) -> None:
        """An event's span ends with its last attempt."""
        traceparent = attempt.traceparent
        if traceparent:
            if traceparent[-1] in _EVEN:  # not sampled, as most may be
                return
            _, trace_id, span_id, flags = traceparent.split("-")
            place = TraceContext(trace_id, flags, span_id)
        else:  # it was told nothing
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

    # Sends.

    def fast(
        self, fast: Callable[[Request], FastHandler | None], scheme: str
    ) -> Callable[[Request], FastHandler | None]:
        """The same, with a span for each send that it answers."""
        bound = self._bound

        def traced(request: Request) -> FastHandler | None:
            answer = fast(request)
            if answer is None:
                return None
            traceparents = None
            for name, value in request.headers:
                if name == b"traceparent":
                    traceparents = [*(traceparents or ()), value.decode("latin-1")]
            if traceparents is None and bound is not None:
                # What begins a trace is mostly not recorded: at the least expense.
                lower = random.getrandbits(64)
                if lower >= bound:
                    return answer
                trace_id = f"{random.randbytes(8).hex()}{lower:016x}"
                parent, place = None, TraceContext(trace_id, "01", _new_span_id())
            else:
                parent = trace_context(traceparents or ())
                place = self._place(parent, SEND, SpanKind.SERVER)
                if not _is_sampled(place.flags):
                    return answer
            began = time_ns()
            path = request.target.partition(b"?")[0].decode()

            def tell(given: FastResponse) -> FastResponse:
                self.add(_send(place, parent, began, scheme, path, given.status))
                return given

            async def tell_later(given: Awaitable[FastResponse]) -> FastResponse:
                return tell(await given)

            def traced_answer(
                body: bytes,
            ) -> FastResponse | Awaitable[FastResponse] | None:
                given = answer(body)
                if given is None:
                    return None  # its handler's turn
                if isinstance(given, Awaitable):
                    return tell_later(given)
                return tell(given)

            return traced_answer

        return traced

    def answered(self, request: HTTPServerRequest, status: int) -> None:
        """A send was answered by a handler, and not as `fast` would."""
        if not _SEND_PATH.fullmatch(request.path):
            return  # whatever it is, it came without a token
        parent = trace_context(request.headers.get_list("traceparent"))
        place = self._place(parent, SEND, SpanKind.SERVER)
        if _is_sampled(place.flags):
            began = _ago(request.request_time())
            scheme, path = request.protocol, request.path
            self.add(_send(place, parent, began, scheme, path, status))

    # What has ended becomes a span of the SDK a moment later: many at once cost less
    # than each by itself, and not so many that anybody would have to wait.

    def add(self, span: "_Span") -> None:
        """Make it a span of the SDK."""
        self._exporter.made += 1
        if len(self._ended) >= MAX_ENDED:
            return  # which is counted as not exported
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
            start_time=span.began,
        )
        for at, attributes in span.failures:
            made.add_event("attempt failed", attributes, at)
        if "error.type" in span.attributes:
            made.set_status(StatusCode.ERROR)
        made.end(span.ended)

    # The end.

    async def close(self) -> None:
        """Export what is left, for as long as `FLUSH_TIMEOUT`."""
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

        # Of no executor, since that is waited for when the loop ends.
        threading.Thread(target=shut_down, daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await done.wait()
        self._exporter.sum_up()


class _Span(NamedTuple):
    """What has ended, as the SDK will be told; times in ns since 1970.

    With an `error.type` among its attributes it is a failure.
    """

    name: str
    kind: SpanKind
    place: TraceContext
    parent: TraceContext | None
    began: int
    ended: int
    attributes: Attributes
    failures: Sequence[tuple[int, Attributes]] = ()


class HandshakeSpan:
    """See `handlers.telemetry.trace.HandshakeSpan`."""

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
        """It was answered, or its client has left."""
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
    attributes: dict[str, str | int] = {
        "http.request.method": "POST",
        "http.route": SEND_ROUTE,
        "url.path": path,
        "url.scheme": scheme,
        "socketdock.connection_id": path.split("/")[-2],
        **_of_status(status),
    }
    return _Span(SEND, SpanKind.SERVER, place, parent, began, time_ns(), attributes)


def _of_status(status: int) -> Attributes:
    """Of what was served, by HTTP's conventions: a peer's mistake is no failure."""
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return {"http.response.status_code": status}
    return {"http.response.status_code": status, "error.type": str(status)}


class _Event:
    """An event that was attempted, and may be again."""

    __slots__ = ("_began", "_first", "_place", "_resent", "_seen")

    def __init__(self, first: Attempt, place: TraceContext) -> None:
        self._first = first
        self._place = place
        self._began = _ago(first.seconds)
        self._resent = 0
        self._seen: list[tuple[int, Attributes]] = []  # its first failures

    def failed(self, attempt: Attempt) -> None:
        """It may go again."""
        self._resent += 1
        if len(self._seen) < MAX_FAILURES:
            attributes: dict[str, str | int] = {"socketdock.outcome": attempt.outcome}
            if attempt.status is not None:
                attributes["http.response.status_code"] = attempt.status
            self._seen.append((time_ns(), attributes))

    def ended(self, attempt: Attempt) -> _Span:
        """That was its last attempt."""
        status, outcome = attempt.status, attempt.outcome
        attributes: dict[str, str | int] = {}
        if status is not None:
            attributes["http.response.status_code"] = status
        decision = attempt.event == "connect" and outcome == "refused"
        if outcome not in ("delivered", "abandoned") and not decision:
            attributes["error.type"] = str(status or outcome)
        return self._span(outcome, self._resent, attributes)

    def given_up(self) -> _Span:
        """There will be no other attempt."""
        return self._span("given_up", self._resent - 1, {"error.type": "given_up"})

    def _span(self, outcome: str, resent: int, attributes: Attributes) -> _Span:
        first = self._first
        told: dict[str, str | int] = {
            "socketdock.event": first.event,
            "socketdock.connection_id": first.connection_id,
            "socketdock.outcome": outcome,
            **attributes,
        }
        if first.event_id:
            told["socketdock.event_id"] = first.event_id
        if resent:
            told["http.request.resend_count"] = resent
        name, of_url = _of_url(first.url) if first.url else (first.event, {})
        return _Span(
            name,
            SpanKind.CLIENT if first.url else SpanKind.INTERNAL,
            self._place,
            first.trace,
            self._began,
            time_ns(),
            {**of_url, **told},
            self._seen,
        )


class _GivenIds(IdGenerator):
    """Gives a span the ids that its place has already."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _Exporter(SpanExporter):
    """Another one, whose failures are counted, and told once until it works again.

    Used by the SDK's thread, but for `made` and `sum_up()`.
    """

    def __init__(self, exporter: SpanExporter, sdk: "_SDKHandler") -> None:
        self._exporter = exporter
        self._sdk = sdk
        self._failing = False
        self._exported = 0
        self.made = 0  # spans

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # as it was with older ones where nobody answers
            result = SpanExportResult.FAILURE
            self._sdk.why = _root_of(error)
        if result is SpanExportResult.SUCCESS:
            self._exported += len(spans)
            if self._failing:
                logger.info("spans are exported again")
        elif not self._failing:
            logger.warning("spans can't be exported: %s", self._sdk.why)
        self._failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def sum_up(self) -> None:
        """Tell of the spans that nobody will see, if there are any."""
        if lost := self.made - self._exported:
            logger.warning("%d of %d spans were not exported", lost, self.made)


class _SDKHandler(logging.Handler):
    """What the SDK logs, in our words.

    It quotes headers that were given to it, and URLs with their queries. So each of
    its sentences is told once, and without what it puts into it; why an export
    failed is kept for the sentence of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.why = "not in time"
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.endswith("trace_exporter"):
            self.why = _reason(record) or self.why
            return
        sentence = str(record.msg)
        if record.levelno < logging.WARNING or sentence in self._told:
            return
        if len(self._told) < MAX_TOLD:
            self._told.add(sentence)
            logger.warning("OpenTelemetry: %s", _GAP.sub("…", sentence))


def _reason(record: logging.LogRecord) -> str | None:
    """Why an export failed: a status, or the system's word; nothing of a peer's."""
    values = record.args if isinstance(record.args, tuple) else ()
    for value in values:
        if isinstance(value, int):
            return f"the collector answered {value}"
        if value in _STATUSES:
            return f"the collector answered {_STATUSES[value]}"
        if isinstance(value, BaseException):
            return _root_of(value)
    return None


def _root_of(error: BaseException) -> str:
    root: BaseException | None = error
    name = type(error).__name__
    for _ in range(10):
        if root is None:
            break
        if isinstance(root, OSError) and root.strerror:
            return root.strerror
        # What urllib3 makes of a timeout that has passed before it is used.
        name = "timed out" if type(root) is ValueError else type(root).__name__
        root = root.__cause__ or root.__context__
    return name


def _resource(version: str, instance: str) -> Resource:
    """Who exports; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES know better."""
    given = OTELResourceDetector().detect().attributes
    return Resource.create(
        {
            "service.name": "socketdock",
            "service.version": version,
            "service.instance.id": instance,
            **given,
        }
    )


_STATUSES = {status.phrase: status.value for status in HTTPStatus}
_NOWHERE = Context()
_ROOT = re.compile(
    r"(?:ParentBased\{root:)?"
    r"(AlwaysOnSampler|AlwaysOffSampler|TraceIdRatioBased)(?:\{([-+.e\d]+)\})?(?:,.*|)"
)
_EVEN = "02468ace"  # hexadecimal digits whose lowest bit is not set
_GAP = re.compile(r"%[-#0-9.]*[a-z]")  # where `logging` puts something in


def _context(place: TraceContext | None, remote: bool) -> Context:
    """The context below a place; below no place a trace begins."""
    if place is None or not place.span_id:
        return _NOWHERE
    span_context = SpanContext(
        int(place.trace_id, 16),
        int(place.span_id, 16),
        remote,
        TraceFlags(int(place.flags, 16)),
    )
    return set_span_in_context(NonRecordingSpan(span_context), _NOWHERE)


def _bound(sampler: Sampler) -> int | None:
    """Below which the lower half of a new trace's id has to be for it to be recorded.

    None where it takes more than that to decide. The SDK's own samplers are told by
    what they say of themselves.
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


@lru_cache(maxsize=16)
def _of_url(url: str) -> tuple[str, Attributes]:
    """Name and attributes of a span for POSTs to `url`."""
    parts = urlsplit(url)
    return f"POST {parts.path}", {
        "http.request.method": "POST",
        "url.full": url,
        "url.template": parts.path,
        "server.address": parts.hostname or "",
        "server.port": parts.port or DEFAULT_PORTS[parts.scheme],
    }
