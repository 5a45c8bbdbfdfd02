"""The answer to a client's handshake (RFC 6455, section 4.2.2).

`handlers.clients.opening` decides whether a client may connect.
"""

import binascii
import hashlib
from collections.abc import Sequence

from handlers.websocket.deflate import Accepted, Compression, accept_offer
from handlers.websocket.negotiation import check_token, extensions

ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


def switching_fields(
    key: str, subprotocol: str | None, accepted: Accepted | None
) -> list[tuple[str, str]]:
    """Return the headers of a 101, for the Sec-WebSocket-Key of a handshake.

    Raises `ValueError` for a subprotocol that is no token.
    """
    fields = []
    if accepted is not None:
        fields.append(("Sec-WebSocket-Extensions", accepted.header))
    if subprotocol is not None:
        check_token(subprotocol)
        fields.append(("Sec-WebSocket-Protocol", subprotocol))
    digest = hashlib.sha1(key.encode() + ACCEPT_GUID).digest()
    fields += [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", binascii.b2a_base64(digest, newline=False).decode()),
    ]
    return fields


def negotiate_compression(
    offered: Sequence[str], compression: Compression | None
) -> Accepted | None:
    """Accept permessage-deflate if `compression` is set, and the client offers it.

    `offered` are its Sec-WebSocket-Extensions headers.
    """
    if compression is None or not offered:
        return None
    return accept_offer(extensions(offered), compression)
