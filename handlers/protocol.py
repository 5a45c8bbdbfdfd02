"""One client's WebSocket on its stream: accepting, reading, writing, closing.

Tornado's own protocol class decides what a frame means in one private method,
and gets it wrong in places (docs/decisions/002-own-frame-reading.md), so this
subclass owns the whole of it; `handlers.frames` knows the frames, and
`handlers.websocket` what to do with the messages.
"""

import asyncio
import socket
import zlib
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Protocol

from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler
from tornado.websocket import WebSocketProtocol13, _WebSocketParams

from backends import ConnectionClosed
from handlers.frames import (
    Close,
    FrameError,
    FrameParser,
    Opcode,
    Ping,
    Pong,
    close_payload,
    deflate,
    frame,
)
from handlers.offers import agree_on_deflate, extensions

READ_CHUNK = 64 * 1024  # bytes taken from the stream at a time
CLOSE_TIMEOUT = 2.0  # seconds for the peer to answer a close frame
FAIR_SHARE = 4  # chunks of one busy client before the others have their turn


@dataclass(frozen=True, slots=True)
class Compression:
    """permessage-deflate's settings (zlib): level 1 to 9, memory level 1 to 9.

    `window_bits`, 9 to 15, is what a client may ask for (RFC 7692, 7.1.2.1).
    """

    level: int = 6
    mem_level: int = 8
    window_bits: int = zlib.MAX_WBITS


class Client(Protocol):
    """Whom the protocol tells what happens: a `ClientSocketHandler`."""

    def on_open(self) -> None: ...

    def on_heard(self, size: int, at_once: bool) -> None: ...

    def on_message(self, message: str | bytes) -> None: ...

    def room(self) -> Awaitable[None] | None: ...

    def on_failed(self, error: FrameError) -> None: ...

    def on_closed(self, peer: Close | None) -> None: ...


