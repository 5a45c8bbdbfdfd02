"""One client's WebSocket on its stream: reading, writing, closing.

Tornado's protocol class handles frames in one private method, with errors in it
(docs/decisions/002-own-frame-reading.md), so this one replaces it. `frames` parses
frames, `stream` reads and writes the socket, `closing` ends it, and
`handlers.clients.connection` gets the messages. Whether the connection is open is
`Client.state`; it is not stored here a second time.
"""

import asyncio
import contextlib
import logging
from collections import deque
from typing import Literal, Protocol

from backends import ConnectionClosed, SendBufferFull
from handlers.http.sockets import TakenSocket
from handlers.websocket.closing import Closing
from handlers.websocket.deflate import Compression, Inflater
from handlers.websocket.frames import (
    Close,
    CloseCode,
    FrameError,
    FrameParser,
    MessageFrame,
    Opcode,
    Ping,
    Pong,
    close_payload,
    frame,
)
from handlers.websocket.stream import ClientStream, client_stream
from handlers.websocket.turns import TURN, Turns, clock
from handlers.websocket.uptake import Outgoing

logger = logging.getLogger(__name__)

READ_CHUNK = 64 * 1024  # bytes read from the stream at a time
# Bytes of messages that are read although there is no room for them, so that the
# pings among them are answered.
READ_AHEAD = READ_CHUNK
MESSAGE_COST = 64  # bytes that each of them counts in addition to its length

State = Literal["connecting", "open", "closing", "closed"]


class Client(Protocol):
    """What the protocol calls when something happens: a `ClientConnection`."""

    @property
    def state(self) -> State:
        """State of the connection, which decides what the protocol does."""

    @property
    def send_timeout(self) -> float:
        """Longest time in which the client may acknowledge nothing, in seconds."""

    @property
    def read_ahead(self) -> int:
        """Bytes of messages that may be read while there is no room for them."""

    @property
    def turns(self) -> Turns:
        """Where work waits until other clients have had their turn."""

    def on_open(self) -> None: ...

    def on_heard(self, size: int, at_once: bool) -> None: ...

    def on_message(self, message: str | bytes) -> None: ...

    def on_pong(self, payload: bytes) -> None: ...

    def on_kept(self, size: int) -> None: ...

    def room(self) -> asyncio.Future[None] | None: ...

    def on_leaving(self) -> None: ...

    def on_failed(self, error: FrameError) -> None: ...

    def on_closed(self, peer: Close | None) -> None: ...


class ReadAhead:
    """Messages that were read while there was no room for them.

    `left` is the number of bytes that may still be read or kept.
    """

    __slots__ = ("left", "messages")

    def __init__(self, left: int) -> None:
        self.left = left
        self.messages: deque[str | bytes] = deque()

    def add(self, message: str | bytes) -> None:
        """Keep a message, even one that exceeds the limit."""
        self.messages.append(message)
        self.left -= len(message) + MESSAGE_COST


