"""Reads the first bytes of new connections, a few in each turn of the loop.

Thousands of connections may come at once, as after a deploy of another instance. The
loop would serve all that have sent a request before it reads from anybody else. So they
wait in a selector of their own, which is one descriptor for the loop.
"""

import asyncio
import logging
import select
from collections.abc import Callable
from typing import Any, Protocol

logger = logging.getLogger(__name__)

AT_ONCE = 8  # connections that are read from in each turn of the loop


class Arrival(Protocol):
    """A connection from which nothing was read yet."""

    @property
    def descriptor(self) -> int: ...

    def read_first(self) -> None:
        """Read what has arrived, and from then on whenever there is more."""


class Arrivals:
    """Calls `read_first` of each connection when its first bytes have arrived.

    Without epoll it does so at once.
    """

    __slots__ = ("_loop", "_selector", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[int, Arrival] = {}  # by descriptor
        make: Callable[[], Any] | None = getattr(select, "epoll", None)
        self._selector: Any = None if make is None else make()
        if self._selector is not None:
            loop.add_reader(self._selector.fileno(), self._read)

    def add(self, arrival: Arrival) -> None:
        """Wait for the first bytes of a connection."""
        if self._selector is None:
            arrival.read_first()
            return
        descriptor = arrival.descriptor
        self._waiting[descriptor] = arrival
        # It is reported once, and need not be unregistered.
        self._selector.register(descriptor, select.EPOLLIN | select.EPOLLONESHOT)

    def discard(self, arrival: Arrival) -> None:
        """Forget a connection, which is about to be closed."""
        descriptor = arrival.descriptor
        if self._waiting.get(descriptor) is arrival:
            del self._waiting[descriptor]

    def read_all(self) -> None:
        """Read all that has arrived, now."""
        while self._read():
            pass

    def _read(self) -> int:
        if self._selector is None:
            return 0
        ready = self._selector.poll(0, AT_ONCE)
        for descriptor, _ in ready:
            arrival = self._waiting.pop(descriptor, None)
            try:
                if arrival is not None:
                    arrival.read_first()
            except Exception:  # a bug that one causes must not stop the others
                logger.exception("bug in reading from a new connection")
        return len(ready)

    def close(self) -> None:
        """Stop waiting."""
        self._waiting.clear()
        if self._selector is not None:
            self._loop.remove_reader(self._selector.fileno())
            self._selector.close()
            self._selector = None
