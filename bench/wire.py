"""Makes the bytes that clients and backend send, before the measurement.

Its parsers are minimal: a peer sends one request or one response at a time on a
connection, with a Content-Length, and complete frames.
"""

import json
import random
import re
import string
import struct
from collections.abc import Iterable

# The example of RFC 6455, section 5.7. Not zero: some servers would skip unmasking.
MASK = b"\x37\xfa\x21\x3d"

TEXT, CLOSE, PING, PONG = 0x81, 0x88, 0x89, 0x8A  # final frames (section 5.2)
NUMBER_SIZE = 6  # digits at a message's end: the number of its client

TOKEN = "bench-callback-token"  # no secret: the relay runs on loopback
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


def message(size: int, number: int) -> bytes:
    """Make a message of client `number`, of `size` bytes, like encrypted JSON."""
    start, end = b'{"protected":"', b'"}%06d' % number
    letters = string.ascii_letters + string.digits
    filling = random.Random(size).choices(letters, k=size - len(start) - len(end))
    return start + "".join(filling).encode() + end


def client_frame(first: int, payload: bytes) -> bytes:
    """Make a masked frame; `first` is its first byte."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 2**16:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    mask = (MASK * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")
    return head + MASK + masked.to_bytes(size, "big")


CLOSE_NORMALLY = client_frame(CLOSE, struct.pack("!H", 1000))
EMPTY_PONG = client_frame(PONG, b"")


def frame_end(data: bytes, at: int) -> int | None:
    """Return where the frame that starts at `at` ends; None: its head is incomplete."""
    if len(data) < at + 2:
        return None
    size = data[at + 1]
    if size < 126:
        return at + 2 + size
    wide = 2 if size == 126 else 8
    if len(data) < at + 2 + wide:
        return None
    return at + 2 + wide + int.from_bytes(data[at + 2 : at + 2 + wide], "big")


def handshake(path: str) -> bytes:
    """Make a client's handshake request."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: relay.example\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def callback(host: bytes, path: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Make a callback that sends a client `body`; return its head and body."""
    head = (
        b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: %d\r\n\r\n" % (path, host, len(body))
    )
    return head, body


def bulk_callback(host: bytes, commands: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Make a callback with many commands; return its head and body."""
    body = b'{"commands": [%b]}' % b", ".join(commands)
    head = (
        b"POST /commands HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n"
        % (host, TOKEN.encode(), len(body))
    )
    return head, body


# In a batch, each event of a message: its connection, and the number of its client.
BATCHED = re.compile(
    rb'"connection_id":"([0-9a-f]+)".*?\\"}(\d{6})"}(?=[,\]])', re.DOTALL
)


def command(body: bytes, connection_id: bytes = b"") -> bytes:
    """Make the command to send `body` as text; by default to the event's client."""
    whom = {"connection_id": connection_id.decode()} if connection_id else {}
    return json.dumps({**whom, "send": body.decode()}).encode()


def reply(*commands: bytes) -> bytes:
    """Make a response with commands."""
    body = b'{"commands": [%b]}' % b", ".join(commands)
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.socketdock+json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def http_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """Return the sizes of an HTTP message's head and body; None: head incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    # The end of "Content-Length" in any case; peers send no other header that ends so.
    at = data.find(b"ength: ", 0, end)
    size = 0 if at < 0 else int(data[at + 7 : data.index(b"\r", at)])
    return end + 4, size
