"""Sends large messages in several frames, for clients that take no large ones.

Used only with `--max_frame_size`.
"""

import asyncio
from collections.abc import Iterator

from handlers.websocket.deflate import Compression
from handlers.websocket.frames import (
    CONTINUATION,
    FIN,
    RSV1,
    MessageFrame,
    frame,
)
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
        self, message: MessageFrame, limit: int | None = None
    ) -> "asyncio.Future[None] | None":
        """Send one message, in as many frames as it needs; see `ClientProtocol`."""
        return super().send(FragmentedMessage(message, self._max_frame_size), limit)


class FragmentedMessage(MessageFrame):
    """A message as frames, each with at most `max_size` bytes of its payload."""

    __slots__ = ("_max_size", "_whole")

    def __init__(self, whole: MessageFrame, max_size: int) -> None:
        self.message, self.size = whole.message, whole.size
        self._whole, self._max_size = whole, max_size
        self.plain = divided(whole.plain, max_size)

    def compressed(self, compression: Compression) -> bytes:
        return divided(self._whole.compressed(compression), self._max_size)


def divided(whole: bytes, size: int) -> bytes:
    """Return a frame as frames, each with at most `size` bytes of its payload."""
    begin = {126: 4, 127: 10}.get(whole[1], 2)  # RFC 6455, section 5.2
    payload = whole[begin:]
    if len(payload) <= size:
        return whole
    return b"".join(fragments(whole[0] & 0x0F, payload, size, bool(whole[0] & RSV1)))


def fragments(
    opcode: int, payload: bytes, size: int, compressed: bool = False
) -> Iterator[bytes]:
    """Yield the frames of a message, each with at most `size` bytes of its payload."""
    last = max(len(payload) - 1, 0) // size * size  # where the last one begins
    for start in range(0, last + 1, size):
        kind = CONTINUATION if start else opcode
        encoded = bytearray(frame(kind, payload[start : start + size]))
        if start < last:
            encoded[0] &= ~FIN
        if compressed and not start:  # RFC 7692, section 6.1: only the first frame
            encoded[0] |= RSV1
        yield bytes(encoded)
