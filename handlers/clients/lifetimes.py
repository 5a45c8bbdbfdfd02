"""Closes connections that are idle or too old.

One timer serves all connections. It fires once a second, or more often for short
limits, and checks only the connections that may have expired.
"""

import asyncio
import logging
import random
from typing import Protocol

from tornado.options import define

from backends.deadlines import STALL, after_reading

logger = logging.getLogger(__name__)

define("idle_timeout", default=0.0, group=__name__, metavar="SECONDS",
       help="longest time without message data in either direction; then the client "
            "is closed with 1001; 0: no limit")
define("max_lifetime", default=0.0, group=__name__, metavar="SECONDS",
       help="longest duration of a connection; then it is closed with 1001, up to a "
            "tenth earlier; 0: no limit")

# Seconds between two turns, which is how late a close may be.
MIN_TURN, MAX_TURN = 0.01, 1.0
TURNS = 20  # in the shorter one of the two limits
JITTER = 0.1  # of a lifetime, so that clients do not all reconnect at once


class Expirable(Protocol):
    """A connection that may expire: a `ClientConnection`."""

    @property
    def last_message_at(self) -> float:
        """Time of the last message, or part of one, in or out, on the loop's clock."""

    @property
    def busy(self) -> bool:
        """Whether messages wait for the backend, so that the client is not idle."""

    def expire(self, reason: str) -> None: ...


class Lifetimes:
    """Calls `expire()` after `idle_timeout` or `max_lifetime`, both in seconds.

    0 turns one off.
    """

    def __init__(self, idle_timeout: float = 0.0, max_lifetime: float = 0.0) -> None:
        self._idle_timeout = idle_timeout or float("inf")
        self._max_lifetime = max_lifetime or float("inf")
        shortest = min(self._idle_timeout, self._max_lifetime)
        self._on = shortest < float("inf")
        self._turn_time = max(MIN_TURN, min(MAX_TURN, shortest / TURNS))
        # Connections by the turn in which to check them, each with the time at which
        # it must end, on the loop's clock.
        self._turns: dict[int, dict[Expirable, float]] = {}
        self._turn_of: dict[Expirable, int] = {}
        # Connections to check once everything that has arrived was read.
        self._due: dict[Expirable, float] = {}
        self._last_turn = 0
        self._timer: asyncio.TimerHandle | None = None
        # When the latest stall of the process ended, on the loop's clock. Nobody could
        # send during it.
        self._resumed_at = float("-inf")

    def add(self, connection: Expirable, now: float) -> None:
        """Watch `connection` from `now` on, which is the time on the loop's clock."""
        if not self._on:
            return
        ends_at = now + self._max_lifetime * (1 - JITTER * random.random())
        if self._timer is None and not self._due:
            self._last_turn = self._turn_at(now)
            self._arm()
        self._look_at(connection, min(now + self._idle_timeout, ends_at), ends_at)

    def discard(self, connection: Expirable) -> None:
        """Stop watching `connection`."""
        self._due.pop(connection, None)
        turn = self._turn_of.pop(connection, None)
        if turn is not None:
            self._turns[turn].pop(connection)
            if not self._turns[turn]:
                del self._turns[turn]

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_at(self, connection: Expirable, at: float, ends_at: float) -> None:
        turn = max(self._turn_at(at), self._last_turn) + 1  # the one after that time
        self._turns.setdefault(turn, {})[connection] = ends_at
        self._turn_of[connection] = turn

    def _turn_at(self, at: float) -> int:
        return int(at / self._turn_time)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(
            self._turn_time, self._on_turn
        )

    def _on_turn(self) -> None:
        assert self._timer is not None
        now = asyncio.get_running_loop().time()
        if now > self._timer.when() + STALL:
            self._resumed_at = now
        self._timer = None
        last, self._last_turn = self._last_turn, self._turn_at(now)
        for turn in range(last + 1, self._last_turn + 1):
            due = self._turns.pop(turn, {})
            self._due.update(due)
            for connection in due:
                del self._turn_of[connection]
        if self._due:
            after_reading(asyncio.get_running_loop(), self._judge_all)
        elif self._turns:
            self._arm()

    def _judge_all(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._due:
            connection, ends_at = self._due.popitem()
            try:
                self._judge(connection, ends_at, now)
            except Exception:  # a bug with one is none of the others'
                logger.exception("bug in a lifetime")
        if self._turns and self._timer is None:
            self._arm()

    def _judge(self, connection: Expirable, ends_at: float, now: float) -> None:
        heard = max(connection.last_message_at, self._resumed_at)
        if connection.busy:
            heard = now
        if now >= ends_at:
            connection.expire("lifetime")
        elif now >= heard + self._idle_timeout:
            connection.expire("idle")
        else:
            self._look_at(
                connection, min(heard + self._idle_timeout, ends_at), ends_at
            )
