"""Checks a deadline only after reading what has arrived.

After a stall of the process (SIGSTOP, a suspended machine, a paused VM) all timers
are overdue at once, while the bytes that arrived in time still wait in the sockets.
`backends.http` and `handlers` use this module; it imports nothing of the project.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType

# Turns of the loop until each readable socket was read once, and a protocol was
# informed of a connection's end: with TLS that takes three. In each turn uvloop runs
# timers, then callbacks, then polls; asyncio polls first.
TURNS = 4
STALL = 0.5  # seconds; if a timer is later than that, the process was stopped


def after_reading(
    loop: asyncio.AbstractEventLoop, judge: Callable[[], None]
) -> None:
    """Call `judge` when each socket that is readable now was read once.

    A timer calls this when its deadline has passed. `judge` checks the deadline
    again, since the peer may have met it with what was read. A read takes at most one
    buffer: if only a part of the needed bytes was read, `judge` may call this again, a
    bounded number of times.
    """
    _after(loop, TURNS, judge)


def _after(
    loop: asyncio.AbstractEventLoop, turns: int, judge: Callable[[], None]
) -> None:
    if turns:
        loop.call_soon(_after, loop, turns - 1, judge)
    else:
        judge()


class RunningTime:
    """Like `asyncio.timeout`, but restarts after a stall of the process.

    For operations of several steps: after a stall the peer's next step may wait in the
    socket, and the following ones still need time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._scope = asyncio.timeout(None)
        self._over = False

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()
        self._begin()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._over = True
        self._timer.cancel()
        await self._scope.__aexit__(kind, error, where)

    def _begin(self) -> None:
        due = self._loop.time() + self._seconds
        self._timer = self._loop.call_at(due, self._end, due)

    def _end(self, due: float) -> None:
        if self._loop.time() > due + STALL:
            self._begin()
        else:
            after_reading(self._loop, self._expire)

    def _expire(self) -> None:
        if not self._over:
            self._scope.reschedule(self._loop.time())
