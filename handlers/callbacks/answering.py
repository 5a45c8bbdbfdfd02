"""The base of all callback handlers: takes the body, and answers with an outcome."""

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from handlers.callbacks.actions import Outcome
from handlers.callbacks.bodies import unsupported
from handlers.callbacks.repeats import (
    HEADER,
    REPLAYED,
    REUSED,
    Answer,
    Keyed,
    KeyReused,
    Repeats,
    key_in,
)
from handlers.callbacks.responses import Response, response_of
from handlers.http.body import BodyHandler

A = TypeVar("A", bound=Answer)


class OutcomeHandler(BodyHandler):
    """A handler whose responses are those of outcomes."""

    def send_outcome(self, outcome: Outcome) -> None:
        """Finish with the response for `outcome`."""
        self.respond(response_of(outcome))

    def respond(self, response: Response) -> None:
        """Finish with `response`."""
        self.set_status(response.status)
        for name, value in response.headers.items():
            self.set_header(name, value)
        self.finish(response.body or None)  # 204 must have none

    @property
    def traceparent(self) -> str:
        """The trace to which the request belongs; empty: none."""
        found = self.request.headers.get_list("traceparent")
        return found[0] if len(found) == 1 else ""

    def take_body(self) -> bytes | None:
        """Return the whole body; None if it was rejected and answered."""
        body = super().take_body()
        if body is None:
            return None
        headers = self.request.headers
        refusal = unsupported(
            headers.get("Content-Type", ""), headers.get_list("Content-Encoding")
        )
        if refusal is not None:
            self.respond(refusal)
            return None
        return body


class RepeatableHandler(OutcomeHandler):
    """A handler of requests that may have an `Idempotency-Key`."""

    repeats: Repeats

    def take_key(self) -> str | None:
        """Return the key, empty if there is none; None if it was rejected with 400."""
        try:
            return key_in(self.request.headers.get_list(HEADER)) or ""
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return None

    async def once(
        self, request: Keyed, act: Callable[[], Coroutine[Any, Any, A]]
    ) -> A | None:
        """Call `act` for the first request with its key, and return the answer.

        None: the key was used for another request, which has been answered.
        """
        try:
            answer, is_repeat = await self.repeats.once(request, act)
        except KeyReused:
            self.send_outcome(REUSED)
            return None
        if is_repeat:
            self.set_header(*REPLAYED)
        return answer
