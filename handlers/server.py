"""An HTTP/1.1 server on asyncio protocols, in front of the same `Application`.

httptools parses, in C, what Tornado's own server parses in Python; handlers see
no difference. A send, which is what a backend asks for all day, is answered
straight from the parser where `quick` knows the answer, and by its handler where
not. `handlers.listener` accepts the connections. See docs/decisions/009.
"""

import asyncio
import logging
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Protocol

import httptools
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, StreamClosedError
from tornado.web import Application

logger = logging.getLogger(__name__)

IDLE_TIMEOUT = 120.0  # seconds between two requests of one connection
ANSWER_TIMEOUT = 60.0  # seconds for an answer to be taken
LINGER_TIMEOUT = 2.0  # seconds in which a peer may see why it is closed
TICK = 0.5  # seconds between two looks at who is late
MAX_PIPELINED = 16  # requests of one connection that wait for the one before

SWITCHING_PROTOCOLS = 101
LINE_END = re.compile(r"[\r\n\0]")


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """What every request is held to: seconds, and bytes."""

    header_timeout: float
    body_timeout: float
    max_header_size: int
    max_body_size: int


class QuickAnswer(Protocol):
    """An answer that needs no handler."""

    @property
    def status(self) -> int: ...

    @property
    def start(self) -> bytes:
        """Its status line."""

    @property
    def rest(self) -> bytes:
        """Its other headers, the empty line and its body."""


class Request:
    """One request as it comes in; `headers` are as on the wire."""

    __slots__ = (
        "chunks",
        "complete",
        "headers",
        "keep_alive",
        "length",
        "method",
        "quick",
        "size",
        "target",
        "upgrade",
        "version",
    )

    def __init__(self) -> None:
        self.method = self.version = ""
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.size = 0  # bytes of its line and headers
        self.chunks: list[bytes] = []
        self.length = 0  # bytes of its body so far
        self.complete = self.keep_alive = self.upgrade = False
        self.quick: Quick | None = None  # what answers it without a handler

    def body(self) -> bytes:
        """All of it."""
        return self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)

    def framing(self) -> list[tuple[bytes, bytes]]:
        """The headers that say where its body ends, if it has one."""
        return [
            (name, value)
            for name, value in self.headers
            if name.lower() == b"transfer-encoding"
            or (name.lower() == b"content-length" and value.strip(b"0"))
        ]

    def expects_continue(self) -> bool:
        """Whether its body waits for a word (RFC 9110, section 10.1.1)."""
        return any(
            name.lower() == b"expect" and value.lower() == b"100-continue"
            for name, value in self.headers
        )


# Answers a whole body; None leaves the request to its handler after all.
Quick = Callable[[bytes], QuickAnswer | Awaitable[QuickAnswer] | None]


class RequestServer:
    """Serves requests on the sockets that it is given.

    `quick` gives what answers a request without a handler, by its head, or None.
    `log` gets method, target and status of what was answered like that.
    """

    def __init__(
        self,
        application: Application,
        bounds: RequestBounds,
        quick: Callable[[Request], Quick | None] = lambda request: None,
        log: Callable[[str, str, int], None] = lambda method, target, status: None,
    ) -> None:
        self.application = application
        self.bounds = bounds
        self.quick = quick
        self.log = log
        # Kept, since asking for it is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.connections: set[RequestConnection] = set()
        self._ticking: asyncio.TimerHandle | None = None
        # While their TLS handshakes go on; they end by themselves.
        self._beginning: set[asyncio.Task[None]] = set()
        self._second = 0
        self._date = b""

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve a connection that was accepted."""
        task = self.loop.create_task(self._begin(accepted, tls))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        connection = RequestConnection(self, "https" if tls else "http")
        try:
            await self.loop.connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=tls,
                ssl_handshake_timeout=self.bounds.header_timeout if tls else None,
                ssl_shutdown_timeout=LINGER_TIMEOUT if tls else None,
            )
        except OSError as error:  # TLS failed, or the peer has gone
            logger.debug("no connection: %s", getattr(error, "reason", error))
            sock.close()
        except asyncio.CancelledError:
            # Its first request may be at work already, and uvloop now closes the
            # transport without a word to its protocol.
            connection.connection_lost(None)
            raise

    def add(self, connection: "RequestConnection") -> None:
        """Look after a connection's deadlines."""
        self.connections.add(connection)
        if self._ticking is None:
            self._ticking = self.loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        now = self.loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.abort()
        self._ticking = None
        if self.connections:
            self._ticking = self.loop.call_later(TICK, self._tick)

    def date(self) -> bytes:
        """The `Date` header, which changes once a second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = b"Date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._date

    async def close_all_connections(self) -> None:
        """Close them at once."""
        await asyncio.sleep(0)  # for each that begins to have its socket in hand
        for task in list(self._beginning):
            task.cancel()
        await asyncio.gather(*self._beginning, return_exceptions=True)
        for connection in list(self.connections):
            connection.abort()
        if self._ticking is not None:
            self._ticking.cancel()


@dataclass(slots=True)
class _Context:
    """What Tornado's requests want to know of their connection."""

    remote_ip: str
    protocol: str


