"""The order of one connection's messages, and held answers.

A message is posted when the one before it has been answered, or is *overdue*:
sent whole and unanswered for a while, since real backends hold an answer until
the session ends and reply by callback meanwhile. An overdue request stays open
and its answer still counts, within `max_unanswered`.
"""

import asyncio
import heapq
import logging
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count

from backends import BackendError, Connection
from backends.http.client import Answer, Client, Exchange, Target

logger = logging.getLogger(__name__)

IMPATIENT_ORDER_WAIT = 0.1  # seconds, once a backend is known to hold answers
HELD_AFTER_DISCONNECT = 5.0  # seconds that a held request outlives its connection

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


def is_failure(status: int) -> bool:
    """Whether the backend may take the event another time; else it is refused."""
    return status >= 500 or status in RETRYABLE


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a delivery waits, in seconds, and how many answers it awaits.

    `order_wait` is infinite for strictly one at a time. `backend_timeout` None
    waits for an answer as long as the connection to the backend lives.
    """

    order_wait: float = 1.0
    max_unanswered: int = 16
    backend_timeout: float | None = None
    delivery_timeout: float = 60.0


class Deliveries:
    """What the deliveries of all connections share: client, clock and bounds."""

    def __init__(self, client: Client, target: Target, patience: Patience) -> None:
        self.client = client
        self.target = target
        self.patience = patience
        self.closing = False
        self._numbers = count()
        # Two limits only, so that each line of waiting requests keeps its order.
        self._lines = {
            wait: OverdueLine(wait)
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
        "_called_back_at",
        "_connection",
        "_deliveries",
        "_open",
        "_order_wait",
        "_stuck",
        "_stuck_timer",
        "number",
        "refused",
    )

    def __init__(self, deliveries: Deliveries, connection: Connection) -> None:
        self._deliveries = deliveries
        self._connection = connection
        self._order_wait = deliveries.patience.order_wait
        self._open: dict[_Request, None] = {}  # in the order sent
        self._answered = 0  # the highest number that was answered
        self._called_back_at = float("-inf")
        # A message that waits for one of too many unanswered requests to end.
        self._stuck: _Request | None = None
        self._stuck_timer: asyncio.TimerHandle | None = None
        self.number = 0  # of the latest message, from 1
        self.refused = 0

    def post(self, data: bytes) -> "asyncio.Future[None]":
        """Send the next message's request.

        The future is done when the one after it may be sent, or fails with
        `BackendError` where this one can't be delivered.
        """
        request = _Request(self, self.number, data)
        if len(self._open) < self._deliveries.patience.max_unanswered or (
            self._let_oldest_go()
        ):
            self._send(request)
        else:
            self._wait_in_vain(request)
        return request.released

    def called_back(self) -> None:
        """The backend called back to this connection: a sign of life."""
        self._called_back_at = asyncio.get_running_loop().time()
        if self._open:
            for request in self._open:
                if request.overdue:
                    self._order_wait = IMPATIENT_ORDER_WAIT
            self._on_sign_of_life()

    def end(self) -> None:
        """Let go of every request that is still held."""
        for request in list(self._open):
            self.let_go(request)

    def let_go(self, request: "_Request") -> None:
        """Close a request's connection: never retried, and not a failure."""
        self._forget(request)
        assert request.exchange is not None
        request.exchange.let_go()
        if not request.released.done():
            request.released.set_result(None)
        self._unstick()

    def _send(self, request: "_Request") -> None:
        deliveries = self._deliveries
        self._open[request] = None
        request.is_open = True
        request.exchange = deliveries.client.post(
            deliveries.target,
            request.data,
            on_done=request.on_done,
            on_sent=request.on_sent,
            timeout=deliveries.patience.backend_timeout,
        )
        request.data = b""

    def on_sent(self, request: "_Request") -> None:
        """The kernel has the whole request: its time runs."""
        request.sent_at = asyncio.get_running_loop().time()
        self._deliveries.line(self._order_wait).add(request)

    def on_overdue(self, request: "_Request") -> None:
        """No answer in time: the next message may go."""
        request.overdue = True
        if self._called_back_at >= request.sent_at:
            self._order_wait = IMPATIENT_ORDER_WAIT
        self._on_sign_of_life()
        if not request.released.done():
            request.released.set_result(None)

    def on_done(self, request: "_Request", outcome: Answer | BackendError) -> None:
        """An answer came, or none will."""
        self._forget(request)
        if isinstance(outcome, Answer) and is_failure(outcome.status):
            outcome = BackendError(
                f"POST {self._deliveries.target}: answered {outcome.status}"
            )
        if isinstance(outcome, BackendError):
            self._on_failed(request, outcome)
        else:
            if not is_success(outcome.status):
                self.refused += 1
                logger.warning(
                    "connection %s: message %d was refused by the backend with %d",
                    self._connection.id,
                    request.number,
                    outcome.status,
                )
            if request.number > self._answered:
                self._answered = request.number
                self._on_sign_of_life()
            if not request.released.done():
                request.released.set_result(None)
        self._unstick()

    def _on_failed(self, request: "_Request", error: BackendError) -> None:
        if not request.released.done():
            request.released.set_exception(error)
        elif not self._deliveries.closing:
            # Overdue, so that later messages have gone: the client has to know.
            self._connection.give_up(error)

    def _forget(self, request: "_Request") -> None:
        request.is_open = False
        self._open.pop(request, None)
        if request.line is not None:
            request.line.discard(request)

    def _on_sign_of_life(self) -> None:
        for request in self._open:
            if not request.expendable and self._is_expendable(request):
                request.expendable = True
                self._deliveries.on_expendable(request)
                if not request.is_open:
                    break  # it was let go at once, and _open has changed
        self._unstick()

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

    def _wait_in_vain(self, request: "_Request") -> None:
        oldest = next(iter(self._open))
        deadline = oldest.sent_at + self._deliveries.patience.delivery_timeout
        self._stuck = request
        self._stuck_timer = asyncio.get_running_loop().call_at(
            deadline, self._on_stuck_for_too_long
        )

    def _unstick(self) -> None:
        """Send the message that waits for room, if there is some now."""
        if self._stuck is None:
            return
        if len(self._open) < self._deliveries.patience.max_unanswered:
            request, self._stuck = self._stuck, None
            assert self._stuck_timer is not None
            self._stuck_timer.cancel()
            self._send(request)
        else:
            self._let_oldest_go()  # which comes back here

    def _on_stuck_for_too_long(self) -> None:
        request, self._stuck = self._stuck, None
        if request is not None:
            request.released.set_exception(
                BackendError(
                    f"POST {self._deliveries.target}: too many requests are unanswered"
                )
            )


class _Request:
    """One message's request, from before it is sent until it is over."""

    __slots__ = (
        "data",
        "delivery",
        "exchange",
        "expendable",
        "is_open",
        "line",
        "number",
        "overdue",
        "released",
        "sent_at",
    )

    def __init__(self, delivery: Delivery, number: int, data: bytes) -> None:
        self.delivery = delivery
        self.number = number
        self.data = data
        self.exchange: Exchange | None = None
        self.released: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )
        self.sent_at = float("inf")  # on the loop's clock
        self.is_open = False
        self.overdue = False
        self.expendable = False
        self.line: OverdueLine | None = None

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

    def __init__(self, wait: float) -> None:
        self._wait = wait
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
        self._timer = asyncio.get_running_loop().call_at(
            first.sent_at + self._wait, self._tick
        )

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._requests:
            request = next(iter(self._requests))
            if request.sent_at + self._wait > now:
                self._arm(request)
                return
            self.discard(request)
            request.on_overdue()


