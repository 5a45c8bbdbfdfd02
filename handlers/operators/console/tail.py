"""Collects what the console's viewers see; observes only while there is a viewer.

Each viewer gets a batch of events every 0.25 s, those that match its filter, up to
a limit; and a snapshot every second. Only one batch and the latest snapshot wait
for a viewer that reads slowly. `handlers.operators.console.live` streams them.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import randrange
from typing import Any, Literal

import orjson

from backends import (
    Attempt,
    Backend,
    Connection,
    EventName,
    ForwardOutcome,
    HandshakeOutcome,
    Initiator,
    Observer,
    Outcome,
)
from backends.commands import CommandName, CommandOutcome, Source
from handlers.clients.connection import Connections
from handlers.telemetry.observers import Observers

MAX_VIEWERS = 16
CLOSE_TIMEOUT = 0.5  # seconds
BATCH_INTERVAL = 0.25  # seconds
BATCHES_PER_SNAPSHOT = 4
EVENTS_PER_BATCH = 25  # nobody can read more; the others are only counted
FOLLOWED_PER_BATCH = 250  # events of the connections that a viewer follows
MAX_FOLLOWED = 4  # connections; the page follows two: playground and detail view
SHOWN_OF_BODY = 1024  # characters of a text, bytes of a binary message
MAX_LATENCIES = 1000  # of one second, sampled for the percentiles

KINDS = frozenset(
    (
        "handshake",
        "opened",
        "closed",
        "received",
        "sent",
        "command",
        "forwarded",
        "attempt",
        "given_up",
    )
)
FAILED_ATTEMPTS = ("error", "unreachable", "timeout")
# A connection that is refused takes a fraction of a millisecond, and is no latency.
WITH_LATENCY = ("delivered", "error", "timeout")

Event = dict[str, Any]


@dataclass(slots=True)
class Counts:
    """Counts of what happened while there were viewers, since the start."""

    opened: int = 0
    closed: int = 0
    rejected: int = 0  # handshakes
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    attempts: int = 0
    failed_attempts: int = 0
    refused: int = 0  # events, by the backend
    given_up: int = 0  # events


@dataclass(frozen=True, slots=True)
class ViewerFilter:
    """Selects the events that one viewer gets.

    Events of these `kinds`, of connections whose id begins with `connection`; only
    failures if `failures` is set. In addition every event of the connections
    `followed`. Message bodies only of the connection `bodies`.
    """

    kinds: frozenset[str] = KINDS
    connection: str = ""
    failures: bool = False
    followed: frozenset[str] = frozenset()
    bodies: str | None = None


class Viewer:
    """One stream of the console: its filter, and the events that wait for it."""

    def __init__(self, on_leave: Callable[["Viewer"], None]) -> None:
        self.id = secrets.token_hex(16)
        self.filter = ViewerFilter()
        self.ended = False  # no more events are added
        self._on_leave = on_leave
        self._events: list[Event] = []
        self._followed = 0  # of these, events of followed connections
        self._skipped = 0
        self._snapshot: bytes | None = None
        self._changed = asyncio.Event()

    def wants(self, kind: str, connection_id: str, failed: bool = False) -> bool:
        """Whether an event matches the filter, and there is room for it."""
        wanted = self.filter
        if connection_id in wanted.followed:
            if self._followed < FOLLOWED_PER_BATCH:
                self._followed += 1
                return True
        elif (
            kind not in wanted.kinds
            or (wanted.failures and not failed)
            or not connection_id.startswith(wanted.connection)
        ):
            return False
        elif len(self._events) - self._followed < EVENTS_PER_BATCH:
            return True
        self._skipped += 1
        return False

    def add(self, event: Event) -> None:
        """Add an event for which `wants` has returned true."""
        self._events.append(event)

    def wake(self, snapshot: bytes | None) -> None:
        """End a batch; `snapshot` replaces one that has not been sent yet."""
        self._snapshot = snapshot or self._snapshot
        if self._snapshot is not None or self._events or self._skipped:
            self._changed.set()

    async def next(self) -> bytes:
        """Wait for the next lines of JSON; empty bytes mean the end."""
        await self._changed.wait()
        self._changed.clear()
        lines = []
        if self._events or self._skipped:
            batch = {
                "kind": "events",
                "events": self._events,
                "skipped": self._skipped,
            }
            lines.append(orjson.dumps(batch))
            self._events = []
            self._followed = self._skipped = 0
        if self._snapshot is not None:
            lines.append(self._snapshot)
            self._snapshot = None
        return b"".join(line + b"\n" for line in lines)

    def end(self) -> None:
        """Send what waits, then end the stream."""
        self.ended = True
        self._changed.set()

    def leave(self) -> None:
        """End the stream: the page was closed."""
        self.end()
        self._on_leave(self)


class Tail(Observer):
    """Observes the relay while there are viewers; costs nothing without them.

    `named` holds the names that the page shows: version, instance, backend. No
    viewer gets bodies unless `may_show_bodies`.
    """

    def __init__(
        self,
        observers: Observers,
        connections: Connections,
        backend: Backend,
        may_show_bodies: bool,
        named: dict[str, str],
    ) -> None:
        self.may_show_bodies = may_show_bodies
        self.named = named
        self._observers = observers
        self._connections = connections
        self._backend = backend
        self._viewers: dict[str, Viewer] = {}
        self._counts = Counts()
        self._latencies: list[float] = []  # seconds; a sample where there are many
        self._attempts_before = 0  # of the counts, at the last snapshot
        self._batches = 0
        self._closed_by_operator: set[str] = set()  # ids, until they have closed
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._left = asyncio.Event()  # set when no viewer is left

    # Viewers.

    def join(self) -> Viewer | None:
        """Add a viewer, which must `leave`; None if there are too many."""
        if self._closed or len(self._viewers) >= MAX_VIEWERS:
            return None
        if not self._viewers:
            self._observers.add(self)
            self._timer = self._connections.loop.call_later(BATCH_INTERVAL, self._tick)
        viewer = Viewer(self._on_leave)
        self._viewers[viewer.id] = viewer
        return viewer

    def viewer(self, viewer_id: str) -> Viewer | None:
        """Return the current viewer of that id."""
        return self._viewers.get(viewer_id)

    def _on_leave(self, viewer: Viewer) -> None:
        if self._viewers.pop(viewer.id, None) is not None and not self._viewers:
            self._observers.remove(self)
            self._latencies.clear()
            self._closed_by_operator.clear()
            if self._timer is not None:
                self._timer.cancel()
            self._left.set()

    async def close(self) -> None:
        """End every stream, and accept no more viewers.

        Returns when the streams have ended, or after `CLOSE_TIMEOUT`.
        """
        self._closed = True
        if not self._viewers:
            return
        self._left.clear()
        for viewer in self._viewers.values():
            viewer.end()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._left.wait()
        except TimeoutError:
            pass  # the listener closes the connections of slow viewers

    def _tick(self) -> None:
        self._batches += 1
        due = self._batches % BATCHES_PER_SNAPSHOT == 0
        snapshot = orjson.dumps(self.snapshot()) if due else None
        if due:
            self._latencies.clear()
            self._attempts_before = self._counts.attempts
        for viewer in self._viewers.values():
            viewer.wake(snapshot)
        self._timer = self._connections.loop.call_later(BATCH_INTERVAL, self._tick)

    def operator_closes(self, connection: Connection) -> None:
        """Record that an operator closes an open connection, for its event."""
        if self._viewers:
            self._closed_by_operator.add(connection.id)

    # Events.

    def snapshot(self) -> dict[str, Any]:
        """Describe the relay now; `counts` never decrease while it runs."""
        connections = self._connections
        condition = self._backend.condition()
        latencies = sorted(self._latencies)
        return {
            "kind": "snapshot",
            "at": time.time(),
            "state": "draining" if connections.stopping else "serving",
            "open": len(connections),
            "total": connections.total,
            "pending": connections.backlog.events,
            "pending_bytes": connections.backlog.bytes,
            "oldest_pending": connections.oldest_pending,
            "backend": condition._asdict(),
            "counts": asdict(self._counts),
            "latency": {
                "p50": _percentile(latencies, 0.5),
                "p95": _percentile(latencies, 0.95),
            },
        }

    def handshake_ended(
        self, outcome: HandshakeOutcome, status: int, remote_ip: str, seconds: float
    ) -> None:
        if outcome == "opened":
            return  # `opened` follows
        self._counts.rejected += 1
        for viewer in self._viewers.values():
            if viewer.wants("handshake", "", failed=True):
                viewer.add(
                    _event(
                        "handshake",
                        "",
                        outcome=outcome,
                        status=status,
                        remote_ip=remote_ip,
                        ms=_milliseconds(seconds),
                    )
                )

    def opened(self, connection: Connection) -> None:
        self._counts.opened += 1
        self._add_event("opened", connection.id)

    def closed(
        self,
        connection: Connection,
        code: int,
        initiator: Initiator,
        duration: float,
    ) -> None:
        self._counts.closed += 1
        by_operator = connection.id in self._closed_by_operator
        self._closed_by_operator.discard(connection.id)
        self._add_event(
            "closed",
            connection.id,
            code=code,
            initiator=initiator,
            operator=by_operator and initiator == "relay",
            duration=round(duration, 3),
        )

    def received(
        self, connection: Connection, message: str | bytes, size: int
    ) -> None:
        self._counts.messages_in += 1
        self._counts.bytes_in += size
        self._add_message("received", connection, message, size)

    def sent(self, connection: Connection, message: str | bytes, size: int) -> None:
        self._counts.messages_out += 1
        self._counts.bytes_out += size
        self._add_message("sent", connection, message, size)

    def attempted(self, attempt: Attempt) -> None:
        counts = self._counts
        counts.attempts += 1
        failed = attempt.outcome in FAILED_ATTEMPTS
        counts.failed_attempts += failed
        counts.refused += attempt.outcome == "refused"
        if attempt.outcome in WITH_LATENCY:
            self._keep(attempt.seconds)
        self._add_event(
            "attempt",
            attempt.connection_id,
            failed or attempt.outcome == "refused",
            event=attempt.event,
            event_id=attempt.event_id,
            outcome=attempt.outcome,
            status=attempt.status,
            ms=_milliseconds(attempt.seconds),
            attempt=attempt.number,
            **({"place": attempt.place} if attempt.place else {}),
        )

    def ended(
        self, event: EventName, connection_id: str, outcome: Outcome, count: int = 1
    ) -> None:
        if outcome == "failed":  # `attempted` reports all other outcomes
            self._counts.given_up += count
            self._add_event("given_up", connection_id, True, event=event, count=count)

    def commanded(
        self,
        source: Source,
        command: CommandName | Literal["none"],
        outcome: CommandOutcome,
        connection_id: str,
    ) -> None:
        self._add_event(
            "command",
            connection_id,
            outcome != "done",
            source=source,
            command=command,
            outcome=outcome,
        )

    def forwarded(
        self, connection_id: str, owner: str, outcome: ForwardOutcome, status: int
    ) -> None:
        self._add_event(
            "forwarded",
            connection_id,
            outcome != "answered",
            owner=owner,
            outcome=outcome,
            status=status,
        )

    def _add_event(
        self, kind: str, connection_id: str, failed: bool = False, **details: Any
    ) -> None:
        for viewer in self._viewers.values():
            if viewer.wants(kind, connection_id, failed):
                viewer.add(_event(kind, connection_id, **details))

    def _add_message(
        self, kind: str, connection: Connection, message: str | bytes, size: int
    ) -> None:
        for viewer in self._viewers.values():
            if viewer.wants(kind, connection.id):
                event = _event(
                    kind,
                    connection.id,
                    type="text" if isinstance(message, str) else "binary",
                    size=size,
                    number=_number(kind, connection),
                )
                if self.may_show_bodies and viewer.filter.bodies == connection.id:
                    event |= _shown(message)
                viewer.add(event)

    def _keep(self, seconds: float) -> None:
        """Keep a uniform sample of the latencies since the last snapshot."""
        if len(self._latencies) < MAX_LATENCIES:
            self._latencies.append(seconds)
            return
        place = randrange(self._counts.attempts - self._attempts_before)
        if place < MAX_LATENCIES:
            self._latencies[place] = seconds


def _event(kind: str, connection_id: str, **details: Any) -> Event:
    return {"kind": kind, "at": time.time(), "id": connection_id, **details}


def _number(kind: str, connection: Any) -> int:
    """Return the message's number within its connection and direction, from 1."""
    counted = connection.messages_in if kind == "received" else connection.messages_out
    return int(counted)


def _shown(message: str | bytes) -> Event:
    """Return the beginning of a body: text as it is, binary in hex."""
    beginning = message[:SHOWN_OF_BODY]
    if isinstance(beginning, bytes):
        body = beginning.hex(" ")
    else:  # JSON cannot contain lone surrogates
        body = beginning.encode(errors="replace").decode()
    return {"body": body, "cut": len(message) > SHOWN_OF_BODY}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """Return a percentile in milliseconds; None if there are no values."""
    if not ordered:
        return None
    return _milliseconds(ordered[int(len(ordered) * share)])
