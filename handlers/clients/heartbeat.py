"""Pings every open connection, and detects the peers that no longer respond.

Tornado's own ping costs a task per connection, and closes clients whose messages
wait for a slow backend. Here one timer serves all connections.
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

define("ping_interval", default=20.0, group=__name__, metavar="SECONDS",
       help="time between pings to each client; 0: no pings")
define("ping_timeout", default=20.0, group=__name__, metavar="SECONDS",
       help="longest wait for a sign of life after a ping; 0: no limit")


class Pinged(Protocol):
    """What is pinged: a `ClientConnection`."""

    def send_ping(self) -> None:
        """Send a ping."""

    def is_silent(self, since: float) -> bool:
        """Whether the peer has shown no sign of life since `since`, the ping's time."""

    def on_ping_timeout(self) -> None:
        """End the connection: its peer no longer responds."""


class Heartbeat:
    """Pings each connection every `interval` seconds; 0 turns it off.

    Calls `on_ping_timeout` of a connection that is silent for `timeout` seconds
    after a ping. What counts as a sign of life is up to the connection: not only a
    pong, which may have to wait behind a large message.
    """

    def __init__(self, interval: float, timeout: float) -> None:
        self._interval = interval
        self._timeout = timeout
        # Both are ordered by time, since the interval is the same for all.
        self._ping_at: dict[Pinged, float] = {}
        self._pinged_at: dict[Pinged, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Pinged, now: float) -> None:
        """Ping `connection` from `now` on, which is the time on the loop's clock."""
        if self._interval > 0:
            self._ping_at[connection] = now + self._interval
            self._arm(now)

    def discard(self, connection: Pinged) -> None:
        """Stop pinging `connection`."""
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
            # The end of one connection may end another.
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
            _guarded(connection.send_ping)
        self._arm(asyncio.get_running_loop().time())

    @staticmethod
    def _due(times: Mapping[Pinged, float], now: float) -> list[Pinged]:
        return [
            connection
            for connection, _ in takewhile(lambda item: item[1] <= now, times.items())
        ]


def _judge(connection: Pinged, pinged_at: float) -> None:
    if connection.is_silent(pinged_at):
        connection.on_ping_timeout()


def _guarded(act: Callable[[], None]) -> None:
    """Call `act`; a bug in one connection must not affect the others."""
    try:
        act()
    except Exception:
        logger.exception("bug in a ping")


def _first(times: Mapping[Pinged, float]) -> list[float]:
    return list(islice(times.values(), 1))
