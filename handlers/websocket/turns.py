"""Turns: what is left of a client's work when it has had its share of time.

Any number of clients may have much to be done at once: thousands of tiny frames in
one packet, messages that waited for the backend. `protocol` and
`handlers.clients.inbox` do some of it, and leave the rest here.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

logger = logging.getLogger(__name__)

TURN = 0.00025  # seconds for which one client is served at a time
ALL_TURNS = 0.001  # seconds for all that wait, in each turn of the loop

# In seconds; the loop's own may stand still while callbacks run.
clock = time.perf_counter


class Turns:
    """Goes on with whatever waits, one after the other, for a while.

    All of it together takes `ALL_TURNS` of each turn of the loop, however many
    wait: in between, those who say little are read.
    """

    __slots__ = ("_is_due", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: OrderedDict[Callable[[], None], None] = OrderedDict()
        self._is_due = False  # `_serve` is to be called

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` when its turn comes; once, however often it is asked for."""
        self._waiting[go_on] = None
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._serve)

    def _serve(self) -> None:
        ends_at = clock() + ALL_TURNS
        while self._waiting and clock() < ends_at:
            go_on, _ = self._waiting.popitem(last=False)
            try:
                go_on()
            except Exception:  # a bug with one is none of the others'
                logger.exception("bug in a client's turn")
        self._is_due = bool(self._waiting)
        if self._is_due:
            self._loop.call_soon(self._serve)
