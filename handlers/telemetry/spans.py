"""Makes OpenTelemetry spans of handshakes, events and sends.

Imported with `--otel` only. `handlers.telemetry.shapes` has what they contain. Spans
are made on the loop's thread; a thread of the SDK exports them through
`handlers.telemetry.exporter`. See docs/tracing.md.
"""

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import time_ns

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
)
from opentelemetry.trace import (
    Link,
    NoOpTracer,
    SpanKind,
    StatusCode,
    TraceFlags,
)
from tornado.httputil import HTTPServerRequest
from tornado.options import Error as OptionError

from backends import Attempt, BatchEnd, Observer, TraceContext
from handlers.http.fast import FastResponse
from handlers.http.request import FastHandler, Request
from handlers.telemetry.exporter import (
    CountingExporter,
    SDKLogHandler,
    make_resource,
)
from handlers.telemetry.sdk import (
    NOWHERE,
    GivenIds,
    bound_of,
    context_of,
    linked,
    new_span_id,
)
from handlers.telemetry.shapes import (
    BULK,
    CALLBACKS,
    SEND,
    EventSpan,
    HandshakeSpan,
    Span,
    ago,
    batch_span,
    is_sampled,
)
from handlers.telemetry.trace_context import trace_context

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT = 3.0  # seconds at the stop for the last spans to be exported
MAX_FAILED = 10_000  # events that may be retried, whose spans have not ended
MAX_ENDED = 10_000  # spans that wait for the SDK
MAKE_AFTER = 0.1  # seconds
MADE_AT_ONCE = 50  # spans, which take about 2 ms


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
        self._ids = GivenIds()
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
        self._bound = bound_of(self._sampler)
        self._loop = asyncio.get_running_loop()
        self._failed: dict[str, EventSpan] = {}  # events that may be retried, by id
        self._ended: deque[Span] = deque()
        self._timer: asyncio.Handle | None = None

    # Sampling, and ids of spans.

    def sample(self, trace_id: str) -> bool:
        """Whether a trace that begins with this id is recorded."""
        bound = self._bound
        if bound is not None:  # no call of the SDK: this runs for each message
            return int(trace_id[16:], 16) < bound
        return self._is_chosen(NOWHERE, int(trace_id, 16), "event", SpanKind.CLIENT)

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
            return TraceContext(new_id, flags, new_span_id())
        # Only a server span has a parent outside the relay.
        context = context_of(parent, remote=kind is SpanKind.SERVER)
        sampled = self._is_chosen(context, int(parent.trace_id, 16), name, kind)
        kept = int(parent.flags, 16) & ~TraceFlags.SAMPLED
        flags = f"{kept | (TraceFlags.SAMPLED if sampled else 0):02x}"
        return TraceContext(parent.trace_id, flags, new_span_id())

    # Handshakes.

    def handshake(
        self, client: TraceContext | None, scheme: str, path: str, seconds: float
    ) -> HandshakeSpan:
        """See `handlers.telemetry.trace_context.Tracer`."""
        place = self._place(client, f"GET {path}", SpanKind.SERVER)
        return HandshakeSpan(self.add, place, client, scheme, path, ago(seconds))

    # Events: one span for all attempts, with the id that the backend received.

    def attempted(self, attempt: Attempt) -> None:
        """An event's span ends with its last attempt."""
        traceparent = attempt.traceparent
        if traceparent:
            if not is_sampled(traceparent):
                return
            _, trace_id, span_id, flags = traceparent.split("-")
            place = TraceContext(trace_id, flags, span_id)
        else:  # an attempt without a trace
            place = self._place(attempt.trace, attempt.event, SpanKind.INTERNAL)
            if not is_sampled(place.flags):
                return
        event = self._failed.pop(attempt.event_id, None)
        if event is None:
            event = EventSpan(attempt, place)
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
        if is_sampled(batch.traceparent):
            self.add(batch_span(batch))

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
            is_bulk = request.target.endswith(BULK.route.encode())
            callback = BULK if is_bulk else SEND
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
                parent, place = None, TraceContext(trace_id, "01", new_span_id())
            else:
                parent = trace_context(traceparents or ())
                place = self._place(parent, callback.name, SpanKind.SERVER)
                if not is_sampled(place.flags):
                    return answer
            began = time_ns()
            path = request.target.partition(b"?")[0].decode()

            def record(given: FastResponse) -> FastResponse:
                self.add(
                    callback.span(place, parent, began, scheme, path, given.status)
                )
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
        callback = next((each for each in CALLBACKS if each.path.fullmatch(path)), None)
        if callback is None:
            return
        parent = trace_context(request.headers.get_list("traceparent"))
        place = self._place(parent, callback.name, SpanKind.SERVER)
        if is_sampled(place.flags):
            began = ago(request.request_time())
            self.add(callback.span(place, parent, began, scheme, path, status))

    # Ended spans are passed to the SDK a little later, several at once, which costs
    # less; but not so many that clients would have to wait.

    def add(self, span: Span) -> None:
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

    def _make(self, span: Span) -> None:
        place = span.place
        self._ids.trace_id = int(place.trace_id, 16)
        self._ids.span_id = int(place.span_id, 16)
        made = self._tracer.start_span(
            span.name,
            context_of(span.parent, remote=span.kind is SpanKind.SERVER),
            span.kind,
            span.attributes,
            [Link(linked(each)) for each in span.links],
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