class ClientProtocol(WebSocketProtocol13):
    """Reads frames in bulk, writes each in one piece, closes by the book."""

    def __init__(
        self,
        handler: RequestHandler,
        client: Client,
        max_message_size: int,
        compression: Compression | None = None,
    ) -> None:
        super().__init__(handler, False, _WebSocketParams())  # type: ignore[arg-type] # only pongs go its way
        self._client = client
        self._max_message_size = max_message_size
        self._compression = compression
        self._parser: FrameParser | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._read_chunk = READ_CHUNK
        self._discarding = False
        self._peer_close: Close | None = None

    def read_in_chunks_of(self, size: int) -> None:
        """Take no more than `size` bytes from the stream at a time; 0: as usual."""
        self._read_chunk = min(size or READ_CHUNK, READ_CHUNK)

    async def accept(self, handler: RequestHandler, subprotocol: str | None) -> None:
        """Answer the handshake with 101, and read until the connection ends."""
        if subprotocol is not None:
            handler.set_header("Sec-WebSocket-Protocol", subprotocol)
        self._agree_on_compression(handler)
        self._parser = FrameParser(
            self._max_message_size, compressed=self._compression is not None
        )
        key = handler.request.headers["Sec-WebSocket-Key"]
        handler.clear_header("Content-Type")
        handler.set_status(101)
        handler.set_header("Upgrade", "websocket")
        handler.set_header("Connection", "Upgrade")
        handler.set_header("Sec-WebSocket-Accept", self.compute_accept_value(key))
        handler.finish()
        self.stream = handler.detach()
        self.set_nodelay(True)
        try:
            self._client.on_open()
            await self._read()
        except StreamClosedError:
            pass
        finally:
            self.abort()
            self._client.on_closed(self._peer_close)

    def _agree_on_compression(self, handler: RequestHandler) -> None:
        compression, self._compression = self._compression, None
        if compression is None:
            return
        offered = handler.request.headers.get_list("Sec-WebSocket-Extensions")
        agreed = agree_on_deflate(extensions(offered))
        if agreed is not None:
            handler.set_header("Sec-WebSocket-Extensions", agreed.answer)
            if agreed.window_bits != compression.window_bits:
                compression = replace(compression, window_bits=agreed.window_bits)
            self._compression = compression

    async def _read(self) -> None:
        chunks = 0
        while not self.client_terminated:
            reading = self.stream.read_bytes(self._read_chunk, partial=True)
            # What is there already comes without a turn of the loop.
            at_once: bool = reading.done()  # type: ignore[attr-defined]
            chunks = chunks + 1 if at_once else 0
            data = await reading
            if chunks >= FAIR_SHARE:
                chunks = 0
                await asyncio.sleep(0)
            self._client.on_heard(len(data), at_once)
            if self._discarding:
                continue
            try:
                while (room := self._client.room()) is not None:
                    await room
                await self._take(data)
            except FrameError as error:
                self._discarding = True
                self._client.on_failed(error)
        await self._flushed()

    async def _take(self, data: bytes) -> None:
        assert self._parser is not None
        for received in self._parser.feed(data):
            if isinstance(received, (str, bytes)):
                self._client.on_message(received)
                # The rest of the chunk waits, so that a queue is exceeded by
                # no more than the message at hand.
                while (room := self._client.room()) is not None:
                    await room
            elif isinstance(received, Ping):
                self._send_pong(received.payload)
            elif isinstance(received, Close):
                self._on_close_frame(received)
                return
            else:
                assert isinstance(received, Pong)  # on_heard() was all it is for

    def _on_close_frame(self, close: Close) -> None:
        self.client_terminated = True
        if self.server_terminated:
            return
        self._peer_close = close
        # "When sending a Close frame in response, the endpoint typically
        # echos the status code it received" (RFC 6455, section 5.5.1).
        self._write_close(close_payload(close.code))

    async def _flushed(self) -> None:
        """Let what waits reach the kernel before the socket goes."""
        if self.bytes_waiting:
            self._arm_close_timer()
            await self.stream.write(b"")

    def send(self, message: str | bytes) -> "asyncio.Future[None] | None":
        """Write one message as one frame: None once the kernel has all of it.

        Otherwise a future that is done then, or fails with `ConnectionClosed`.
        """
        if isinstance(message, str):
            opcode, payload = Opcode.TEXT, message.encode()
        else:
            opcode, payload = Opcode.BINARY, message
        compression = self._compression
        if compression is not None:
            payload = deflate(
                payload,
                compression.level,
                compression.mem_level,
                compression.window_bits,
            )
        try:
            written = self.stream.write(
                frame(opcode, payload, compressed=compression is not None)
            )
        except StreamClosedError as error:
            raise ConnectionClosed from error
        if written.done() and not self.stream.closed():
            return None
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        written.add_done_callback(lambda written: _settle(sent, written))
        return sent

    @property
    def bytes_waiting(self) -> int:
        """Bytes that were written and that the kernel has not taken."""
        return self.stream._total_write_index - self.stream._total_write_done_index

    @property
    def bytes_taken(self) -> int:
        """Bytes that the kernel has taken since the connection began."""
        return self.stream._total_write_done_index

    def send_ping(self) -> None:
        """Send a ping, unless frames wait: the peer is too slow to see it."""
        if not self.is_closing() and not self.bytes_waiting:
            self.stream.write(frame(Opcode.PING, b""))

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Send a close frame; the socket goes after the answer or 2 seconds."""
        if self.server_terminated or self.stream.closed():
            return
        self._write_close(
            b"" if code is None else close_payload(code, reason or "")
        )
        self._arm_close_timer()

    def fail(self, code: int, reason: str) -> None:
        """Send a close frame, then read nothing more of what the peer sends.

        What it sends is discarded for a while, since closing a socket with
        unread bytes resets it, and the close frame would be lost.
        """
        self._discarding = True
        self.close(code, reason)
        if self.stream.closed() or self.bytes_waiting:
            return
        if type(self.stream.socket) is socket.socket:  # TLS can't be half closed
            try:
                self.stream.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.abort()

    def abort(self) -> None:
        """Close the socket at once."""
        self.client_terminated = self.server_terminated = True
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self.stream.close()

    _abort = abort  # for the pongs, which Tornado sends

    def _write_close(self, payload: bytes) -> None:
        self.server_terminated = True
        try:
            self.stream.write(frame(Opcode.CLOSE, payload))
        except StreamClosedError:
            pass  # the read loop ends by itself

    def _arm_close_timer(self) -> None:
        if self._close_timer is None:
            self._close_timer = asyncio.get_running_loop().call_later(
                CLOSE_TIMEOUT, self.abort
            )


def _settle(sent: "asyncio.Future[None]", written: "asyncio.Future[None]") -> None:
    if sent.done():
        return
    if written.cancelled() or written.exception() is not None:
        sent.set_exception(ConnectionClosed())
        sent.exception()  # whoever does not await it need not hear of it
    else:
        sent.set_result(None)
