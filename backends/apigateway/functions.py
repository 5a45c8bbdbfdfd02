"""Invokes functions: the HTTP client, and the deliveries of messages.

As on AWS an invocation is not repeated, unless `--function_retries` says so; and an
emulator that dies of two invocations at once gets one at a time.
"""

import asyncio
from collections.abc import Collection, Iterable
from typing import NamedTuple

from tornado.options import options

from backends import Connection, Hold, Observer
from backends.apigateway.answers import SERVER_ERROR, Answers, error_frame
from backends.breaker import Breaker, BreakerSettings, HeldBreaker
from backends.client import Client
from backends.events import Event
from backends.http.deliveries import DeliveryLimits
from backends.http.delivery import SingleDeliveries
from backends.http.held import Request
from backends.http.request import RequestWriter
from backends.target import Target

# The path of the runtime interface emulator, which has one function.
EMULATOR_PATH = "/functions/function/invocations"
# Seconds. Lambda's longest invocation; until then an emulator may still be busy with
# one that nobody waits for.
LONGEST_INVOCATION = 900.0
# Seconds. Servers close idle connections after some seconds, and a request that was
# lost with one may have been carried out, so it is not sent again.
IDLE_TIMEOUT = 1.0
# Of a breaker: a share of failed attempts that is never reached.
NEVER_OPEN = BreakerSettings(share=2.0)


class InvokeTimeouts(NamedTuple):
    """How long to wait, in seconds: for an answer, from sending, and before that."""

    answer: float
    queue: float


class FunctionClient(Client):
    """A client that sends no request twice.

    `concurrency` is the most invocations at once for each origin; None: 1 for the
    origins in `emulators`, no limit for others.
    """

    idle_timeout = IDLE_TIMEOUT
    queue_may_move = False
    resends = False

    concurrency: int | None = None
    emulators: Collection[tuple[str, str, int]] = ()

    def connections_to(self, target: Target) -> float:
        """Return the most invocations at once."""
        if self.concurrency is not None:
            return self.concurrency
        return 1 if target.origin in self.emulators else float("inf")

    def lingering_at(self, target: Target) -> float:
        """Keep a connection until its function has ended, if the next one must wait."""
        return LONGEST_INVOCATION if self.connections_to(target) < float("inf") else 0.0


def make_no_breaker(hold: Hold | None) -> Breaker:
    """Make a breaker that never opens: API Gateway has none."""
    return Breaker(NEVER_OPEN) if hold is None else HeldBreaker(NEVER_OPEN, hold)


class FunctionDeliveries(SingleDeliveries):
    """The deliveries of connections whose messages invoke functions.

    No invocation is abandoned: each ends within `limits.backend_timeout`.
    """

    def __init__(
        self,
        client: FunctionClient,
        requests: RequestWriter,
        breaker: Breaker,
        target: Target,
        limits: DeliveryLimits,
        observer: Observer,
        answers: Answers,
    ) -> None:
        super().__init__(
            client,
            requests,
            breaker,
            target,
            limits,
            observer,
            answers,
            answers.rules,
        )
        self.answers = answers

    def mark_expendable(self, request: Request) -> None:
        """Do nothing."""

    def on_failed(
        self, connection: Connection, event: Event
    ) -> "asyncio.Future[None] | None":
        """Tell the client that its message has failed; the connection stays."""
        frame = error_frame(SERVER_ERROR, connection.id, event)
        return self.answers.send(connection, frame)


def make_function_client(targets: Iterable[Target]) -> FunctionClient:
    """Make the client for the functions at `targets`, from the options."""
    client = FunctionClient(
        options.max_backend_connections,
        options.backend_connect_timeout,
        options.backend_dead_after,
        options.backend_connection_age or float("inf"),
    )
    client.concurrency = options.function_concurrency
    client.emulators = {
        target.origin
        for target in targets
        if target.path.partition("?")[0].endswith(EMULATOR_PATH)
    }
    return client


def invoke_timeouts() -> InvokeTimeouts:
    """Read them from the options."""
    return InvokeTimeouts(options.function_timeout, options.delivery_timeout)


def function_limits() -> DeliveryLimits:
    """Read the limits of messages from the options."""
    return DeliveryLimits(
        options.order_wait,
        options.max_unanswered,
        options.function_timeout,
        options.delivery_timeout,
        options.max_queued_bytes,
        options.function_retries,
        options.function_timeout,
    )