class RequestConnection(asyncio.Protocol, HTTPConnection):
    """One connection: requests in their order, each answered before the next."""

    def __init__(self, server: RequestServer, protocol: str) -> None:
        self.context = _Context("", protocol)
        self.deadline = float("inf")  # on the loop's clock; late, it is closed
        self._server = server
        self._transport: Any = None
        self._parser: Any = None  # while it is connected, since it calls back here
        self._reading: Request | None = None  # whose end has not come
        self._resuming = False  # the parser reads what stands in for a head
        self._waiting: deque[Request] = deque()
        self._unparsed: bytearray | None = None  # behind a request to upgrade
        self._broken = b""  # the last answer, to what is no HTTP
        self._ended = False  # the peer says nothing more
        self._closing = self._reading_paused = self._writing_paused = False
        # For whom writes more while the peer has not taken what was written.
        self._taken: asyncio.Future[None] | None = None

        # Of the request that is being answered.
        self._current: Request | None = None
        self._delegate: HTTPMessageDelegate | None = None
        self._prepared = False
        self._answered = False  # its start is on its way
        self._chunked = False
        self._keep_alive = False
        self._switch = b""  # a 101, which leaves with the socket
        self._body_limit = 0
        self._on_close: Callable[[], None] | None = None
        self._sending: asyncio.Task[None] | None = None

    # What the transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        peer = transport.get_extra_info("peername")
        self.context.remote_ip = peer[0] if isinstance(peer, tuple) else ""
        self.deadline = self._now() + self._server.bounds.header_timeout
        self._server.add(self)

    def data_received(self, data: bytes) -> None:
        if self._closing or self._broken:
            return
        if self._unparsed is not None:
            self._unparsed += data
            self._pause_if_full()
        else:
            self._parse(data)
            self._pump()

    def eof_received(self) -> bool:
        """A peer that has said all may still hear the answer; not by TLS."""
        if self._closing or self._unparsed is not None or self._has_tls():
            return False
        self._ended = True
        reading, self._reading = self._reading, None
        if reading is not None:
            if reading is self._current:
                return False
            if self._waiting and self._waiting[-1] is reading:
                self._waiting.pop()
        return self._current is not None or bool(self._waiting)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._closing = True
        self._waiting.clear()
        if self._sending is not None:
            self._sending.cancel()
        if self._taken is not None and not self._taken.done():
            self._taken.set_exception(StreamClosedError())
            self._taken.exception()  # whoever does not await it need not hear of it
        if self._current is not None:
            self._tell_of_close(self._current)
        self._delegate = self._on_close = None
        self._parser = None

    def _tell_of_close(self, request: Request) -> None:
        delegate, on_close = self._delegate, self._on_close
        self._delegate = self._on_close = None
        if delegate is not None and not request.complete:
            delegate.on_connection_close()
        elif on_close is not None:
            on_close()

    def pause_writing(self) -> None:
        self._writing_paused = True
        self.deadline = self._now() + ANSWER_TIMEOUT

    def resume_writing(self) -> None:
        self._writing_paused = False
        taken, self._taken = self._taken, None
        if taken is not None and not taken.done():
            taken.set_result(None)
        self._pump()

    def _has_tls(self) -> bool:
        return self._transport.get_extra_info("sslcontext") is not None

    # What the parser tells.

    def _parse(self, data: bytes) -> None:
        before = self._reading
        length = before.length if before is not None else 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._after_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._break(b"400 Bad Request")
            return
        reading = self._reading
        if reading is None:
            return
        bounds = self._server.bounds
        if reading is not before:
            if not reading.version:
                latest = self._now() + bounds.header_timeout
                self.deadline = min(self.deadline, latest)
        elif reading.length == length:
            # All of it is of one line: a header, a chunk's extension or a trailer.
            reading.size += len(data)
            if reading.size > bounds.max_header_size:
                self._break(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        if not self._resuming:
            self._reading = Request()

    def on_url(self, target: bytes) -> None:
        if not self._resuming and self._reading is not None:
            self._reading.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._reading
        if self._resuming or request is None:
            return
        if not request.version:  # else it is a trailer, and nobody's
            request.headers.append((name, value.strip(b" \t")))
        request.size += len(name) + len(value) + 4  # with the colon and the line's end
        if request.size + len(request.target) > self._server.bounds.max_header_size:
            self._break(b"431 Request Header Fields Too Large")
            raise ValueError("too many headers")  # for the parser to stop

    def on_headers_complete(self) -> None:
        request = self._reading
        if self._resuming or request is None:
            return
        parser = self._parser
        request.method = parser.get_method().decode("latin-1")
        request.version = parser.get_http_version()
        request.keep_alive = parser.should_keep_alive()
        request.upgrade = parser.should_upgrade()
        if request.version not in ("1.0", "1.1"):
            raise ValueError("no version of ours")
        request.quick = self._server.quick(request)
        self._waiting.append(request)
        self.deadline = self._now() + self._server.bounds.body_timeout

    def on_body(self, body: bytes) -> None:
        request = self._reading
        if request is not None and not self._closing:
            request.chunks.append(body)
            request.length += len(body)

    def on_message_complete(self) -> None:
        request = self._reading
        if self._resuming or request is None:
            return
        if request.upgrade and request.framing():
            return  # its body follows, whatever the parser thinks
        request.complete = True
        self._reading = None

    def _after_upgrade(self, data: bytes) -> None:
        """Behind a request to upgrade the parser stops.

        One with a body is for no protocol of ours: "A server MAY ignore a
        received Upgrade header field" (RFC 9110, section 7.8).
        """
        request = self._reading
        self._parser = httptools.HttpRequestParser(self)
        if request is None:
            self._unparsed = bytearray(data)
            return
        if request.method != "POST":
            self._break(b"400 Bad Request")
            return
        request.upgrade = False
        framing = b"".join(b"%b: %b\r\n" % header for header in request.framing())
        self._resuming = True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        except httptools.HttpParserError:
            self._break(b"400 Bad Request")
            return
        finally:
            self._resuming = False
        self._parse(data)

    def _break(self, status: bytes) -> None:
        """Nothing more can be read: the last answer, after those that are due."""
        if self._broken:
            return
        logger.debug("malformed request: %s", status.decode())
        self._broken = b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n" % status
        reading, self._reading = self._reading, None
        if reading is None:
            return
        if reading is self._current:
            self._give_up(reading)
        elif self._waiting and self._waiting[-1] is reading:
            self._waiting.pop()

    def _give_up(self, request: Request) -> None:
        """The request at hand can't be completed."""
        answered = self._answered
        self._tell_of_close(request)
        self._current = None
        self._waiting.clear()
        if not answered:
            self._transport.write(self._broken)
        self._linger()

    # From one request to the next.

    def _pump(self) -> None:
        """Go on with the request at hand, and begin those that wait."""
        if self._current is not None and self._prepared:
            self._go_on(self._current)
        while (
            self._current is None
            and self._waiting
            and not (self._closing or self._writing_paused)
        ):
            request = self._waiting[0]
            answer = None
            if request.quick is not None:
                if request.complete:
                    answer = request.quick(request.body())
                elif request.length <= self._server.bounds.max_body_size:
                    break
            self._waiting.popleft()
            if answer is None:
                self._begin(request)
            elif isinstance(answer, Awaitable):
                self._current = request
                self._sending = self._server.loop.create_task(
                    self._answer_later(request, answer)
                )
            else:
                self._answer(request, answer)
        if self._closing or self._writing_paused:
            return
        if self._current is not None or self._waiting:
            if self._reading is None:  # all that is said waits for us
                self.deadline = float("inf")
        elif self._broken:
            self._transport.write(self._broken)
            self._linger()
            return
        elif self._ended:
            self.close()
            return
        elif self._reading is None and self._answered:
            self.deadline = self._now() + IDLE_TIMEOUT
        self._pause_if_full()

    def _pause_if_full(self) -> None:
        full = len(self._waiting) > MAX_PIPELINED or (
            self._unparsed is not None
            and len(self._unparsed) > self._server.bounds.max_header_size
        )
        if full == self._reading_paused or self._ended or self._transport.is_closing():
            return
        self._reading_paused = full
        if full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # Without a handler.

    def _answer(self, request: Request, answer: QuickAnswer) -> None:
        server = self._server
        self._answered = True
        self._transport.write(answer.start + server.date() + answer.rest)
        server.log(request.method, request.target.decode("latin-1"), answer.status)

    async def _answer_later(
        self, request: Request, answer: Awaitable[QuickAnswer]
    ) -> None:
        self._answer(request, await answer)
        self._current = self._sending = None
        self._pump()

    # With a handler, which sees an `HTTPConnection`.

    def _begin(self, request: Request) -> None:
        self._current = request
        self._prepared = self._answered = self._chunked = False
        self._keep_alive = request.keep_alive
        self._body_limit = self._server.bounds.max_body_size
        headers = HTTPHeaders()
        try:
            for name, value in request.headers:
                headers.add(name.decode("latin-1"), value.decode("latin-1"))
            self._delegate = self._server.application.start_request(self, self)
            ready = self._delegate.headers_received(
                RequestStartLine(
                    request.method,
                    request.target.decode("latin-1"),
                    f"HTTP/{request.version}",
                ),
                headers,
            )
        except HTTPInputError:
            self._delegate = self._on_close = None
            self._refuse(request, b"400 Bad Request")
            return
        if ready is None:
            self._on_ready(request)
        else:
            asyncio.ensure_future(ready).add_done_callback(
                lambda _: self._on_ready(request)
            )

    def _on_ready(self, request: Request) -> None:
        if request is not self._current:
            return
        self._prepared = True
        if not (self._answered or request.complete) and request.expects_continue():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._go_on(request)

    def _go_on(self, request: Request) -> None:
        delegate = self._delegate
        if delegate is None:
            return
        chunks, request.chunks = request.chunks, []
        for chunk in chunks:
            delegate.data_received(chunk)
        if self._closing or request is not self._current:
            return
        if request.length > self._body_limit:
            self._refuse(request, b"413 Content Too Large")
        elif request.complete:
            self._delegate = None
            delegate.finish()

    def _refuse(self, request: Request, status: bytes) -> None:
        """It is malformed as a whole, or too large for a handler that keeps it."""
        self._reading = request
        self._broken = b""  # if so, it was by what came behind this one
        self._break(status)

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Call it when the peer goes before it is answered."""
        self._on_close = callback

    def set_max_body_size(self, size: int) -> None:
        """Of the request at hand, in bytes."""
        self._body_limit = size

    def set_body_timeout(self, timeout: float) -> None:
        """Of the request at hand, in seconds from now."""
        self.deadline = self._now() + timeout

    def write_headers(
        self,
        start_line: Any,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> "asyncio.Future[None]":
        """Answer the request at hand; with its body, or the body's first part."""
        assert isinstance(start_line, ResponseStartLine)
        request = self._current
        if self._closing or request is None:
            return _closed(self._server.loop)
        self._answered = True
        status = start_line.code
        self._keep_alive &= headers.get("Connection", "").lower() != "close"
        self._chunked = (
            request.version == "1.1"
            and "Content-Length" not in headers
            and status not in (204, 304)
            and status >= 200
            and request.method != "HEAD"
        )
        lines = [f"HTTP/1.1 {status} {start_line.reason}"]
        lines += (f"{name}: {value}" for name, value in headers.get_all())
        if self._chunked:
            lines.append("Transfer-Encoding: chunked")
        if status == SWITCHING_PROTOCOLS:
            pass
        elif not self._keep_alive:
            if "Connection" not in headers:
                lines.append("Connection: close")
        elif request.version == "1.0":
            lines.append("Connection: keep-alive")
        if any(map(LINE_END.search, lines)):
            raise ValueError("a header has a line's end in it")
        data = "\r\n".join((*lines, "", "")).encode("latin-1")
        if status == SWITCHING_PROTOCOLS:
            self._switch = data
            return _done(self._server.loop)
        return self._write(data + self._part(chunk or b""))

    def write(self, chunk: bytes) -> "asyncio.Future[None]":
        """Another part of the answer's body."""
        if self._closing or self._current is None:
            return _closed(self._server.loop)
        return self._write(self._part(chunk))

    def finish(self) -> None:
        """The answer is complete: the next request's turn."""
        request = self._current
        if self._closing or request is None or self._switch:
            return
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        self._current = self._delegate = self._on_close = None
        if not request.complete or not self._keep_alive:
            if request.complete:
                self.close()
            else:
                self._linger()
            return
        if self._unparsed is not None:  # it was not upgraded
            data, self._unparsed = bytes(self._unparsed), None
            self._parse(data)
        self._pump()

    def detach(self) -> IOStream:
        """Hand over the socket, with what was read of it and what has to leave.

        Raises `StreamClosedError` where it has gone.
        """
        if self._closing or self._transport.is_closing():
            raise StreamClosedError
        self._transport.pause_reading()
        try:
            # The transport closes its own descriptor, whenever it does.
            fd = os.dup(self._transport.get_extra_info("socket").fileno())
        except OSError as error:
            self.abort()
            raise StreamClosedError(error) from error
        stream = IOStream(
            socket.socket(fileno=fd),
            max_buffer_size=2 * self._server.bounds.max_header_size,
        )
        if self._unparsed:
            stream._read_buffer += self._unparsed
            stream._read_buffer_size += len(self._unparsed)
        self._current = self._delegate = self._on_close = None
        self.abort()
        stream.write(self._switch)
        return stream

    def _part(self, chunk: bytes) -> bytes:
        if self._chunked and chunk:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        return chunk

    def _write(self, data: bytes) -> "asyncio.Future[None]":
        """Done when more may be written, at once for all but long answers."""
        self._transport.write(data)
        if not self._writing_paused:
            return _done(self._server.loop)
        if self._taken is None or self._taken.done():
            self._taken = self._server.loop.create_future()
        return self._taken

    # The end.

    def close(self) -> None:
        """Close, when what was written has left."""
        self._closing = True
        self.deadline = self._now() + ANSWER_TIMEOUT
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._server.connections.discard(self)
        self._transport.abort()

    def _linger(self) -> None:
        """Close for writing, and drop what still comes.

        Closing a socket with unread bytes resets it, and the peer would not
        see its answer (RFC 9112, section 9.6).
        """
        if self._ended or self._has_tls():
            self.close()
            return
        self._closing = True
        self._transport.write_eof()
        if self._reading_paused:
            self._transport.resume_reading()
        self.deadline = self._now() + LINGER_TIMEOUT

    def _now(self) -> float:
        return self._server.loop.time()


def _done(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    future: asyncio.Future[None] = loop.create_future()
    future.set_result(None)
    return future


def _closed(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    future: asyncio.Future[None] = loop.create_future()
    future.set_exception(StreamClosedError())
    future.exception()  # whoever does not await it need not hear of it
    return future
