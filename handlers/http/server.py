"""An HTTP/1.1 server on plain sockets, for the same `Application` as Tornado's.

httptools parses in C what Tornado's own server parses in Python; handlers see no
difference. A send, by far the most frequent callback, is answered without a handler
if `fast` can. `listener` accepts the connections, `sockets` reads and writes them,
`parser` parses requests, `response` answers one. See docs/decisions/009.

A connection parses one request at a time: what follows it stays as bytes, of limited
size, until that request is answered and the peer has read the response.
"""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from tornado.web import Application

from backends.waiting import done_future
from handlers.http.arrivals import Arrivals
from handlers.http.body_budget import RETRY_AFTER
from handlers.http.bounds import ANSWER_TIMEOUT, IDLE_TIMEOUT, RequestBounds
from handlers.http.deadlines import Deadlines
from handlers.http.fast import FastResponse
from handlers.http.parser import MalformedRequest, NamingParser, RequestParser
from handlers.http.plain import MAX_HEAD_SIZE, plain_handshake, plain_request
from handlers.http.request import FastHandler, Request, Response
from handlers.http.response import (
    MALFORMED,
    Connection,
    Context,
    HandlerResponse,
    PendingResponse,
    fail,
)
from handlers.http.sockets import READ_SIZE, SocketConnection, TakenSocket

logger = logging.getLogger(__name__)

LINGER_TIMEOUT = 2.0  # seconds in which a peer may read why the connection closes
# Bytes of one connection that wait behind the current request; then reading stops.
MAX_AHEAD = READ_SIZE
PIECES_PER_TURN = 16  # that one connection parses before others have their turn

Upgrade = Callable[[Connection, Request], bool]


class RequestServer:
    """Serves requests on accepted sockets.

    `fast` returns what can answer a request without a handler, by its head, or
    None. `log` is called with method, target and status of such a response. `upgrade`
    answers a request for another protocol without a handler, now or later; it returns
    False if it cannot.
    """

    def __init__(
        self,
        application: Application,
        bounds: RequestBounds,
        fast: Callable[[Request], FastHandler | None] = lambda request: None,
        log: Callable[[str, str, int], None] = lambda method, target, status: None,
        upgrade: Upgrade | None = None,
        keep_names: bool = False,
    ) -> None:
        """If `keep_names`, requests keep the names of headers as they were written."""
        self.parser_type = NamingParser if keep_names else RequestParser
        self.max_plain_head = min(MAX_HEAD_SIZE, bounds.max_header_size)
        self.application = application
        self.bounds = bounds
        self.fast = fast
        self.log = log
        self.upgrade = upgrade
        self.reads_handshakes = upgrade is not None and not keep_names
        # Kept, since asking for it is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.arrivals = Arrivals(self.loop)
        self.deadlines = Deadlines(self.loop, self.arrivals.read_all)
        self._second = 0
        self._date = b""

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve a connection that was accepted."""
        remote_ip = address[0] if isinstance(address, tuple) else ""
        try:
            connection = RequestConnection(self, accepted, remote_ip, tls)
        except OSError as error:  # the peer has disconnected already
            logger.debug("no connection: %s", getattr(error, "reason", error))
            accepted.close()
            return
        self.deadlines.add(connection)
        self.arrivals.add(connection)

    def date(self) -> bytes:
        """Return the `Date` header, which is built once a second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = b"Date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._date

    def make_room(self) -> None:
        """Close some of the connections that wait for their peers."""
        self.deadlines.make_room()

    async def close_all_connections(self) -> None:
        """Close all connections at once."""
        for connection in list(self.deadlines.connections):
            connection.abort()
        self.arrivals.close()
        self.deadlines.close()


