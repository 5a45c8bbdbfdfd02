"""RFC 6455 frames without a socket: parses bytes into messages, and builds frames.

`handlers.websocket.protocol` reads and writes the bytes. Compressed messages go
through `handlers.websocket.deflate`.
"""

import codecs
import io
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from tornado.util import _websocket_mask as unmask
from tornado.util import _websocket_mask_python

from handlers.websocket.deflate import (
    BadStream,
    Compression,
    Inflater,
    deflate_bound,
)

UNMASKS_IN_C = unmask is not _websocket_mask_python

FIN = 0x80
RSV1 = 0x40  # "per-message compressed" (RFC 7692, section 6)
RSV23 = 0x30
MASKED = 0x80
MAX_CONTROL_PAYLOAD = 125  # bytes; RFC 6455, section 5.5
MAX_CLOSE_REASON = MAX_CONTROL_PAYLOAD - 2  # behind the code
# The first byte, 126 or 127, and the payload's length (section 5.2).
HEADER_16 = struct.Struct("!BBH").pack
HEADER_64 = struct.Struct("!BBQ").pack


class Opcode(IntEnum):
    """RFC 6455, section 5.2."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


# As numbers, since reading a member of an enumeration takes long before Python 3.12.
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = map(int, Opcode)
# The first byte of a whole message that is not compressed.
WHOLE_TEXT, WHOLE_BINARY = FIN | TEXT, FIN | BINARY


class CloseCode(IntEnum):
    """The codes that the relay itself uses, by their names in IANA's registry.

    See RFC 6455, section 7.4.1, and the WebSocket Close Code Number Registry.
    """

    NORMAL_CLOSURE = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    NO_STATUS_RCVD = 1005  # never on the wire: a close frame without a code
    ABNORMAL_CLOSURE = 1006  # never on the wire: no close frame at all
    INVALID_FRAME_PAYLOAD_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    TRY_AGAIN_LATER = 1013


def is_valid_close_code(code: int) -> bool:
    """Whether a peer may send `code` (RFC 6455, section 7.4, and IANA)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def check_closing(code: int, reason: str) -> None:
    """Raise `ValueError` unless a close frame may have this code and reason."""
    if not isinstance(code, int) or not is_valid_close_code(code):
        raise ValueError(f"{code} is no close code that may be sent")
    if len(reason.encode()) > MAX_CLOSE_REASON:
        raise ValueError(f"a close reason has at most {MAX_CLOSE_REASON} bytes")


