"""The order of one connection's messages: retries, and held answers.

A message is posted when the one before it has been answered, or is *overdue*:
sent whole and unanswered for a while, since real backends hold an answer until
the session ends and reply by callback meanwhile. An overdue request stays open
and its answer still counts, within `max_unanswered`. One that fails goes again
before anything else, until `delivery_timeout`.
"""

import asyncio
import logging
import random
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from typing import Literal

from backends import (
    Attempt,
    AttemptOutcome,
    BackendAway,
    BackendError,
    Connection,
    Observer,
)
from backends.breaker import Breaker
from backends.client import Client, NoConnection, Response
from backends.deadlines import after_reading
from backends.http.event import Event, EventWriter
from backends.http.held import Held, OverdueLine, Request
from backends.target import Target
from backends.waiting import Line

logger = logging.getLogger(__name__)

IMPATIENT_ORDER_WAIT = 0.1  # seconds, once a backend is known to hold answers
MIN_BACKOFF = 0.2  # seconds before the first retry, at most
MAX_BACKOFF = 5.0  # seconds between two retries, at most
MAX_DOUBLINGS = 16  # beyond MAX_BACKOFF, and far below what overflows
HELD_AFTER_DISCONNECT = 5.0  # seconds that a held request outlives its connection
MAX_DATE_LENGTH = 64  # characters; those of RFC 9110, section 5.6.7, have 24 to 33

# A gateway's word for a backend that is away (RFC 9110, section 15.6).
GATEWAY_FAILURES = frozenset(
    {
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)

RETRYABLE = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)


# What an operator looks at first where an event is refused.
HINTS = {
    401: "; look at --backend_headers_file and --webhook_secret",
    403: "; look at --backend_headers_file and --webhook_secret",
    404: "; is there that path?",
    405: "; is it a path for POST?",
    413: "; it takes less than --max_message_size",
}


def is_success(status: int) -> bool:
    """Whether the backend took the event."""
    return 200 <= status < 300


def attempt_outcome(outcome: Response | BackendError) -> AttemptOutcome:
    """What became of an attempt: it was taken or refused, or may go again."""
    if isinstance(outcome, BackendError):
        return "away" if isinstance(outcome, BackendAway) else "timeout"
    if is_success(outcome.status):
        return "delivered"
    if outcome.status in GATEWAY_FAILURES:
        return "away"
    return "error" if is_failure(outcome.status) else "refused"


def is_failure(status: int) -> bool:
    """Whether the backend may take the event another time; else it is refused."""
    return status >= 500 or status in RETRYABLE


