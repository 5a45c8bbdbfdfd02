"""Tornado's own HTTP server, with the relay's limits and rules.

`--http_server=tornado` selects it. It sends the same responses as
`handlers.http.server`: the same tests run against both.
"""

import asyncio
import contextlib
import itertools
import logging
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
from handlers.http.response import MALFORMED, SWITCHING_PROTOCOLS, add_option
from handlers.http.sockets import TakenSocket, send_close_notify

logger = logging.getLogger(__name__)

TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"
)
PIECES_READ_AT_THE_END = 16  # reads of 64 KiB before a rejected connection is closed
BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
# A request line as llhttp accepts it; Tornado is less strict. The target is an
# authority for CONNECT, otherwise a path, a URL or an asterisk, in visible ASCII.
REQUEST_LINE = re.compile(
    r"(?:CONNECT [!-~]+|(?!CONNECT )[A-Z-]+ (?:/[!-~]*|\*|[a-z]+://[!-~]+))"
    r" HTTP/1\.[01]",
    re.IGNORECASE,
)
# RFC 9112, section 7.1.
CHUNK_LINE = re.compile(rb"0*([0-9A-Fa-f]{1,15})(?:;[^\r\n\0]*)?\r\n")
TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n")


class TornadoServer(HTTPServer):
    """Tornado's server; `Deadlines` closes its connections when a peer is late."""

    def initialize(  # type: ignore[override] # fewer arguments than HTTPServer's
        self, application: Application, bounds: RequestBounds
    ) -> None:
        super().initialize(
            application,
            max_header_size=bounds.max_header_size,
            max_body_size=bounds.max_body_size,
            max_buffer_size=2 * bounds.max_header_size,
        )
        # Tornado's own timers would close a connection before reading what arrived.
        self.conn_params.header_timeout = self.conn_params.body_timeout = None
        self._bounds = bounds
        self._deadlines: Deadlines | None = None

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve an accepted connection; with TLS if `tls` is set."""
        if tls is None:
            stream: IOStream = _Stream(accepted, max_buffer_size=self.max_buffer_size)
        else:
            try:
                wrapped = tls.wrap_socket(
                    accepted, server_side=True, do_handshake_on_connect=False
                )
            except OSError:  # the peer has disconnected already
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
        """Close some of the connections that wait for their peers, if any do."""
        if self._deadlines is not None:
            self._deadlines.make_room()

    def on_close(self, server_conn: object) -> None:
        if self._deadlines is not None and isinstance(server_conn, _Connection):
            self._deadlines.discard(server_conn)
        super().on_close(server_conn)


class _Bounded(BaseIOStream):
    """Answers a request that exceeds a limit before it closes, and frees its bytes."""

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
            # The error's traceback refers to this stream: it would not be freed
            # until the garbage collector runs.
            exc_info = False
            self._read_buffer = bytearray()
            self._read_buffer_size = 0
        super().close(exc_info)

    def _refuse(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the peer has disconnected
            self.write_to_fd(memoryview(TOO_LARGE))
            # Unread bytes would reset the connection, and the response would be lost.
            for _ in range(PIECES_READ_AT_THE_END):
                if not self.read_from_fd(bytearray(self.read_chunk_size)):
                    break


class _Stream(_Bounded, IOStream):
    """A plain connection."""


class _TLSStream(_Bounded, SSLIOStream):
    """A TLS connection, which ends with close_notify."""

    def close_fd(self) -> None:
        if not self._ssl_accepting and not self.writing():
            send_close_notify(self.socket)
        super().close_fd()


class _Connection(HTTP1ServerConnection):
    """One connection, closed by `Deadlines` when its peer is late."""

    def __init__(
        self, stream: IOStream, params: Any, context: object, bounds: RequestBounds
    ) -> None:
        super().__init__(stream, params, context)
        self.bounds = bounds
        self._loop = asyncio.get_running_loop()
        # Both on the loop's clock: until when the peer must send what comes next, and
        # must have taken the response; None while it has taken all.
        self._wanted_by = 0.0
        self._taken_by: float | None = None
        self._exchange: _Exchange | None = None
        self.expect(bounds.header_timeout)

    @property
    def deadline(self) -> float:
        """When the peer is late, on the loop's clock; read at each tick."""
        exchange = self._exchange
        if not self.stream.closed() and self.stream.writing():
            if self._taken_by is None:
                self._taken_by = self._now() + ANSWER_TIMEOUT
            return self._taken_by
        self._taken_by = None
        if exchange is not None and exchange._read_finished:
            return float("inf")  # the peer waits for the relay
        return self._wanted_by

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        if self._taken_by is not None:
            self._taken_by = deadline
        else:
            self._wanted_by = deadline

    def expect(self, timeout: float) -> None:
        """Give the peer `timeout` seconds to complete what it has begun to send."""
        self._wanted_by = self._now() + timeout

    def abort(self) -> None:
        """Close immediately."""
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
    """One request and its response."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__(
            connection.stream, False, connection.params, connection.context
        )
        self._connection = connection

    def _parse_headers(self, data: bytes) -> tuple[str, HTTPHeaders]:
        # As in handlers.http.server: a header with a bare line feed is one header
        # for a proxy, and must not be two here.
        if BARE_LINE_FEED.search(data.lstrip(b"\r\n")):
            raise HTTPInputError("a line feed alone")
        if data.count(b"\n") > MAX_HEADERS + 2:
            self.stream.close(UnsatisfiableReadError("too many headers"))
            raise StreamClosedError
        start_line, headers = super()._parse_headers(data)
        if not REQUEST_LINE.fullmatch(start_line):
            raise HTTPInputError("no request line")
        length = headers.get("Content-Length", "0")
        is_chunked = is_transfer_encoding_chunked(headers)  # raises if it is invalid
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
            # Tornado sends 100 (Continue) for this spelling only, even without a body.
            headers["Expect"] = "100-continue" if has_body else "100-Continue"
        self._connection.expect(self._connection.bounds.body_timeout)
        return start_line, headers

    def _can_keep_alive(
        self, start_line: RequestStartLine, headers: HTTPHeaders
    ) -> bool:
        # After such a request a proxy may tunnel bytes; see handlers.http.server.
        asks = "Upgrade" in headers or start_line.method == "CONNECT"
        return not asks and super()._can_keep_alive(start_line, headers)

    async def _read_chunked_body(self, delegate: HTTPMessageDelegate) -> None:
        """Read a chunked body; skip extensions and trailers, which Tornado rejects."""
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
                # Reading what arrived already never suspends: give others a turn.
                await asyncio.sleep(0)
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
        """File descriptor of the connection's socket; -1 once it is closed."""
        sock = self.stream.socket
        return -1 if sock is None else sock.fileno()

    @property
    def is_over(self) -> bool:
        """Whether the connection is closed."""
        return self.stream is None or self.stream.closed()

    def take_socket(self) -> TakenSocket | None:
        """Return the socket for another protocol; None if the connection is closed."""
        stream = self.detach()
        if stream.closed():
            return None
        if stream._state is not None:
            stream.io_loop.remove_handler(stream.fileno())
            stream._state = None
        unsent = b""
        if stream._write_buffer:
            with stream._write_buffer.peek(len(stream._write_buffer)) as waiting:
                unsent = bytes(waiting)
        taken = TakenSocket(stream.socket, bytes(stream._read_buffer), unsent)
        stream.socket = None  # type: ignore[assignment] # as IOStream.close_fd does
        stream._closed = True
        return taken

    @property
    def body_budget(self) -> BodyBudget:
        """The budget that counts each body until a handler takes it."""
        return self._connection.bounds.body_budget

    def set_body_timeout(self, timeout: float) -> None:
        """Give the peer `timeout` seconds from now to send the body."""
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
        # Otherwise Tornado would send `Connection: close` instead of any other option.
        self._disconnect_on_finish = False
        try:
            return super().write_headers(start_line, headers, chunk)
        finally:
            self._disconnect_on_finish = ends


class _Malformed(logging.Filter):
    """Logs malformed requests as `handlers.http.server` does, instead of Tornado."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Malformed HTTP message"):
            return True
        logger.debug(MALFORMED, "400 Bad Request")
        return False


logging.getLogger("tornado.general").addFilter(_Malformed())


class _Nobody(HTTPMessageDelegate):
    """Drops a request that was read before its connection was closed.

    Tornado would process it, and send no response. "The server [...] MUST NOT process
    any further requests received on that connection" (RFC 9112, section 9.6).
    """

    def __init__(self, connection: HTTP1Connection) -> None:
        self._connection = connection

    def headers_received(self, start_line: object, headers: object) -> None:
        self._connection.detach()  # stops reading
