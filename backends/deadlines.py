"""Deadlines that are judged only after what has already come was read.

After a stall of the process (SIGSTOP, a suspended machine, a paused VM) every
timer is overdue at once, while the bytes that met the deadlines in time still
wait in the sockets. `backends.http` and `handlers` both judge deadlines, so
this module imports nothing of the project.
"""

import asyncio
from collections.abc import Callable

# Turns of the loop until each readable socket was read once. A turn of uvloop
# runs timers, then callbacks, then polls; one of asyncio polls first.
TURNS = 2


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
