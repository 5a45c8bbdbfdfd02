"""Counts what the relay does, and measures how late its loop is.

`Metrics` observes the relay (`backends.Observer`) and keeps plain numbers: updating a
library's labels for each message would cost more than all other counting.
`handlers.operators.prometheus` exports them. docs/metrics.md explains each metric.
"""

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import product
from time import monotonic
from typing import Literal, get_args

from backends import (
    Attempt,
    AttemptOutcome,
    Connection,
    EventName,
    ForwardOutcome,
    HandshakeOutcome,
    Initiator,
    Observer,
    Outcome,
)
from backends.commands import CommandName, CommandOutcome, Source

# Upper bounds of the histogram in seconds, from a local backend to one that delays its
# responses.
BOUNDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
          30.0, 60.0)
# Outcomes that measure the backend's response time; the others have no response.
TIMED = frozenset({"delivered", "refused", "error", "timeout"})

EVENTS: Sequence[str] = get_args(EventName)
CLOSE_CODES = (1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1010, 1011,
               1012, 1013, 1014)  # RFC 6455, section 7.4.1, and IANA's registry
CLOSE_LABELS = (*map(str, CLOSE_CODES), "3xxx", "4xxx", "other")
SEND_STATUSES = (200, 202, 400, 401, 410, 413, 422, 429, 503, 504)
OTHER = 0  # any other status
COMMAND_SOURCES: Sequence[Source] = ("response", "batch", "callback", "broker")

LAG_INTERVAL = 0.1  # seconds; shorter delays may go unnoticed
LAG_BUCKET = 5.0  # seconds; the worst delay of each is kept
LAG_BUCKETS = 12  # one minute, the usual longest scrape interval


class Metrics(Observer):
    """Counts what it observes; each label has few values."""

    def __init__(self) -> None:
        self.handshakes = _zeroes(HandshakeOutcome)
        self.texts_in = self.binaries_in = self.texts_out = self.binaries_out = 0
        self.bytes_in = self.bytes_out = 0
        self.events = {event: _zeroes(Outcome) for event in EVENTS}
        self.attempts = {event: _zeroes(AttemptOutcome) for event in EVENTS}
        # By event: the number of attempts up to each bound, and of longer ones.
        self.durations = {event: [0] * (len(BOUNDS) + 1) for event in EVENTS}
        self.seconds = dict.fromkeys(EVENTS, 0.0)
        self.sends = dict.fromkeys((*SEND_STATUSES, OTHER), 0)
        self.heartbeats = {"delivered": 0, "failed": 0}
        self.forwards = _zeroes(ForwardOutcome)
        self.closes = {code: _zeroes(Initiator) for code in CLOSE_LABELS}
        # By source, command and outcome; command is "none" for unreadable replies.
        self.commands = {
            labels: 0
            for source in COMMAND_SOURCES
            for labels in (
                (source, "none", "invalid"),
                *product((source,), get_args(CommandName), get_args(CommandOutcome)),
            )
        }

    def handshake_ended(
        self, outcome: HandshakeOutcome, status: int, remote_ip: str, seconds: float
    ) -> None:
        self.handshakes[outcome] += 1

    def closed(
        self, connection: Connection, code: int, initiator: Initiator, duration: float
    ) -> None:
        self.closes[close_label(code)][initiator] += 1

    def received(self, connection: Connection, message: str | bytes, size: int) -> None:
        if isinstance(message, str):
            self.texts_in += 1
        else:
            self.binaries_in += 1
        self.bytes_in += size

    def sent(self, connection: Connection, message: str | bytes, size: int) -> None:
        if isinstance(message, str):
            self.texts_out += 1
        else:
            self.binaries_out += 1
        self.bytes_out += size

    def send_answered(self, status: int) -> None:
        self.sends[status if status in self.sends else OTHER] += 1

    def attempted(self, attempt: Attempt) -> None:
        event, outcome = attempt.event, attempt.outcome
        self.attempts[event][outcome] += 1
        if outcome in TIMED:
            seconds = attempt.seconds
            self.durations[event][bisect_left(BOUNDS, seconds)] += 1
            self.seconds[event] += seconds

    def forwarded(
        self, connection_id: str, owner: str, outcome: ForwardOutcome, status: int
    ) -> None:
        self.forwards[outcome] += 1

    def heartbeat_ended(self, delivered: bool) -> None:
        self.heartbeats["delivered" if delivered else "failed"] += 1

    def ended(
        self, event: EventName, connection_id: str, outcome: Outcome, count: int = 1
    ) -> None:
        self.events[event][outcome] += count

    def commanded(
        self,
        source: Source,
        command: CommandName | Literal["none"],
        outcome: CommandOutcome,
        connection_id: str,
    ) -> None:
        self.commands[source, command, outcome] += 1


def _zeroes(labels: object) -> dict[str, int]:
    """Return a count of 0 for each value of a `Literal`."""
    return dict.fromkeys(get_args(labels), 0)


def close_label(code: int) -> str:
    """Return the label of a close code; codes of applications share one per range.

    Otherwise a client could create any number of labels.
    """
    if code in CLOSE_CODES:
        return str(code)
    return f"{code // 1000}xxx" if 3000 <= code <= 4999 else "other"


class LoopLag:
    """Measures how late the loop is, with a timer; keeps the maximum of a minute.

    It does not use the loop's clock, which uvloop stops while callbacks run.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worst = deque([0.0], maxlen=LAG_BUCKETS)
        self._bucket_ends = monotonic() + LAG_BUCKET
        self._start()

    def _start(self) -> None:
        self._due = monotonic() + LAG_INTERVAL
        self._timer = self._loop.call_later(LAG_INTERVAL, self._tick)

    def _tick(self) -> None:
        now = monotonic()
        if now >= self._bucket_ends:
            self._bucket_ends = now + LAG_BUCKET
            self._worst.append(0.0)
        self._worst[-1] = max(self._worst[-1], now - self._due)
        self._start()

    @property
    def seconds(self) -> float:
        """Return the longest delay of the last minute."""
        return max(*self._worst, monotonic() - self._due)

    def close(self) -> None:
        """Stop the timer."""
        self._timer.cancel()
