"""Tornado's own HTTP server, held to our bounds and rules.

It serves where `--http_server=tornado` says so, and answers as `handlers.http.server`
does: the tests of both run over the same requests.
"""

import asyncio
import contextlib
import itertools
import re
import socket
import ssl
from types import TracebackType
from typing import Any

from tornado.http1connection import (
    HTTP1Connection,
    HTTP1ServerConnection,
    is_transfer_encoding_chunked,
)
from tornado.httpserver import HTTPServer, _HTTPRequestContext
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import (
    BaseIOStream,
    IOStream,
    SSLIOStream,
    StreamClosedError,
    UnsatisfiableReadError,
)
from tornado.web import Application

from handlers.http.body_budget import BodyBudget
from handlers.http.bounds import (
    ANSWER_TIMEOUT,
    IDLE_TIMEOUT,
    LINES_PER_PIECE,
    MAX_HEADERS,
    RequestBounds,
)
from handlers.http.deadlines import Deadlines
from handlers.http.response import SWITCHING_PROTOCOLS, add_option

TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"
)
PIECES_READ_AT_THE_END = 16  # of 64 KiB, of a peer that is refused
BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
# What llhttp takes for a request line, which Tornado is less strict with: CONNECT
# has an authority, all else a path, a URL or an asterisk, of visible ASCII.
REQUEST_LINE = re.compile(
    r"(?:CONNECT [!-~]+|(?!CONNECT )[A-Z-]+ (?:/[!-~]*|\*|[a-z]+://[!-~]+))"
    r" HTTP/1\.[01]",
    re.IGNORECASE,
)
# RFC 9112, section 7.1.
CHUNK_LINE = re.compile(rb"0*([0-9A-Fa-f]{1,15})(?:;[^\r\n\0]*)?\r\n")
TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n")


class TornadoServer(HTTPServer):
    """Tornado's server, whose connections end by our deadlines."""

    def initialize(  # type: ignore[override] # of what HTTPServer offers, this
        self, application: Application, bounds: RequestBounds
    ) -> None:
        super().initialize(
            application,
            max_header_size=bounds.max_header_size,
            max_body_size=bounds.max_body_size,
            max_buffer_size=2 * bounds.max_header_size,
        )
        # Tornado's own timers would judge before they read.
        self.conn_params.header_timeout = self.conn_params.body_timeout = None
        self._bounds = bounds
        self._deadlines: Deadlines | None = None

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve a connection that was accepted."""
        if tls is None:
            stream: IOStream = _Stream(accepted, max_buffer_size=self.max_buffer_size)
        else:
            try:
                wrapped = tls.wrap_socket(
                    accepted, server_side=True, do_handshake_on_connect=False
                )
            except OSError:  # it has gone already
                accepted.close()
                return
            stream = _TLSStream(wrapped, max_buffer_size=self.max_buffer_size)
        self.handle_stream(stream, address)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        if self._deadlines is None:
            self._deadlines = Deadlines(asyncio.get_running_loop())
        context = _HTTPRequestContext(
            stream, address, self.protocol, self.trusted_downstream
        )
        connection = _Connection(stream, self.conn_params, context, self._bounds)
        self._connections.add(connection)
        self._deadlines.add(connection)
        connection.start_serving(self)

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        if request_conn.stream.closed():
            return _Nobody(request_conn)
        return super().start_request(server_conn, request_conn)

    def make_room(self) -> None:
        """Close some connections that wait for their peers."""
        if self._deadlines is not None:
            self._deadlines.make_room()

    def on_close(self, server_conn: object) -> None:
        if self._deadlines is not None and isinstance(server_conn, _Connection):
            self._deadlines.discard(server_conn)
        super().on_close(server_conn)


class _Bounded(BaseIOStream):
    """Answers what is beyond a bound before it closes, and keeps nothing of it."""

    def close(
        self,
        exc_info: bool
        | BaseException
        | tuple[type[BaseException] | None, BaseException | None, TracebackType | None]
        | None = False,
    ) -> None:
        if isinstance(exc_info, UnsatisfiableReadError) and not self.closed():
            if not self.writing():
                self._refuse()
            # The error would keep us, by its traceback, until cycles are collected.
            exc_info = False
            self._read_buffer = bytearray()
            self._read_buffer_size = 0
        super().close(exc_info)

    def _refuse(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the peer has gone
            self.write_to_fd(memoryview(TOO_LARGE))
            # Unread bytes would reset the connection, and the answer be lost.
            for _ in range(PIECES_READ_AT_THE_END):
                if not self.read_from_fd(bytearray(self.read_chunk_size)):
                    break


class _Stream(_Bounded, IOStream):
    """A plain connection."""


class _TLSStream(_Bounded, SSLIOStream):
    """One by TLS."""


class _Connection(HTTP1ServerConnection):
    """One connection; `deadline` is on the loop's clock."""

    def __init__(
        self, stream: IOStream, params: Any, context: object, bounds: RequestBounds
    ) -> None:
        super().__init__(stream, params, context)
        self.bounds = bounds
        self._loop = asyncio.get_running_loop()
        self._wanted_by = 0.0  # what the peer is to send next
        self._taken_by: float | None = None  # what it has not taken yet
        self._exchange: _Exchange | None = None
        self.expect(bounds.header_timeout)

    @property
    def deadline(self) -> float:
        """When it is late; asked for at each tick."""
        exchange = self._exchange
        if not self.stream.closed() and self.stream.writing():
            if self._taken_by is None:
                self._taken_by = self._now() + ANSWER_TIMEOUT
            return self._taken_by
        self._taken_by = None
        if exchange is not None and exchange._read_finished:
            return float("inf")  # all that is said waits for us
        return self._wanted_by

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        if self._taken_by is not None:
            self._taken_by = deadline
        else:
            self._wanted_by = deadline

    def expect(self, timeout: float) -> None:
        """The peer is to have sent what it has begun in so many seconds."""
        self._wanted_by = self._now() + timeout

    def abort(self) -> None:
        """Close at once."""
        self.stream.close()

    def _now(self) -> float:
        return self._loop.time()

    async def _server_request_loop(
        self, delegate: HTTPServerConnectionDelegate
    ) -> None:
        try:
            again = True
            while again:
                self._exchange = exchange = _Exchange(self)
                try:
                    again = await exchange.read_response(
                        delegate.start_request(self, exchange)
                    )
                except (StreamClosedError, UnsatisfiableReadError):
                    return
                self._exchange = None
                self.expect(IDLE_TIMEOUT)
        finally:
            delegate.on_close(self)


