"""Message requests, and those that are held: their response is overdue.

`delivery` owns them. A request is in at most one `OverdueLine`, and in `Held`
from when its response is overdue until its message has ended.
"""

import asyncio
import mmap
from collections.abc import Callable
from typing import Protocol

from backends import BackendError
from backends.client import Exchange, Response
from backends.deadlines import after_reading
from backends.events import Event
from backends.waiting import Waiters, call_one

OWN_PAGES = 16 * 1024  # bytes from which on a body that is held has pages of its own
# Linux fills them at once, in half the time that it takes page by page.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)


class Owner(Protocol):
    """The sender of a request, to which its outcome is reported."""

    def on_sent(self, request: "Request") -> None:
        """The kernel has the whole request."""

    def on_overdue(self, request: "Request") -> None:
        """There is no response in time."""

    def on_done(self, request: "Request", outcome: Response | BackendError) -> None:
        """There is a response, or there will be none."""

    def abandon(self, request: "Request") -> None:
        """Abandon it: another request needs its connection."""


class Request:
    """One message, from before it is sent until it is over."""

    __slots__ = (
        "attempts",
        "began_at",
        "event",
        "exchange",
        "failed_at",
        "line",
        "not_before",
        "number",
        "overdue",
        "owner",
        "sent_at",
    )

    def __init__(self, owner: Owner, number: int, event: Event) -> None:
        self.owner = owner
        self.number = number
        self.event = event
        self.exchange: Exchange | None = None  # while an attempt is under way
        self.attempts = 0  # that failed
        # All times are on the loop's clock.
        self.failed_at = float("inf")  # the first time
        self.not_before = float("-inf")  # of the next attempt
        self.began_at = self.sent_at = float("inf")  # the latest attempt
        self.overdue = False  # the latest attempt
        self.line: OverdueLine | None = None

    def on_sent(self) -> None:
        self.owner.on_sent(self)

    def on_overdue(self) -> None:
        self.owner.on_overdue(self)

    def on_done(self, outcome: Response | BackendError) -> None:
        self.owner.on_done(self, outcome)

    def leave_line(self) -> None:
        """It does not become overdue, unless it is added again."""
        if self.line is not None:
            self.line.discard(self)


class OverdueLine:
    """Requests that become overdue after the same wait, so in the order sent.

    One timer serves them all: a message that is answered in time costs two
    operations on a dict.
    """

    def __init__(self, wait: float, loop: asyncio.AbstractEventLoop) -> None:
        self._wait = wait
        self._loop = loop
        self._requests: dict[Request, None] = {}
        self._timer: asyncio.TimerHandle | None = None  # until it has been judged

    def add(self, request: Request) -> None:
        """Call `request.on_overdue()` later, unless it is discarded."""
        request.leave_line()  # it was sent again, on another connection
        if self._wait == float("inf"):
            return
        request.line = self
        self._requests[request] = None
        if self._timer is None:
            self._arm(request)

    def discard(self, request: Request) -> None:
        """It was answered in time."""
        self._requests.pop(request, None)
        request.line = None

    def _arm(self, first: Request) -> None:
        self._timer = self._loop.call_at(
            first.sent_at + self._wait, after_reading, self._loop, self._judge
        )

    def _judge(self) -> None:
        """Call those that are overdue; responses that had come were read."""
        self._timer = None
        now = self._loop.time()
        while self._requests:
            request = next(iter(self._requests))
            if request.sent_at + self._wait > now:
                self._arm(request)
                return
            self.discard(request)
            call_one(request.on_overdue)


class Held:
    """The messages of all connections whose response was overdue, until they end.

    Their clients' queues no longer count them, so their bytes are counted here, also
    while one that failed waits for its next attempt. There is no other table of all
    connections' requests: what is discarded here is forgotten.
    """

    def __init__(self, max_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        self._max_bytes = max_bytes
        self._loop = loop
        self._sizes: dict[Request, int] = {}
        self._bytes = 0
        self._overdue: set[Request] = set()
        # Overdue ones that may be abandoned, in the order in which that was found.
        self._expendable: dict[Request, None] = {}
        self._waiters = Waiters()  # for bytes
        self._waking = False

    @property
    def overdue(self) -> int:
        """How many requests wait for an overdue response."""
        return len(self._overdue)

    @property
    def failed(self) -> int:
        """How many messages were overdue, have failed, and are to be retried."""
        return len(self._sizes) - len(self._overdue)

    @property
    def full(self) -> bool:
        """Whether the bytes are at their bound: a connection may add no second one."""
        return self._bytes >= self._max_bytes

    def add(self, request: Request) -> None:
        """Its response is overdue."""
        request.overdue = True
        self._overdue.add(request)
        if request not in self._sizes:
            event = request.event
            request.event = event._replace(body=on_own_pages(event.body))
            self._sizes[request] = size = len(event.body)
            self._bytes += size

    def mark_expendable(self, request: Request) -> None:
        """The backend has shown that it has seen it: it may be abandoned."""
        self._expendable[request] = None

    def is_expendable(self, request: Request) -> bool:
        """Whether it may be abandoned."""
        return request in self._expendable

    def abandon_one(self) -> None:
        """Abandon one request, of any connection, if there is one that may be."""
        if self._expendable:
            request = next(iter(self._expendable))
            request.owner.abandon(request)

    def on_failed(self, request: Request) -> None:
        """It is not held any more, and will be retried."""
        request.overdue = False
        self._overdue.discard(request)
        self._expendable.pop(request, None)

    def discard(self, request: Request) -> None:
        """Its message has ended; nothing where it was never overdue."""
        size = self._sizes.pop(request, None)
        if size is None:
            return
        self.on_failed(request)
        self._bytes -= size
        if self._waiters and not self.full and not self._waking:
            self._waking = True
            self._loop.call_soon(self._wake)

    def wait(self, call: Callable[[], None]) -> None:
        """Have `call` called once when it is full no more."""
        self._waiters.wait(call)

    def leave(self, call: Callable[[], None]) -> None:
        """Wait no more."""
        self._waiters.leave(call)

    def _wake(self) -> None:
        self._waking = False
        while self._waiters and not self.full:
            self._waiters.call_first()


def on_own_pages(body: bytes | mmap.mmap) -> bytes | mmap.mmap:
    """Return the same bytes in memory that the system gets back once they are freed.

    Messages that are held for long would leave gaps in the C library's heap among
    those that pass, and it would keep that memory: most of it after 100 MB of them.
    A small body stays where it is, and so does any where there are no more mappings.
    """
    if len(body) < OWN_PAGES:
        return body
    try:
        pages = mmap.mmap(-1, len(body), PRIVATE)
    except OSError:
        return body
    pages[:] = body
    return pages
