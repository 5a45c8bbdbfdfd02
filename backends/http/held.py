"""Requests of messages, and which of them are held, with an overdue response.

`delivery` owns the requests. A request is in at most one `OverdueLine`, and in `Held`
from when its response is overdue until its message has ended.
"""

import asyncio
import mmap
from collections.abc import Callable
from typing import Protocol

from backends import BackendError
from backends.client import Exchange, Response, Terms
from backends.deadlines import after_reading
from backends.events import Event
from backends.target import Target
from backends.waiting import Waiters, call_one

INFINITY = float("inf")
OWN_PAGES = 16 * 1024  # bytes; a held body of that size gets its own memory pages
# MAP_POPULATE: Linux fills all pages at once, in half the time of one by one.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)


class Owner(Protocol):
    """The sender of a request, to which its outcome is reported."""

    def write(self, request: "Request") -> bytes:
        """Return the whole HTTP request."""

    def on_sent(self, request: "Request") -> None:
        """The kernel has the whole request."""

    def on_overdue(self, request: "Request") -> None:
        """The response is overdue."""

    def on_done(self, request: "Request", outcome: Response | BackendError) -> None:
        """There is a response, or the attempt has failed."""

    def may_read(self, request: "Request") -> bool:
        """A response with a reply has begun: whether to read it now, or later."""

    def abandon(self, request: "Request") -> None:
        """Abandon it, since another request needs its connection."""


class Request(Exchange):
    """One attempt to send a message, from before it is sent until it has ended."""

    __slots__ = (
        "answering",
        "attempts",
        "began_at",
        "event",
        "failed_at",
        "line",
        "not_before",
        "number",
        "overdue",
        "owner",
        "sent_at",
    )

    def __init__(
        self, owner: Owner, number: int, event: Event, target: Target, terms: Terms
    ) -> None:
        super().__init__(target, terms)
        self.owner = owner
        self.number = number
        self.event = event
        self.attempts = 0  # earlier ones, which have failed
        # All times are on the loop's clock.
        self.failed_at = float("inf")  # first failure of the message
        self.not_before = float("-inf")  # earliest time to send it
        self.began_at = self.sent_at = float("inf")
        self.overdue = self.answering = False  # the response; a reply has begun
        self.line: OverdueLine | None = None

    def again(self) -> "Request":
        """Return the next attempt to send the same message."""
        again = Request(self.owner, self.number, self.event, self.target, self.terms)
        again.attempts, again.failed_at = self.attempts, self.failed_at
        return again

    def write(self) -> bytes:
        return self.owner.write(self)

    def on_sent(self) -> None:
        self.owner.on_sent(self)

    def on_overdue(self) -> None:
        """The response is overdue."""
        self.owner.on_overdue(self)

    def on_done(self, outcome: Response | BackendError) -> None:
        self.owner.on_done(self, outcome)

    def may_read(self) -> bool:
        return self.owner.may_read(self)

    def leave_line(self) -> None:
        """Leave the `OverdueLine`, so that it does not become overdue."""
        if self.line is not None:
            self.line.discard(self)


class OverdueLine:
    """Requests that become overdue after the same wait, in the order sent.

    They share one timer: a message that is answered in time costs two dict operations.
    """

    def __init__(self, wait: float, loop: asyncio.AbstractEventLoop) -> None:
        self._wait = wait
        self._loop = loop
        self._requests: dict[Request, None] = {}
        self._timer: asyncio.TimerHandle | None = None  # set until `_judge` has run

    def add(self, request: Request) -> None:
        """Call `request.on_overdue()` later, unless it is discarded."""
        if request.line is not None:  # it was sent again, on another connection
            request.leave_line()
        if self._wait == INFINITY:
            return
        request.line = self
        self._requests[request] = None
        if self._timer is None:
            self._arm(request)

    def discard(self, request: Request) -> None:
        """Remove a request that was answered in time."""
        self._requests.pop(request, None)
        request.line = None

    def _arm(self, first: Request) -> None:
        self._timer = self._loop.call_at(
            first.sent_at + self._wait, after_reading, self._loop, self._judge
        )

    def _judge(self) -> None:
        """Report overdue requests; called after reading the responses that arrived."""
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
    while a failed one waits for its next attempt. There is no other table of the
    requests of all connections.
    """

    def __init__(self, max_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        self._max_bytes = max_bytes
        self._loop = loop
        self._sizes: dict[Request, int] = {}
        self._bytes = 0
        self._overdue: set[Request] = set()
        # Requests that may be abandoned, in the order of `mark_expendable` calls.
        self._expendable: dict[Request, None] = {}
        self._waiters = Waiters()  # for bytes
        self._waking = False

    @property
    def overdue(self) -> int:
        """Number of requests that wait for an overdue response."""
        return len(self._overdue)

    @property
    def failed(self) -> int:
        """Number of messages that were overdue, have failed, and will be retried."""
        return len(self._sizes) - len(self._overdue)

    @property
    def full(self) -> bool:
        """Whether the bytes have reached their limit.

        Then a connection that has an overdue message may not add another one.
        """
        return self._bytes >= self._max_bytes

    def add(self, request: Request) -> None:
        """Add a request whose response is overdue."""
        request.overdue = True
        self._overdue.add(request)
        if request not in self._sizes:
            event = request.event
            request.event = event.with_body(on_own_pages(event.body))
            self._sizes[request] = size = len(event.body)
            self._bytes += size

    def mark_expendable(self, request: Request) -> None:
        """Permit a request to be abandoned: the backend has seen its message."""
        self._expendable[request] = None

    def keep(self, request: Request) -> None:
        """Do not abandon a request: its response has begun."""
        self._expendable.pop(request, None)

    def is_expendable(self, request: Request) -> bool:
        """Whether a request may be abandoned."""
        return request in self._expendable

    def abandon_one(self) -> None:
        """Abandon one request of any connection, if one is marked."""
        if self._expendable:
            request = next(iter(self._expendable))
            request.owner.abandon(request)

    def retry(self, request: Request, again: Request) -> None:
        """Record that an attempt has failed, and that `again` is the next one."""
        if (size := self._sizes.pop(request, None)) is not None:
            self._sizes[again] = size
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """The response is not overdue any more."""
        self._overdue.discard(request)
        self._expendable.pop(request, None)

    def discard(self, request: Request) -> None:
        """Remove a request whose message has ended; does nothing if it is not held."""
        size = self._sizes.pop(request, None)
        if size is None:
            return
        self._forget(request)
        self._bytes -= size
        if self._waiters and not self.full and not self._waking:
            self._waking = True
            self._loop.call_soon(self._wake)

    def wait(self, call: Callable[[], None]) -> None:
        """Call `call` once, when `full` is no longer true."""
        self._waiters.wait(call)

    def leave(self, call: Callable[[], None]) -> None:
        """Do not call `call` any more."""
        self._waiters.leave(call)

    def _wake(self) -> None:
        self._waking = False
        while self._waiters and not self.full:
            self._waiters.call_first()


def on_own_pages(body: bytes | mmap.mmap) -> bytes | mmap.mmap:
    """Return a copy of `body` in pages of its own, which are unmapped when it is freed.

    In the C library's heap, held messages would lie among short-lived ones and leave
    gaps when they are freed: after 100 MB of them, most of that memory would stay with
    the process. Returns a small body unchanged, and any body if mapping fails.
    """
    if len(body) < OWN_PAGES:
        return body
    try:
        pages = mmap.mmap(-1, len(body), PRIVATE)
    except OSError:
        return body
    pages[:] = body
    return pages
