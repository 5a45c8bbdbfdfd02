"""The backend's verdict on a handshake: what it was asked, and what it said."""

import re

from backends import BackendError, ConnectionRefused
from backends.client import Response
from backends.client.response import MAX_KEPT_BODY, MalformedResponse
from backends.http.attempts import Attempts
from backends.http.content import decoded, parsed_json
from backends.http.delivery import hint, is_success
from backends.http.event import Event
from backends.target import Target

MAX_REFUSAL_BODY = 4096  # bytes of a refusal's body that the client gets

# A verdict that is passed on to the client; any other is no verdict.
REFUSALS = frozenset({401, 403, 404, 429})
REFUSAL_HEADERS = ("content-type", "www-authenticate", "retry-after")
CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")


class Verdicts:
    """Asks `target` for them, with one attempt; None: nobody is asked."""

    def __init__(
        self, target: Target | None, attempts: Attempts, timeout: float
    ) -> None:
        self.target = target
        self._attempts = attempts
        self._timeout = timeout

    async def ask(self, connection_id: str, event: Event) -> str | None:
        """Return the subprotocol that the backend chose, if it did.

        Raises `ConnectionRefused` where its verdict is no, and `BackendError`
        where there is none in time.
        """
        target = self.target
        assert target is not None
        answer = await self._attempts.make(
            "connect", connection_id, target, event, self._timeout, keep=True
        )
        if answer.status in REFUSALS:
            raise verdict_of(answer)
        if not is_success(answer.status):
            raise BackendError(
                f"POST {target}: answered {answer.status}{hint(answer.status)}"
            )
        try:
            body = decoded(answer.headers, answer.body, MAX_KEPT_BODY)
        except MalformedResponse as error:
            raise BackendError(f"POST {target}: {error}") from error
        return chosen_subprotocol(body)


def verdict_of(answer: Response) -> ConnectionRefused:
    """The backend's no, with what of it the client gets.

    A body that cannot be decoded is left out: the status says enough.
    """
    try:
        body = decoded(answer.headers, answer.body, MAX_KEPT_BODY)
    except MalformedResponse:
        body = b""
    return ConnectionRefused(
        answer.status,
        {
            # As spaces (RFC 9110, section 5.5), where the backend sent some.
            name: CONTROLS.sub(" ", answer.headers[name]).strip()
            for name in REFUSAL_HEADERS
            if name in answer.headers
        },
        body[:MAX_REFUSAL_BODY],
    )


def chosen_subprotocol(body: bytes) -> str | None:
    """The `subprotocol` of a connect answer's JSON body, if there is one."""
    try:
        verdict = parsed_json(body)
    except ValueError:
        return None  # "OK", or nothing: a verdict all the same
    if not isinstance(verdict, dict) or verdict.get("subprotocol") is None:
        return None
    if not isinstance(verdict["subprotocol"], str):
        raise BackendError("the backend's subprotocol is not a string")
    return verdict["subprotocol"]
