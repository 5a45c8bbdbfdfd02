"""The messages of one connection on their way through a lane, in order.

When one fails, it and all later ones leave the lane, wait out its backoff, and enter
the lane again. The lane itself goes on.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from backends import BackendError, Connection, EventName
from backends.deadlines import STALL, after_reading
from backends.events import Event
from backends.http.batches.entry import Entry
from backends.http.batches.lane import Lane, LaneContext
from backends.http.retries import backoff, hint
from backends.waiting import Taken, call_one

logger = logging.getLogger(__name__)


class BatchDelivery(Taken):
    """Delivers one connection's messages; the counterpart of `delivery.Delivery`."""

    name: EventName = "message"
    holding = False  # no response is held

    __slots__ = (
        "_connection",
        "_context",
        "_entries",
        "_lane",
        "_outside",
        "_quiet",
        "_taken",
        "_timer",
        "connection_id",
        "disconnected",
        "failures",
        "number",
        "refused",
        "timeout",
        "undelivered",
    )

    def __init__(
        self, lane: Lane, context: LaneContext, connection: Connection
    ) -> None:
        self._lane = lane
        self._context = context
        self._connection = connection
        self.connection_id = connection.id
        self.timeout = context.limits.delivery_timeout
        # Messages that are not settled, in order, and what to call when they are.
        self._entries: deque[Entry] = deque()
        self._taken: deque[Callable[[], None]] = deque()
        # They are outside the lane: one has failed, or the client is slow.
        self._outside = False
        self._timer: asyncio.TimerHandle | None = None  # of the first one's backoff
        self._quiet: asyncio.Future[None] | None = None
        self.failures = 0  # of attempts, so far
        self.number = 0  # of the latest message, from 1
        self.refused = 0
        self.disconnected = False
        self.undelivered = 0

    def post(self, event: Event) -> Taken:
        """Send the next message."""
        entry = Entry(self, event)
        self._entries.append(entry)
        if not self._outside:
            self._lane.add(entry)
        return self

    def then(self, call: Callable[[], None]) -> None:
        """Call `call` when the latest message is settled."""
        self._taken.append(call)

    # What its disconnect event waits for.

    @property
    def busy(self) -> bool:
        """Whether a message is not settled."""
        return bool(self._entries)

    @property
    def settled(self) -> bool:
        """Whether each message is accepted, refused or given up."""
        return not self._entries

    async def settle(self) -> None:
        """Wait until each message is accepted, refused or given up."""
        while self._entries:
            if self._quiet is None:
                self._quiet = self._context.client.loop.create_future()
            await asyncio.shield(self._quiet)

    def on_disconnect_answered(self) -> None:
        """Nothing is held that would end now."""

    def called_back(self) -> None:
        """No response is held, so a sign of life changes nothing."""

    async def until_failure(self, before: int) -> bool:
        """Return whether `failures` is above `before`."""
        return self.failures != before

    def end(self) -> None:
        """Drop what is left."""
        for entry in self._entries:
            entry.owner = None
        self._entries.clear()
        self._stop_waiting()
        self._release_callers()

    # Called by the lane.

    def on_accepted(self, entry: Entry) -> None:
        self._context.observer.ended("message", self.connection_id, "delivered")
        self._settle_first(entry)

    def on_refused(self, entry: Entry, status: int) -> None:
        self.refused += 1
        self._context.observer.ended("message", self.connection_id, "refused")
        logger.warning(
            "connection %s: message %s was refused by the backend with %d: POST %s%s",
            self.connection_id,
            entry.event.id.rpartition("-")[2],
            status,
            self._context.target.url,
            hint(status),
            extra={"connection_id": self.connection_id, "status": status},
        )
        self._settle_first(entry)

    def on_failed(self, entry: Entry, error: BackendError, wait: float) -> None:
        loop = self._context.client.loop
        now = loop.time()
        self.failures += 1
        for each in self._entries:
            if each.sending:
                each.attempts += 1
                each.failed_at = min(each.failed_at, now)
        first = self._entries[0]
        logger.log(
            logging.WARNING if first.attempts == 1 else logging.DEBUG,
            "connection %s: message %s is retried: %s",
            self.connection_id,
            first.event.id.rpartition("-")[2],
            error,
            extra={"connection_id": self.connection_id},
        )
        if now >= first.deadline:
            self.give_up(error)
            return
        until = min(now + max(backoff(first.attempts), wait), first.deadline)
        self._leave()
        self._timer = loop.call_at(until, self._on_time, until)

    def give_up(self, error: BackendError) -> None:
        messages = len(self._entries)
        for entry in self._entries:
            entry.owner = None
            if entry.attempts:
                self._context.observer.given_up(entry.event.id)
        self._entries.clear()
        self._stop_waiting()
        self._connection.give_up(error, messages)
        self._release_callers()

    def on_replied(self) -> None:
        """Let a slow client read what the commands sent, before its next message."""
        room = self._connection.has_room()
        if room is not None:
            self._leave()
            room.add_done_callback(self._on_room)

    # Outside the lane.

    def _leave(self) -> None:
        """Take all messages that are not under way out of the lane."""
        if not self._outside:
            self._outside = True
            self._entries = deque(entry.leave(self) for entry in self._entries)

    def _on_time(self, due: float) -> None:
        loop = self._context.client.loop
        now = loop.time()
        if now > due + STALL:
            # The process was stopped: restart the time in which messages may fail.
            for entry in self._entries:
                entry.restart(now)
        after_reading(loop, self._go_on)

    def _go_on(self) -> None:
        if self._timer is not None:
            self._timer = None
            self._enter()

    def _on_room(self, room: "asyncio.Future[None]") -> None:
        if not room.cancelled():
            room.exception()  # the client has gone: its messages go nevertheless
        self._enter()

    def _enter(self) -> None:
        """Enter the lane again, unless something else still delays that."""
        if not self._outside or self._timer is not None:
            return
        room = self._connection.has_room()
        if room is not None:
            room.add_done_callback(self._on_room)
            return
        self._outside = False
        self._lane.add_again(self._entries)

    def _settle_first(self, entry: Entry) -> None:
        entry.owner = None
        assert self._entries[0] is entry
        self._entries.popleft()
        call_one(self._taken.popleft())
        self._signal_if_quiet()

    def _release_callers(self) -> None:
        """No message is left."""
        taken, self._taken = self._taken, deque()
        for call in taken:
            self._context.client.loop.call_soon(call)
        self._signal_if_quiet()

    def _signal_if_quiet(self) -> None:
        if self._quiet is not None and not self._entries:
            quiet, self._quiet = self._quiet, None
            if not quiet.done():
                quiet.set_result(None)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
