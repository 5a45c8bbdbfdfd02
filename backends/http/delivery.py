"""The order of one connection's messages: retries, and held answers.

A message is posted when the one before it has been answered, or is *overdue*:
sent whole and unanswered for a while, since real backends hold an answer until
the session ends and reply by callback meanwhile. An overdue request stays open
and its answer still counts, within `max_unanswered`. One that fails goes again
before anything else, until `delivery_timeout`.
"""

import asyncio
import heapq
import logging
import random
import time
from bisect import insort
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from itertools import count

from backends import (
    Attempt,
    AttemptOutcome,
    BackendAway,
    BackendError,
    Connection,
    Observer,
)
from backends.http.breaker import Breaker
from backends.http.client import Answer, Client, Exchange, Target
from backends.http.event import Event, EventWriter

logger = logging.getLogger(__name__)

IMPATIENT_ORDER_WAIT = 0.1  # seconds, once a backend is known to hold answers
MIN_BACKOFF = 0.2  # seconds before the first retry, at most
MAX_BACKOFF = 5.0  # seconds between two retries, at most
HELD_AFTER_DISCONNECT = 5.0  # seconds that a held request outlives its connection

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


def is_success(status: int) -> bool:
    """Whether the backend took the event."""
    return 200 <= status < 300


def is_away(outcome: Answer | BackendError) -> bool:
    """Whether an attempt's outcome says that the backend is not there."""
    if isinstance(outcome, Answer):
        return outcome.status in GATEWAY_FAILURES
    return isinstance(outcome, BackendAway)


def attempt_outcome(outcome: Answer | BackendError) -> AttemptOutcome:
    """What became of an attempt, for those who count."""
    if is_away(outcome):
        return "away"
    if isinstance(outcome, BackendError):
        return "timeout"
    if is_success(outcome.status):
        return "delivered"
    return "error" if is_failure(outcome.status) else "refused"


def is_failure(status: int) -> bool:
    """Whether the backend may take the event another time; else it is refused."""
    return status >= 500 or status in RETRYABLE


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
        self.url = str(target)
        self.patience = patience
        self.closing = False
        self.held = self.held_bytes = 0  # of overdue messages, in case that they fail
        self._numbers = count()
        # Two limits only, so that each line of waiting requests keeps its order.
        self._lines = {
            wait: OverdueLine(wait, self.loop)
            for wait in (patience.order_wait, IMPATIENT_ORDER_WAIT)
        }
        # Overdue requests that may be let go, oldest first; some have ended since.
        self._expendable: list[tuple[float, int, _Request]] = []
        client.on_starved = self.let_one_go

    def line(self, wait: float) -> "OverdueLine":
        """The requests that become overdue after `wait` seconds."""
        return self._lines[wait]

    def on_expendable(self, request: "_Request") -> None:
        """An overdue request's backend has shown a sign of life since."""
        heapq.heappush(
            self._expendable, (request.sent_at, next(self._numbers), request)
        )
        if self.client.starved:
            self.let_one_go()

    def let_one_go(self) -> None:
        """Let go the oldest overdue request of any connection, if there is one."""
        while self._expendable:
            _, _, request = heapq.heappop(self._expendable)
            if request.is_open:
                request.delivery.let_go(request)
                return