def hint(status: int) -> str:
    """What to look at where the backend refuses with `status`; begins with `; `."""
    if 300 <= status < 400:
        return "; redirects are not followed: give the URL that it leads to"
    return HINTS.get(status, "")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a delivery waits, in seconds, and how many answers it awaits.

    `order_wait` is infinite for strictly one at a time. `backend_timeout` None
    waits for an answer as long as the connection to the backend lives. Above
    `max_held_bytes` of overdue messages, over all connections, one that has
    some itself waits as if it had `max_unanswered`.
    """

    order_wait: float = 1.0
    max_unanswered: int = 16
    backend_timeout: float | None = None
    delivery_timeout: float = 60.0
    max_held_bytes: int = 256 * 1024 * 1024


class Deliveries:
    """What the deliveries of all connections share: client, clock and bounds."""

    def __init__(
        self,
        client: Client,
        events: EventWriter,
        breaker: Breaker,
        target: Target,
        patience: Patience,
        observer: Observer,
    ) -> None:
        self.loop = client.loop
        self.observer = observer
        self.client = client
        self.events = events
        self.breaker = breaker
        self.target = target
        self.patience = patience
        self.closing = False
        self.held = Held(patience.max_held_bytes, self.loop)
        # Two waits only, so that each line of requests keeps its order.
        self._lines = {
            wait: OverdueLine(wait, self.loop)
            for wait in (patience.order_wait, IMPATIENT_ORDER_WAIT)
        }
        client.on_starved = self.held.let_one_go

    def line(self, wait: float) -> OverdueLine:
        """The requests that become overdue after `wait` seconds."""
        return self._lines[wait]

    def on_sign_of_life(self, request: Request) -> None:
        """An overdue request may be let go from now on."""
        self.held.on_sign_of_life(request)
        if self.client.starved:
            self.held.let_one_go()


class Delivery:
    """One connection's messages on their way to the backend.

    A message is in the backlog, or open: an attempt is under way. The latest
    attempt holds back the next (the gate) until it is overdue or over.
    """

    __slots__ = (
        "_backlog",
        "_called_back_at",
        "_changed",
        "_connection",
        "_deliveries",
        "_gate",
        "_line",
        "_open",
        "_order_wait",
        "_quiet",
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
        self._order_wait = deliveries.patience.order_wait
        # To be sent, in their order: what failed before, then what is new.
        self._backlog: list[Request] = []
        # The latest request sent, while it holds back the next.
        self._gate: Request | None = None
        self._open: dict[Request, None] = {}  # under way, in the order sent
        self._called_back_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._line: Line | None = None  # where `_pump` waits to be called
        # Done when nothing waits to be sent, nor holds back the next.
        self._quiet: asyncio.Future[None] | None = None
        # Done when a request has ended, or failed.
        self._changed: asyncio.Future[None] | None = None
        self.failures = 0  # of attempts, so far
        self.number = 0  # of the latest message, from 1
        self.refused = 0
        # Once the disconnect event is due, given up messages are counted here:
        # the client's connection has counted its own by then.
        self.disconnected = False
        self.undelivered = 0

    def post(self, event: Event) -> "asyncio.Future[None]":
        """Send the next message; the one after it may follow when it is done."""
        self._backlog.append(Request(self, self.number, event))
        self._pump()
        return self.quiet()

    def quiet(self) -> "asyncio.Future[None]":
        """Done when every message has been answered, is overdue or given up."""
        if not self.busy:
            return self._done()
        if self._quiet is None:
            self._quiet = self._deliveries.loop.create_future()
        return self._quiet

    @property
    def holding(self) -> bool:
        """Whether requests are unanswered."""
        return bool(self._open)

    @property
    def settled(self) -> bool:
        """Whether no message waits to be sent, nor has failed and is unanswered."""
        return not (self.busy or self._has_failed_open())

    async def settle(self) -> None:
        """Wait until each message is answered, given up, or overdue without a failure.

        One that has failed and is held again is awaited for
        `HELD_AFTER_DISCONNECT` seconds: its answer may be held until the
        backend is told of the disconnect.
        """
        failures = -1
        while failures != self.failures:
            while self.busy:
                await self.quiet()
            failures = self.failures
            await self.until_failure(failures, self._has_failed_open)

    @property
    def busy(self) -> bool:
        """Whether a message waits to be sent, or holds back the next."""
        return bool(self._backlog) or self._gate is not None

    def _has_failed_open(self) -> bool:
        return any(request.attempts for request in self._open)

    async def until_failure(
        self, before: int, awaited: Callable[[], object] | None = None
    ) -> bool:
        """Wait while requests are held; whether `failures` is above `before`.

        At most for `HELD_AFTER_DISCONNECT` seconds, for those that are `awaited`
        (default: all), and not after the first failure.
        """
        loop = self._deliveries.loop
        deadline = loop.time() + HELD_AFTER_DISCONNECT
        awaits = self._open.__len__ if awaited is None else awaited
        while awaits() and self.failures == before and loop.time() < deadline:
            self._changed = loop.create_future()
            # Judged after reading: the answer may have come during a stall.
            timer = loop.call_at(deadline, after_reading, loop, self._tell_of_change)
            try:
                await self._changed
            finally:
                timer.cancel()
        return self.failures != before

    def called_back(self) -> None:
        """The backend called back to this connection: a sign of life."""
        self._called_back_at = self._deliveries.loop.time()
        if not self._open:
            return
        if any(request.overdue for request in self._open):
            self._order_wait = IMPATIENT_ORDER_WAIT
        self._on_sign_of_life()
        self._pump()

    def told(self) -> None:
        """The backend has answered the disconnect event: a sign of life."""
        self._on_sign_of_life()

    def end(self) -> None:
        """Forget what is left: every request that is held, and what goes again."""
        for request in self._backlog:
            self._deliveries.held.discard(request)
        self._backlog.clear()
        self._wait_no_more()
        while self._open:
            self.let_go(next(iter(self._open)))

    def let_go(self, request: Request) -> None:
        """Close a request's connection: never retried, and not a failure."""
        exchange = request.exchange
        assert exchange is not None
        self._end_attempt(request)
        self._deliveries.held.discard(request)
        self._tell_of_attempt(request, "let_go", None)
        self._deliveries.observer.ended("message", self._connection.id, "let_go")
        exchange.abandon()
        self._tell_of_change()
        self._pump()

    def _pump(self) -> None:
        """Send what may be sent now; else wait for what keeps it back.

        Whatever ends such a wait calls this, and so does a timer: what is too
        late by then has been given up, see `_judge`.
        """
        deliveries = self._deliveries
        while self._backlog and self._gate is None:
            now = deliveries.loop.time()
            head = self._backlog[0]
            if now < head.not_before:
                self._wait(head.not_before)
                return
            if self._open and self._has_too_many_open():
                if not self._let_oldest_go():
                    self._wait(
                        self._room_deadline(),
                        deliveries.held if deliveries.held.full else None,
                    )
                return  # letting one go has pumped
            if not deliveries.breaker.take():
                # The backend is away: that counts like an attempt of one's own.
                head.failed_at = min(head.failed_at, now)
                self._wait(self._deadline(), deliveries.breaker)
                return
            self._send(self._backlog.pop(0), now)
        if self._quiet is not None:
            self._tell_if_quiet()

    def _has_too_many_open(self) -> bool:
        deliveries = self._deliveries
        return bool(self._open) and (
            len(self._open) >= deliveries.patience.max_unanswered
            or deliveries.held.full
        )

    def _send(self, request: Request, now: float) -> None:
        deliveries = self._deliveries
        if self._timer is not None:
            self._wait_no_more()
        request.began_at = now
        self._gate = request
        self._open[request] = None
        request.exchange = deliveries.client.post(
            deliveries.target,
            partial(deliveries.events.request, deliveries.target, request.event),
            on_done=request.on_done,
            on_sent=request.on_sent,
            timeout=deliveries.patience.backend_timeout,
            queue_timeout=deliveries.patience.delivery_timeout,
        )

    def _tell_if_quiet(self) -> None:
        if self._quiet is None or self._backlog or self._gate is not None:
            return
        quiet, self._quiet = self._quiet, None
        if not quiet.done():
            quiet.set_result(None)

    def _tell_of_change(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # What becomes of a request.

    def on_sent(self, request: Request) -> None:
        """The kernel has the whole request: its time runs."""
        request.sent_at = self._deliveries.loop.time()
        self._deliveries.line(self._order_wait).add(request)

    def on_overdue(self, request: Request) -> None:
        """No answer in time: the next message may go."""
        exchange = request.exchange
        assert exchange is not None
        if exchange.queued:  # its kept connection had ended: it was not sent
            return
        exchange.forbid_resend()  # nobody closes a connection as idle that late
        self._deliveries.held.add(request)
        # Whoever took it whole and has not reset it is there.
        self._deliveries.breaker.record(self._connection.id, away=False)
        self._gate = None
        if self._called_back_at >= request.sent_at:
            self._order_wait = IMPATIENT_ORDER_WAIT
            self._deliveries.on_sign_of_life(request)
        self._pump()

    def on_done(self, request: Request, outcome: Response | BackendError) -> None:
        """An answer came, or none will."""
        self._end_attempt(request)
        if isinstance(outcome, NoConnection):
            self._on_unsent(request, outcome)
            return
        became = attempt_outcome(outcome)
        if isinstance(outcome, BackendError):
            self._tell_of_attempt(request, became, None)
            self._on_failed(request, outcome, 0.0)
        else:
            self._tell_of_attempt(request, became, outcome.status)
            if became == "delivered" or became == "refused":
                self._on_answered(request, became, outcome.status)
            else:
                error = self._error(f"answered {outcome.status}")
                self._on_failed(request, error, retry_after(outcome) or 0.0)
        # Others may go on now, but nothing of this connection overtakes what failed.
        self._deliveries.breaker.record(self._connection.id, became == "away")
        if self._changed is not None:
            self._tell_of_change()
        self._pump()

    def _end_attempt(self, request: Request) -> None:
        """Nothing of the attempt that is over is kept."""
        request.exchange = None
        if request.line is not None:
            request.leave_line()
        self._open.pop(request, None)
        if self._gate is request:
            self._gate = None

    def _tell_of_attempt(
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
                self._deliveries.target.url,
                event.trace,
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
                self._deliveries.target.url,
                hint(status),
                extra={"connection_id": self._connection.id, "status": status},
            )
        if self._open:
            self._on_sign_of_life(before=request.number)

    def _on_failed(self, request: Request, error: BackendError, wait: float) -> None:
        """Back to the head of the queue, or given up with all behind it.

        `wait` is what the backend asked for, in seconds, for this message.
        """
        if self._deliveries.closing:
            self._deliveries.held.discard(request)
            return
        now = self._deliveries.loop.time()
        self.failures += 1
        self._deliveries.held.on_failed(request)
        request.attempts += 1
        request.failed_at = min(request.failed_at, now)
        request.sent_at = float("inf")
        self._put_back(request)
        self._keep_behind(request)
        request.not_before = min(
            now + max(backoff(request.attempts), wait),
            request.failed_at + self._deliveries.patience.delivery_timeout,
        )
        logger.log(
            logging.WARNING if request.attempts == 1 else logging.DEBUG,
            "connection %s: message %d goes again: %s",
            self._connection.id,
            request.number,
            error,
            extra={"connection_id": self._connection.id},
        )
        if now >= self._deadline():
            self._give_up(error)

    def _put_back(self, request: Request) -> None:
        """Into the queue, by its number."""
        insort(self._backlog, request, key=lambda request: request.number)

    def _keep_behind(self, failed: Request) -> None:
        """Nothing later is sent before `failed` goes again, nor once more at once."""
        gate = self._gate
        if gate is None or gate.number < failed.number:
            return
        assert gate.exchange is not None
        if gate.exchange.queued:
            self._withdraw(gate)
        else:
            gate.exchange.forbid_resend()

    def _withdraw(self, gate: Request) -> None:
        """Back from the line for a connection: it was not sent."""
        exchange = gate.exchange
        assert exchange is not None
        self._end_attempt(gate)
        exchange.abandon()
        self._deliveries.breaker.record_nothing()
        self._put_back(gate)

    def _on_unsent(self, request: Request, error: NoConnection) -> None:
        """No connection became free: others' requests hold them all."""
        self._deliveries.breaker.record_nothing()
        self._put_back(request)
        self._give_up(error)
        if self._changed is not None:
            self._tell_of_change()
        self._pump()

    def _give_up(self, error: BackendError) -> None:
        """Give up the message at the head, and all behind it."""
        messages = len(self._backlog)
        for request in self._backlog:
            self._deliveries.held.discard(request)
            if request.attempts:
                self._deliveries.observer.given_up(request.event.id)
        self._backlog.clear()
        self._wait_no_more()
        if self.disconnected:
            self.undelivered += messages
            self._deliveries.observer.ended(
                "message", self._connection.id, "failed", messages
            )
        else:
            self._connection.give_up(error, messages)

    # Signs of life.

    def _on_sign_of_life(self, before: float = float("inf")) -> None:
        """What is overdue may be let go, of messages `before` that number."""
        held = self._deliveries.held
        for request in list(self._open):
            if (
                request.overdue
                and request.number < before
                and not held.is_expendable(request)
            ):
                self._deliveries.on_sign_of_life(request)

    def _let_oldest_go(self) -> bool:
        for request in self._open:
            if self._deliveries.held.is_expendable(request):
                self.let_go(request)
                return True
        return False

    # Waits, and their deadlines on the loop's clock.

    def _deadline(self) -> float:
        """When the message at the head is given up."""
        return self._backlog[0].failed_at + self._deliveries.patience.delivery_timeout

    def _room_deadline(self) -> float:
        """When too many have been unanswered for too long."""
        oldest = next(iter(self._open))
        # Sent as a whole, or it would be the gate.
        return oldest.sent_at + self._deliveries.patience.delivery_timeout

    def _wait(self, deadline: float, line: Line | None = None) -> None:
        """Have `_pump` called at `deadline`, or before by `line`."""
        if self._timer is not None:
            self._timer.cancel()
        loop = self._deliveries.loop
        self._timer = loop.call_at(deadline, after_reading, loop, self._judge)
        if self._line is not None and self._line is not line:
            self._line.leave(self._pump)
        self._line = line
        if line is not None:
            line.wait(self._pump)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._line is not None:
            self._line.leave(self._pump)
            self._line = None

    def _judge(self) -> None:
        """A wait may have lasted too long; what had come by then has been read."""
        if self._timer is None:
            return  # it has ended meanwhile
        now = self._deliveries.loop.time()
        if self._backlog and now >= self._backlog[0].not_before:
            if self._has_too_many_open():
                if now >= self._room_deadline():
                    self._give_up(self._error("too many are unanswered"))
            elif self._line is self._deliveries.breaker and now >= self._deadline():
                self._give_up(self._error("the backend is away"))
        self._pump()

    def _error(self, why: str) -> BackendError:
        return BackendError(f"POST {self._deliveries.target}: {why}")

    def _done(self) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = self._deliveries.loop.create_future()
        future.set_result(None)
        return future


def backoff(attempts: int) -> float:
    """Seconds before the next attempt: exponential, with full jitter."""
    doublings = min(attempts - 1, MAX_DOUBLINGS)
    return random.uniform(0.0, min(MAX_BACKOFF, MIN_BACKOFF * 2**doublings))


def retry_after(answer: Response) -> float | None:
    """Seconds that Retry-After asks for (RFC 9110, section 10.2.3), or None.

    A date counts from the answer's own Date, since clocks differ. Infinite where
    a number is beyond all that a float holds.
    """
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    until = seconds_of(value)
    if until is None:
        return None
    now = seconds_of(answer.headers.get("date", ""))
    return max(0.0, until - (time.time() if now is None else now))


def seconds_of(date: str) -> float | None:
    """An HTTP date (RFC 9110, section 5.6.7) in seconds since 1970, or None."""
    if len(date) > MAX_DATE_LENGTH:
        return None
    try:
        parsed = parsedate_to_datetime(date)
        if parsed.tzinfo is None:  # asctime's, which is UTC as well
            parsed = parsed.replace(tzinfo=UTC)
        return parsed.timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):  # as it likes
        return None
