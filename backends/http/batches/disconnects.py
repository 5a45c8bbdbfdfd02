"""Disconnect events on their way through the lanes."""

import asyncio
import logging
from collections.abc import Callable

from backends import BackendError, EventName
from backends.deadlines import after_reading
from backends.http.batches.entry import Entry
from backends.http.batches.lane import Lane, LaneContext
from backends.http.disconnects import DisconnectNotification, Disconnects
from backends.http.retries import backoff, hint

logger = logging.getLogger(__name__)


class BatchDisconnects(Disconnects):
    """Delivers disconnect events in the lanes of their connections.

    An event is given up `timeout` seconds after its first failure.
    """

    def __init__(
        self, context: LaneContext, lane_of: Callable[[str], Lane], timeout: float
    ) -> None:
        super().__init__(context.observer)
        self.target = context.target
        self._context = context
        self._lane_of = lane_of
        self._timeout = timeout

    async def _send(
        self, notification: DisconnectNotification
    ) -> BackendError | None:
        await notification.wait_until_ready()
        lane = self._lane_of(notification.connection_id)
        sending = SendingDisconnect(notification, lane, self._context, self._timeout)
        try:
            return await sending.outcome
        finally:
            sending.leave()


class SendingDisconnect:
    """One disconnect event, until it is accepted, refused or given up.

    `outcome` is None, or the error of a refusal; it fails if the event is given up.
    """

    name: EventName = "disconnect"

    def __init__(
        self,
        notification: DisconnectNotification,
        lane: Lane,
        context: LaneContext,
        timeout: float,
    ) -> None:
        self.connection_id = notification.connection_id
        self.timeout = timeout
        self._notification = notification
        self._lane = lane
        self._context = context
        loop = context.client.loop
        self.outcome: asyncio.Future[BackendError | None] = loop.create_future()
        self._entry = Entry(self, notification.event())
        lane.add(self._entry)

    def on_accepted(self, entry: Entry) -> None:
        self._end(entry, None)

    def on_refused(self, entry: Entry, status: int) -> None:
        target = self._context.target
        error = BackendError(f"POST {target}: answered {status}{hint(status)}")
        self._end(entry, error)

    def on_failed(self, entry: Entry, error: BackendError, wait: float) -> None:
        loop = self._context.client.loop
        now = loop.time()
        entry.attempts += 1
        entry.failed_at = min(entry.failed_at, now)
        self._entry = again = entry.leave(self)
        if now >= again.deadline:
            self.give_up(error)
            return
        until = min(now + max(backoff(entry.attempts), wait), again.deadline)
        loop.call_at(until, after_reading, loop, self._enter)

    def give_up(self, error: BackendError) -> None:
        self._entry.owner = None
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def leave(self) -> None:
        """Send it no more: nobody waits for its outcome."""
        self._entry.owner = None

    def on_replied(self) -> None:
        """Its connection has ended: there is nobody to wait for."""

    def _enter(self) -> None:
        if not self.outcome.done():
            self._lane.add_again([self._entry])

    def _end(self, entry: Entry, outcome: BackendError | None) -> None:
        entry.owner = None
        if not self.outcome.done():
            self.outcome.set_result(outcome)
