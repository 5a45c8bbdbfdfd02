"""What the spans of handshakes, events and callbacks contain (docs/tracing.md).

`handlers.telemetry.spans` decides which are made, and passes them to the SDK.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from time import time_ns
from typing import NamedTuple
from urllib.parse import urlsplit

from opentelemetry.trace import SpanKind

from backends import Attempt, BatchEnd, HandshakeOutcome, TraceContext
from backends.hosts import DEFAULT_PORTS

MAX_FAILURES = 100  # failed attempts of one event that its span lists

Attributes = Mapping[str, str | int]
_EVEN = "02468ace"  # hexadecimal digits whose lowest bit is not set


class Span(NamedTuple):
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


class Callback(NamedTuple):
    """A kind of callbacks that have spans.

    `path` fits those of this kind. `connection` is the segment of the path that has the
    id of the connection, counted from the end; None: it has none.
    """

    route: str
    path: re.Pattern[str]
    connection: int | None = None

    @property
    def name(self) -> str:
        """The name of its spans."""
        return f"POST {self.route}"

    def span(
        self,
        place: TraceContext,
        parent: TraceContext | None,
        began: int,
        scheme: str,
        path: str,
        status: int,
    ) -> Span:
        """Return the span of a callback that was answered with `status` now."""
        attributes: dict[str, str | int] = {
            "http.request.method": "POST",
            "http.route": self.route,
            "url.path": path,
            "url.scheme": scheme,
            **_of_status(status),
        }
        if self.connection is not None:
            segments = path.split("/")
            attributes["socketdock.connection_id"] = segments[self.connection]
        return Span(
            self.name, SpanKind.SERVER, place, parent, began, time_ns(), attributes
        )


SEND = Callback(
    "/socket/{id}/send", re.compile(r".{0,200}/socket/[0-9a-f]{32,84}/send"), -2
)
BULK = Callback("/commands", re.compile(r".{0,200}/commands"))
SDK_SEND = Callback(  # of AWS's SDKs
    "/@connections/{id}",
    re.compile(r".{0,200}/(?:@|%(?:25)?40)connections/([0-9a-f]{32,84})"),
    -1,
)
CALLBACKS = (SEND, BULK, SDK_SEND)


class HandshakeSpan:
    """See `handlers.telemetry.trace_context.HandshakeSpan`; `add` takes the span."""

    __slots__ = ("_add", "_began", "_client", "_path", "_scheme", "trace")

    def __init__(
        self,
        add: Callable[[Span], None],
        trace: TraceContext,
        client: TraceContext | None,
        scheme: str,
        path: str,
        began: int,
    ) -> None:
        self.trace = trace
        self._add = add
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
        if not is_sampled(self.trace.flags):
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
        self._add(
            Span(
                f"GET {self._path}",
                SpanKind.SERVER,
                self.trace,
                self._client,
                self._began,
                time_ns(),
                attributes,
            )
        )


class EventSpan:
    """An event with a failed attempt, which may be retried."""

    __slots__ = ("_began", "_first", "_place", "_resent", "_seen")

    def __init__(self, first: Attempt, place: TraceContext) -> None:
        self._first = first
        self._place = place
        self._began = ago(first.seconds)
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

    def ended(self, attempt: Attempt) -> Span:
        """Return the span after the last attempt."""
        status, outcome = attempt.status, attempt.outcome
        attributes: dict[str, str | int] = {}
        if status is not None:
            attributes["http.response.status_code"] = status
        decision = attempt.event == "connect" and outcome == "refused"
        if outcome not in ("delivered", "abandoned") and not decision:
            attributes["error.type"] = str(status or outcome)
        return self._span(outcome, self._resent, attributes, attempt.place)

    def given_up(self) -> Span:
        """Return the span of an event that is not retried any more."""
        return self._span("given_up", self._resent - 1, {"error.type": "given_up"})

    def _span(
        self, outcome: str, resent: int, attributes: Attributes, place: str = ""
    ) -> Span:
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
        return Span(
            name,
            kind,
            self._place,
            first.trace,
            self._began,
            time_ns(),
            {**of_url, **details},
            self._seen,
        )


def batch_span(batch: BatchEnd) -> Span:
    """Return the span of a batch that has ended; it links those of its events."""
    _, trace_id, span_id, flags = batch.traceparent.split("-")
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
    return Span(
        name,
        SpanKind.CLIENT,
        TraceContext(trace_id, flags, span_id),
        None,
        ago(batch.seconds),
        time_ns(),
        attributes,
        links=batch.events,
    )


def _of_status(status: int) -> Attributes:
    """Attributes of a response, by the HTTP conventions: 4xx is not a failure."""
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return {"http.response.status_code": status}
    return {"http.response.status_code": status, "error.type": str(status)}


def is_sampled(flags: str) -> bool:
    """Return whether a trace is recorded, by its flags or a whole `traceparent`."""
    return flags[-1] not in _EVEN


def ago(seconds: float) -> int:
    """Return the time `seconds` ago, in ns since 1970."""
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
