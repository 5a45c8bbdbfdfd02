"""Makes single attempts to deliver connect and disconnect events.

`decisions` and `disconnects` use it; `delivery` has the attempts of messages.
"""

import asyncio

from backends import Attempt, BackendError, EventName, Observer
from backends.breaker import Breaker
from backends.client import Client, Exchange, NoConnection, Response, Terms
from backends.client.response import Keep
from backends.events import Event
from backends.http.request import RequestWriter
from backends.http.retries import BY_STATUS, AnswerRules, unreachable_cause
from backends.target import Target


class Attempts:
    """Makes attempts, and reports each to the breaker and the observer."""

    def __init__(
        self,
        client: Client,
        requests: RequestWriter,
        breaker: Breaker,
        observer: Observer,
        rules: AnswerRules = BY_STATUS,
        keep: Keep | None = None,
    ) -> None:
        """`rules` say what a response means; `keep` what they need of its body."""
        self.rules = rules
        self.requests = requests
        self.breaker = breaker
        self.observer = observer
        self.loop = client.loop
        self._keep = keep
        self._client = client

    def terms(
        self,
        timeout: float,
        queue_timeout: float | None = None,
        keep: Keep | None = None,
    ) -> Terms:
        """Return the terms of attempts, see `Terms`; by default `rules` need `keep`."""
        return Terms(timeout, queue_timeout, keep or self._keep)

    async def make(
        self,
        name: EventName,
        connection_id: str,
        target: Target,
        event: Event,
        terms: Terms,
        number: int = 1,
    ) -> Response:
        """Post `event`, attempt `number`, and wait for the response.

        Raises `BackendError` if there is none.
        """
        attempt = SingleAttempt(self, name, connection_id, target, event, terms, number)
        self._client.send(attempt)
        try:
            return await attempt.response
        except asyncio.CancelledError:
            if attempt.response.cancelled():
                attempt.abandon()
                self.breaker.record_nothing()
            raise


class SingleAttempt(Exchange):
    """One attempt: reports how it has ended, and keeps the response."""

    __slots__ = (
        "_attempts",
        "_began",
        "_connection_id",
        "_event",
        "_name",
        "_number",
        "response",
    )

    def __init__(
        self,
        attempts: Attempts,
        name: EventName,
        connection_id: str,
        target: Target,
        event: Event,
        terms: Terms,
        number: int,
    ) -> None:
        super().__init__(target, terms)
        self._attempts = attempts
        self._name: EventName = name
        self._connection_id = connection_id
        self._event = event
        self._number = number
        self._began = attempts.loop.time()
        # Fails with `BackendError` if there is none.
        self.response: asyncio.Future[Response] = attempts.loop.create_future()

    def write(self) -> bytes:
        """Return the whole request."""
        return self._attempts.requests.write(self.target, self._event)

    def on_done(self, outcome: Response | BackendError) -> None:
        """There is a response, or there will be none."""
        if self.response.done():
            return  # cancelled, which `Attempts.make` handles in a later turn
        status = None
        if isinstance(outcome, BackendError):
            self.response.set_exception(outcome)
            self.response.exception()  # whoever waited may be cancelled before it runs
        else:
            status = outcome.status
            self.response.set_result(outcome)
        attempts, event, url = self._attempts, self._event, self.target.url
        if isinstance(outcome, NoConnection):
            attempts.breaker.record_nothing()
            return
        became = attempts.rules.outcome_of(outcome)
        attempts.breaker.record(
            self._connection_id, unreachable_cause(became, url, outcome)
        )
        attempts.observer.attempted(
            Attempt(
                self._name,
                self._connection_id,
                event.id,
                event.traceparent,
                became,
                status,
                attempts.loop.time() - self._began,
                url,
                event.trace,
                self._number,
            )
        )