class FrameError(Exception):
    """The peer violated the protocol; `code` and `reason` go into the close frame."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Close(NamedTuple):
    """A close frame; `code` is 1005 if the frame had none."""

    code: int
    reason: str


class Ping(NamedTuple):
    """A ping frame; the pong must have the same payload."""

    payload: bytes


class Pong(NamedTuple):
    """A pong frame."""

    payload: bytes


# A text message is a str, a binary one bytes.
Received = str | bytes | Close | Ping | Pong


class Fragments:
    """The payloads of an incomplete message.

    Uncompressed text is decoded as it arrives, so that bad UTF-8 fails at once.
    """

    __slots__ = ("_payload", "_text", "_utf8", "compressed", "opcode")

    def __init__(self, opcode: int, compressed: bool) -> None:
        self.opcode = opcode
        self.compressed = compressed
        self._payload = bytearray()
        self._text: io.StringIO | None = None
        if opcode == TEXT and not compressed:
            self._text = io.StringIO()
            self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def add(self, payload: bytes, final: bool) -> None:
        """Add the next payload. Raises `FrameError` if it is not UTF-8 but must be."""
        if self._text is None:
            self._payload += payload
            return
        try:
            self._text.write(self._utf8.decode(payload, final))
        except UnicodeDecodeError:
            raise _not_utf8() from None

    def message(self) -> str | bytes:
        """Return all payloads: text, or bytes of any message that was not decoded."""
        return bytes(self._payload) if self._text is None else self._text.getvalue()


class FrameParser:
    """Parses a client's bytes into messages and control frames.

    `max_message_size` is the limit of one message in bytes, with all its fragments
    and after decompression. `inflater` is None unless permessage-deflate was
    negotiated.
    """

    __slots__ = (
        "_buffer",
        "_data",
        "_first",
        "_fragments",
        "_inflater",
        "_mask",
        "_max_frame_size",
        "_max_message_size",
        "_needed",
        "_position",
        "_remaining",
        "_size",
        "unparsed",
    )

    def __init__(self, max_message_size: int, inflater: Inflater | None = None) -> None:
        self._max_message_size = self._max_frame_size = max_message_size
        self._inflater = inflater
        self.unparsed = False  # whether `next` has bytes to parse
        self._data = b""  # these bytes, from `_position` on
        self._position = 0
        # An incomplete header, or an incomplete control frame.
        self._buffer = b""
        self._needed = 2  # length of `_buffer` at which it can be parsed
        # An incomplete data frame: its first byte, the number of payload bytes that
        # are missing, and its mask, rotated to the next of them.
        self._first = 0
        self._remaining = 0
        self._mask = b""
        self._fragments: Fragments | None = None  # None between messages
        self._size = 0  # bytes in `_fragments`

    def limit_frames(self, size: int) -> None:
        """Accept only frames of at most `size` bytes, as they are sent."""
        self._max_frame_size = min(size, self._max_message_size)

    @property
    def kept(self) -> int:
        """Bytes kept of an incomplete message or control frame."""
        return self._size + len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Received]:
        """Yield the messages and control frames that `data` completes.

        Keeps the rest. Raises `FrameError` at the first violation; do not feed more
        data after that.
        """
        self.add(data)
        while self.unparsed:
            received = self.next()
            if received is not None:
                yield received

    def add(self, data: bytes) -> None:
        """Take more bytes; only when the last ones are parsed."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        self._data = data
        self._position = 0
        self.unparsed = bool(data)

    def next(self) -> Received | None:
        """Parse the next frame; call it while there are `unparsed` bytes.

        Returns None for a frame that completes no message. So the caller can stop
        after any number of frames, even empty ones. Raises `FrameError` as `feed`.
        """
        data, start = self._data, self._position
        end = len(data)
        if self._remaining:
            position = min(self._remaining, end)
            self._go_on(position)
            return self._take_part(data[:position])
        if end - start < self._needed:
            self._keep(self._needed)
            return None
        first, second = data[start], data[start + 1]
        length = second & 0x7F
        is_whole = self._fragments is None and first in (WHOLE_TEXT, WHOLE_BINARY)
        if not is_whole or second < MASKED:
            self._check_header(first, second, length)
        position = start + 2
        if length > MAX_CONTROL_PAYLOAD:
            extended = 2 if length == 126 else 8
            if end - position < extended:
                self._keep(2 + extended)
                return None
            length = int.from_bytes(data[position : position + extended])
            _check_length(length, extended)
            position += extended
        is_control = first & 0x08
        size = length + self._size
        if size > self._max_frame_size and not is_control:
            self._check_size(first, length, size)
        wanted = 4 + length if is_control else 4
        if end - position < wanted:
            self._keep(position - start + wanted)
            return None
        mask = data[position : position + 4]
        position += 4
        self._needed = 2
        if end - position < length:
            self._first, self._remaining, self._mask = first, length, mask
            self._go_on(end)
            return self._take_part(data[position:]) if position < end else None
        payload = unmask(mask, data[position : position + length])
        self._go_on(position + length)
        if is_whole:
            return self._message(first, payload)
        return self._take(first, payload)

    def drop(self) -> None:
        """Parse nothing more of what was added."""
        self._data = b""
        self.unparsed = False

    def _go_on(self, position: int) -> None:
        """Continue at `position` of the data."""
        if position == len(self._data):
            self.drop()
        else:
            self._position = position

    def _keep(self, needed: int) -> None:
        """Keep an incomplete frame until it has `needed` bytes."""
        self._needed = needed
        self._buffer = self._data[self._position :]
        self.drop()

    def _take_part(self, part: bytes) -> Received | None:
        """Handle the received part of a data frame as if it were a fragment.

        So its bytes are stored once, and bad UTF-8 fails at once.
        """
        first, mask = self._first, self._mask
        self._remaining -= len(part)
        if self._remaining:
            turn = len(part) % 4
            self._first = CONTINUATION | first & FIN
            self._mask = mask[turn:] + mask[:turn]
            first &= ~FIN
        return self._take(first, unmask(mask, part))

    def _check_size(self, first: int, length: int, size: int) -> None:
        """Check a frame of `length` bytes, and `size`, that of its message so far.

        A compressed message may be larger than the original, if that was
        incompressible.
        """
        fragments = self._fragments
        largest_frame, largest = self._max_frame_size, self._max_message_size
        if first & RSV1 if fragments is None else fragments.compressed:
            largest_frame, largest = map(deflate_bound, (largest_frame, largest))
        if size > largest:
            raise FrameError(CloseCode.MESSAGE_TOO_BIG, "message too big")
        if length > largest_frame:
            raise FrameError(CloseCode.MESSAGE_TOO_BIG, "frame too big")

    def _check_header(self, first: int, second: int, length: int) -> None:
        opcode = first & 0x0F
        if not second & MASKED:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "frame is not masked")
        if first & RSV23:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "reserved bit set")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "unknown opcode")
            if not first & FIN:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "fragmented control frame")
            if length > MAX_CONTROL_PAYLOAD:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "control frame too long")
            if first & RSV1:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "reserved bit set")
            return
        if opcode > BINARY:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "unknown opcode")
        if first & RSV1 and (self._inflater is None or opcode == CONTINUATION):
            raise FrameError(CloseCode.PROTOCOL_ERROR, "reserved bit set")
        if (opcode == CONTINUATION) != (self._fragments is not None):
            raise FrameError(CloseCode.PROTOCOL_ERROR, "wrong continuation")

    def _take(self, first: int, payload: bytes) -> Received | None:
        opcode = first & 0x0F
        if opcode >= CLOSE:
            return _control(opcode, payload)
        final = bool(first & FIN)
        fragments = self._fragments
        if fragments is None:
            compressed = bool(first & RSV1)
            if final:
                return self._message(
                    opcode, self._inflate(payload) if compressed else payload
                )
            fragments = self._fragments = Fragments(opcode, compressed)
        self._size += len(payload)
        fragments.add(payload, final)
        if not final:
            return None
        self._fragments, self._size = None, 0
        message = fragments.message()
        if isinstance(message, str):
            return message
        return self._message(
            fragments.opcode,
            self._inflate(message) if fragments.compressed else message,
        )

    def _message(self, first: int, payload: bytes) -> str | bytes:
        """Return a message; `first` is the first byte of its frame, or its opcode."""
        if first & 0x0F == BINARY:
            return payload
        try:
            return payload.decode()
        except UnicodeDecodeError:
            raise _not_utf8() from None

    def _inflate(self, payload: bytes) -> bytes:
        """Decompress one message; produce at most one byte above the maximum."""
        assert self._inflater is not None
        try:
            message = self._inflater.inflate(payload, self._max_message_size)
        except BadStream:
            raise FrameError(
                CloseCode.INVALID_FRAME_PAYLOAD_DATA, "bad compressed data"
            ) from None
        if len(message) > self._max_message_size:
            raise FrameError(CloseCode.MESSAGE_TOO_BIG, "message too big")
        return message


