"""The decision on a handshake: `$connect` and what its answer means.

The authorizer was asked before, see `authorizer`.
"""

import logging
from collections.abc import Sequence

from backends import BackendError, ConnectionRefused, Handshake, Observer, Outcome
from backends.apigateway.answers import (
    SERVER_ERROR,
    Answer,
    BadAnswer,
    error_frame,
    read_answer,
)
from backends.apigateway.events import Caller, FunctionEvents
from backends.apigateway.functions import InvokeTimeouts
from backends.events import Event
from backends.http.attempts import Attempts
from backends.http.decisions import CONTROLS, MAX_REFUSAL_BODY, REFUSAL_HEADERS
from backends.target import Target

logger = logging.getLogger(__name__)

JSON = {"content-type": "application/json"}
MAX_REFUSAL_HEADERS = 8 * 1024  # bytes of their values; clients reject larger ones
NOT_MODIFIED = 304  # has no body (RFC 9110, section 15.4.5)
SUBPROTOCOL = "sec-websocket-protocol"


class Decisions:
    """Invokes `$connect` at `target` for each handshake; None: all are accepted."""

    def __init__(
        self,
        target: Target | None,
        events: FunctionEvents,
        attempts: Attempts,
        timeouts: InvokeTimeouts,
        observer: Observer,
    ) -> None:
        self._target = target
        self._events = events
        self._attempts = attempts
        self._terms = attempts.terms(*timeouts)
        self._observer = observer

    async def ask(
        self, connection_id: str, caller: Caller, handshake: Handshake
    ) -> str | None:
        """Return the subprotocol that the function chose, or None.

        Raises `ConnectionRefused`, with 502 if the function has failed.
        """
        target = self._target
        if target is None:
            return None
        event = self._events.connect(connection_id, caller, handshake)
        outcome: Outcome = "failed"
        try:
            response = await self._attempts.make(
                "connect", connection_id, target, event, self._terms
            )
            answer = read_answer(response)
            if not answer.accepts:
                refusal = refusal_of(answer)
                outcome = "refused"
                raise refusal
            subprotocol = subprotocol_of(answer, handshake.subprotocols)
            outcome = "delivered"
            return subprotocol
        except (BackendError, BadAnswer) as error:
            logger.warning(
                "connection %s has no decision: POST %s: %s", connection_id, target,
                error, extra={"connection_id": connection_id},
            )
            raise error_refusal(502, SERVER_ERROR, connection_id, event) from error
        finally:
            self._observer.ended("connect", connection_id, outcome)


def subprotocol_of(answer: Answer, offered: Sequence[str]) -> str | None:
    """Return the subprotocol that `$connect` chose, or None. Raises `BadAnswer`."""
    chosen = answer.headers.get(SUBPROTOCOL, "").strip()
    if chosen and chosen not in offered:
        raise BadAnswer("the function chose a subprotocol that was not offered")
    return chosen or None


def refusal_of(answer: Answer) -> ConnectionRefused:
    """Return the refusal that passes the function's status on. Raises `BadAnswer`."""
    if not 300 <= answer.status <= 599:
        raise BadAnswer("the function returned a statusCode that is none of HTTP")
    body = answer.body.encode() if isinstance(answer.body, str) else answer.body
    if answer.status == NOT_MODIFIED:
        body = b""
    headers = dict(JSON) if body else {}
    headers |= {
        name: header_value(answer.headers[name])
        for name in (*REFUSAL_HEADERS, "location")
        if name in answer.headers
    }
    if sum(map(len, headers.values())) > MAX_REFUSAL_HEADERS:
        raise BadAnswer(
            f"the function returned headers of more than {MAX_REFUSAL_HEADERS} bytes"
        )
    return ConnectionRefused(answer.status, headers, body[:MAX_REFUSAL_BODY])


def header_value(value: str) -> str:
    """Return a value that a header may have (RFC 9110, section 5.5)."""
    value = CONTROLS.sub(" ", value).strip()
    return value.encode("latin-1", "replace").decode("latin-1")


def error_refusal(
    status: int, message: str, connection_id: str, event: Event
) -> ConnectionRefused:
    """Return a refusal in API Gateway's words."""
    return ConnectionRefused(
        status, JSON, error_frame(message, connection_id, event).encode()
    )