class RequestConnection(SocketConnection):
    """One connection: serves one request after the other.

    What was read waits in `_inbox`. The parser gets pieces of it, of which each ends
    one request at most, once the previous request was answered and the peer has read
    that response. So a peer can have no more stored here than one request, whose
    body is bounded, and `MAX_AHEAD` bytes.
    """

    __slots__ = (
        "_closing",
        "_ended",
        "_inbox",
        "_parser",
        "_rejection",
        "_server",
        "_taken",
        "_turning",
        "deadline",
        "remote_ip",
        "request",
    )

    def __init__(
        self,
        server: RequestServer,
        accepted: socket.socket,
        remote_ip: str,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(server.loop, accepted, tls)
        self.remote_ip = remote_ip
        # On the loop's clock; after it the connection is closed.
        self.deadline = server.loop.time() + server.bounds.header_timeout
        # The current request: its head was parsed, and it is not answered.
        self.request: Request | None = None
        self._server = server
        self._parser: RequestParser | None = None  # until a request is not plain
        self._inbox = bytearray()  # what was read and not parsed
        self._turning = False  # `_on_turn` is scheduled
        self._rejection = b""  # the last response, to bytes that are not HTTP
        self._ended = False  # the peer sends nothing more
        self._closing = False  # what still arrives is discarded
        # For writers that wait until the peer has taken what was written.
        self._taken: asyncio.Future[None] | None = None

    @property
    def context(self) -> Context:
        """What Tornado's requests ask of their connection."""
        return Context(self.remote_ip, "https" if self.has_tls else "http")

    @property
    def bounds(self) -> RequestBounds:
        """Limits of each request."""
        return self._server.bounds

    @property
    def descriptor(self) -> int:
        """File descriptor of the socket."""
        return self._sock.fileno()

    # Called by SocketConnection.

    def room(self) -> int:
        return READ_SIZE if self._closing else MAX_AHEAD - len(self._inbox)

    def on_data(self, data: bytes) -> None:
        if self._closing or self._rejection:
            return
        if self._inbox or self.request is not None or self._unsent is not None:
            self._inbox += data
            self._advance()
            return
        # Usually one complete request, and often a plain one: these are fast paths.
        parser = self._parser
        if (parser is None or parser.partial is None) and (
            self._answer_plain(data) or self._upgrade_plain(data)
        ):
            return
        if self._begun_parser().end_of_piece(data) != len(data):
            self._inbox += data
            self._advance()
            return
        self._parse(data)
        self._serve()
        if self._has_work():
            self._settle()

    def on_end(self) -> None:
        """Without TLS, a peer that has ended its side may still read the response."""
        self._ended = True
        request = self.request
        if self._closing or self.has_tls or (request is not None and request.upgrade):
            self.abort()  # a client that asked for another protocol has left
        else:
            self._advance()

    def on_sent(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None and not taken.done():
            taken.set_result(None)
        if self._closing:
            self._shut_down()
            return
        self._set_deadline()
        self._advance()

    def on_lost(self) -> None:
        self.abort()

    def on_bug(self) -> None:
        """Answer 500, since the peer would wait for the answer of the bug."""
        logger.exception("bug in answering a request")
        if not self.closed:
            self.give_up(b"500 Internal Server Error")

    # From one request to the next.

    @property
    def _partial(self) -> Request | None:
        """The request of which a part was parsed."""
        return None if self._parser is None else self._parser.partial

    def _forget_partial(self) -> None:
        if self._parser is not None:
            self._parser.partial = None

    def _begun_parser(self) -> RequestParser:
        """Return the parser; one that has only plain requests needs none."""
        if self._parser is None:
            server = self._server
            self._parser = server.parser_type(self, server.bounds.max_header_size)
        return self._parser

    def _has_work(self) -> bool:
        """Whether a request has to be answered, or bytes that are no request."""
        return self.request is not None or bool(self._rejection)

    def _may_parse(self) -> bool:
        """Whether more may be parsed now."""
        request = self.request
        return not (
            self._closing
            or self._rejection
            or self.sending
            or (
                request is not None
                and (
                    request.complete
                    or (request.response is not None and not request.response.prepared)
                )
            )
        )

    def _advance(self) -> None:
        """Parse what has arrived, as far as it may be parsed now."""
        inbox = self._inbox
        for _ in range(PIECES_PER_TURN):
            if not inbox or self._turning or not self._may_parse():
                break
            end = self._begun_parser().end_of_piece(inbox)
            if not end:
                break
            piece = bytes(inbox[:end])
            del inbox[:end]
            self._parse(piece)
            self._serve()
        else:
            self._turn()
        self._settle()

    def _turn(self) -> None:
        """Go on when other connections have had their turn."""
        if not self._turning:
            self._turning = True
            self.loop.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._turning = False
        if self.closed:
            return
        try:
            self._advance()
        except Exception:
            self.on_bug()

    def _parse(self, piece: bytes) -> None:
        parser = self._begun_parser()
        before = parser.partial
        try:
            rest = parser.feed(piece)
        except MalformedRequest as error:
            self._reject(error.status)
            return
        if rest:
            self._inbox[:0] = rest
        partial = parser.partial
        if partial is not None and partial is not before and not partial.version:
            latest = self.loop.time() + self._server.bounds.header_timeout
            self.deadline = min(self.deadline, latest)

    def on_head(self, request: Request) -> None:
        """The parser has read a complete head: that of the current request."""
        server = self._server
        request.fast = server.fast(request)
        self.request = request
        self.deadline = self.loop.time() + server.bounds.body_timeout

    def _reject(self, status: bytes) -> None:
        """Parse nothing more; `status` is the last response, after one that is due."""
        logger.debug(MALFORMED, status.decode())
        self._rejection = b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n" % status
        partial = self._partial
        self._forget_partial()
        if partial is not None and partial is self.request:
            self.give_up(status)

    def _serve(self) -> None:
        """Answer the current request, as far as it has been parsed."""
        request = self.request
        if request is None:
            return
        if request.response is not None:
            request.response.on_body()
            return
        if request.fast is not None:
            if request.complete:
                body = request.take_body()
                response = request.fast(body)
                if response is not None:
                    if request.in_budget:
                        self._server.bounds.body_budget.release(self)
                    self._answer(request, response)
                    return
                request.body = body
            elif request.length <= self._server.bounds.max_body_size:
                if request.length:
                    request.in_budget = True
                    self._server.bounds.body_budget.hold(self, request.length)
                return
        if request.in_budget:
            self._server.bounds.body_budget.release(self)
        if request.upgrade and request.complete and self._upgrade(request):
            return
        by_handler = HandlerResponse(self, request, self._server.application)
        request.response = by_handler
        by_handler.begin()

    def _answer_plain(self, data: bytes) -> bool:
        """Answer `data` if it is a plain request, whole, that needs no handler.

        If not, nothing was done: the parser reads it.
        """
        server = self._server
        request = plain_request(data, server.max_plain_head)
        fast = server.fast(request) if request is not None else None
        if request is None or fast is None:
            return False
        response = fast(request.take_body())
        if response is None:
            return False
        if isinstance(response, FastResponse):
            self._write(request, response)
            self._set_deadline()
        else:
            self.request = request
            self._answer_later(request, response)
            self._settle()
        return True

    def _upgrade_plain(self, data: bytes) -> bool:
        """Answer `data` if it is a plain handshake, whole, that needs no handler.

        If not, nothing was done: the parser reads it.
        """
        server = self._server
        if not server.reads_handshakes:
            return False
        self.request = request = plain_handshake(data, server.max_plain_head)
        if request is None or not self._upgrade(request):
            self.request = None
            return False
        if self.request is not None:  # the backend decides later
            self._settle()
        return True

    def _upgrade(self, request: Request) -> bool:
        """Whether a request for another protocol is answered without a handler."""
        upgrade = self._server.upgrade
        return upgrade is not None and upgrade(self, request)

    def _answer(
        self, request: Request, response: FastResponse | Awaitable[FastResponse]
    ) -> None:
        """Answer the current request without a handler, immediately or later."""
        if isinstance(response, FastResponse):
            self._write(request, response)
            self.on_answered(keep_alive=True)
        else:
            self._answer_later(request, response)

    def _answer_later(
        self, request: Request, response: Awaitable[FastResponse]
    ) -> None:
        self.deadline = float("inf")
        request.response = PendingResponse(self, request, response)

    def _write(self, request: Request, response: FastResponse) -> None:
        server = self._server
        self.send_dated(response.start, response.rest)
        server.log(request.method, request.target.decode("latin-1"), response.status)

    def answer(self, request: Request, response: FastResponse) -> None:
        """Write a response that has been waited for."""
        self._answer(request, response)
        self._settle()

    def on_prepared(self) -> None:
        """The handler of the current request is ready for the body."""
        self._advance()

    def on_answered(self, keep_alive: bool) -> None:
        """The response to the current request was written: go on with the next."""
        self._end_request()
        if self._closing:
            return
        if not keep_alive:
            self.close()
            return
        self._set_deadline()
        if self._inbox or self._ended or self._rejection:
            self._turn()

    def _end_request(self) -> Response | None:
        """There is no current request any more; returns its response.

        The two refer to each other, and must not be left to the garbage collector.
        """
        request, self.request = self.request, None
        if request is None:
            return None
        response, request.response = request.response, None
        return response

    def on_over_budget(self) -> None:
        """The process has no memory for the rest of the current request's body."""
        request = self.request
        if request is None or request.complete or request.response is not None:
            return  # a handler has taken the body already
        status = HTTPStatus.SERVICE_UNAVAILABLE
        self._server.log(request.method, request.target.decode("latin-1"), status)
        retry = b"Retry-After: %d" % RETRY_AFTER
        self.give_up(b"503 Service Unavailable\r\n" + retry)

    def give_up(self, status: bytes) -> None:
        """End the current request, which can't be completed, and the connection.

        Answers with `status` unless the response has begun.
        """
        self._server.bounds.body_budget.release(self)
        response = self._end_request()
        self._forget_partial()
        if response is not None:
            response.on_close()
        if response is None or not response.answered:
            self.write(b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n" % status)
        self.close()

    def _set_deadline(self) -> None:
        """Set the deadline of what the peer has to do next."""
        request, bounds = self.request, self._server.bounds
        if self._unsent is not None:
            timeout = ANSWER_TIMEOUT
        elif request is None:
            has_begun = self._partial is not None
            timeout = bounds.header_timeout if has_begun else IDLE_TIMEOUT
        else:
            timeout = float("inf") if request.complete else bounds.body_timeout
        self.deadline = self.loop.time() + timeout

    def _settle(self) -> None:
        """Nothing more can be done now: close, or wait for the peer."""
        if self._closing:
            return
        stuck = self._ended and not self._turning and self._may_parse()
        if self.request is None:
            if self._rejection and not self._turning:
                self.write(self._rejection)
                self.close()
            elif stuck:
                self.close()
        elif stuck:  # the end of the body will never arrive
            self.abort()
        elif self.request.complete and not self.sending:
            self.deadline = float("inf")  # the peer waits for the response
        if self._closing or self._ended:
            return
        if len(self._inbox) < MAX_AHEAD:
            self.start_reading()
        else:
            self.stop_reading()

    # Writing and closing.

    def send_dated(self, start: bytes, rest: bytes) -> None:
        """Send a response: its status line, `Date`, and the rest."""
        self.send(start + self._server.date() + rest)

    def write(self, data: bytes) -> "asyncio.Future[None]":
        """Write; the future is done when more may be written, mostly immediately."""
        was_sending = self.sending
        self.send(data)
        if not self.sending:
            return done_future(self.loop)
        if not was_sending:
            self.deadline = self.loop.time() + ANSWER_TIMEOUT
        if self._taken is None or self._taken.done():
            self._taken = self.loop.create_future()
        return self._taken

    def hand_over(self) -> TakenSocket | None:
        """Return the socket for another protocol; None if the connection is closing."""
        if self._closing:
            return None
        unread, unsent = bytes(self._inbox), bytes(self._unsent or b"")
        taken = TakenSocket(self.take_socket(), unread, unsent)
        self._forget()
        return taken

    def close(self) -> None:
        """Close once the peer has taken what was written; discard what arrives.

        Closing a socket with unread bytes resets it, and the peer would not see
        its response (RFC 9112, section 9.6).
        """
        if self._closing:
            return
        self._closing = True
        self._inbox.clear()
        if not self.sending:
            self._shut_down()

    def _shut_down(self) -> None:
        """End the writing side, and read until the peer ends its own."""
        if self._ended:
            self.abort()
            return
        self.shut_down()
        self.start_reading()
        self.deadline = self.loop.time() + LINGER_TIMEOUT

    def abort(self) -> None:
        """Close immediately."""
        if not self.closed:
            self._server.arrivals.discard(self)
            self.close_socket()
            self._forget()

    def _forget(self) -> None:
        """Release everything: the socket is closed, or belongs to a WebSocket now."""
        self._closing = True
        self._server.deadlines.discard(self)
        self._server.bounds.body_budget.release(self)
        if self._parser is not None:
            self._parser.close()
        self._inbox = bytearray()
        response = self._end_request()
        if response is not None:
            # Later: a fault of its handler must not stop who closes many connections.
            self.loop.call_soon(response.on_close)
        if self._taken is not None and not self._taken.done():
            fail(self._taken)
