"""Keeps the order of one connection's messages, and retries them.

A message is sent when the one before it was answered or is *overdue*: completely sent,
and unanswered for `order_wait`. Some backends hold the response until the connection
ends, and reply by callback meanwhile. An overdue request stays open and its response
still counts; at most `max_unanswered` are open. A request that fails is retried before
any other is sent, until `delivery_timeout`. `deliveries` has what all deliveries share,
and `held` the overdue requests of all connections.
"""

import asyncio
import logging
from bisect import insort
from collections.abc import Callable
from typing import Literal

from backends import Attempt, AttemptOutcome, BackendError, Connection
from backends.client import NoConnection, Response
from backends.deadlines import STALL, after_reading
from backends.events import Event
from backends.http.deliveries import IMPATIENT_ORDER_WAIT, Deliveries
from backends.http.held import Request
from backends.http.reply_turns import ReplyTurns
from backends.http.retries import backoff, hint, retry_after, unreachable_cause
from backends.target import Target
from backends.waiting import Line, Taken, done_future

logger = logging.getLogger(__name__)


class Delivery(Taken):
    """Delivers one connection's messages to the backend.

    A message is in the backlog, or unanswered: an attempt is being made. The latest
    attempt (the gate) delays the next one until it is overdue or has ended.
    """

    __slots__ = (
        "_backlog",
        "_called_back_at",
        "_changed",
        "_connection",
        "_deliveries",
        "_gate",
        "_line",
        "_order_wait",
        "_overdue",
        "_quiet",
        "_replies",
        "_then",
        "_timer",
        "disconnected",
        "failures",
        "number",
        "refused",
        "undelivered",
    )

    def __init__(self, deliveries: Deliveries, connection: Connection) -> None:
        self._deliveries = deliveries
        self._connection = connection
        self._order_wait = deliveries.limits.order_wait
        # To be sent, in order: those that failed before, then new ones.
        self._backlog: list[Request] = []
        # The latest request sent, while it delays the next.
        self._gate: Request | None = None
        self._overdue: dict[Request, None] = {}  # unanswered ones, in the order sent
        self._called_back_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._line: Line | None = None  # where `_pump` waits to be called
        self._replies: ReplyTurns | None = None  # from the first reply on
        # Called, and done, when no message waits to be sent, and none delays the next.
        self._then: Callable[[], None] | None = None
        self._quiet: asyncio.Future[None] | None = None
        # Done when a request has ended or failed.
        self._changed: asyncio.Future[None] | None = None
        self.failures = 0  # of attempts that were, or will be, repeated
        self.number = 0  # of the latest message, from 1
        self.refused = 0
        # Once the disconnect event is due, messages given up are counted here: the
        # client's connection no longer counts them.
        self.disconnected = False
        self.undelivered = 0

    def post(self, event: Event, target: Target | None = None) -> Taken:
        """Send the next message.

        Without a `target` of its own it goes where most of them go.
        """
        deliveries = self._deliveries
        if target is None:
            target = deliveries.target
        request = Request(self, self.number, event, target, deliveries.terms)
        self._backlog.append(request)
        self._pump()
        return self

    def then(self, call: Callable[[], None]) -> None:
        """Call `call` when the message is answered, overdue or given up."""
        self._then = call

    def quiet(self) -> "asyncio.Future[None]":
        """A future, done when each message is answered, overdue or given up."""
        if not self.busy:
            return done_future(self._deliveries.loop)
        if self._quiet is None:
            self._quiet = self._deliveries.loop.create_future()
        return self._quiet

    @property
    def holding(self) -> bool:
        """Whether there are unanswered requests."""
        return self._gate is not None or bool(self._overdue)

    def _unanswered(self) -> list[Request]:
        """Return the unanswered requests, in the order sent."""
        return [*self._overdue, *(() if self._gate is None else (self._gate,))]

    @property
    def settled(self) -> bool:
        """Whether no message waits to be sent, and none that has failed is open."""
        return not (self.busy or self._has_failed_open())

    async def settle(self) -> None:
        """Wait until each message is answered, given up, or overdue without a failure.

        Waits for one that has failed and is overdue again for at most
        `held_after_disconnect` seconds: the backend may hold the response until it gets
        the disconnect event.
        """
        failures = -1
        while failures != self.failures:
            while self.busy:
                await self.quiet()
            failures = self.failures
            await self.until_failure(failures, self._has_failed_open)

    @property
    def busy(self) -> bool:
        """Whether a message waits to be sent, or it or its reply delays the next."""
        replies = self._replies
        return (
            bool(self._backlog)
            or self._gate is not None
            or (replies is not None and replies.carrying_out)
        )

    def _has_failed_open(self) -> bool:
        return any(request.attempts for request in self._unanswered())

    async def until_failure(
        self, before: int, awaited: Callable[[], object] | None = None
    ) -> bool:
        """Wait while requests are held; return whether `failures` is above `before`.

        Waits at most `held_after_disconnect` seconds, at most until the first failure,
        and only while `awaited` returns a true value (default: while any is held).
        """
        loop = self._deliveries.loop
        deadline = loop.time() + self._deliveries.limits.held_after_disconnect
        awaits = self._unanswered if awaited is None else awaited
        while awaits() and self.failures == before and loop.time() < deadline:
            self._changed = loop.create_future()
            # Judged after reading: the response may have come during a stall.
            timer = loop.call_at(deadline, after_reading, loop, self._signal_change)
            try:
                await self._changed
            finally:
                timer.cancel()
        return self.failures != before

    def called_back(self) -> None:
        """The backend called back for this connection: it has seen earlier messages."""
        if not self.holding:
            return
        self._called_back_at = self._deliveries.loop.time()
        if self._overdue:
            self._order_wait = IMPATIENT_ORDER_WAIT
        self._mark_expendable()
        self._pump()

    def on_disconnect_answered(self) -> None:
        """The backend has answered the disconnect event: it needs no held request."""
        self._mark_expendable()

    def end(self) -> None:
        """Abandon requests that are held, and drop those that wait for a retry."""
        for request in self._backlog:
            self._deliveries.held.discard(request)
        self._backlog.clear()
        self._stop_waiting()
        while unanswered := self._unanswered():
            self.abandon(unanswered[0])
        self._deliveries.loop.call_soon(self._signal_if_quiet)

    def abandon(self, request: Request) -> None:
        """Close a request's connection; it is not retried, nor counted as a failure."""
        self._end_attempt(request)
        self._deliveries.held.discard(request)
        self._report_attempt(request, "abandoned", None)
        logger.debug(
            "connection %s: message %d is abandoned",
            self._connection.id,
            request.number,
            extra={"connection_id": self._connection.id},
        )
        self._deliveries.observer.ended("message", self._connection.id, "abandoned")
        request.abandon()
        self._signal_change()
        if self._replies is not None:
            self._replies.go_on()
        self._pump()

    def _pump(self) -> None:
        """Send the messages that may be sent now, or wait for what delays them.

        The end of such a wait calls this again. At a deadline, `_judge` runs first, and
        gives up messages that are too late.
        """
        deliveries = self._deliveries
        while self._backlog and self._gate is None:
            if self._replies is not None and self._replies.carrying_out:
                break
            now = deliveries.loop.time()
            head = self._backlog[0]
            if now < head.not_before:
                self._wait(head.not_before)
                return
            if self._overdue and self._has_too_many_open():
                if not self._abandon_oldest():
                    self._wait(
                        self._room_deadline(now),
                        deliveries.held if deliveries.held.full else None,
                    )
                return  # abandoning one has called this
            if not deliveries.breaker.take():
                # An open breaker counts as a failed attempt.
                head.failed_at = min(head.failed_at, now)
                self._wait(self._deadline(), deliveries.breaker)
                return
            self._send(self._backlog.pop(0), now)
        if self._then is not None or self._quiet is not None:
            self._signal_if_quiet()

    def _has_too_many_open(self) -> bool:
        deliveries, unanswered = self._deliveries, len(self._unanswered())
        return unanswered > 0 and (
            unanswered >= deliveries.limits.max_unanswered or deliveries.held.full
        )

    def _send(self, request: Request, now: float) -> None:
        deliveries = self._deliveries
        if self._timer is not None:
            self._stop_waiting()
        request.began_at = now
        self._gate = request
        deliveries.client.send(request)

    def _signal_if_quiet(self) -> None:
        if self.busy:
            return
        quiet, self._quiet = self._quiet, None
        if quiet is not None and not quiet.done():
            quiet.set_result(None)
        then, self._then = self._then, None
        if then is not None:
            then()  # it may post the next message

    def _signal_change(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # Called by the request.

    def write(self, request: Request) -> bytes:
        """Return the HTTP request of this attempt."""
        return self._deliveries.requests.write(request.target, request.event)

    def on_sent(self, request: Request) -> None:
        """The kernel has the whole request: it can become overdue from now on."""
        request.sent_at = self._deliveries.loop.time()
        if request.answering:  # before it was sent completely
            return
        self._deliveries.line(self._order_wait).add(request)

    def on_overdue(self, request: Request) -> None:
        """There is no response in time: the next message may be sent."""
        if request.queued:  # its kept connection has ended: it will be sent again
            return
        request.forbid_resend()  # a server closes idle connections earlier
        self._overdue[request] = None
        self._deliveries.held.add(request)
        # The backend received all of it, and did not reset the connection.
        self._deliveries.breaker.record(self._connection.id, cause=None)
        self._gate = None
        if self._called_back_at >= request.sent_at:
            self._order_wait = IMPATIENT_ORDER_WAIT
            self._deliveries.mark_expendable(request)
        self._pump()

    def on_done(self, request: Request, outcome: Response | BackendError) -> None:
        """There is a response, or there will be none."""
        self._end_attempt(request)
        if isinstance(outcome, NoConnection):
            self._on_unsent(request, outcome)
            return
        deliveries = self._deliveries
        became = deliveries.outcome_of(outcome)
        if isinstance(outcome, BackendError):
            self._report_attempt(request, became, None)
            self._on_failed(request, outcome, 0.0)
        else:
            self._report_attempt(request, became, outcome.status)
            if became == "delivered" or became == "refused":
                self._on_answered(request, became, outcome.status)
                if outcome.body is not None:
                    self._reply_turns().add(request.event.id, outcome)
            else:
                why = deliveries.why_failed(outcome)
                error = self._error(why, request.target)
                self._on_failed(request, error, retry_after(outcome) or 0.0)
        # Now others may be sent, but no message of this connection before a failed one.
        cause = None
        if became == "unreachable":
            cause = unreachable_cause(became, request.target.url, outcome)
        deliveries.breaker.record(self._connection.id, cause)
        if self._changed is not None:
            self._signal_change()
        if self._replies is not None:
            self._replies.go_on()
        self._pump()

    def _end_attempt(self, request: Request) -> None:
        """Remove the state of an attempt that has ended."""
        if request.line is not None:
            request.leave_line()
        if self._gate is request:
            self._gate = None
        else:
            self._overdue.pop(request, None)
        if self._replies is not None:
            self._replies.forget(request)

    def _report_attempt(
        self, request: Request, outcome: AttemptOutcome, status: int | None
    ) -> None:
        event = request.event
        self._deliveries.observer.attempted(
            Attempt(
                "message",
                self._connection.id,
                event.id,
                event.traceparent,
                outcome,
                status,
                self._deliveries.loop.time() - request.began_at,
                request.target.url,
                event.trace,
                request.attempts + 1,
            )
        )

    def _on_answered(
        self, request: Request, became: Literal["delivered", "refused"], status: int
    ) -> None:
        deliveries = self._deliveries
        deliveries.held.discard(request)
        deliveries.observer.ended("message", self._connection.id, became)
        if became == "refused":
            self.refused += 1
            logger.warning(
                "connection %s: message %d was refused by the backend with %d:"
                " POST %s%s",
                self._connection.id,
                request.number,
                status,
                request.target.url,
                hint(status),
                extra={"connection_id": self._connection.id, "status": status},
            )
        if self._overdue:
            self._mark_expendable(before=request.number)

    def _on_failed(self, request: Request, error: BackendError, wait: float) -> None:
        """Put a request back into the backlog, or give it up, or the whole backlog.

        `wait` is the time in seconds that the backend requested before the retry.
        """
        if self._deliveries.closing:
            self._deliveries.held.discard(request)
            return
        now = self._deliveries.loop.time()
        request.attempts += 1
        request.failed_at = min(request.failed_at, now)
        if self._is_final(request, now):
            self._fail(request, error)
            return
        self.failures += 1
        again = self._retry(request)
        self._keep_behind(again)
        again.not_before = min(
            now + max(backoff(again.attempts), wait),
            again.failed_at + self._deliveries.limits.delivery_timeout,
        )
        logger.log(
            logging.WARNING if request.attempts == 1 else logging.DEBUG,
            "connection %s: message %d is retried: %s",
            self._connection.id,
            request.number,
            error,
            extra={"connection_id": self._connection.id},
        )
        if now >= self._deadline():
            self._give_up(error)

    def _is_final(self, request: Request, now: float) -> bool:
        """Whether a failed request is not retried, and those behind it go on."""
        limits = self._deliveries.limits
        return limits.retries is not None and (
            request.attempts > limits.retries
            or now >= request.failed_at + limits.delivery_timeout
        )

    def _fail(self, request: Request, error: BackendError) -> None:
        """End a message that is not retried; those behind it go on."""
        deliveries = self._deliveries
        deliveries.held.discard(request)
        deliveries.observer.given_up(request.event.id)
        deliveries.observer.ended("message", self._connection.id, "failed")
        logger.warning(
            "connection %s: message %d has failed: %s",
            self._connection.id,
            request.number,
            error,
            extra={"connection_id": self._connection.id},
        )
        told = deliveries.on_failed(self._connection, request.event)
        if told is not None:
            self._reply_turns().hold(told)

    def _retry(self, request: Request) -> Request:
        """Put the next attempt to send the same message into the backlog."""
        again = request.again()
        self._deliveries.held.retry(request, again)
        self._put_back(again)
        return again

    def _put_back(self, request: Request) -> None:
        """Put a request into the backlog, in the order of numbers."""
        insort(self._backlog, request, key=lambda request: request.number)

    def _keep_behind(self, failed: Request) -> None:
        """Send no message that is later than `failed` before it is retried.

        A later one in the client's queue goes back into the backlog. One that was sent
        already is not sent again when its connection is lost.
        """
        gate = self._gate
        if gate is None or gate.number < failed.number:
            return
        if gate.queued:
            self._withdraw(gate)
        else:
            gate.forbid_resend()

    def _withdraw(self, gate: Request) -> None:
        """Remove a request from the client's queue, and put it into the backlog."""
        self._end_attempt(gate)
        gate.abandon()
        self._deliveries.breaker.record_nothing()
        self._retry(gate)

    def _on_unsent(self, request: Request, error: NoConnection) -> None:
        """Handle a request that got no connection: others use all of them."""
        self._deliveries.breaker.record_nothing()
        if self._deliveries.limits.retries is None:
            self._put_back(request)
            self._give_up(error)
        else:
            self._fail(request, error)
        if self._changed is not None:
            self._signal_change()
        self._pump()

    def _give_up(self, error: BackendError) -> None:
        """Give up the message at the head of the backlog, and all behind it."""
        messages = len(self._backlog)
        for request in self._backlog:
            self._deliveries.held.discard(request)
            if request.attempts:
                self._deliveries.observer.given_up(request.event.id)
        self._backlog.clear()
        self._stop_waiting()
        if self.disconnected:
            self.undelivered += messages
            self._deliveries.observer.ended(
                "message", self._connection.id, "failed", messages
            )
        else:
            self._connection.give_up(error, messages)

    # Replies.

    def may_read(self, request: Request) -> bool:
        """Return whether its reply may be read now; otherwise it is read later."""
        request.answering = True  # neither overdue nor abandoned from now on
        request.leave_line()
        self._deliveries.held.keep(request)
        return self._reply_turns().may_read(request)

    def _reply_turns(self) -> ReplyTurns:
        if self._replies is None:
            replies = self._deliveries.replies
            assert replies is not None
            self._replies = ReplyTurns(replies, self._connection, self._pump)
        return self._replies

    # Which overdue requests may be abandoned.

    def _mark_expendable(self, before: float = float("inf")) -> None:
        """Permit overdue requests with numbers below `before` to be abandoned.

        The backend has shown that it has seen their messages.
        """
        held = self._deliveries.held
        for request in list(self._overdue):
            if (
                not request.answering
                and request.number < before
                and not held.is_expendable(request)
            ):
                self._deliveries.mark_expendable(request)

    def _abandon_oldest(self) -> bool:
        for request in self._overdue:
            if self._deliveries.held.is_expendable(request):
                self.abandon(request)
                return True
        return False

    # Waits, and their deadlines on the loop's clock.

    def _deadline(self) -> float:
        """Return when the message at the head of the backlog is given up."""
        return self._backlog[0].failed_at + self._deliveries.limits.delivery_timeout

    def _room_deadline(self, now: float) -> float:
        """Return when messages are given up because too many are unanswered.

        Requests whose reply waits for a slow client are answered. If there are no
        others, this is always later than `now`.
        """
        # Those were sent completely; otherwise one of them would be the gate.
        oldest = min(
            (request.sent_at for request in self._overdue if not request.answering),
            default=now,
        )
        return oldest + self._deliveries.limits.room_timeout

    def _wait(self, deadline: float, line: Line | None = None) -> None:
        """Call `_judge` at `deadline`, unless `line` calls `_pump` before."""
        if self._timer is not None:
            self._timer.cancel()
        loop = self._deliveries.loop
        self._timer = loop.call_at(deadline, self._on_time, deadline)
        if self._line is not None and self._line is not line:
            self._line.leave(self._pump)
        self._line = line
        if line is not None:
            line.wait(self._pump)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._line is not None:
            self._line.leave(self._pump)
            self._line = None

    def _on_time(self, due: float) -> None:
        """Handle the timer of a wait that was due to end at `due`."""
        loop = self._deliveries.loop
        now = loop.time()
        if now > due + STALL:
            # The process was stopped: restart the time in which messages may fail.
            for request in self._backlog:
                if request.failed_at < now:
                    request.failed_at = now
        after_reading(loop, self._judge)

    def _judge(self) -> None:
        """Give up messages that waited too long; called after reading what arrived."""
        if self._timer is None:
            return  # the wait has ended meanwhile
        now = self._deliveries.loop.time()
        if self._backlog and now >= self._backlog[0].not_before:
            if self._has_too_many_open():
                if now >= self._room_deadline(now):
                    self._give_up(self._error("too many are unanswered"))
            elif self._line is self._deliveries.breaker and now >= self._deadline():
                self._give_up(self._error("backend unavailable"))
        self._pump()

    def _error(self, why: str, target: Target | None = None) -> BackendError:
        return BackendError(f"POST {target or self._deliveries.target}: {why}")


class SingleDeliveries(Deliveries):
    """The deliveries of connections whose messages are sent one by one."""

    def new(self, connection: Connection) -> Delivery:
        """Return the delivery of a connection that sends its first message."""
        return Delivery(self, connection)

    def close(self) -> None:
        """Retry nothing more."""
        self.closing = True

    @property
    def overdue(self) -> int:
        """Number of requests that wait for an overdue response."""
        return self.held.overdue

    @property
    def failed(self) -> int:
        """Number of messages that were overdue, have failed, and will be retried."""
        return self.held.failed
