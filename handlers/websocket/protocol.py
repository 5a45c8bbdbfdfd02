"""One client's WebSocket on its stream: accepting, reading, writing, closing.

Tornado's own protocol class decides what a frame means in one private method,
and gets it wrong in places (docs/decisions/002-own-frame-reading.md), so this is
one of our own; `frames` knows the frames, `stream` the socket, `closing` how it ends,
and `handlers.clients.connection` what to do with the messages.
It has no state of its own: `Client.state` says whether it is open, and only what
there is to do until it is closed stands here.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from tornado.iostream import IOStream
from tornado.web import RequestHandler

from backends import ConnectionClosed
from handlers.websocket.closing import Closing
from handlers.websocket.deflate import Contexts, Inflater
from handlers.websocket.frames import (
    Close,
    CloseCode,
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
from handlers.websocket.negotiation import agree_on_deflate, extensions
from handlers.websocket.stream import ClientStream, client_stream
from handlers.websocket.turns import TURN, Turns, clock
from handlers.websocket.uptake import Outgoing

logger = logging.getLogger(__name__)

READ_CHUNK = 64 * 1024  # bytes taken from the stream at a time
ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
# Bytes of messages that are read while there is no room for them, so that the pings
# between and behind them are answered.
READ_AHEAD = READ_CHUNK
MESSAGE_COST = 64  # bytes that each of them counts for besides, however short

State = Literal["connecting", "open", "closing", "closed"]


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

    @property
    def state(self) -> State:
        """That of the connection; everything here goes by it."""

    @property
    def send_timeout(self) -> float:
        """Longest that it may take nothing, in seconds."""

    @property
    def read_ahead(self) -> int:
        """Bytes that may be read while there is no room."""

    @property
    def turns(self) -> Turns:
        """Where to wait until the others have had their turn."""

    def on_open(self) -> None: ...

    def on_heard(self, size: int, at_once: bool) -> None: ...

    def on_message(self, message: str | bytes) -> None: ...

    def on_pong(self) -> None: ...

    def on_kept(self, size: int) -> None: ...

    def room(self) -> asyncio.Future[None] | None: ...

    def on_leaving(self) -> None: ...

    def on_failed(self, error: FrameError) -> None: ...

    def on_closed(self, peer: Close | None) -> None: ...


class ReadAhead:
    """Messages that were read while there was no room, until there is.

    `left` is how many bytes more may be read or kept.
    """

    __slots__ = ("left", "messages")

    def __init__(self, left: int) -> None:
        self.left = left
        self.messages: deque[str | bytes] = deque()

    def add(self, message: str | bytes) -> None:
        """Keep a message; the one that exceeds the bound as well."""
        self.messages.append(message)
        self.left -= len(message) + MESSAGE_COST


class ClientProtocol:
    """Reads frames in bulk, writes each in one piece, closes by the book."""

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
        "_received",
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
        self._closing: Closing | None = None  # from the first close frame on
        self._kept = 0  # bytes of a message that is not whole, as the client was told
        # What `FrameParser.frames` has yet to yield of the last chunk.
        self._received: Iterator[Received | None] | None = None
        self._ahead: ReadAhead | None = None  # while there is no room
        # Only the latest of the pings that came while a pong is on its way is
        # answered (RFC 6455, section 5.5.3), so that pongs don't pile up.
        self._pong: asyncio.Future[None] | None = None
        self._latest_ping: bytes | None = None

    def begin(self, stream: IOStream) -> None:
        """The 101 was written to `stream`: its socket is taken over."""
        self._stream = client_stream(stream, self._on_readable, self._on_lost)
        try:
            self._client.on_open()
        except Exception:
            self._on_bug("opening a connection")
        if self._stream.closed:
            self.abort()
            return
        self._stream.start_reading()
        if self._stream.pending:
            self._on_readable()

    # Reading.

    def _on_readable(self) -> None:
        if self._received is None:  # else what was read before goes on by itself
            self._read_on(at_once=False)

    def _go_on(self) -> None:
        if not self._stream.closed and (self._ahead is None or self._ahead.left > 0):
            self._read_on(at_once=True)

    def _read_on(self, at_once: bool) -> None:
        try:
            self._read_share(at_once)
        except Exception:
            self._on_bug("reading from a client")

    def _read_share(self, at_once: bool) -> None:
        """Take what has come, for as long as a client's turn lasts.

        `at_once` says that it was there before we asked.
        """
        stream, ends_at = self._stream, clock() + TURN
        is_full = True
        while True:
            if self._received is None:
                ahead = self._ahead
                size = self._read_chunk
                if ahead is not None:
                    size = min(size, ahead.left)
                data = stream.read(size)
                if not data:
                    # After a failed write there is no more than what has come.
                    if data is not None or stream.lost:
                        self._end()
                    return
                self._client.on_heard(len(data), at_once)
                # What fills a chunk is followed by what is there already.
                at_once, is_full = True, len(data) == size
                if ahead is not None:
                    ahead.left -= len(data)
                if self._closing is None or not self._closing.discarding:
                    self._received = self._parser.frames(data)
            if self._received is not None:
                self._take(ends_at)
                if self._parser.kept != self._kept:
                    self._note_kept()
            if stream.closed:
                return
            if self._ahead is not None and self._is_ahead_enough():
                stream.stop_reading()
                return
            if self._received is None and not (
                is_full or stream.pending or stream.lost
            ):
                return
            if clock() >= ends_at:
                break
        if self._received is not None or stream.pending or stream.lost:
            self._client.turns.wait(self._go_on)

    def _take(self, ends_at: float) -> None:
        """Hand on what was read, or keep it until there is room for it.

        From `ends_at` on the rest of `_received` has to wait; one frame never does.
        """
        assert self._received is not None
        try:
            for received in self._received:
                if isinstance(received, (str, bytes)):
                    if self._ahead is None:
                        self._wait_for_room()
                    if self._ahead is None:
                        self._client.on_message(received)
                    else:
                        self._ahead.add(received)
                elif isinstance(received, Ping):
                    self._send_pong(received.payload)
                elif isinstance(received, Pong):
                    self._client.on_pong()
                elif isinstance(received, Close):
                    self._on_close_frame(received)
                if self._received is None or (
                    self._ahead is not None and self._is_ahead_enough()
                ):
                    return
                if clock() >= ends_at:
                    return
            self._received = None
            if self._ahead is None:
                self._wait_for_room()
        except FrameError as error:
            self._client.on_failed(error)

    def _note_kept(self) -> None:
        kept = self._parser.kept
        if kept != self._kept and not self._stream.closed:
            self._kept = kept
            self._client.on_kept(kept)

    def _is_ahead_enough(self) -> bool:
        """Whether nothing more may be read until there is room."""
        return self._ahead is not None and self._ahead.left <= 0

    def _wait_for_room(self) -> None:
        """Keep messages from now on, unless there is room for them.

        Raises `FrameError` where the client has sent too much for too long.
        """
        room = self._client.room()
        if room is not None:
            self._ahead = ReadAhead(self._client.read_ahead)
            room.add_done_callback(self._on_room)

    def _on_room(self, room: "asyncio.Future[None]") -> None:
        self._catch_up()

    def _catch_up(self) -> None:
        """Hand on what was read ahead, while there is room and the turn lasts."""
        ahead, ends_at = self._ahead, clock() + TURN
        if ahead is None:  # it ends: what was kept is handed on already
            return
        try:
            while (wait := self._client.room()) is None:
                if not ahead.messages:
                    self._ahead = None
                    self._stream.start_reading()
                    # Whoever may go on finds what came meanwhile at once.
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
        """Hand on what was read ahead, room or not, and look at nothing more."""
        self._received = None
        ahead, self._ahead = self._ahead, None
        while ahead is not None and ahead.messages:
            self._client.on_message(ahead.messages.popleft())

    def _end(self) -> None:
        """The peer has ended the connection, or it is lost, and all was read."""
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
        # Mostly the peer has sent nothing more, and closing loses nothing.
        stream = self._stream
        if stream.closes_cleanly and not stream.waiting and not stream.read(READ_CHUNK):
            self.abort()
        else:
            self._discard()

    def _discard(self) -> None:
        """Read nothing more of what comes: only until the peer has taken all.

        It is read all the same, since closing a socket with unread bytes resets it,
        and what is under way would be lost.
        """
        assert self._closing is not None
        if self._closing.discarding:
            return
        if self._stream.lost:
            self.abort()
            return
        self._closing.discarding = True
        self._parser = FrameParser(0)  # what the other one kept is nobody's any more
        self._note_kept()
        self._stream.start_reading()
        self._closing.shut_down()
        self._closing.watch()

    def _on_lost(self) -> None:
        """A write has failed: what the kernel still has is read, then it is over.

        The peer may have sent messages, and a close frame, before it went.
        """
        self._client.on_leaving()
        if self._closing is not None and self._closing.discarding:
            self.abort()
        else:
            self._go_on()

    def _on_over(self) -> None:
        """The peer has had its time to answer our close frame."""
        if self._is_ahead_enough():
            # Its answer may stand behind messages for which there is no room.
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

    def drained(self) -> "asyncio.Future[None]":
        """Done when the kernel has taken all that was written before.

        It fails with `ConnectionClosed`.
        """
        return self._stream.drained()

    @property
    def is_held(self) -> bool:
        """Whether nothing is read, so that no pong can be seen."""
        return self._is_ahead_enough()

    def outgoing(self) -> Outgoing:
        """What is under way to the peer."""
        return self._stream.outgoing()

    def send_ping(self) -> bool:
        """Send a ping, unless frames wait: they would keep it back.

        Returns whether it was sent.
        """
        if self.bytes_waiting:
            return False
        try:
            self._stream.write(frame(Opcode.PING, b""))
        except ConnectionClosed:
            return False
        return True

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
        """Send a close frame; the socket goes after the answer, or see `Closing`."""
        self._write_close(close_payload(code, reason)).watch()

    def fail(self, code: int, reason: str) -> None:
        """Send a close frame, if none was sent, then look at nothing that comes."""
        self._stop_taking()
        if self._stream.closed:
            return
        if self._closing is None:
            self._write_close(close_payload(code, reason))
        self._discard()

    def give_up(self) -> None:
        """Write nothing more, and take no more than what has come, which is read."""
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
        with contextlib.suppress(ConnectionClosed):  # the stream tells of its end
            self._stream.write(frame(Opcode.CLOSE, payload))
        self._closing = Closing(self._stream, self._client.send_timeout, self._on_over)
        return self._closing


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
