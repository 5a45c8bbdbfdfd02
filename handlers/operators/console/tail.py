"""What the console's viewers see: an observer that is there while somebody looks.

Every quarter of a second each viewer gets the events of that time, as far as they
are what it wishes to see and no more than it can read; every second a snapshot.
A viewer that reads slowly gets them when it has read: what waits for it is one
batch, and the newest snapshot. `handlers.operators.console.live` streams it.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import randrange
from typing import Any

import orjson

from backends import (
    Attempt,
    Backend,
    Connection,
    EventName,
    HandshakeOutcome,
    Initiator,
    Observer,
    Outcome,
)
from handlers.clients.connection import Connections
from handlers.telemetry.observers import Observers

MAX_VIEWERS = 16
CLOSE_TIMEOUT = 0.5  # seconds
BATCH_INTERVAL = 0.25  # seconds
BATCHES_PER_SNAPSHOT = 4
EVENTS_PER_BATCH = 25  # more of them nobody can read; the rest is counted
FOLLOWED_PER_BATCH = 250  # of the connections that a viewer follows
MAX_FOLLOWED = 4  # connections: one in the playground, one that is looked at
SHOWN_OF_BODY = 1024  # characters of a text, bytes of a binary message
MAX_LATENCIES = 1000  # of one second, of which percentiles are made

KINDS = frozenset(
    ("handshake", "opened", "closed", "received", "sent", "attempt", "given_up")
)
FAILED_ATTEMPTS = ("error", "away", "timeout")

Event = dict[str, Any]


@dataclass(slots=True)
class Counts:
    """What happened while anybody watched, since the relay's start."""

    opened: int = 0
    closed: int = 0
    turned_away: int = 0  # handshakes
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    attempts: int = 0
    failed_attempts: int = 0
    refused: int = 0  # events, by the backend
    given_up: int = 0  # events


@dataclass(frozen=True, slots=True)
class Wishes:
    """What one viewer wants to see.

    Events of those `kinds`, of connections whose id begins with `connection`, and
    only what went wrong where `failures` is set; besides all of those `followed`,
    and the bodies of one connection's messages.
    """

    kinds: frozenset[str] = KINDS
    connection: str = ""
    failures: bool = False
    followed: frozenset[str] = frozenset()
    bodies: str | None = None


class Viewer:
    """One person's stream: what waits to be sent on it."""

    def __init__(self, on_leave: Callable[["Viewer"], None]) -> None:
        self.id = secrets.token_hex(16)
        self.wishes = Wishes()
        self.ended = False  # nothing comes any more
        self._on_leave = on_leave
        self._events: list[Event] = []
        self._followed = 0  # of these
        self._skipped = 0
        self._snapshot: bytes | None = None
        self._changed = asyncio.Event()

    def wants(self, kind: str, connection_id: str, failed: bool = False) -> bool:
        """Whether there is room for an event that it wishes to see."""
        wishes = self.wishes
        if connection_id in wishes.followed:
            if self._followed < FOLLOWED_PER_BATCH:
                self._followed += 1
                return True
        elif (
            kind not in wishes.kinds
            or (wishes.failures and not failed)
            or not connection_id.startswith(wishes.connection)
        ):
            return False
        elif len(self._events) - self._followed < EVENTS_PER_BATCH:
            return True
        self._skipped += 1
        return False

    def add(self, event: Event) -> None:
        """One that it `wants`."""
        self._events.append(event)

    def wake(self, snapshot: bytes | None) -> None:
        """A batch's time is over; there may be a newer snapshot."""
        self._snapshot = snapshot or self._snapshot
        if self._snapshot is not None or self._events or self._skipped:
            self._changed.set()

    async def next(self) -> bytes:
        """Lines of JSON, when there are any; empty at the end."""
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
        """There is nothing more to see."""
        self.ended = True
        self._changed.set()

    def leave(self) -> None:
        """It looks no more."""
        self.end()
        self._on_leave(self)