class _Exchange(HTTP1Connection):
    """One request and its answer."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__(
            connection.stream, False, connection.params, connection.context
        )
        self._connection = connection

    def _parse_headers(self, data: bytes) -> tuple[str, HTTPHeaders]:
        # As handlers.http.server: what a proxy takes for one header must not be two.
        if BARE_LINE_FEED.search(data.lstrip(b"\r\n")):
            raise HTTPInputError("a line feed alone")
        if data.count(b"\n") > MAX_HEADERS + 2:
            self.stream.close(UnsatisfiableReadError("too many headers"))
            raise StreamClosedError
        start_line, headers = super()._parse_headers(data)
        if not REQUEST_LINE.fullmatch(start_line):
            raise HTTPInputError("no request line")
        length = headers.get("Content-Length", "0")
        is_chunked = is_transfer_encoding_chunked(headers)  # raises, too
        if not (length.isascii() and length.isdigit()) or (
            is_chunked and "Content-Length" in headers
        ):
            raise HTTPInputError("no length, or several")
        has_body = is_chunked or length.strip("0") != ""
        options = re.split(r"[ \t]*,[ \t]*", headers.get("Connection", "").lower())
        asks = "Upgrade" in headers and "upgrade" in options
        if asks and has_body and not start_line.startswith("POST "):
            raise HTTPInputError("a request for another protocol has no body")
        if headers.get("Expect", "").lower() == "100-continue":
            # Tornado knows one spelling, by which it asks for a body that may not be.
            headers["Expect"] = "100-continue" if has_body else "100-Continue"
        self._connection.expect(self._connection.bounds.body_timeout)
        return start_line, headers

    def _can_keep_alive(
        self, start_line: RequestStartLine, headers: HTTPHeaders
    ) -> bool:
        # A proxy that tunnels upgrades goes by the request; see handlers.http.server.
        asks = "Upgrade" in headers or start_line.method == "CONNECT"
        return not asks and super()._can_keep_alive(start_line, headers)

    async def _read_chunked_body(self, delegate: HTTPMessageDelegate) -> None:
        """With extensions and trailers, which Tornado refuses and nobody reads."""
        stream, limit = self.stream, self.params.max_header_size
        total = 0
        for number in itertools.count(1):
            line = await stream.read_until(b"\r\n", max_bytes=limit)
            match = CHUNK_LINE.fullmatch(line)
            if match is None:
                raise HTTPInputError("no chunk")
            left = int(match[1], 16)
            if left == 0:
                break
            total += left
            if total > self._max_body_size:
                raise HTTPInputError("chunked body too large")
            while left:
                size = min(left, self.params.chunk_size)
                part = await stream.read_bytes(size, partial=True)
                left -= len(part)
                await self._deliver_body(delegate, part)
            if await stream.read_bytes(2) != b"\r\n":
                raise HTTPInputError("a chunk without its end")
            if number % LINES_PER_PIECE == 0:
                await asyncio.sleep(0)  # what has come already waits for nobody else
        for _ in range(MAX_HEADERS):
            line = await stream.read_until(b"\r\n", max_bytes=limit)
            if line == b"\r\n":
                return
            limit -= len(line)
            if limit <= 0 or not TRAILER.fullmatch(line):
                raise HTTPInputError("no trailer")
            await asyncio.sleep(0)
        raise HTTPInputError("too many trailers")

    @property
    def descriptor(self) -> int:
        """The number of its connection's socket; -1 once that is closed."""
        sock = self.stream.socket
        return -1 if sock is None else sock.fileno()

    @property
    def body_budget(self) -> BodyBudget:
        """What all bodies are counted in, until handlers take them."""
        return self._connection.bounds.body_budget

    def set_body_timeout(self, timeout: float) -> None:
        """In seconds from now."""
        self._connection.expect(timeout)

    def write_headers(
        self,
        start_line: RequestStartLine | ResponseStartLine,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> Any:
        assert isinstance(start_line, ResponseStartLine)
        ends = self._disconnect_on_finish and start_line.code != SWITCHING_PROTOCOLS
        if ends:
            add_option(headers, "close")
        # Tornado would say that in place of any other option.
        self._disconnect_on_finish = False
        try:
            return super().write_headers(start_line, headers, chunk)
        finally:
            self._disconnect_on_finish = ends


class _Nobody(HTTPMessageDelegate):
    """Whom a request reaches that was read before its connection was closed.

    Tornado would serve it, unanswered. "The server [...] MUST NOT process any
    further requests received on that connection" (RFC 9112, section 9.6).
    """

    def __init__(self, connection: HTTP1Connection) -> None:
        self._connection = connection

    def headers_received(self, start_line: object, headers: object) -> None:
        self._connection.detach()  # so that nothing more is read
