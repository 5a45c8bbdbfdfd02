"""Holds events back after a stall of this process that may have cost its lease."""

import asyncio
from collections.abc import Callable
from time import CLOCK_BOOTTIME, clock_gettime

from backends.waiting import Waiters

MAX_HOLD = 5.0  # seconds, unless events wait for Redis anyway


def now() -> float:
    """Seconds on a clock that also counts while the machine is suspended."""
    return clock_gettime(CLOCK_BOOTTIME)


class StallHold:
    """`active` from the end of a stall beyond `ttl` seconds until `release`.

    At most for `MAX_HOLD`, unless `persist` was called. It begins with the first look
    at `active` after the stall, before any timer or socket had its turn; then it calls
    `on_stall`. `extend` says that there was no stall until now.
    """

    def __init__(self, ttl: float) -> None:
        self.loop = asyncio.get_running_loop()
        self._ttl = ttl
        self._until = now() + ttl
        self._holds = False
        self._persists = False
        self._timer: asyncio.TimerHandle | None = None  # ends it
        self._line = Waiters()
        self.on_stall: Callable[[], None] = lambda: None

    @property
    def active(self) -> bool:
        """Whether events must wait now."""
        if self._holds:
            return True
        if now() <= self._until:
            return False
        self._holds = True
        if not self._persists:
            self._timer = self.loop.call_later(MAX_HOLD, self.release)
        self.on_stall()
        return True

    def persist(self) -> None:
        """Hold until Redis has answered, however long that takes."""
        self._persists = True

    def extend(self) -> None:
        """The loop runs: a stall is what is longer than `ttl` from now on."""
        if not self.active:
            self._until = now() + self._ttl

    def release(self) -> None:
        """Let the events go."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._holds = False
        self._until = now() + self._ttl
        self._line.call_all()

    def wait(self, call: Callable[[], None]) -> None:
        """Call once, when it is released."""
        self._line.wait(call)

    def leave(self, call: Callable[[], None]) -> None:
        """Do not call."""
        self._line.leave(call)

    def passed(self) -> "asyncio.Future[None]":
        """Return a future that is done when it is not active, in the order of calls."""
        future: asyncio.Future[None] = self.loop.create_future()

        def call() -> None:
            if not future.done():
                future.set_result(None)

        if self.active:
            self._line.wait(call)
        else:
            self.loop.call_soon(call)
        return future
