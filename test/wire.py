"""A client's handshakes and frames as bytes, valid and invalid ones."""

import zlib

from tornado.util import _websocket_mask as unmask

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
MASK = b"\x37\xfa\x21\x3d"  # the example of RFC 6455, section 5.7
DEFLATE = ("Sec-WebSocket-Extensions: permessage-deflate",)

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def handshake(
    *more: str,
    without: str = "",
    line: str = "GET /ws HTTP/1.1",
    end: bytes = b"\r\n",
) -> bytes:
    """Make a handshake request, `without` the header of that name, with `more`."""
    headers = [
        "Host: relay.example",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY}",
    ]
    kept = [h for h in headers if h.partition(":")[0] != without]
    return end.join(part.encode("latin-1") for part in (line, *kept, *more, "", ""))


def frame(
    opcode: int,
    payload: bytes = b"",
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = MASK,
    length_size: int | None = None,
    length: int | None = None,
) -> bytes:
    """Make one frame. `rsv` are its reserved bits, 4 for RSV1.

    `length_size` is the number of extended length bytes, 0, 2 or 8, by default the
    least. `length` is a false length.
    """
    length = len(payload) if length is None else length
    if length_size is None:
        length_size = 0 if length < 126 else 2 if length < 2**16 else 8
    short = {0: length, 2: 126, 8: 127}[length_size]
    head = bytes((fin << 7 | rsv << 4 | opcode, (mask is not None) << 7 | short))
    head += length.to_bytes(length_size) if length_size else b""
    if mask is None:
        return head + payload
    return head + mask + unmask(mask, payload)


def deflated(message: bytes) -> bytes:
    """Return a compressed message's payload (RFC 7692, section 7.2.1)."""
    deflater = zlib.compressobj(9, wbits=-15)
    return (deflater.compress(message) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def bomb(size: int) -> bytes:
    """Make a compressed message of `size` zeros, a multiple of 64 KiB."""
    deflater = zlib.compressobj(9, wbits=-15)
    block = deflater.compress(bytes(65536)) + deflater.flush(zlib.Z_FULL_FLUSH)
    return (block * (size // 65536))[:-4]
