"""Callbacks that wait for something, and are called by whatever ends the wait."""

import logging
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Line(Protocol):
    """Somewhere to wait."""

    def wait(self, call: Callable[[], None]) -> None:
        """Enter at the end, or stay where `call` stands; it is called once."""

    def leave(self, call: Callable[[], None]) -> None:
        """Wait no more."""


class Waiters:
    """Callbacks in line: each is called once, in the order in which they came.

    One that raises is a bug, and keeps no other from its call.
    """

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: dict[Callable[[], None], None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def wait(self, call: Callable[[], None]) -> None:
        """Enter at the end, or stay where `call` stands; it is called once."""
        self._calls.setdefault(call)

    def leave(self, call: Callable[[], None]) -> None:
        """Wait no more."""
        self._calls.pop(call, None)

    def call_first(self) -> None:
        """Call the one in front, which has left the line by then."""
        call = next(iter(self._calls))
        del self._calls[call]
        call_one(call)

    def call_all(self) -> None:
        """Call all that are in line now; who enters meanwhile waits."""
        calls, self._calls = self._calls, {}
        for call in calls:
            call_one(call)


def call_one(call: Callable[[], None]) -> None:
    """Call one of many: what it raises is logged, and the others have their turn."""
    try:
        call()
    except Exception:
        logger.exception("bug in %r", call)