class ClientProtocol:
    """Reads frames in bulk, writes each with one call, closes as RFC 6455 says."""

    __slots__ = (
        "_ahead",
        "_client",
        "_closing",
        "_compression",
        "_kept",
        "_latest_ping",
        "_parser",
        "_pong",
        "_read_chunk",
        "_stream",
        "_taking",
    )

    def __init__(
        self,
        client: Client,
        max_message_size: int,
        compression: Compression | None = None,
        read_chunk: int = 0,
    ) -> None:
        """`read_chunk` is the most to read at a time, in bytes; 0: `READ_CHUNK`."""
        self._client = client
        self._compression = compression
        self._parser = FrameParser(
            max_message_size, Inflater(compression.contexts) if compression else None
        )
        self._read_chunk = min(read_chunk or READ_CHUNK, READ_CHUNK)
        self._stream: ClientStream
        self._closing: Closing | None = None  # from the first close frame on
        # Bytes of an incomplete message, as last reported by `Client.on_kept`.
        self._kept = 0
        self._taking = False  # what was read last, until all of it is parsed
        self._ahead: ReadAhead | None = None  # while there is no room
        # While a pong is being sent, only the latest ping is remembered and answered
        # (RFC 6455, section 5.5.3), so that pongs cannot pile up.
        self._pong: asyncio.Future[None] | None = None
        self._latest_ping: bytes | None = None

    def begin(self, taken: TakenSocket, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on a socket to which the 101 was written."""
        self._stream = client_stream(taken, loop, self)
        try:
            self._client.on_open()
        except Exception:
            self._on_bug("opening a connection")
        if self._stream.closed:
            self.abort()
        elif self._stream.pending:
            self.on_readable()

    # Reading.

    def on_readable(self) -> None:
        if not self._taking:  # else `turns` continues with the last chunk
            self._read_on(at_once=False)

    def _resume_reading(self) -> None:
        if not self._stream.closed and (self._ahead is None or self._ahead.left > 0):
            self._read_on(at_once=True)

    def _read_on(self, at_once: bool) -> None:
        try:
            self._read_share(at_once)
        except Exception:
            self._on_bug("reading from a client")

    def _read_share(self, at_once: bool) -> None:
        """Read and handle what has arrived, for as long as one turn lasts.

        `at_once` says that it had arrived before the socket was asked.
        """
        stream, ends_at = self._stream, clock() + TURN
        is_full = True
        while True:
            if not self._taking:
                ahead = self._ahead
                size = self._read_chunk
                if ahead is not None:
                    size = min(size, ahead.left)
                data = stream.read(size)
                if not data:
                    # After a failed write nothing more will arrive.
                    if data is not None or stream.lost:
                        self._end()
                    return
                self._client.on_heard(len(data), at_once)
                # A full chunk means that more has arrived already.
                at_once, is_full = True, len(data) == size
                if ahead is not None:
                    ahead.left -= len(data)
                if self._closing is None or not self._closing.discarding:
                    self._parser.add(data)
                    self._taking = True
            if self._taking:
                self._take(ends_at)
                if self._parser.kept != self._kept:
                    self._note_kept()
            if stream.closed:
                return
            if self._ahead is not None and self._is_ahead_enough():
                stream.stop_reading()
                return
            if not (self._taking or is_full or stream.pending or stream.lost):
                return
            if clock() >= ends_at:
                break
        if self._taking or stream.pending or stream.lost:
            self._client.turns.wait(self._resume_reading)

    def _take(self, ends_at: float) -> None:
        """Deliver what was read, or keep it until there is room for it.

        At least one frame is handled; from `ends_at` on the others wait. The client
        fails if it has exceeded its rate for too long.
        """
        parser, client = self._parser, self._client
        try:
            while parser.unparsed:
                received = parser.next()
                if isinstance(received, (str, bytes)):
                    if self._ahead is None and (room := client.room()) is not None:
                        self._wait_for(room)
                    if self._ahead is None:
                        client.on_message(received)
                    else:
                        self._ahead.add(received)
                elif isinstance(received, Ping):
                    self._send_pong(received.payload)
                elif isinstance(received, Pong):
                    client.on_pong(received.payload)
                elif isinstance(received, Close):
                    self._on_close_frame(received)
                if not self._taking or (
                    self._ahead is not None and self._is_ahead_enough()
                ):
                    return
                if parser.unparsed and clock() >= ends_at:
                    return
            self._taking = False
            if self._ahead is None and (room := client.room()) is not None:
                self._wait_for(room)
        except FrameError as error:
            self._client.on_failed(error)

    def _note_kept(self) -> None:
        kept = self._parser.kept
        if kept != self._kept and not self._stream.closed:
            self._kept = kept
            self._client.on_kept(kept)

    def _is_ahead_enough(self) -> bool:
        """Whether reading must stop until there is room."""
        return self._ahead is not None and self._ahead.left <= 0

    def _wait_for(self, room: "asyncio.Future[None]") -> None:
        """Keep messages until there is room for them."""
        self._ahead = ReadAhead(self._client.read_ahead)
        room.add_done_callback(self._on_room)

    def _on_room(self, room: "asyncio.Future[None]") -> None:
        self._catch_up()

    def _catch_up(self) -> None:
        """Deliver what was read ahead, while there is room and the turn lasts."""
        ahead, ends_at = self._ahead, clock() + TURN
        if ahead is None:  # the connection ends, and the messages were delivered
            return
        try:
            while (wait := self._client.room()) is None:
                if not ahead.messages:
                    self._ahead = None
                    self._stream.start_reading()
                    # Do not wait for the loop to report what arrived meanwhile.
                    self._read_on(at_once=True)
                    return
                self._client.on_message(ahead.messages.popleft())
                if self._ahead is None:
                    return
                if clock() >= ends_at:
                    self._client.turns.wait(self._catch_up)
                    return
            wait.add_done_callback(self._on_room)
        except FrameError as error:
            self._client.on_failed(error)
        except Exception:
            self._on_bug("reading from a client")

    def _stop_taking(self) -> None:
        """Deliver what was read ahead, even without room, and parse nothing more."""
        self._taking = False
        self._parser.drop()
        ahead, self._ahead = self._ahead, None
        while ahead is not None and ahead.messages:
            self._client.on_message(ahead.messages.popleft())

    def _end(self) -> None:
        """The peer has closed the TCP connection, or it is lost; all was read."""
        self._stop_taking()
        self.abort()

    def _on_close_frame(self, close: Close) -> None:
        self._stop_taking()
        if self._stream.closed:
            return
        if self._closing is None:
            self._client.on_leaving()
            # "When sending a Close frame in response, the endpoint typically
            # echos the status code it received" (RFC 6455, section 5.5.1).
            closing = self._write_close(close_payload(close.code))
            closing.peer = close
        # Usually the peer has sent nothing more, and closing loses nothing.
        stream = self._stream
        if stream.closes_cleanly and not stream.waiting and not stream.read(READ_CHUNK):
            self.abort()
        else:
            self._discard()

    def _discard(self) -> None:
        """Discard what arrives until the peer has acknowledged all that was sent.

        It must be read, since closing a socket with unread bytes resets the
        connection, and what was sent would be lost.
        """
        assert self._closing is not None
        if self._closing.discarding:
            return
        if self._stream.lost:
            self.abort()
            return
        self._closing.discarding = True
        self._parser = FrameParser(0)  # frees what the old one kept
        self._note_kept()
        self._stream.start_reading()
        self._closing.shut_down()
        self._closing.watch()

    def on_lost(self) -> None:
        """A write has failed: read what the kernel still has, then end.

        The peer may have sent messages and a close frame before it disconnected.
        """
        self._client.on_leaving()
        if self._closing is not None and self._closing.discarding:
            self.abort()
        else:
            self._resume_reading()

    def _on_over(self) -> None:
        """The peer's time to answer the close frame is over."""
        if self._is_ahead_enough():
            # The answer may be behind messages for which there is no room.
            self._stop_taking()
            self._discard()
        else:
            self.abort()

    def _on_bug(self, where: str) -> None:
        logger.exception("bug in %s", where)
        self._ahead = None
        try:
            self._client.on_failed(
                FrameError(CloseCode.INTERNAL_ERROR, "internal error")
            )
        except Exception:
            logger.exception("bug in closing a connection")
            self.abort()

    # Writing.

    def send(
        self, message: MessageFrame, limit: int | None = None
    ) -> "asyncio.Future[None] | None":
        """Send one message.

        Returns None if the kernel took all of it, otherwise a future that is done
        when it has, or fails with `ConnectionClosed`. Raises `SendBufferFull` if
        frames wait, and with this one they have more than `limit` bytes.
        """
        stream, compression = self._stream, self._compression
        unsent = stream.unsent
        if unsent and limit is not None and len(unsent) + message.size > limit:
            raise SendBufferFull
        return stream.write(
            message.plain if compression is None else message.compressed(compression)
        )

    @property
    def bytes_waiting(self) -> int:
        """Bytes that were written and that the kernel has not taken yet."""
        return self._stream.waiting

    def drained(self) -> "asyncio.Future[None]":
        """Return a future that is done when the kernel has all that was written.

        It fails with `ConnectionClosed`.
        """
        return self._stream.drained()

    @property
    def is_held(self) -> bool:
        """Whether reading has stopped, so that no pong can be seen."""
        return self._is_ahead_enough()

    def below(self, size: int) -> "asyncio.Future[None]":
        """Return a future that is done when fewer than `size` bytes wait to be sent.

        It fails with `ConnectionClosed`.
        """
        return self._stream.below(size)

    def outgoing(self) -> Outgoing:
        """Ask the kernel what the peer has not acknowledged yet."""
        return self._stream.outgoing()

    def send_ping(self, payload: bytes) -> "asyncio.Future[None] | None":
        """Send a ping; returns as `send` does. Raises `ConnectionClosed`."""
        return self._stream.write(frame(Opcode.PING, payload))

    def _send_pong(self, payload: bytes) -> None:
        if self._client.state != "open":
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

    def close(self, code: int, reason: str) -> None:
        """Send a close frame; the answer, or `Closing`, then closes the socket."""
        self._write_close(close_payload(code, reason)).watch()

    def fail(self, code: int, reason: str) -> None:
        """Send a close frame unless one was sent, then discard what arrives."""
        self._stop_taking()
        if self._stream.closed:
            return
        if self._closing is None:
            self._write_close(close_payload(code, reason))
        self._discard()

    def give_up(self) -> None:
        """Stop writing and receiving; only what has arrived is still read."""
        self._stream.lose()

    def abort(self) -> None:
        """Close the socket at once."""
        self._stop_taking()
        if self._client.state == "closed":
            return
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.cancel()
        self._stream.close()
        self._client.on_closed(None if closing is None else closing.peer)

    def _write_close(self, payload: bytes) -> Closing:
        try:
            self._stream.write(frame(Opcode.CLOSE, payload))
        except ConnectionClosed:
            pass  # the stream reports its end
        self._closing = Closing(self._stream, self._client.send_timeout, self._on_over)
        return self._closing
