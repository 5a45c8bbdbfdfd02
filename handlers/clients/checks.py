"""Which handshakes are rejected before anybody is asked (RFC 6455, section 4.2.1)."""

import binascii
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from handlers.clients.headers import members
from handlers.clients.origins import is_host_header
from handlers.clients.request import HandshakeRequest
from handlers.websocket.negotiation import extensions, subprotocols


class Rejection(NamedTuple):
    """The relay's own negative response to a handshake."""

    status: HTTPStatus
    detail: str
    headers: Mapping[str, str] = {}


def malformed(request: HandshakeRequest, extensible: bool) -> Rejection | None:
    """Return the response to a malformed handshake; None if it is well-formed.

    Checks the extensions only if `extensible`: if the relay accepts none, the offer
    does not matter.
    """
    if request.text("upgrade").lower() != "websocket" or (
        "upgrade" not in members(request.lines("connection"))
    ):
        return Rejection(
            HTTPStatus.UPGRADE_REQUIRED,
            "WebSocket upgrade required.",
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )
    if request.text("sec-websocket-version") != "13":
        return Rejection(
            HTTPStatus.UPGRADE_REQUIRED,
            "WebSocket version 13 required.",
            {"Sec-WebSocket-Version": "13"},
        )
    detail = _malformed_part(request, extensible)
    return None if detail is None else Rejection(HTTPStatus.BAD_REQUEST, detail)


def _malformed_part(request: HandshakeRequest, extensible: bool) -> str | None:
    if request.version != "1.1":
        return "HTTP/1.1 required."
    if not is_key(request.text("sec-websocket-key")):
        return "Sec-WebSocket-Key must be 16 bytes in base64."
    if request.has_body:
        return "A WebSocket handshake must not have a body."
    if not is_host_header(request.text("host")):
        return "Host must be a host with an optional port."
    try:
        subprotocols(request.lines("sec-websocket-protocol"))
    except ValueError:
        return "Sec-WebSocket-Protocol must be a list of tokens."
    try:
        if extensible:
            extensions(request.lines("sec-websocket-extensions"))
    except ValueError:
        return "Sec-WebSocket-Extensions must be a list of extensions."
    return None


def is_key(key: str) -> bool:
    """Whether a Sec-WebSocket-Key is 16 bytes in base64 (RFC 6455, section 4.1)."""
    try:
        return len(binascii.a2b_base64(key, strict_mode=True)) == 16
    except ValueError:
        return False
