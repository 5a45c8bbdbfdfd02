"""Queues of callbacks: each is called once, when what it waits for has happened."""

import asyncio
import logging
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Protocol

logger = logging.getLogger(__name__)

# What a call of a backend may raise that is not awaited; the result of a cancelled
# future is no `Exception`.
RAISED = (Exception, asyncio.CancelledError)


class Taken:
    """What `Backend.message` may return: an awaitable that calls back without a future.

    It may be the same object for each message of a connection.
    """

    __slots__ = ()

    def then(self, call: Callable[[], None]) -> None:
        """Call `call` once, later, when the next message may follow.

        It must be called, or this awaited, immediately after `Backend.message`.
        """
        raise NotImplementedError

    def __await__(self) -> Generator[Any, None, None]:
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.then(partial(_set_done, taken))
        return taken.__await__()


def _set_done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class Line(Protocol):
    """A queue that a callback can enter and leave."""

    def wait(self, call: Callable[[], None]) -> None:
        """Enter at the end, or keep the place that `call` has; it is called once."""

    def leave(self, call: Callable[[], None]) -> None:
        """Leave the line."""


class Waiters:
    """Callbacks in line: each is called once, in the order of entry.

    An exception in one is a bug, and does not stop the others.
    """

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: dict[Callable[[], None], None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def wait(self, call: Callable[[], None]) -> None:
        """Enter at the end, or keep the place that `call` has; it is called once."""
        self._calls.setdefault(call)

    def leave(self, call: Callable[[], None]) -> None:
        """Leave the line."""
        self._calls.pop(call, None)

    def call_first(self) -> None:
        """Take the first out of the line and call it."""
        call = next(iter(self._calls))
        del self._calls[call]
        call_one(call)

    def call_all(self) -> None:
        """Call all that are in line now; those that enter meanwhile wait."""
        calls, self._calls = self._calls, {}
        for call in calls:
            call_one(call)


def call_one(call: Callable[[], None]) -> None:
    """Call one of many: an exception is logged, and does not stop the others."""
    try:
        call()
    except Exception:
        logger.exception("bug in %r", call)


def done_future(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    """Return a future that is done already, for a caller that need not wait."""
    future: asyncio.Future[None] = loop.create_future()
    future.set_result(None)
    return future
