"""Message requests: from the backlog to their end, and what is kept meanwhile.

`delivery` owns them. A request stands in at most one `OverdueLine`, and in `Held`
from when its answer is overdue until its message has ended.
"""

import asyncio
import mmap
from collections.abc import Callable
from typing import Protocol

from backends import BackendError
from backends.client import Exchange, Response
from backends.deadlines import after_reading
from backends.http.event import Event
from backends.waiting import Waiters, call_one

OWN_PAGES = 16 * 1024  # bytes from which on a body that is held has pages of its own
# Linux fills them at once, for half of what it costs page by page.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)


class Owner(Protocol):
    """Whoever sends a request, and learns what becomes of it."""

    def on_sent(self, request: "Request") -> None:
        """The kernel has the whole request."""

    def on_overdue(self, request: "Request") -> None:
        """There is no answer in time."""

    def on_done(self, request: "Request", outcome: Response | BackendError) -> None:
        """An answer came, or none will."""

    def let_go(self, request: "Request") -> None:
        """Another request needs its place."""


class Request:
    """One message on its way, from before it is sent until it is over."""

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
        """It becomes overdue no more, unless it stands in line again."""
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
        """Find who is overdue; answers that have come were read."""
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
    """Messages whose answer was overdue, of all connections, until they end.

    Their clients' queues count them no more, so their bytes count here, also
    while one that failed waits for its next attempt. Nothing else refers to
    them for all connections: what is discarded here is forgotten.
    """

    def __init__(self, max_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        self._max_bytes = max_bytes
        self._loop = loop
        self._sizes: dict[Request, int] = {}
        self._bytes = 0
        self._overdue: set[Request] = set()
        # Overdue ones that may be let go, those with a sign of life first in front.
        self._expendable: dict[Request, None] = {}
        self._waiters = Waiters()  # for bytes
        self._waking = False

    @property
    def overdue(self) -> int:
        """How many requests wait for an answer that is overdue."""
        return len(self._overdue)

    @property
    def failed(self) -> int:
        """How many messages were overdue, have failed, and go again."""
        return len(self._sizes) - len(self._overdue)

    @property
    def full(self) -> bool:
        """Whether so many bytes are kept that no second one of a connection may be."""
        return self._bytes >= self._max_bytes

    def add(self, request: Request) -> None:
        """Its answer is overdue."""
        request.overdue = True
        self._overdue.add(request)
        if request not in self._sizes:
            event = request.event
            request.event = event._replace(body=on_own_pages(event.body))
            self._sizes[request] = size = len(event.body)
            self._bytes += size

    def on_sign_of_life(self, request: Request) -> None:
        """The backend has shown since that it has seen it: it may be let go."""
        self._expendable[request] = None

    def is_expendable(self, request: Request) -> bool:
        """Whether it may be let go."""
        return request in self._expendable

    def let_one_go(self) -> None:
        """Let one go, of any connection, if there is one that may be."""
        if self._expendable:
            request = next(iter(self._expendable))
            request.owner.let_go(request)

    def on_failed(self, request: Request) -> None:
        """It is not held any more, but goes again."""
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
    """The same, where the system gets its memory back as soon as it is forgotten.

    Among messages that pass, those that are held for long would leave gaps in the
    C library's memory, which it keeps: after 100 MB of them most of that. A small
    one stays where it is, and so does any where the system has no more mappings.
    """
    if len(body) < OWN_PAGES:
        return body
    try:
        pages = mmap.mmap(-1, len(body), PRIVATE)
    except OSError:
        return body
    pages[:] = body
    return pages
