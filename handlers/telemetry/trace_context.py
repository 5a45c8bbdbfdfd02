"""Parses `traceparent` (W3C Trace Context), the trace to which a handshake belongs.

With `--otel`, `handlers.telemetry.spans` makes spans in that trace.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from tornado.options import define

from backends import HandshakeOutcome, TraceContext

define("trust_traceparent", default=True,
       help="continue the trace in a handshake's traceparent header")
define("otel", default=False,
       help="create OpenTelemetry spans of handshakes, events and sends, and export "
            "them by OTLP as the variables OTEL_* configure; needs the extra otel")

# Every version begins with these four fields (Trace Context level 2, section 4.3).
_TRACEPARENT = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_SAMPLED, _RANDOM = 0x01, 0x02  # all the flags that level 2 knows


def trace_context(traceparents: Sequence[str]) -> TraceContext | None:
    """Parse the `traceparent` headers of one request; None if none or invalid.

    Unknown flags are cleared: "The behavior of other flags [...] is reserved for
    future use. Vendors MUST set those to zero."
    """
    if len(traceparents) != 1:
        return None
    parts = _TRACEPARENT.fullmatch(traceparents[0])
    if parts is None:
        return None
    version, trace_id, span_id, flags, more = parts.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not (trace_id.strip("0") and span_id.strip("0")):
        return None
    # For a later version: "Parse the sampled bit of flags", and nothing else.
    known = _SAMPLED | _RANDOM if version == "00" else _SAMPLED
    return TraceContext(trace_id, f"{int(flags, 16) & known:02x}", span_id)


class HandshakeSpan(Protocol):
    """The span of one handshake; `trace` is for what happens in it."""

    @property
    def trace(self) -> TraceContext: ...

    def end(
        self,
        outcome: HandshakeOutcome,
        status: int,
        remote_ip: str,
        connection_id: str | None,
    ) -> None:
        """The handshake was answered, or its client has disconnected."""


class Tracer(Protocol):
    """Makes spans of handshakes."""

    def handshake(
        self, client: TraceContext | None, scheme: str, path: str, seconds: float
    ) -> HandshakeSpan:
        """Begin the span of a handshake that started `seconds` ago."""
