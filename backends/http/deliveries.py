"""The objects that the `Delivery` of every connection shares: client, breaker, limits.

`HTTPBackend` makes one `Deliveries`, and passes it to each `Delivery`.
"""

import asyncio
from dataclasses import dataclass

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Connection, Observer
from backends.breaker import Breaker
from backends.client import Client, Terms
from backends.events import Event
from backends.http.held import Held, OverdueLine, Request
from backends.http.reply_turns import MessageReplies
from backends.http.request import RequestWriter
from backends.http.retries import BY_STATUS, AnswerRules
from backends.target import Target

define("messageuri", type=str, group=__name__, metavar="URL",
       help="URL to which each client message is POSTed; required without --batchuri")
define("order_wait", default=1.0, group=__name__, metavar="SECONDS",
       help="longest time that the next message waits for the answer to the one "
            "before; inf: no limit, requires --backend_timeout")
define("max_unanswered", default=16, group=__name__, metavar="COUNT",
       help="most unanswered message requests per connection")
define("backend_timeout", default=0.0, group=__name__, metavar="SECONDS",
       help="longest wait for the answer to a message; 0: no limit, for backends that "
            "hold answers")
define("delivery_timeout", default=60.0, group=__name__, metavar="SECONDS",
       help="how long a message is retried after its first failure, or waits for a "
            "backend without a sign of life; then its client is closed with 1013")

IMPATIENT_ORDER_WAIT = 0.1  # seconds, for a backend that is known to hold responses


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    """How long a delivery waits, in seconds, and for how many responses.

    An infinite `order_wait` sends strictly one message at a time. With
    `backend_timeout` None, a response may take as long as the connection to the backend
    lives. While the overdue messages of all connections take `max_held_bytes`, a
    connection that has one waits as if it had `max_unanswered`. A message is retried
    `retries` times, then it has failed and the next ones are sent; None: it is retried
    until `delivery_timeout`, and its connection is then closed. A held request
    outlives its connection by `held_after_disconnect` seconds.
    """

    order_wait: float = 1.0
    max_unanswered: int = 16
    backend_timeout: float | None = None
    delivery_timeout: float = 60.0
    max_held_bytes: int = 256 * 1024 * 1024
    retries: int | None = None
    held_after_disconnect: float = 5.0

    @property
    def room_timeout(self) -> float:
        """Seconds after which messages are given up if too many are unanswered."""
        if self.retries is None:
            return self.delivery_timeout
        # Each ends by itself before, and makes room.
        return max(self.delivery_timeout, (self.backend_timeout or 0.0) + 1.0)


class Deliveries:
    """The target, client, breaker, limits and observer of each `Delivery`."""

    def __init__(
        self,
        client: Client,
        requests: RequestWriter,
        breaker: Breaker,
        target: Target,
        limits: DeliveryLimits,
        observer: Observer,
        replies: MessageReplies | None = None,
        rules: AnswerRules = BY_STATUS,
    ) -> None:
        """Without `replies`, nothing is read of a response but its status.

        `rules` say what a response, or its absence, means for its message.
        """
        self.loop = client.loop
        self.observer = observer
        self.client = client
        self.requests = requests
        self.breaker = breaker
        self.target = target
        self.limits = limits
        self.replies = replies
        self.outcome_of, self.why_failed = rules
        keep = None if replies is None else replies.of_message
        self.terms = Terms(limits.backend_timeout, limits.delivery_timeout, keep)
        self.closing = False  # the relay stops: nothing is retried
        self.held = Held(limits.max_held_bytes, self.loop)
        # There are only two waits; each line has its requests in the order sent.
        self._lines = {
            wait: OverdueLine(wait, self.loop)
            for wait in (limits.order_wait, IMPATIENT_ORDER_WAIT)
        }
        client.on_starved = self.held.abandon_one

    def on_failed(
        self, connection: Connection, event: Event
    ) -> "asyncio.Future[None] | None":
        """A message of `connection` was retried `retries` times, and has failed.

        With a returned future, the next message waits until that is done.
        """
        return None

    def line(self, wait: float) -> OverdueLine:
        """Return the requests that become overdue after `wait` seconds."""
        return self._lines[wait]

    def mark_expendable(self, request: Request) -> None:
        """Permit an overdue request to be abandoned."""
        self.held.mark_expendable(request)
        if self.client.starved:
            self.held.abandon_one()


def delivery_limits() -> DeliveryLimits:
    """Read the limits from the options. Raises `OptionError` if they conflict."""
    if options.order_wait == float("inf") and not options.backend_timeout:
        raise OptionError("--order_wait=inf needs --backend_timeout")
    return DeliveryLimits(
        options.order_wait,
        options.max_unanswered,
        options.backend_timeout or None,
        options.delivery_timeout,
        options.max_queued_bytes,
    )