class Tail(Observer):
    """Watches while there are viewers; costs nothing while there are none.

    `named` is what the page tells of this relay. Bodies are shown to nobody
    unless `may_show_bodies`.
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
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._left = asyncio.Event()  # by all of them

    # Who looks.

    def join(self) -> Viewer | None:
        """Another viewer, who has to leave; None where there are too many."""
        if self._closed or len(self._viewers) >= MAX_VIEWERS:
            return None
        if not self._viewers:
            self._observers.add(self)
            self._timer = self._connections.loop.call_later(BATCH_INTERVAL, self._tick)
        viewer = Viewer(self._on_leave)
        self._viewers[viewer.id] = viewer
        return viewer

    def viewer(self, viewer_id: str) -> Viewer | None:
        """The viewer of that id, who looks now."""
        return self._viewers.get(viewer_id)

    def _on_leave(self, viewer: Viewer) -> None:
        if self._viewers.pop(viewer.id, None) is not None and not self._viewers:
            self._observers.remove(self)
            self._latencies.clear()
            if self._timer is not None:
                self._timer.cancel()
            self._left.set()

    async def close(self) -> None:
        """The relay stops: every stream ends, and there are no more.

        Returns when they have ended, or after `CLOSE_TIMEOUT`.
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
            pass  # whoever reads slowly is cut off with its listener

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

    # What there is to see.

    def snapshot(self) -> dict[str, Any]:
        """The relay at this moment; `counts` only ever grow while it runs."""
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
            "backend": asdict(condition),
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
        self._counts.turned_away += 1
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
        self._tell("opened", connection.id)

    def closed(
        self,
        connection: Connection,
        code: int,
        initiator: Initiator,
        duration: float,
    ) -> None:
        self._counts.closed += 1
        self._tell(
            "closed",
            connection.id,
            code=code,
            initiator=initiator,
            duration=round(duration, 3),
        )

    def received(
        self, connection: Connection, message: str | bytes, size: int
    ) -> None:
        self._counts.messages_in += 1
        self._counts.bytes_in += size
        self._tell_of_message("received", connection, message, size)

    def sent(self, connection: Connection, message: str | bytes, size: int) -> None:
        self._counts.messages_out += 1
        self._counts.bytes_out += size
        self._tell_of_message("sent", connection, message, size)

    def attempted(self, attempt: Attempt) -> None:
        counts = self._counts
        counts.attempts += 1
        failed = attempt.outcome in FAILED_ATTEMPTS
        counts.failed_attempts += failed
        counts.refused += attempt.outcome == "refused"
        if attempt.outcome != "let_go":
            self._keep(attempt.seconds)
        self._tell(
            "attempt",
            attempt.connection_id,
            failed or attempt.outcome == "refused",
            event=attempt.event,
            event_id=attempt.event_id,
            outcome=attempt.outcome,
            status=attempt.status,
            ms=_milliseconds(attempt.seconds),
        )

    def ended(
        self, event: EventName, connection_id: str, outcome: Outcome, count: int = 1
    ) -> None:
        if outcome == "failed":  # all others are seen in their last attempt
            self._counts.given_up += count
            self._tell("given_up", connection_id, True, event=event, count=count)

    def _tell(
        self, kind: str, connection_id: str, failed: bool = False, **details: Any
    ) -> None:
        for viewer in self._viewers.values():
            if viewer.wants(kind, connection_id, failed):
                viewer.add(_event(kind, connection_id, **details))

    def _tell_of_message(
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
                if self.may_show_bodies and viewer.wishes.bodies == connection.id:
                    event |= _shown(message)
                viewer.add(event)

    def _keep(self, seconds: float) -> None:
        """A fair sample of a second's attempts, however many there are."""
        if len(self._latencies) < MAX_LATENCIES:
            self._latencies.append(seconds)
            return
        place = randrange(self._counts.attempts - self._attempts_before)
        if place < MAX_LATENCIES:
            self._latencies[place] = seconds


def _event(kind: str, connection_id: str, **details: Any) -> Event:
    return {"kind": kind, "at": time.time(), "id": connection_id, **details}


def _number(kind: str, connection: Any) -> int:
    """Which of its connection's messages that is, in its direction, from 1."""
    counted = connection.messages_in if kind == "received" else connection.messages_out
    return int(counted)


def _shown(message: str | bytes) -> Event:
    """The beginning of a body: text as it is, binary in hex."""
    beginning = message[:SHOWN_OF_BODY]
    if isinstance(beginning, bytes):
        body = beginning.hex(" ")
    else:  # JSON can't hold what is no Unicode
        body = beginning.encode(errors="replace").decode()
    return {"body": body, "cut": len(message) > SHOWN_OF_BODY}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    if not ordered:
        return None
    return _milliseconds(ordered[int(len(ordered) * share)])
