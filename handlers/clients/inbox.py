"""One client's messages between reading and delivering, in order."""

import asyncio
import logging
from collections import deque
from typing import Protocol

from backends import Backend, BackendError, Connection, Observer, Taken
from backends.waiting import RAISED
from handlers.backlog import Backlog
from handlers.clients.policy import ClientPolicy
from handlers.connections import NEVER
from handlers.rates import Throttle
from handlers.websocket.frames import CloseCode
from handlers.websocket.turns import TURN, Turns, clock

logger = logging.getLogger(__name__)


class InboxContext(Protocol):
    """The objects that all inboxes of a relay share."""

    loop: asyncio.AbstractEventLoop
    backend: Backend
    backlog: Backlog
    observer: Observer
    policy: ClientPolicy
    turns: Turns


class Inbox:
    """Gives messages to the backend one by one, and pauses reading at its limits.

    A message counts in the `Backlog` from `put` until it is accepted or given up. If
    one cannot be delivered, those after it are given up, too, and the connection is
    closed with 1013, or with 1011 after a bug.
    """

    __slots__ = (
        "_connection",
        "_context",
        "_delivered",
        "_full",
        "_given_up",
        "_head_size",
        "_in_flight",
        "_queue",
        "_queued_bytes",
        "_room",
        "busy",
        "throttle",
        "undelivered",
        "waiting_since",
    )

    def __init__(self, connection: Connection, context: InboxContext) -> None:
        self._connection: Connection | None = connection
        self._context = context
        # Created when a message waits; None while the backend is fast.
        self._queue: deque[tuple[str | bytes, float]] | None = None
        # Size and time of each message that a backend has which `takes_many`.
        self._in_flight: deque[tuple[int, float]] | None = None
        self._queued_bytes = 0  # of either
        self._head_size = 0  # bytes of the message that the backend has
        self.busy = False  # whether the backend has one
        self._delivered: asyncio.Future[None] | None = None  # see `delivered`
        # What reading waits for: room in this queue (`_full`) or in the process, or
        # the throttle, which exists only with rate limits.
        self._room: asyncio.Future[None] | None = None
        self._full = False
        self._given_up = False
        self.throttle: Throttle | None = None
        self.undelivered = 0  # messages that were given up
        self.waiting_since = NEVER  # when the oldest message that waits was read

    def __len__(self) -> int:
        """Number of waiting messages, including the one that the backend has."""
        return len(self._in_flight or self._queue or ()) + (
            self.busy and not self._in_flight
        )

    def put(self, message: str | bytes, size: int, read_at: float) -> None:
        """Deliver a message now, or after those that wait.

        `size` is in bytes; `read_at` is when it was read, on the loop's clock.
        """
        if self._given_up:
            self._count_undelivered(1)
            return
        self._context.backlog.hold(size)
        if self._context.backend.takes_many:
            self._pass_on(message, size, read_at)
        elif self.busy:
            if self._queue is None:
                self._queue = deque()
            self._queue.append((message, read_at))
            self._queued_bytes += size
        else:
            self._deliver(message, size, read_at)

    # When to read.

    def room(self) -> "asyncio.Future[None] | None":
        """Return None if another message may be read, else a future to wait for.

        Raises `FrameError` if the client has exceeded its rate for too long.
        """
        context, throttle = self._context, self.throttle
        if throttle is not None:
            held = throttle.room(context.loop.time())
            if held is not None:
                self._room = held
                return held
        queue = self._queue or self._in_flight
        if not queue or (
            len(queue) < context.policy.queue_messages
            and self._queued_bytes < context.policy.queue_bytes
        ):
            self._room = context.backlog.room()
        elif self._room is None or self._room.done():
            self._room = context.loop.create_future()
            self._full = True
        if throttle is not None and self._room is not None:
            throttle.on_full(context.loop.time())
        return self._room

    @property
    def reading_paused(self) -> bool:
        """Whether the backlog or a rate limit has paused reading."""
        return self._room is not None and not self._room.done()

    # Delivering.

    def _deliver(self, message: str | bytes, size: int, read_at: float) -> None:
        """Give messages to the backend until one must be awaited.

        Messages from the queue are delivered only while this turn lasts.
        """
        ends_at = 0.0
        connection, context = self._connection, self._context
        assert connection is not None
        while True:
            self._head_size = size
            try:
                taken = context.backend.message(connection, message)
            except RAISED as error:
                self._on_undeliverable(error, size)
                self._rest()
                return
            if taken is not None:
                self.busy = True
                self.waiting_since = read_at
                if isinstance(taken, Taken):
                    taken.then(self._on_taken)
                    return
                if not isinstance(taken, asyncio.Future):
                    taken = asyncio.ensure_future(taken)
                taken.add_done_callback(self._on_delivered)
                return
            context.backlog.release(size)
            if not self._queue:
                self._rest()
                return
            if not ends_at:
                ends_at = clock() + TURN
            elif clock() >= ends_at:
                self.waiting_since = self._queue[0][1]
                context.turns.wait(self._deliver_next)
                return
            message, size, read_at = self._next()

    def _pass_on(self, message: str | bytes, size: int, read_at: float) -> None:
        """Give a message to a backend that has others already, maybe."""
        context, connection = self._context, self._connection
        assert connection is not None
        try:
            taken = context.backend.message(connection, message)
        except RAISED as error:
            self._on_undeliverable(error, size)
            return
        if taken is None:
            context.backlog.release(size)
            return
        if self._in_flight is None:
            self._in_flight = deque()
        if not self._in_flight:
            self.busy, self.waiting_since = True, read_at
        self._in_flight.append((size, read_at))
        self._queued_bytes += size
        if isinstance(taken, Taken):
            taken.then(self._on_first_taken)
            return
        if not isinstance(taken, asyncio.Future):
            taken = asyncio.ensure_future(taken)
        taken.add_done_callback(self._on_first_delivered)

    def _on_first_taken(self) -> None:
        """The backend has taken the oldest message that it had."""
        self._context.backlog.release(self._pop_first())
        self._after_first()

    def _on_first_delivered(self, taken: "asyncio.Future[None]") -> None:
        """Handle the completion of the oldest message that the backend had."""
        size = self._pop_first()
        if not taken.cancelled() and taken.exception() is None:
            self._context.backlog.release(size)
        else:
            self._on_undeliverable(_failure(taken), size)
        self._after_first()

    def _pop_first(self) -> int:
        """Return the size of the oldest message that the backend had."""
        assert self._in_flight
        size, _ = self._in_flight.popleft()
        self._queued_bytes -= size
        if self._full:
            self._make_room()
        return size

    def _after_first(self) -> None:
        if self._in_flight:
            self.waiting_since = self._in_flight[0][1]
        else:
            self._rest()

    def _deliver_next(self) -> None:
        if self._queue:
            self._deliver(*self._next())
        else:
            self._rest()

    def _on_taken(self) -> None:
        self._context.backlog.release(self._head_size)
        self._deliver_next()

    def _on_delivered(self, taken: "asyncio.Future[None]") -> None:
        if not taken.cancelled() and taken.exception() is None:
            self._context.backlog.release(self._head_size)
            self._deliver_next()
        else:
            self._on_undeliverable(_failure(taken), self._head_size)
            self._rest()

    def _next(self) -> tuple[str | bytes, int, float]:
        assert self._queue
        message, read_at = self._queue.popleft()
        size = size_of(message)
        self._queued_bytes -= size
        if self._full:
            self._make_room()
        return message, size, read_at

    def _make_room(self) -> None:
        """Read on: the queue, which was full, has room."""
        self._full = False
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    def _rest(self) -> None:
        """Go idle: everything that was read is accepted or given up."""
        self.busy = False
        self.waiting_since = NEVER
        self._queue = None
        if self._delivered is not None and not self._delivered.done():
            self._delivered.set_result(None)

    async def delivered(self) -> None:
        """Wait until every message is accepted or given up."""
        if self.busy:
            self._delivered = self._context.loop.create_future()
            await self._delivered

    # Giving up.

    def _on_undeliverable(self, error: BaseException, size: int) -> None:
        """Give up a message of `size` bytes, and close the connection."""
        self._context.backlog.release(size)
        connection = self._connection
        assert connection is not None
        if isinstance(error, BackendError):
            connection.give_up(error)
        else:
            logger.error("bug on a message of %s", connection.id, exc_info=error,
                         extra={"connection_id": connection.id})
            self.give_up(1)
            connection.close(CloseCode.INTERNAL_ERROR, "internal error", "relay")

    def give_up(self, messages: int) -> None:
        """Give up `messages` that left the queue, all that wait, and all later ones."""
        self._given_up = True
        self._count_undelivered(messages + len(self._queue or ()))
        while self._queue:
            _, size, _ = self._next()
            self._context.backlog.release(size)

    def _count_undelivered(self, messages: int) -> None:
        if messages and self._connection is not None:
            self.undelivered += messages
            self._context.observer.ended(
                "message", self._connection.id, "failed", messages
            )

    def close(self) -> None:
        """Break the reference cycle with the connection."""
        self._connection = None


def _failure(taken: "asyncio.Future[None]") -> BaseException:
    """Return why the backend did not take a message."""
    error = None if taken.cancelled() else taken.exception()
    return error or BackendError("its delivery was cancelled")


def size_of(message: str | bytes) -> int:
    """Bytes of a message on the wire, before compression."""
    if isinstance(message, str) and not message.isascii():
        return len(message.encode())
    return len(message)
