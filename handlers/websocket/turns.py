"""Divides the loop's time among clients that have much work at once.

Examples are thousands of tiny frames in one packet, and messages that waited for the
backend. `protocol` and `handlers.clients.inbox` do a share of the work, and register
here to continue later.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

TURN = 0.00025  # seconds for which one client is served at a time
ALL_TURNS = 0.001  # seconds for all that wait, in each turn of the loop

# In seconds; the loop's own may stand still while callbacks run.
clock = time.perf_counter


class Turns:
    """Calls registered callbacks, one after the other.

    However many are registered, they take at most `ALL_TURNS` of each turn of the loop;
    in between, the loop reads from other clients.
    """

    __slots__ = ("_is_due", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: OrderedDict[Callable[[], None], None] = OrderedDict()
        self._is_due = False  # whether the loop will call `_serve`

    def wait(self, resume: Callable[[], None]) -> None:
        """Call `resume` when its turn comes: once, however often it is registered."""
        self._waiting[resume] = None
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._serve)

    def run(self, steps: Iterator[object]) -> "asyncio.Future[None] | None":
        """Take all `steps`, as many at a time as a turn permits.

        Returns None if one turn was enough, else a future that is done after the last
        step. An exception of a step ends them: it is raised, or the future has it.
        """
        if _take(steps):
            return None
        done: asyncio.Future[None] = self._loop.create_future()

        def resume() -> None:
            try:
                is_over = _take(steps)
            except Exception as error:
                if not done.done():
                    done.set_exception(error)
                return
            if not is_over:
                self.wait(resume)
            elif not done.done():
                done.set_result(None)

        self.wait(resume)
        return done

    def _serve(self) -> None:
        ends_at = clock() + ALL_TURNS
        while self._waiting and clock() < ends_at:
            resume, _ = self._waiting.popitem(last=False)
            try:
                resume()
            except Exception:  # a bug that one client causes must not stop the others
                logger.exception("bug in a client's turn")
        self._is_due = bool(self._waiting)
        if self._is_due:
            self._loop.call_soon(self._serve)


def _take(steps: Iterator[object]) -> bool:
    """Take steps until the turn is over; return whether none is left."""
    ends_at = clock() + TURN
    for _ in steps:  # noqa: SIM110 # a generator in `all` takes longer
        if clock() >= ends_at:
            return False
    return True
