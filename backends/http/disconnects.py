"""Sends each disconnect event until it is accepted, refused or given up.

`attempts` makes the attempts. `open_connections` records which events are due.
"""

import abc
import asyncio
import itertools
import logging
from collections.abc import Coroutine
from typing import Any, Protocol

from tornado.options import define

from backends import BackendAway, BackendError, Observer
from backends.breaker import Breaker
from backends.deadlines import after_reading
from backends.events import Ended, Event
from backends.http.attempts import Attempts
from backends.http.retries import backoff, hint, retry_after
from backends.target import Target

logger = logging.getLogger(__name__)

define("disconnecturi", type=str, group=__name__, metavar="URL",
       help="URL that receives an event for each closed connection; none: not sent")
define("disconnect_timeout", default=300.0, group=__name__, metavar="SECONDS",
       help="how long a disconnect event is retried after its first failure")

# Seconds for the response to a disconnect event; before, also the longest wait for a
# connection in a queue that does not move.
DISCONNECT_TIMEOUT = 30.0


class Messages(Protocol):
    """The messages of one connection, as its disconnect event sees them."""

    failures: int  # of attempts, so far
    refused: int
    undelivered: int

    @property
    def busy(self) -> bool:
        """Whether a message waits to be sent, or delays the next."""

    @property
    def settled(self) -> bool:
        """Whether no message waits to be sent, and none that has failed is open."""

    async def settle(self) -> None:
        """Wait until `settled`, or until it takes too long."""


class DisconnectEvents(Protocol):
    """Makes disconnect events: an `EventWriter`."""

    def disconnect(self, ended: Ended, undelivered: int, refused: int) -> Event:
        """Make the event of a connection's end, with the counts of its messages."""


class DisconnectNotification:
    """One connection's disconnect event.

    Before each attempt it waits until no message of `delivery` (None: there were no
    messages) can fail any more, except those that are held and have not failed.
    """

    def __init__(
        self, events: DisconnectEvents, ended: Ended, delivery: Messages | None = None
    ) -> None:
        self.connection_id = ended.id
        self._events = events
        self._ended = ended
        self._delivery = delivery
        self._event: Event | None = None
        self.failures = 0  # failed attempts of messages when the event was made

    def again(self) -> "DisconnectNotification":
        """Return the next notification: a message was delivered after this one."""
        return DisconnectNotification(self._events, self._ended, self._delivery)

    @property
    def settled(self) -> bool:
        """Whether `wait_until_ready` need not wait."""
        return self._delivery is None or self._delivery.settled

    @property
    def ready(self) -> bool:
        """Whether it may still be sent, after `wait_until_ready`."""
        return self._delivery is None or not self._delivery.busy

    async def wait_until_ready(self) -> None:
        """Wait until it may be sent."""
        if self._delivery is not None:
            if not self._delivery.settled:
                await self._delivery.settle()
            self.failures = self._delivery.failures

    def event(self) -> Event:
        """Make the event with current counts, and the id of the previous attempt."""
        undelivered, refused = self._ended.closure.undelivered, 0
        if self._delivery is not None:
            self.failures = self._delivery.failures
            undelivered += self._delivery.undelivered
            refused = self._delivery.refused
        event = self._events.disconnect(self._ended, undelivered, refused)
        if self._event is not None:  # the same event: only its counts may change
            event = self._event.with_body(event.body)
        self._event = event
        return event


class Disconnects(abc.ABC):
    """Delivers disconnect events, and reports what became of each."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.closing = False  # the relay stops: the next start sends failed events

    async def deliver(self, notification: DisconnectNotification) -> None:
        """Send the event. Raises `BackendError` if it was refused or given up."""
        connection_id, observer = notification.connection_id, self._observer
        try:
            refused = await self._send(notification)
        except BackendError:
            if not self.closing:
                observer.given_up(f"{connection_id}-disconnect")
                observer.ended("disconnect", connection_id, "failed")
            raise
        if refused is None:
            observer.ended("disconnect", connection_id, "delivered")
        else:
            observer.ended("disconnect", connection_id, "refused")
            raise refused

    @abc.abstractmethod
    async def _send(
        self, notification: DisconnectNotification
    ) -> BackendError | None:
        """Send until accepted or refused; then return None or the error for the log.

        Raises `BackendError` if it is given up.
        """


class DisconnectDelivery(Disconnects):
    """Delivers disconnect events to `target`; None: no events are sent.

    An event is given up `timeout` seconds after its first failure, and after `retries`.
    """

    def __init__(
        self,
        target: Target | None,
        attempts: Attempts,
        breaker: Breaker,
        timeout: float,
        observer: Observer,
        retries: float = float("inf"),
    ) -> None:
        super().__init__(observer)
        self._retries = retries
        self.target = target
        self._attempts = attempts
        self._terms = attempts.terms(DISCONNECT_TIMEOUT, DISCONNECT_TIMEOUT)
        self._breaker = breaker
        self._timeout = timeout

    def deliver(
        self, notification: DisconnectNotification
    ) -> Coroutine[Any, Any, None]:
        """Send the event. Raises `BackendError` if it was refused or given up."""
        if self.target is None:
            return notification.wait_until_ready()
        return super().deliver(notification)

    async def _send(
        self, notification: DisconnectNotification
    ) -> BackendError | None:
        target = self.target
        assert target is not None
        loop = self._attempts.loop
        deadline = float("inf")
        for attempt in itertools.count(1):
            wait = 0.0
            if not notification.settled:
                await notification.wait_until_ready()
            while not self._breaker.take():
                deadline = min(deadline, loop.time() + self._timeout)
                if await self._wait_for_breaker(notification, deadline):
                    break
                if loop.time() >= deadline:
                    raise BackendAway(f"POST {target}: backend unavailable")
                await notification.wait_until_ready()
            try:
                response = await self._attempts.make(
                    "disconnect",
                    notification.connection_id,
                    target,
                    notification.event(),
                    self._terms,
                    attempt,
                )
            except BackendError as failure:
                error = failure
            else:
                rules = self._attempts.rules
                became = rules.outcome_of(response)
                if became == "delivered":
                    return None
                error = BackendError(f"POST {target}: {rules.why_failed(response)}")
                if became == "refused":
                    return BackendError(f"{error}{hint(response.status)}")
                wait = retry_after(response) or 0.0
            if self.closing or attempt > self._retries:
                raise error
            deadline = min(deadline, loop.time() + self._timeout)
            left = deadline - loop.time()
            if left <= 0:
                raise error
            await asyncio.sleep(min(left, max(backoff(attempt), wait)))
        raise AssertionError("it never stops counting")

    async def _wait_for_breaker(
        self, notification: DisconnectNotification, deadline: float
    ) -> bool:
        """Wait until the breaker permits an attempt; return whether it does.

        Returns False at the deadline, and if the notification is no longer ready, since
        a message of its connection must be sent first.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()

        def call() -> None:
            # Take the permit immediately: it is for the called one only.
            if not turn.done():
                turn.set_result(notification.ready and self._breaker.take())

        def end() -> None:
            if not turn.done():
                turn.set_result(False)

        timer = loop.call_at(deadline, after_reading, loop, end)
        self._breaker.wait(call)
        try:
            return await turn
        finally:
            timer.cancel()
            self._breaker.leave(call)


def log_failure(connection_id: str, error: BackendError) -> None:
    """Log that the backend did not accept a disconnect event."""
    logger.error(
        "connection %s: disconnect notification failed: %s", connection_id, error,
        extra={"event": "disconnect_failed", "connection_id": connection_id},
    )
