"""Sends large messages in several frames, for clients that take no large ones.

Used only with `--max_frame_size`.
"""

import asyncio
from collections.abc import Iterator

from handlers.websocket.deflate import Compression
from handlers.websocket.frames import FIN, RSV1, Opcode, SharedFrame, frame
from handlers.websocket.protocol import Client, ClientProtocol


class FragmentingProtocol(ClientProtocol):
    """A `ClientProtocol` whose frames, both ways, have a largest size."""

    __slots__ = ("_max_frame_size",)

    def __init__(
        self,
        client: Client,
        max_message_size: int,
        compression: Compression | None,
        read_chunk: int,
        max_frame_size: int,
    ) -> None:
        super().__init__(client, max_message_size, compression, read_chunk)
        self._max_frame_size = max_frame_size
        self._parser.limit_frames(max_frame_size)

    def send(
        self, message: str | bytes, shared: SharedFrame | None = None
    ) -> "asyncio.Future[None] | None":
        """Send one message, in as many frames as it needs; see `ClientProtocol`."""
        if isinstance(message, str):
            opcode, payload = Opcode.TEXT, message.encode()
        else:
            opcode, payload = Opcode.BINARY, message
        if len(payload) <= self._max_frame_size and shared is not None:
            return super().send(message, shared)
        if self._compression is not None:
            payload = self._compression.compress(payload)
        compressed = self._compression is not None
        return self._stream.write(
            b"".join(fragments(opcode, payload, self._max_frame_size, compressed))
        )


def fragments(
    opcode: int, payload: bytes, size: int, compressed: bool = False
) -> Iterator[bytes]:
    """Yield the frames of a message, each with at most `size` bytes of its payload."""
    last = max(len(payload) - 1, 0) // size * size  # where the last one begins
    for start in range(0, last + 1, size):
        kind = Opcode.CONTINUATION if start else opcode
        encoded = bytearray(frame(kind, payload[start : start + size]))
        if start < last:
            encoded[0] &= ~FIN
        if compressed and not start:  # RFC 7692, section 6.1: only the first frame
            encoded[0] |= RSV1
        yield bytes(encoded)
