"""Deadlines that are judged only after what has already come was read.

After a stall of the process (SIGSTOP, a suspended machine, a paused VM) every
timer is overdue at once, while the bytes that met the deadlines in time still
wait in the sockets. `backends.http` and `handlers` both judge deadlines, so
this module imports nothing of the project.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType

# Turns of the loop until each readable socket was read once, and a protocol knows
# of a connection's end: by TLS that takes three. A turn of uvloop runs timers, then
# callbacks, then polls; one of asyncio polls first.
TURNS = 4
STALL = 0.5  # seconds that a timer may be late; beyond, the process was stopped


def after_reading(
    loop: asyncio.AbstractEventLoop, judge: Callable[[], None]
) -> None:
    """Call `judge` when each socket that is readable now was read once.

    To be called by a timer whose deadline has passed. `judge` looks at the
    deadline again, since what was read may have met it. A read takes at most
    one buffer: where bytes have come but not all that are needed, `judge` may
    call this again, a bounded number of times.
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
    """As `asyncio.timeout`, but a stall of the process begins the time anew.

    What is awaited takes several steps, of which the peer's next one may wait in
    the socket, and those behind it are still to come.
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
