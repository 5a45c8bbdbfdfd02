"""One client's WebSocket on its stream: accepting, reading, writing, closing.

Tornado's own protocol class decides what a frame means in one private method,
and gets it wrong in places (docs/decisions/002-own-frame-reading.md), so this is
one of our own; `handlers.frames` knows the frames, `handlers.stream` the socket,
and `handlers.websocket` what to do with the messages.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from tornado.iostream import IOStream
from tornado.web import RequestHandler

from backends import ConnectionClosed
from handlers.frames import (
    Close,
    FrameError,
    FrameParser,
    Opcode,
    Ping,
    Pong,
    Received,
    close_payload,
    deflate,
    frame,
)
from handlers.inflate import Contexts, Inflater
from handlers.offers import agree_on_deflate, extensions
from handlers.stream import ClientStream

logger = logging.getLogger(__name__)

READ_CHUNK = 64 * 1024  # bytes taken from the stream at a time
CLOSE_TIMEOUT = 2.0  # seconds for the peer to answer a close frame
ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
FAIR_SHARE = 4  # chunks of one busy client before the others have their turn


@dataclass(frozen=True, slots=True)
class Compression:
    """permessage-deflate's settings (zlib): level 1 to 9, memory level 1 to 9.

    `window_bits`, 9 to 15, is what a client may ask for (RFC 7692, 7.1.2.1).
    `contexts` are those of all clients.
    """

    level: int = 6
    mem_level: int = 8
    window_bits: int = zlib.MAX_WBITS
    contexts: Contexts = field(default_factory=Contexts)


class Client(Protocol):
    """Whom the protocol tells what happens: a `ClientConnection`."""

    def on_open(self) -> None: ...

    def on_heard(self, size: int, at_once: bool) -> None: ...

    def on_message(self, message: str | bytes) -> None: ...

    def on_kept(self, size: int) -> None: ...

    def room(self) -> asyncio.Future[None] | None: ...

    def on_failed(self, error: FrameError) -> None: ...

    def on_closed(self, peer: Close | None) -> None: ...


class ClientProtocol:
    """Reads frames in bulk, writes each in one piece, closes by the book."""

    __slots__ = (
        "_client",
        "_close_timer",
        "_compression",
        "_discarding",
        "_is_over",
        "_kept",
        "_latest_ping",
        "_parser",
        "_peer_close",
        "_pong",
        "_read_chunk",
        "_received",
        "_said_close",
        "_stream",
    )

    def __init__(
        self,
        client: Client,
        max_message_size: int,
        compression: Compression | None = None,
        read_chunk: int = 0,
    ) -> None:
        """`read_chunk` bytes at most are taken from the stream at a time; 0: as many
        as are usual."""
        self._client = client
        self._compression = compression
        self._parser = FrameParser(
            max_message_size, Inflater(compression.contexts) if compression else None
        )
        self._read_chunk = min(read_chunk or READ_CHUNK, READ_CHUNK)
        self._stream: ClientStream
        self._close_timer: asyncio.TimerHandle | None = None
        self._discarding = False
        self._said_close = False  # our close frame is on its way
        self._peer_close: Close | None = None  # where it came first
        self._is_over = False
        self._kept = 0  # bytes of a message that is not whole, as the client was told
        # What `FrameParser.feed` has yet to yield, while there is no room for it.
        self._received: Iterator[Received] | None = None
        # Only the latest of the pings that came while a pong is on its way is
        # answered (RFC 6455, section 5.5.3), so that pongs don't pile up.
        self._pong: asyncio.Future[None] | None = None
        self._latest_ping: bytes | None = None

    def begin(self, stream: IOStream) -> None:
        """The 101 was written to `stream`: its socket is taken over."""
        self._stream = ClientStream(stream, self._on_readable, self.abort)
        try:
            self._client.on_open()
        except BaseException:
            self.abort()
            raise
        if self._stream.closed:
            self.abort()
            return
        self._stream.start_reading()
        if self._stream.pending:
            self._on_readable()

    # Reading.

    def _on_readable(self) -> None:
        """Take what has come; a busy client's share of one turn, no more."""
        try:
            for chunk in range(FAIR_SHARE):
                # What fills a chunk is followed by what is there already.
                if not self._read(at_once=chunk > 0):
                    return
        except Exception:
            logger.exception("bug in reading from a client")
            self.abort()
            return
        if self._stream.pending:
            self._stream.loop.call_soon(self._go_on_reading)

    def _read(self, at_once: bool) -> bool:
        """Take one chunk; whether there may be another one at once."""
        data = self._stream.read(self._read_chunk)
        if data is None:
            return False
        if not data:
            self.abort()
            return False
        self._client.on_heard(len(data), at_once)
        if self._discarding:
            return True
        self._received = self._parser.feed(data)
        self._take()
        kept = 0 if self._discarding else self._parser.kept
        if kept != self._kept and not self._is_over:
            self._kept = kept
            self._client.on_kept(kept)
        return self._received is None and not self._is_over and (
            len(data) == self._read_chunk or self._stream.pending
        )

    def _go_on_reading(self) -> None:
        if self._received is None and not self._is_over:
            self._on_readable()

    def _on_room(self, room: "asyncio.Future[None]") -> None:
        if self._is_over:
            return
        try:
            if self._discarding:
                self._received = None
            else:
                self._take()
            if self._received is not None or self._is_over:
                return
            self._stream.start_reading()
            # Whoever may go on finds what came meanwhile at once.
            self._read(at_once=True)
        except Exception:
            logger.exception("bug in reading from a client")
            self.abort()
            return
        if self._stream.pending:
            self._stream.loop.call_soon(self._go_on_reading)

    def _take(self) -> None:
        """Hand on what was read, as long as there is room for it.

        The rest waits, and nothing is read meanwhile, so that a queue is exceeded
        by no more than the message at hand.
        """
        assert self._received is not None
        try:
            while (room := self._client.room()) is None:
                received = next(self._received, None)
                if received is None:
                    self._received = None
                    return
                if isinstance(received, (str, bytes)):
                    self._client.on_message(received)
                elif isinstance(received, Ping):
                    self._send_pong(received.payload)
                elif isinstance(received, Close):
                    self._received = None
                    self._on_close_frame(received)
                    return
                else:
                    assert isinstance(received, Pong)  # on_heard() was all it is for
        except FrameError as error:
            self._received = None
            self._discarding = True
            self._client.on_failed(error)
            return
        self._stream.stop_reading()
        room.add_done_callback(self._on_room)

    def _on_close_frame(self, close: Close) -> None:
        if not self._said_close:
            self._peer_close = close
            # "When sending a Close frame in response, the endpoint typically
            # echos the status code it received" (RFC 6455, section 5.5.1).
            self._write_close(close_payload(close.code))
        self._stream.stop_reading()
        if not self.bytes_waiting:
            self.abort()
            return
        # What waits is to reach the kernel before the socket goes.
        self._arm_close_timer()
        self._stream.drained().add_done_callback(lambda drained: self.abort())

    # Writing.

    def send(self, message: str | bytes) -> "asyncio.Future[None] | None":
        """Send one message as one frame: None once the kernel has all of it.

        Otherwise a future that is done then, or fails with `ConnectionClosed`.
        """
        if isinstance(message, str):
            opcode, payload = Opcode.TEXT, message.encode()
        else:
            opcode, payload = Opcode.BINARY, message
        compression = self._compression
        if compression is None:
            return self._stream.write(frame(opcode, payload))
        payload = deflate(
            payload,
            compression.level,
            compression.mem_level,
            compression.window_bits,
        )
        return self._stream.write(frame(opcode, payload, compressed=True))

    @property
    def bytes_waiting(self) -> int:
        """Bytes that were written and that the kernel has not taken."""
        return self._stream.waiting

    @property
    def bytes_taken(self) -> int:
        """Bytes that the kernel has taken since the handshake."""
        return self._stream.taken

    def drained(self) -> "asyncio.Future[None]":
        """Done when the kernel has taken all that was written before.

        It fails with `ConnectionClosed`.
        """
        return self._stream.drained()

    def send_ping(self) -> None:
        """Send a ping, unless frames wait: the peer is too slow to see it."""
        if not self.is_closing() and not self.bytes_waiting:
            with contextlib.suppress(ConnectionClosed):
                self._stream.write(frame(Opcode.PING, b""))

    def _send_pong(self, payload: bytes) -> None:
        if self._said_close:
            return
        if self._pong is not None:
            self._latest_ping = payload
            return
        with contextlib.suppress(ConnectionClosed):
            self._pong = self._stream.write(frame(Opcode.PONG, payload))
        if self._pong is not None:
            self._pong.add_done_callback(self._on_pong_sent)

    def _on_pong_sent(self, pong: "asyncio.Future[None]") -> None:
        self._pong = None
        payload, self._latest_ping = self._latest_ping, None
        if payload is not None:
            self._send_pong(payload)

    # Closing.

    def is_closing(self) -> bool:
        """Whether either side has begun to close."""
        return self._is_over or self._said_close or self._stream.closed

    def close(self, code: int, reason: str) -> None:
        """Send a close frame; the socket goes after the answer or 2 seconds."""
        if self.is_closing():
            return
        self._write_close(close_payload(code, reason))
        self._arm_close_timer()

    def fail(self, code: int, reason: str) -> None:
        """Send a close frame, then read nothing more of what the peer sends.

        What it sends is discarded for a while, since closing a socket with
        unread bytes resets it, and the close frame would be lost.
        """
        self._discarding = True
        self._parser = FrameParser(0)  # what the other one kept is nobody's any more
        self.close(code, reason)
        if self._stream.closed or self.bytes_waiting:
            return
        try:
            self._stream.shut_down()
        except OSError:
            self.abort()

    def abort(self) -> None:
        """Close the socket at once; the client hears of the end a little later."""
        if self._is_over:
            return
        self._is_over = True
        self._received = None
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self._stream.close()
        self._stream.loop.call_soon(self._client.on_closed, self._peer_close)

    def _write_close(self, payload: bytes) -> None:
        self._said_close = True
        with contextlib.suppress(ConnectionClosed):  # the stream tells of its end
            self._stream.write(frame(Opcode.CLOSE, payload))

    def _arm_close_timer(self) -> None:
        if self._close_timer is None:
            self._close_timer = self._stream.loop.call_later(
                CLOSE_TIMEOUT, self.abort
            )


def agree_on_compression(
    handler: RequestHandler, compression: Compression | None
) -> Compression | None:
    """What the 101 is to say of permessage-deflate, and how to go by it."""
    if compression is None:
        return None
    offered = handler.request.headers.get_list("Sec-WebSocket-Extensions")
    agreed = agree_on_deflate(extensions(offered))
    if agreed is None:
        return None
    handler.set_header("Sec-WebSocket-Extensions", agreed.answer)
    if agreed.window_bits != compression.window_bits:
        return replace(compression, window_bits=agreed.window_bits)
    return compression


def switch(handler: RequestHandler, subprotocol: str | None) -> IOStream:
    """Answer a handshake with 101; the stream is the WebSocket's from now on."""
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
    return handler.detach()