class Delivery:
    """One connection's messages on their way to the backend."""

    __slots__ = (
        "_answered",
        "_backlog",
        "_called_back_at",
        "_changed",
        "_connection",
        "_deliveries",
        "_gate",
        "_not_before",
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
        self._backlog: list[_Request] = []
        # The latest request sent, while it holds back the next.
        self._gate: _Request | None = None
        self._open: dict[_Request, None] = {}  # sent and unanswered
        self._answered = 0  # the highest number that was answered
        self._called_back_at = float("-inf")
        self._not_before = float("-inf")  # when the backlog may go again
        self._timer: asyncio.TimerHandle | None = None
        # Done when nothing waits to be sent, nor holds back the next.
        self._quiet: asyncio.Future[None] | None = None
        # Done when a request has failed or the last one has ended.
        self._changed: asyncio.Future[None] | None = None
        self.failures = 0  # of attempts, so far
        self.number = 0  # of the latest message, from 1
        self.refused = 0
        # Once the disconnect event has been written, given up messages are
        # counted here, for when it is sent again.
        self.disconnected = False
        self.undelivered = 0

    def post(self, event: Event) -> "asyncio.Future[None]":
        """Send the next message; the one after it may follow when it is done."""
        self._backlog.append(_Request(self, self.number, event))
        self._pump()
        return self.quiet()

    def quiet(self) -> "asyncio.Future[None]":
        """Done when every message has been answered, is overdue or given up."""
        if self._quiet is None:
            self._quiet = self._deliveries.loop.create_future()
            self._tell_if_quiet()
        return self._quiet or self._done()

    @property
    def holding(self) -> bool:
        """Whether requests are unanswered."""
        return bool(self._open)

    async def until_failure(self, before: int, timeout: float) -> bool:
        """Wait while requests are held; whether `failures` is above `before`.

        At most `timeout` seconds, and not after the first failure.
        """
        try:
            async with asyncio.timeout(timeout):
                while self._open and self.failures == before:
                    self._changed = self._deliveries.loop.create_future()
                    await self._changed
        except TimeoutError:
            pass
        return self.failures != before

    def called_back(self) -> None:
        """The backend called back to this connection: a sign of life."""
        self._called_back_at = self._deliveries.loop.time()
        if any(request.overdue for request in self._open):
            self._order_wait = IMPATIENT_ORDER_WAIT
        self._on_sign_of_life()
        self._pump()

    def end(self) -> None:
        """Let go of every request that is still held."""
        for request in list(self._open):
            self.let_go(request)

    def let_go(self, request: "_Request") -> None:
        """Close a request's connection: never retried, and not a failure."""
        self._forget(request)
        self._tell_of_attempt(request, "let_go", None)
        self._deliveries.observer.ended("message", self._connection.id, "let_go")
        assert request.exchange is not None
        request.exchange.let_go()
        self._pump()

    def _pump(self) -> None:
        """Send what may be sent now, and set the timer for what may not."""
        now = self._deliveries.loop.time()
        while self._backlog and self._gate is None:
            if now < self._not_before:
                self._wake_at(self._not_before)
                return
            if self._has_too_many_open():
                if not self._let_oldest_go():
                    self._wait_for_room(now)
                return  # letting one go has pumped
            if not self._deliveries.breaker.take():
                self._wait_for_breaker(now)
                break
            self._send(self._backlog.pop(0), now)
        self._tell_if_quiet()

    def _has_too_many_open(self) -> bool:
        deliveries, patience = self._deliveries, self._deliveries.patience
        return len(self._open) >= patience.max_unanswered or (
            bool(self._open) and deliveries.held_bytes >= patience.max_held_bytes
        )

    def _send(self, request: "_Request", now: float) -> None:
        deliveries = self._deliveries
        request.began_at = now
        self._gate = request
        self._open[request] = None
        request.is_open = True
        request.exchange = deliveries.client.post(
            deliveries.target,
            partial(deliveries.events.request, deliveries.target, request.event),
            on_done=request.on_done,
            on_sent=request.on_sent,
            timeout=deliveries.patience.backend_timeout,
        )

    def _tell_if_quiet(self) -> None:
        if self._quiet is None or self._backlog or self._gate is not None:
            return
        quiet, self._quiet = self._quiet, None
        if not quiet.done():
            quiet.set_result(None)

    def on_sent(self, request: "_Request") -> None:
        """The kernel has the whole request: its time runs."""
        request.sent_at = self._deliveries.loop.time()
        self._deliveries.line(self._order_wait).add(request)

    def on_overdue(self, request: "_Request") -> None:
        """No answer in time: the next message may go."""
        request.overdue = True
        self._deliveries.held += 1
        self._deliveries.held_bytes += len(request.event.body)
        if request.exchange is not None:
            request.exchange.hold()
        # Whoever took it whole and has not reset it is there.
        self._deliveries.breaker.record(self._connection.id, away=False)
        if self._called_back_at >= request.sent_at:
            self._order_wait = IMPATIENT_ORDER_WAIT
        self._open_gate(request)
        self._on_sign_of_life()
        self._pump()

    def on_done(self, request: "_Request", outcome: Answer | BackendError) -> None:
        """An answer came, or none will."""
        self._forget(request)
        self._deliveries.breaker.record(self._connection.id, is_away(outcome))
        self._tell_of_attempt(
            request,
            attempt_outcome(outcome),
            outcome.status if isinstance(outcome, Answer) else None,
        )
        if isinstance(outcome, BackendError):
            self._on_failed(request, outcome, None)
        elif is_failure(outcome.status):
            error = BackendError(
                f"POST {self._deliveries.target}: answered {outcome.status}"
            )
            self._on_failed(request, error, retry_after(outcome))
        else:
            self._on_answered(request, outcome.status)
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._pump()

    def _tell_of_attempt(
        self, request: "_Request", outcome: AttemptOutcome, status: int | None
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
                self._deliveries.url,
                event.trace,
            )
        )

    def _on_answered(self, request: "_Request", status: int) -> None:
        taken = is_success(status)
        self._deliveries.observer.ended(
            "message", self._connection.id, "delivered" if taken else "refused"
        )
        if not taken:
            self.refused += 1
            logger.warning(
                "connection %s: message %d was refused by the backend with %d",
                self._connection.id,
                request.number,
                status,
                extra={"connection_id": self._connection.id, "status": status},
            )
        if request.number > self._answered:
            self._answered = request.number
            self._on_sign_of_life()

    def _on_failed(
        self, request: "_Request", error: BackendError, wait: float | None
    ) -> None:
        """Back to the head of the queue, or given up with all behind it."""
        if self._deliveries.closing:
            return
        now = self._deliveries.loop.time()
        self.failures += 1
        request.failed(now)
        insort(self._backlog, request, key=lambda request: request.number)
        deadline = self._deadline()
        delay = max(backoff(request.attempts), wait or 0.0)
        self._not_before = min(now + delay, deadline)
        logger.log(
            logging.WARNING if request.attempts == 1 else logging.DEBUG,
            "connection %s: message %d goes again: %s",
            self._connection.id,
            request.number,
            error,
            extra={"connection_id": self._connection.id},
        )
        if now >= deadline:
            self._give_up(error)

    def _deadline(self) -> float:
        """When the message at the head is given up, on the loop's clock."""
        return (
            self._backlog[0].failed_at + self._deliveries.patience.delivery_timeout
        )

    def _give_up(self, error: BackendError) -> None:
        messages = len(self._backlog)
        for request in self._backlog:
            if request.attempts:
                self._deliveries.observer.given_up(request.event.id)
        self._backlog.clear()
        self._deliveries.breaker.leave(self._pump)
        self._not_before = float("-inf")
        if self.disconnected:
            self.undelivered += messages
            self._deliveries.observer.ended(
                "message", self._connection.id, "failed", messages
            )
        else:
            self._connection.give_up(error, messages)

    def _forget(self, request: "_Request") -> None:
        if request.is_open and request.overdue:
            self._deliveries.held -= 1
            self._deliveries.held_bytes -= len(request.event.body)
        request.is_open = False
        self._open.pop(request, None)
        self._open_gate(request)
        if request.line is not None:
            request.line.discard(request)

    def _open_gate(self, request: "_Request") -> None:
        if self._gate is request:
            self._gate = None

    def _on_sign_of_life(self) -> None:
        for request in list(self._open):
            if not request.expendable and self._is_expendable(request):
                request.expendable = True
                self._deliveries.on_expendable(request)

    def _is_expendable(self, request: "_Request") -> bool:
        return request.overdue and (
            self._called_back_at >= request.sent_at or self._answered > request.number
        )

    def _let_oldest_go(self) -> bool:
        for request in self._open:
            if self._is_expendable(request):
                self.let_go(request)
                return True
        return False

    def _wait_for_breaker(self, now: float) -> None:
        """The backend is away: that counts like an attempt of one's own."""
        head = self._backlog[0]
        head.failed_at = min(head.failed_at, now)
        deadline = self._deadline()
        if now >= deadline:
            self._give_up(
                BackendAway(f"POST {self._deliveries.target}: the backend is away")
            )
        else:
            self._deliveries.breaker.wait(self._pump)
            self._wake_at(deadline)

    def _wait_for_room(self, now: float) -> None:
        """Too many are unanswered, and the backend gives no sign of life."""
        oldest = next(iter(self._open))
        deadline = oldest.sent_at + self._deliveries.patience.delivery_timeout
        if now >= deadline:
            self._give_up(
                BackendError(
                    f"POST {self._deliveries.target}: too many are unanswered"
                )
            )
            self._tell_if_quiet()
        else:
            self._wake_at(deadline)

    def _done(self) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = self._deliveries.loop.create_future()
        future.set_result(None)
        return future

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._deliveries.loop.call_at(when, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._pump()


def backoff(attempts: int) -> float:
    """Seconds before the next attempt: exponential, with full jitter."""
    return random.uniform(0.0, min(MAX_BACKOFF, MIN_BACKOFF * 2 ** (attempts - 1)))


def retry_after(answer: Answer) -> float | None:
    """Seconds that Retry-After asks for (RFC 9110, section 10.2.3), or None."""
    value = answer.headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return max(0.0, date.timestamp() - time.time())


class _Request:
    """One message on its way, from before it is sent until it is over."""

    __slots__ = (
        "attempts",
        "began_at",
        "delivery",
        "event",
        "exchange",
        "expendable",
        "failed_at",
        "is_open",
        "line",
        "number",
        "overdue",
        "sent_at",
    )

    def __init__(self, delivery: Delivery, number: int, event: Event) -> None:
        self.delivery = delivery
        self.number = number
        self.event = event
        self.exchange: Exchange | None = None
        self.attempts = 0  # that failed
        self.failed_at = float("inf")  # the first time, on the loop's clock
        self.began_at = self.sent_at = float("inf")  # the latest attempt
        self.is_open = False
        self.overdue = False
        self.expendable = False
        self.line: OverdueLine | None = None

    def failed(self, now: float) -> None:
        """As before it was sent, but for the failure."""
        self.attempts += 1
        self.failed_at = min(self.failed_at, now)
        self.sent_at = float("inf")
        self.overdue = self.expendable = False

    def on_sent(self) -> None:
        self.delivery.on_sent(self)

    def on_overdue(self) -> None:
        self.delivery.on_overdue(self)

    def on_done(self, outcome: Answer | BackendError) -> None:
        self.delivery.on_done(self, outcome)


class OverdueLine:
    """Requests that become overdue after the same wait, so in the order sent.

    One timer serves them all: a message that is answered in time costs two
    operations on a dict.
    """

    def __init__(self, wait: float, loop: asyncio.AbstractEventLoop) -> None:
        self._wait = wait
        self._loop = loop
        self._requests: dict[_Request, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, request: _Request) -> None:
        """Call `request.on_overdue()` later, unless it is discarded."""
        if self._wait == float("inf"):
            return
        request.line = self
        self._requests[request] = None
        if self._timer is None:
            self._arm(request)

    def discard(self, request: _Request) -> None:
        """It was answered in time."""
        self._requests.pop(request, None)
        request.line = None

    def _arm(self, first: _Request) -> None:
        self._timer = self._loop.call_at(
            first.sent_at + self._wait, self._tick
        )

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._requests:
            request = next(iter(self._requests))
            if request.sent_at + self._wait > now:
                self._arm(request)
                return
            self.discard(request)
            request.on_overdue()