def _not_utf8() -> FrameError:
    return FrameError(CloseCode.INVALID_FRAME_PAYLOAD_DATA, "text is not UTF-8")


def _check_length(length: int, extended: int) -> None:
    """Check an extended payload length.

    "the minimal number of bytes MUST be used to encode the length", and in the
    8-byte form "the most significant bit MUST be 0" (RFC 6455, section 5.2).
    """
    if length <= (MAX_CONTROL_PAYLOAD if extended == 2 else 0xFFFF):
        raise FrameError(CloseCode.PROTOCOL_ERROR, "length is not minimal")
    if length >> 63:
        raise FrameError(CloseCode.PROTOCOL_ERROR, "length has its top bit set")


def _control(opcode: int, payload: bytes) -> Close | Ping | Pong:
    if opcode == PING:
        return Ping(payload)
    if opcode == PONG:
        return Pong(payload)
    if not payload:
        return Close(CloseCode.NO_STATUS_RCVD, "")
    if len(payload) == 1:
        raise FrameError(CloseCode.PROTOCOL_ERROR, "close code of one byte")
    code = int.from_bytes(payload[:2])
    if not is_valid_close_code(code):
        raise FrameError(CloseCode.PROTOCOL_ERROR, "invalid close code")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError:
        raise FrameError(
            CloseCode.INVALID_FRAME_PAYLOAD_DATA, "close reason is not UTF-8"
        ) from None


def frame(opcode: int, payload: bytes, compressed: bool = False) -> bytes:
    """Build one complete frame, unmasked as a server's frames must be."""
    first = FIN | opcode | (RSV1 if compressed else 0)
    length = len(payload)
    if length <= MAX_CONTROL_PAYLOAD:
        return bytes((first, length)) + payload
    if length <= 0xFFFF:
        return HEADER_16(first, 126, length) + payload
    return HEADER_64(first, 127, length) + payload


class MessageFrame:
    """A message as one frame, for any number of clients.

    It is built once, and once for each size of the compression window. `size` is that
    of the payload before compression, in bytes.
    """

    __slots__ = ("_compressed", "message", "plain", "size")

    def __init__(self, message: str | bytes, payload: bytes | None = None) -> None:
        """`payload` is the message in bytes, if they are at hand."""
        self.message = message
        if isinstance(message, str):
            if payload is None:
                payload = message.encode()
            self.plain = frame(TEXT, payload)
        else:
            payload = message
            self.plain = frame(BINARY, payload)
        self.size = len(payload)
        self._compressed: dict[int, bytes] | None = None  # by window bits

    def compressed(self, compression: Compression) -> bytes:
        """Return the frame for a client with these settings."""
        if self._compressed is None:
            self._compressed = {}
        bits = compression.window_bits
        if bits not in self._compressed:
            payload = compression.compress(self.plain[len(self.plain) - self.size :])
            opcode = self.plain[0] & 0x0F
            self._compressed[bits] = frame(opcode, payload, compressed=True)
        return self._compressed[bits]


def close_payload(code: int, reason: str = "") -> bytes:
    """Build a close frame's payload; empty for 1005, which is never sent."""
    if code == CloseCode.NO_STATUS_RCVD:
        return b""
    return code.to_bytes(2) + reason.encode()
