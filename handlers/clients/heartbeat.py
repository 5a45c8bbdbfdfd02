"""Pings every open connection, and finds the peers that have vanished.

Tornado's own ping costs a task per connection and closes clients whose
messages are merely waiting for a slow backend; one timer serves them all here.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice, takewhile
from typing import Protocol

from tornado.options import define

from backends.deadlines import after_reading

logger = logging.getLogger(__name__)

define("ping_interval", default=20.0, metavar="SECONDS",
       help="time between pings to each client; 0 turns them off")
define("ping_timeout", default=20.0, metavar="SECONDS",
       help="longest wait for any sign of life after a ping; 0 waits forever")


class Pinged(Protocol):
    """What is pinged: a `ClientConnection`."""

    def beat(self) -> None:
        """Send a ping."""

    def is_silent(self, since: float) -> bool:
        """Whether no sign of life came since `since`, when it was pinged."""

    def vanish(self) -> None:
        """Give it up."""


class Heartbeat:
    """Pings each connection every `interval` seconds; 0 turns it off.

    A peer that shows no sign of life within `timeout` seconds of a ping is given
    up. It says itself what a sign is: any byte that comes, since a pong has to wait
    behind a large message that is on its way, or that is taken, since a ping has to.
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
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._due(self._pinged_at, now - self._timeout):
            # Signs of life may have come already.
            after_reading(loop, partial(self._judge, now))
        else:
            self._ping(now)

    def _judge(self, now: float) -> None:
        for connection in self._due(self._pinged_at, now - self._timeout):
            # One may have ended with another one.
            pinged_at = self._pinged_at.pop(connection, None)
            if pinged_at is not None:
                _guarded(partial(_judge, connection, pinged_at))
        self._ping(now)

    def _ping(self, now: float) -> None:
        for connection in self._due(self._ping_at, now):
            if self._ping_at.pop(connection, None) is None:
                continue
            self._ping_at[connection] = now + self._interval
            if self._timeout > 0:
                self._pinged_at.setdefault(connection, now)
            _guarded(connection.beat)
        self._arm(asyncio.get_running_loop().time())

    @staticmethod
    def _due(times: Mapping[Pinged, float], now: float) -> list[Pinged]:
        return [
            connection
            for connection, _ in takewhile(lambda item: item[1] <= now, times.items())
        ]


def _judge(connection: Pinged, pinged_at: float) -> None:
    if connection.is_silent(pinged_at):
        connection.vanish()


def _guarded(act: Callable[[], None]) -> None:
    """So that a bug with one connection is none of the others'."""
    try:
        act()
    except Exception:
        logger.exception("bug in a ping")


def _first(times: Mapping[Pinged, float]) -> list[float]:
    return list(islice(times.values(), 1))
