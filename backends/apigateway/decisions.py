"""What the answer of `$connect` means for the handshake."""

import logging
from collections.abc import Sequence

from backends import ConnectionRefused
from backends.apigateway.answers import Answer, BadAnswer, error_frame
from backends.events import Event
from backends.http.decisions import CONTROLS, MAX_REFUSAL_BODY, REFUSAL_HEADERS

logger = logging.getLogger(__name__)

JSON = {"content-type": "application/json"}
NOT_MODIFIED = 304  # has no body (RFC 9110, section 15.4.5)
SUBPROTOCOL = "sec-websocket-protocol"


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
