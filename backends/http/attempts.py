"""Makes single attempts to deliver connect and disconnect events.

`decisions` and `disconnects` use it; `delivery` has the attempts of messages.
"""

import asyncio
from functools import partial

from backends import Attempt, BackendError, EventName, Observer
from backends.breaker import Breaker
from backends.client import Client, NoConnection, Response
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
        self._keep = keep
        self._client = client
        self._requests = requests
        self._breaker = breaker
        self._observer = observer

    async def make(
        self,
        name: EventName,
        connection_id: str,
        target: Target,
        event: Event,
        timeout: float,
        queue_timeout: float | None = None,
        keep: Keep | None = None,
        number: int = 1,
    ) -> Response:
        """Post `event`, attempt `number`, and wait `timeout` seconds for the response.

        With `queue_timeout` these begin when it is sent, see `Client.post`. `keep`
        decides how much of the response's body is kept. Raises `BackendError` if there
        is no response.
        """
        loop = self._client.loop
        began = loop.time()
        outcome: Response | BackendError
        try:
            outcome = await self._post(
                target, event, timeout, queue_timeout, keep or self._keep
            )
        except (NoConnection, asyncio.CancelledError):
            self._breaker.record_nothing()
            raise
        except BackendError as error:
            outcome = error
        became = self.rules.outcome_of(outcome)
        cause = unreachable_cause(became, target.url, outcome)
        self._breaker.record(connection_id, cause)
        answer = outcome if isinstance(outcome, Response) else None
        self._observer.attempted(
            Attempt(
                name,
                connection_id,
                event.id,
                event.traceparent,
                became,
                answer.status if answer is not None else None,
                loop.time() - began,
                target.url,
                event.trace,
                number,
            )
        )
        if isinstance(outcome, BackendError):
            raise outcome
        return outcome

    async def _post(
        self,
        target: Target,
        event: Event,
        timeout: float,
        queue_timeout: float | None,
        keep: Keep | None,
    ) -> Response:
        done: asyncio.Future[Response] = self._client.loop.create_future()

        def on_done(outcome: Response | BackendError) -> None:
            if done.done():
                return
            if isinstance(outcome, BackendError):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)

        exchange = self._client.post(
            target,
            partial(self._requests.write, target, event),
            on_done,
            timeout=timeout,
            queue_timeout=queue_timeout,
            keep=keep,
        )
        try:
            return await done
        finally:
            if not done.done() or done.cancelled():
                exchange.abandon()
