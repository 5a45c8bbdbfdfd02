"""What the answer of `$connect` means for the handshake."""

import logging
from collections.abc import Sequence

from backends import ConnectionRefused
from backends.apigateway.answers import Answer, BadAnswer, error_frame
from backends.events import Event
from backends.http.decisions import CONTROLS, MAX_REFUSAL_BODY, REFUSAL_HEADERS

logger = logging.getLogger(__name__)

JSON = {"content-type": "application/json"}
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
    headers = dict(JSON) if body else {}
    headers |= {
        # RFC 9110, section 5.5: control characters are replaced with spaces.
        name: CONTROLS.sub(" ", answer.headers[name]).strip()
        for name in (*REFUSAL_HEADERS, "location")
        if name in answer.headers
    }
    return ConnectionRefused(answer.status, headers, body[:MAX_REFUSAL_BODY])


def error_refusal(
    status: int, message: str, connection_id: str, event: Event
) -> ConnectionRefused:
    """Return a refusal in API Gateway's words."""
    return ConnectionRefused(
        status, JSON, error_frame(message, connection_id, event).encode()
    )
