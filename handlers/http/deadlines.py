"""Closes HTTP connections whose deadline has passed."""

import asyncio
import heapq
from collections.abc import Callable
from typing import Protocol

from backends.deadlines import after_reading

TICK = 0.5  # seconds; the deadline check interval
LATE_TICK = 0.1  # seconds of delay above which a tick counts as a stall
MIN_AGE = 1.0  # seconds for which a connection is not closed to make room
MAX_CLOSED = 256  # connections that one call of `make_room` closes


class Expirable(Protocol):
    """A connection with a deadline."""

    deadline: float  # on the loop's clock

    def abort(self) -> None:
        """Close immediately."""


class Deadlines:
    """Aborts connections whose deadline has passed; one timer checks all of them.

    A stall of the whole process (SIGSTOP, a suspended machine) extends all
    deadlines, and what has arrived by then is read first. `read_all` reads what the
    loop does not.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        read_all: Callable[[], None] = lambda: None,
    ) -> None:
        self._read_all = read_all
        # With the time at which each was accepted, on the loop's clock.
        self.connections: dict[Expirable, float] = {}
        self._loop = loop
        self._next = 0.0  # tick, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Expirable) -> None:
        """Check `connection` until it is discarded."""
        self.connections[connection] = self._loop.time()
        if self._timer is None:
            self._wait()

    def discard(self, connection: Expirable) -> None:
        """Stop checking `connection`."""
        self.connections.pop(connection, None)

    def make_room(self) -> None:
        """Close a quarter of the connections that wait for their peers, if any do.

        The earliest deadlines first, so an unfinished head goes before an idle
        connection. New connections stay: their requests may have arrived unread.
        """
        latest = self._loop.time() - MIN_AGE
        waiting = [
            connection
            for connection, accepted in self.connections.items()
            if accepted < latest and connection.deadline < float("inf")
        ]
        count = min(-(-len(waiting) // 4), MAX_CLOSED)
        for connection in heapq.nsmallest(count, waiting, lambda c: c.deadline):
            connection.abort()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._next = self._loop.time() + TICK
        self._timer = self._loop.call_at(self._next, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        late_by = now - self._next
        if late_by > LATE_TICK:
            for connection in self.connections:
                connection.deadline += late_by
        if any(connection.deadline < now for connection in self.connections):
            after_reading(self._loop, self._abort_expired)
        self._timer = None
        if self.connections:
            self._wait()

    def _abort_expired(self) -> None:
        self._read_all()
        now = self._loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.abort()
