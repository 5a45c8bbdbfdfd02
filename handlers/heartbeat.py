"""Pings every open connection, and finds the peers that have vanished.

Tornado's own ping costs a task per connection and closes clients whose
messages are merely waiting for a slow backend; one timer serves them all here.
"""

import asyncio
from collections.abc import Mapping
from itertools import islice, takewhile
from typing import Protocol


class Pinged(Protocol):
    """What is pinged: a `ClientConnection`."""

    @property
    def last_heard(self) -> float:
        """When its peer sent anything, on the loop's clock."""

    @property
    def reading_paused(self) -> bool:
        """Whether it reads nothing now, a pong neither."""

    def beat(self) -> None: ...

    def vanish(self) -> None: ...


class Heartbeat:
    """Pings each connection every `interval` seconds; 0 turns it off.

    A peer from which nothing at all came within `timeout` seconds of a ping
    is reported by `vanish()`. Any byte counts, since a pong has to wait behind
    a large message that is on its way.
    """

    def __init__(self, interval: float, timeout: float) -> None:
        self._interval = interval
        self._timeout = timeout
        # Each keeps the order of its times, since all wait equally long.
        self._ping_at: dict[Pinged, float] = {}
        self._pinged_at: dict[Pinged, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Pinged) -> None:
        """Ping `connection` from now on."""
        if self._interval > 0:
            now = asyncio.get_running_loop().time()
            self._ping_at[connection] = now + self._interval
            self._arm(now)

    def discard(self, connection: Pinged) -> None:
        """Ping it no more."""
        self._ping_at.pop(connection, None)
        self._pinged_at.pop(connection, None)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, now: float) -> None:
        if self._timer is not None:
            return
        due = [at + self._timeout for at in _first(self._pinged_at)]
        due += _first(self._ping_at)
        if due:
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, min(due) - now), self._tick
            )

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in self._due(self._pinged_at, now - self._timeout):
            pinged_at = self._pinged_at.pop(connection)
            if connection.last_heard < pinged_at and not connection.reading_paused:
                connection.vanish()
        for connection in self._due(self._ping_at, now):
            del self._ping_at[connection]
            self._ping_at[connection] = now + self._interval
            if connection.reading_paused:
                continue
            connection.beat()
            if self._timeout > 0:
                self._pinged_at.setdefault(connection, now)
        self._arm(now)

    @staticmethod
    def _due(times: Mapping[Pinged, float], now: float) -> list[Pinged]:
        return [
            connection
            for connection, _ in takewhile(lambda item: item[1] <= now, times.items())
        ]


def _first(times: Mapping[Pinged, float]) -> list[float]:
    return list(islice(times.values(), 1))
