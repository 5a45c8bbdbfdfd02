"""Answers a client's handshake with 101, and hands over the socket (RFC 6455, 4.2.2).

`handlers.clients.handshake` decides whether a client may connect.
"""

import base64
import hashlib
from typing import Any

from tornado.web import RequestHandler

from handlers.http.sockets import TakenSocket
from handlers.websocket.deflate import Compression, accept_offer
from handlers.websocket.negotiation import extensions

ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


def upgrade(handler: RequestHandler, subprotocol: str | None) -> TakenSocket | None:
    """Answer a handshake with 101, and return the socket of the new WebSocket.

    None: the client has disconnected.
    """
    key = handler.request.headers["Sec-WebSocket-Key"].encode()
    accept = base64.b64encode(hashlib.sha1(key + ACCEPT_GUID).digest()).decode()
    if subprotocol is not None:
        handler.set_header("Sec-WebSocket-Protocol", subprotocol)
    handler.clear_header("Content-Type")
    handler.set_status(101)
    handler.set_header("Upgrade", "websocket")
    handler.set_header("Connection", "Upgrade")
    handler.set_header("Sec-WebSocket-Accept", accept)
    handler.finish()
    connection: Any = handler.request.connection
    taken: TakenSocket | None = connection.take_socket()
    return taken


def negotiate_compression(
    handler: RequestHandler, compression: Compression | None
) -> Compression | None:
    """Accept permessage-deflate if the client offers it and `compression` is set.

    Sets the header of the answer. Returns the settings of this connection, or None
    for no compression.
    """
    if compression is None:
        return None
    offered = handler.request.headers.get_list("Sec-WebSocket-Extensions")
    accepted = accept_offer(extensions(offered), compression)
    if accepted is None:
        return None
    handler.set_header("Sec-WebSocket-Extensions", accepted.header)
    return accepted.compression
