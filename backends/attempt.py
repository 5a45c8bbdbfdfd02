"""One attempt to deliver an event, as observers see it.

Part of the interface: import these from `backends`.
"""

from typing import Literal, NamedTuple

EventName = Literal["connect", "message", "disconnect"]
# What became of one attempt: "unreachable" did not reach the backend, or a gateway
# says so; "error" is a response after which it is repeated, "timeout" is none in time.
AttemptOutcome = Literal[
    "delivered", "refused", "error", "unreachable", "timeout", "abandoned"
]


class TraceContext(NamedTuple):
    """A place in a trace (W3C Trace Context): lower-case hex digits, 32, 2 and 16.

    The next span is a child of `span_id`; empty: the parent is not known.
    """

    trace_id: str
    flags: str
    span_id: str = ""


class Attempt:
    """One attempt to deliver an event, when it has ended. It does not change.

    `event_id` is the same on every attempt of one event, `traceparent` is what was
    sent, `seconds` is the time from its start to its response or failure. `status`
    is None where there was no response. `url` is the target without its query, or
    empty, and `trace` is what the event belongs to, or None. `number` counts the
    attempts of the event, from 1. `place` is where a broker has put the event, such as
    a stream and the id of an entry; empty: no broker has.
    """

    __slots__ = (
        "connection_id",
        "event",
        "event_id",
        "number",
        "outcome",
        "place",
        "seconds",
        "status",
        "trace",
        "traceparent",
        "url",
    )

    def __init__(
        self,
        event: EventName,
        connection_id: str,
        event_id: str,
        traceparent: str,
        outcome: AttemptOutcome,
        status: int | None,
        seconds: float,
        url: str = "",
        trace: TraceContext | None = None,
        number: int = 1,
        place: str = "",
    ) -> None:
        self.event: EventName = event
        self.connection_id = connection_id
        self.event_id = event_id
        self.traceparent = traceparent
        self.outcome: AttemptOutcome = outcome
        self.status = status
        self.seconds = seconds
        self.url = url
        self.trace = trace
        self.number = number
        self.place = place
