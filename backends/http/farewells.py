"""Disconnect events: each until it is taken, refused or given up."""

import asyncio
import itertools

from backends import BackendAway, BackendError, Closure, Observer, TraceContext
from backends.breaker import Breaker
from backends.deadlines import after_reading
from backends.http.attempts import Attempts
from backends.http.delivery import (
    Delivery,
    backoff,
    hint,
    is_failure,
    is_success,
    retry_after,
)
from backends.http.event import Event, EventWriter
from backends.target import Target

# Seconds for the answer to a disconnect event, and for a connection to become free
# for it in a line that does not move.
DISCONNECT_TIMEOUT = 30.0


class Farewell:
    """One connection's disconnect event.

    Before each attempt it waits until no message of `delivery` (None: there was
    none) can fail any more, except those that are held and have not failed.
    `instance` is an earlier run that lost the connection, or None.
    """

    def __init__(
        self,
        events: EventWriter,
        connection_id: str,
        closure: Closure,
        trace: TraceContext | None,
        delivery: Delivery | None = None,
        instance: str | None = None,
    ) -> None:
        self.connection_id = connection_id
        self._events = events
        self._closure = closure
        self._trace = trace
        self._delivery = delivery
        self._instance = instance
        self._event: Event | None = None
        self.failures = 0  # of messages, by when it was written

    def again(self) -> "Farewell":
        """A new one, with the same id: the backend got a message after this one."""
        return Farewell(
            self._events,
            self.connection_id,
            self._closure,
            self._trace,
            self._delivery,
            self._instance,
        )

    @property
    def ready(self) -> bool:
        """Whether it may be sent once it has waited until then."""
        return self._delivery is None or not self._delivery.busy

    async def until_ready(self) -> None:
        """Wait until it may be sent."""
        if self._delivery is not None:
            if not self._delivery.settled:
                await self._delivery.settle()
            self.failures = self._delivery.failures

    def event(self) -> Event:
        """Return the event with the counts of now."""
        undelivered, refused = self._closure.undelivered, 0
        if self._delivery is not None:
            self.failures = self._delivery.failures
            undelivered += self._delivery.undelivered
            refused = self._delivery.refused
        event = self._events.disconnect(
            self.connection_id,
            self._closure,
            undelivered,
            refused,
            self._trace,
            self._instance,
        )
        if self._event is not None:  # it is the same one: only counts may change
            event = self._event._replace(body=event.body)
        self._event = event
        return event


class Farewells:
    """Delivers disconnect events to `target`; None: nobody is told.

    An event is given up `timeout` seconds after its first failure.
    """

    def __init__(
        self,
        target: Target | None,
        attempts: Attempts,
        breaker: Breaker,
        timeout: float,
        observer: Observer,
    ) -> None:
        self.target = target
        self._attempts = attempts
        self._breaker = breaker
        self._timeout = timeout
        self._observer = observer
        self.closing = False  # what fails is left to the next start

    async def say(self, farewell: Farewell) -> None:
        """Deliver it. Raises `BackendError` where it was refused or given up."""
        if self.target is None:
            await farewell.until_ready()
            return
        connection_id = farewell.connection_id
        try:
            refused = await self._retry(self.target, farewell)
        except BackendError:
            if not self.closing:
                self._observer.given_up(f"{connection_id}-disconnect")
                self._observer.ended("disconnect", connection_id, "failed")
            raise
        if refused is None:
            self._observer.ended("disconnect", connection_id, "delivered")
        else:
            self._observer.ended("disconnect", connection_id, "refused")
            raise refused

    async def _retry(self, target: Target, farewell: Farewell) -> BackendError | None:
        """Until it is taken, or refused: then the error for the log is returned.

        Raises `BackendError` where it is given up.
        """
        loop = asyncio.get_running_loop()
        deadline = float("inf")
        for attempt in itertools.count(1):
            wait = 0.0
            await farewell.until_ready()
            while not self._breaker.take():
                deadline = min(deadline, loop.time() + self._timeout)
                if await self._turn(farewell, deadline):
                    break
                if loop.time() >= deadline:
                    raise BackendAway(f"POST {target}: the backend is away")
                await farewell.until_ready()
            try:
                answer = await self._attempts.make(
                    "disconnect",
                    farewell.connection_id,
                    target,
                    farewell.event(),
                    timeout=DISCONNECT_TIMEOUT,
                    queue_timeout=DISCONNECT_TIMEOUT,
                )
            except BackendError as failure:
                error = failure
            else:
                if is_success(answer.status):
                    return None
                error = BackendError(f"POST {target}: answered {answer.status}")
                if not is_failure(answer.status):
                    return BackendError(f"{error}{hint(answer.status)}")
                wait = retry_after(answer) or 0.0
            if self.closing:
                raise error
            deadline = min(deadline, loop.time() + self._timeout)
            left = deadline - loop.time()
            if left <= 0:
                raise error
            await asyncio.sleep(min(left, max(backoff(attempt), wait)))
        raise AssertionError("it never stops counting")

    async def _turn(self, farewell: Farewell, deadline: float) -> bool:
        """Wait for the breaker to let an attempt go; whether one may.

        Not where it is not ready any more: a message of its own goes first.
        Nor at the deadline, by when all that had come was read.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()

        def call() -> None:
            # Taken here: the permit is for whoever is called.
            if not turn.done():
                turn.set_result(farewell.ready and self._breaker.take())

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
