"""An HTTP/1.1 server on plain sockets, in front of the same `Application`.

httptools parses, in C, what Tornado's own server parses in Python; handlers see
no difference. A send, which is what a backend asks for all day, is answered
straight from the parser where `fast` knows the answer, and by its handler where
not. `handlers.http.listener` accepts the connections, `handlers.http.sockets` reads and
writes them. See docs/decisions/009.

A connection parses one request at a time: what comes behind it stays as bytes, and
is bounded, until that request has been answered and the answer has been taken.
"""

import asyncio
import heapq
import logging
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
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

from backends.deadlines import after_reading
from handlers.http.body_budget import RETRY_AFTER, BodyBudget, joined
from handlers.http.sockets import READ_SIZE, SocketConnection

logger = logging.getLogger(__name__)

IDLE_TIMEOUT = 120.0  # seconds between two requests of one connection
ANSWER_TIMEOUT = 60.0  # seconds for an answer to be taken
LINGER_TIMEOUT = 2.0  # seconds in which a peer may see why it is closed
TICK = 0.5  # seconds between two looks at who is late
LEAST_STAY = 1.0  # seconds that a connection has, though there is no room for more
MAX_CLOSED = 256  # connections that make room at once
LATE_TICK = 0.1  # seconds; by how much more a tick is late counts against nobody
# Bytes of one connection behind the request at hand; then reading stops.
MAX_AHEAD = READ_SIZE
MAX_HEADERS = 1000  # of one request, trailers included: each takes its time
PIECES_PER_TURN = 16  # that one connection parses before others have their turn
LINES_PER_PIECE = 16  # of a chunked body: a chunk of one byte takes time like any
# Bytes that come at once which are looked at for tiny chunks before they are parsed.
LONG_PIECE = 4096

SWITCHING_PROTOCOLS = 101
NEW_LINE = b"\r\n"
EMPTY_LINE = NEW_LINE * 2
EMPTY_LINE_SIZE = len(EMPTY_LINE)
LINE_END = re.compile(r"[\r\n\0]")
# Headers that say where a request ends, or how to go on.
NOTED = frozenset({b"content-length", b"transfer-encoding", b"upgrade"})


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """What every request is held to: seconds, and bytes.

    `body_budget` is what the bodies of all requests together are held to.
    """

    header_timeout: float
    body_timeout: float
    max_header_size: int
    max_body_size: int
    body_budget: BodyBudget = field(default_factory=BodyBudget)


class FastResponse:
    """An answer that needs no handler."""

    status: int

    @property
    def start(self) -> bytes:
        """Its status line."""
        raise NotImplementedError

    @property
    def rest(self) -> bytes:
        """Its other headers, the empty line and its body."""
        raise NotImplementedError


class Request:
    """One request as it comes in; names of `headers` are in lower case.

    `upgrade` says that it asks for another protocol, by its headers or by CONNECT.
    """

    __slots__ = (
        "body",
        "chunked",
        "complete",
        "declared",
        "fast",
        "headers",
        "is_kept",
        "keep_alive",
        "length",
        "method",
        "size",
        "target",
        "trailers",
        "upgrade",
        "version",
    )

    def __init__(self) -> None:
        self.method = self.version = ""
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.trailers = 0
        # Bytes of a head that is not whole; then those since its body last grew.
        self.size = 0
        self.body: bytes | bytearray = b""  # what no handler has taken
        self.is_kept = False  # among the bodies that are counted in the process
        self.declared = 0  # bytes of its body, by Content-Length
        self.length = 0  # bytes of its body so far
        self.chunked = self.complete = self.keep_alive = self.upgrade = False
        self.fast: FastHandler | None = None  # what answers it without a handler

    def take_body(self) -> bytes:
        """What has come of its body, which is the caller's from now on."""
        body, self.body = self.body, b""
        return bytes(body)  # the same one, where it came in one piece

    def head_size(self) -> int:
        """Bytes of its target and headers, colons and line ends included."""
        return len(self.target) + sum(
            len(name) + len(value) + 4 for name, value in self.headers
        )

    def framing(self) -> list[tuple[bytes, bytes]]:
        """The headers that say where its body ends, if it has one."""
        return [
            (name, value)
            for name, value in self.headers
            if name == b"transfer-encoding"
            or (name == b"content-length" and value.strip(b"0"))
        ]

    def expects_continue(self) -> bool:
        """Whether its body waits for a word (RFC 9110, section 10.1.1)."""
        return any(
            name == b"expect" and value.lower() == b"100-continue"
            for name, value in self.headers
        )


# Answers a whole body; None leaves the request to its handler after all.
FastHandler = Callable[[bytes], FastResponse | Awaitable[FastResponse] | None]


class Expirable(Protocol):
    """What `Deadlines` ends."""

    deadline: float  # on the loop's clock

    def abort(self) -> None:
        """Close at once."""


class Deadlines:
    """Ends connections whose deadline has passed, by one timer for all of them.

    Time in which the whole process stood still (SIGSTOP, a suspended machine)
    counts against nobody, and what has come by then is read first.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # With when they were accepted, on the loop's clock.
        self.connections: dict[Expirable, float] = {}
        self._loop = loop
        self._next = 0.0  # tick, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: Expirable) -> None:
        """Look after a connection until it is discarded."""
        self.connections[connection] = self._loop.time()
        if self._timer is None:
            self._wait()

    def discard(self, connection: Expirable) -> None:
        """Look after a connection no more."""
        self.connections.pop(connection, None)

    def make_room(self) -> None:
        """Close some of the connections whose peers let us wait, where there are any.

        Those that would be late first: with an unfinished head sooner than between
        two requests. Who came just now may have said something already.
        """
        latest = self._loop.time() - LEAST_STAY
        waiting = [
            connection
            for connection, accepted in self.connections.items()
            if accepted < latest and connection.deadline < float("inf")
        ]
        count = min(-(-len(waiting) // 4), MAX_CLOSED)
        for connection in heapq.nsmallest(count, waiting, lambda c: c.deadline):
            connection.abort()

    def close(self) -> None:
        """Look after nobody any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._next = self._loop.time() + TICK
        self._timer = self._loop.call_at(self._next, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        late_by = now - self._next
        if late_by > LATE_TICK:
            for connection in self.connections:
                connection.deadline += late_by
        if any(connection.deadline < now for connection in self.connections):
            after_reading(self._loop, self._judge)
        self._timer = None
        if self.connections:
            self._wait()

    def _judge(self) -> None:
        now = self._loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.abort()


class RequestServer:
    """Serves requests on the sockets that it is given.

    `fast` gives what answers a request without a handler, by its head, or None.
    `log` gets method, target and status of what was answered like that.
    """

    def __init__(
        self,
        application: Application,
        bounds: RequestBounds,
        fast: Callable[[Request], FastHandler | None] = lambda request: None,
        log: Callable[[str, str, int], None] = lambda method, target, status: None,
    ) -> None:
        self.application = application
        self.bounds = bounds
        self.fast = fast
        self.log = log
        # Kept, since asking for it is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.deadlines = Deadlines(self.loop)
        self._second = 0
        self._date = b""

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve a connection that was accepted."""
        remote_ip = address[0] if isinstance(address, tuple) else ""
        try:
            connection = RequestConnection(self, accepted, remote_ip, tls)
        except OSError as error:  # it has gone already
            logger.debug("no connection: %s", getattr(error, "reason", error))
            accepted.close()
            return
        self.deadlines.add(connection)
        connection.start_reading()

    def date(self) -> bytes:
        """The `Date` header, which changes once a second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = b"Date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._date

    def make_room(self) -> None:
        """Close some connections that wait for their peers."""
        self.deadlines.make_room()

    async def close_all_connections(self) -> None:
        """Close them at once."""
        for connection in list(self.deadlines.connections):
            connection.abort()
        self.deadlines.close()


@dataclass(slots=True)
class _Context:
    """What Tornado's requests want to know of their connection."""

    remote_ip: str
    protocol: str


class RequestConnection(SocketConnection):
    """One connection: requests in their order, each answered before the next.

    What was read waits in `_inbox`. A piece of it, which ends one request at most,
    goes to the parser when the request before was answered and the peer has taken
    the answer. So a peer can have no more kept here than one request, of which a
    handler bounds the body, and `MAX_AHEAD` bytes.
    """

    __slots__ = (
        "_answering",
        "_broken",
        "_closing",
        "_ended",
        "_exchange",
        "_inbox",
        "_parser",
        "_partial",
        "_request",
        "_resuming",
        "_server",
        "_taken",
        "_turning",
        "context",
        "deadline",
    )

    def __init__(
        self,
        server: RequestServer,
        accepted: socket.socket,
        remote_ip: str,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(server.loop, accepted, tls)
        self.context = _Context(remote_ip, "https" if tls else "http")
        # On the loop's clock; late, it is closed.
        self.deadline = server.loop.time() + server.bounds.header_timeout
        self._server = server
        # It refers to us, and goes when the connection does.
        self._parser: Any = httptools.HttpRequestParser(self)
        self._resuming = False  # the parser reads what stands in for a head
        self._inbox = bytearray()  # what was read and not parsed
        self._turning = False  # the next turn of the loop goes on with it
        self._partial: Request | None = None  # whose end was not parsed
        # At hand: its head was parsed, and it is not answered. With a handler its
        # `Exchange` does that, without one perhaps a task.
        self._request: Request | None = None
        self._exchange: Exchange | None = None
        self._answering: asyncio.Task[None] | None = None
        self._broken = b""  # the last answer, to what is no HTTP
        self._ended = False  # the peer says nothing more
        self._closing = False  # what still comes is dropped
        # For whom writes more while the peer has not taken what was written.
        self._taken: asyncio.Future[None] | None = None

    # What the socket tells.

    def room(self) -> int:
        return READ_SIZE if self._closing else MAX_AHEAD - len(self._inbox)

    def on_data(self, data: bytes) -> None:
        if self._closing or self._broken:
            return
        if (
            self._inbox
            or self._request is not None
            or self._unsent is not None
            or self._end_of_piece(data) != len(data)
        ):
            self._inbox += data
            self._advance()
            return
        # One request as a rule, and all of it: this is the fast path.
        self._parse(data)
        if self._request is not None:
            self._serve()
        if self._request is not None or self._broken:
            self._settle()

    def on_end(self) -> None:
        """A peer that has said all may still hear the answer; not by TLS."""
        self._ended = True
        request = self._request
        if self._closing or self.has_tls or (request is not None and request.upgrade):
            self.abort()  # who asked for another protocol has left
        else:
            self._advance()

    def on_sent(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None and not taken.done():
            taken.set_result(None)
        if self._closing:
            self._say_end()
            return
        self._set_deadline()
        self._advance()

    def on_lost(self) -> None:
        self.abort()

    # From one request to the next.

    def _may_parse(self) -> bool:
        """Whether what comes next is wanted now."""
        request, exchange = self._request, self._exchange
        return not (
            self._closing
            or self._broken
            or self.sending
            or (request is not None and request.complete)
            or (exchange is not None and not exchange.prepared)
        )

    def _end_of_piece(self, data: bytes | bytearray) -> int:
        """How many bytes the parser may have, for one request at most to end there.

        A request's head and its chunks end with an empty line, and a body of a
        given length where it says. What may be the beginning of an empty line waits
        for the rest of it.
        """
        partial = self._partial
        if partial is not None and partial.length < partial.declared:
            return min(len(data), partial.declared - partial.length)
        if partial is not None and partial.chunked:
            end = _start_of_line(data, LINES_PER_PIECE)
            if end > 0 and data.find(EMPTY_LINE, 0, end + len(NEW_LINE)) < 0:
                return end
        end = data.find(EMPTY_LINE) + EMPTY_LINE_SIZE
        if end < EMPTY_LINE_SIZE:
            return len(data) - _begun(data)
        if (
            end < len(data)
            and data[-1] not in b"\r\n"
            and data.find(EMPTY_LINE, end) < 0
            and (len(data) < LONG_PIECE or _start_of_line(data, MAX_HEADERS) < 0)
        ):
            return len(data)  # behind it is at most its body, or half a head
        return end

    def _advance(self) -> None:
        """Parse what has come, as far as it is wanted now."""
        inbox = self._inbox
        for _ in range(PIECES_PER_TURN):
            if not inbox or self._turning or not self._may_parse():
                break
            end = self._end_of_piece(inbox)
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
        """Go on when others have had their turn."""
        if not self._turning:
            self._turning = True
            self.loop.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._turning = False
        if not self.closed:
            self._advance()

    def _serve(self) -> None:
        """Answer the request at hand, as far as it has come."""
        request = self._request
        if request is None or self._answering is not None:
            return
        if self._exchange is not None:
            self._exchange.go_on()
            return
        if request.fast is not None:
            if request.complete:
                body = request.take_body()
                answer = request.fast(body)
                if answer is not None:
                    if request.is_kept:
                        self._server.bounds.body_budget.release(self)
                    self._answer(request, answer)
                    return
                request.body = body
            elif request.length <= self._server.bounds.max_body_size:
                if request.length:
                    request.is_kept = True
                    self._server.bounds.body_budget.hold(self, request.length)
                return
        if request.is_kept:
            self._server.bounds.body_budget.release(self)
        self._exchange = Exchange(self, self._server, request)
        self._exchange.begin()

    def _answer(
        self, request: Request, answer: FastResponse | Awaitable[FastResponse]
    ) -> None:
        """Without a handler."""
        if not isinstance(answer, FastResponse):
            self.deadline = float("inf")
            self._answering = self.loop.create_task(self._answer_later(request, answer))
            return
        server = self._server
        self.send(answer.start + server.date() + answer.rest)
        server.log(request.method, request.target.decode("latin-1"), answer.status)
        self.on_answered(keep_alive=True)

    async def _answer_later(
        self, request: Request, answer: Awaitable[FastResponse]
    ) -> None:
        answered = await answer
        self._answering = None
        self._answer(request, answered)
        self._settle()

    def on_answered(self, keep_alive: bool) -> None:
        """The answer to the request at hand was written: the next one's turn."""
        request = self._request
        self._request = self._exchange = None
        if self._closing:
            return
        if request is None or not keep_alive:
            self.close()
            return
        self._set_deadline()
        if self._inbox or self._ended or self._broken:
            self._turn()

    def on_prepared(self) -> None:
        """A handler wants the body of the request at hand."""
        self._advance()

    def _set_deadline(self) -> None:
        """That of what the peer is to do next."""
        request, bounds = self._request, self._server.bounds
        if self._unsent is not None:
            timeout = ANSWER_TIMEOUT
        elif request is None:
            is_late = self._partial is not None
            timeout = bounds.header_timeout if is_late else IDLE_TIMEOUT
        else:
            timeout = float("inf") if request.complete else bounds.body_timeout
        self.deadline = self.loop.time() + timeout

    def _settle(self) -> None:
        """All has been done that can be done now."""
        if self._closing:
            return
        stuck = self._ended and not self._turning and self._may_parse()
        if self._request is None:
            if self._broken and not self._turning:
                self.write(self._broken)
                self.close()
            elif stuck:
                self.close()
        elif stuck:  # the end of its body never comes
            self.abort()
        elif self._request.complete and not self.sending:
            self.deadline = float("inf")  # all that is said waits for us
        if self._closing or self._ended:
            return
        if len(self._inbox) < MAX_AHEAD:
            self.start_reading()
        else:
            self.stop_reading()

    # What the parser tells.

    def _parse(self, piece: bytes) -> None:
        before, bounds = self._partial, self._server.bounds
        most = bounds.max_header_size
        length = size = 0
        if before is not None:
            length, size = before.length, before.size
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            end = upgrade.args[0]
            self._inbox[:0] = piece[end:]
            if size + end <= most or not self._breaks_with_head():
                self._after_upgrade()
            return
        except httptools.HttpParserError:
            self._break(b"400 Bad Request")
            return
        if size + len(piece) > most and self._breaks_with_head():
            return
        partial = self._partial
        if partial is None:
            return
        if partial.version and (partial is not before or partial.length != length):
            partial.size = 0
        else:
            # All of it is of a head that is not whole, or of one line behind
            # it: a chunk's extension or a trailer.
            partial.size += len(piece)
        if partial is not before and not partial.version:
            latest = self.loop.time() + bounds.header_timeout
            self.deadline = min(self.deadline, latest)
        if partial.size > most:
            self._break(b"431 Request Header Fields Too Large")

    def _breaks_with_head(self) -> bool:
        """Whether the head that is whole now, if one is, is too large."""
        request, most = self._request, self._server.bounds.max_header_size
        if request is None or request.head_size() <= most:
            return False
        self._request = None
        self._break(b"431 Request Header Fields Too Large")
        return True

    def on_message_begin(self) -> None:
        if not self._resuming:
            self._partial = Request()

    def on_url(self, target: bytes) -> None:
        if not self._resuming and self._partial is not None:
            self._partial.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._partial
        if self._resuming or request is None:
            return
        if request.version:
            request.trailers += 1  # which are nobody's
        else:
            name, value = name.lower(), value.strip(b" \t")
            request.headers.append((name, value))
            if name in NOTED:
                self._note(request, name, value)
        if len(request.headers) + request.trailers > MAX_HEADERS:
            self._break(b"431 Request Header Fields Too Large")
            raise ValueError("too many headers")  # for the parser to stop

    def _note(self, request: Request, name: bytes, value: bytes) -> None:
        """Take in a header that says where the request ends, or how to go on."""
        if name == b"content-length":
            request.declared = int(value)
        elif name == b"upgrade":
            request.upgrade = True
        elif name == b"transfer-encoding":
            if request.chunked or value.lower() != b"chunked":
                raise ValueError("a coding that nobody here decodes")
            request.chunked = True

    def on_headers_complete(self) -> None:
        request = self._partial
        if self._resuming or request is None:
            return
        parser = self._parser
        request.method = parser.get_method().decode("latin-1")
        request.version = parser.get_http_version()
        if request.version not in ("1.0", "1.1"):
            raise ValueError("no version of ours")
        # A proxy that tunnels upgrades goes by the request: whatever but 101 we
        # answer, what follows comes from a client that speaks past the proxy.
        asks = request.upgrade or request.method == "CONNECT"
        request.keep_alive = parser.should_keep_alive() and not asks
        request.upgrade = parser.should_upgrade()
        request.fast = self._server.fast(request)
        self._request = request
        self.deadline = self.loop.time() + self._server.bounds.body_timeout

    def on_body(self, body: bytes) -> None:
        request = self._partial
        if request is not None and not self._closing:
            request.body = joined(request.body, body)
            request.length += len(body)

    def on_message_complete(self) -> None:
        request = self._partial
        if self._resuming or request is None:
            return
        if request.upgrade and request.framing():
            return  # its body follows, whatever the parser thinks
        request.complete = True
        self._partial = None

    def _after_upgrade(self) -> None:
        """Behind a request to upgrade the parser stops.

        One with a body is for no protocol of ours: "A server MAY ignore a
        received Upgrade header field" (RFC 9110, section 7.8).
        """
        request = self._request
        if request is None:
            return
        request.upgrade = request.method == "GET"
        if request.complete:
            return
        if request.method != "POST":
            self._break(b"400 Bad Request")
            return
        framing = b"".join(b"%b: %b\r\n" % header for header in request.framing())
        self._parser = httptools.HttpRequestParser(self)
        self._resuming = True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        except httptools.HttpParserError:
            self._break(b"400 Bad Request")
        finally:
            self._resuming = False

    def _break(self, status: bytes) -> None:
        """Nothing more can be read: the last answer, after the one that is due."""
        if self._broken or self._closing:
            return
        logger.debug("malformed request: %s", status.decode())
        self._broken = b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n" % status
        partial, self._partial = self._partial, None
        if partial is not None and partial is self._request:
            self.give_up(status)

    def on_over_budget(self) -> None:
        """The process has no room for the rest of the body of the one at hand."""
        request = self._request
        if request is None or request.complete or self._exchange is not None:
            return  # it is another's already
        status = HTTPStatus.SERVICE_UNAVAILABLE
        self._server.log(request.method, request.target.decode("latin-1"), status)
        retry = b"Retry-After: %d" % RETRY_AFTER
        self.give_up(b"503 Service Unavailable\r\n" + retry)

    def give_up(self, status: bytes) -> None:
        """The request at hand can't be completed: `status`, if it has no answer."""
        self._server.bounds.body_budget.release(self)
        exchange, self._exchange = self._exchange, None
        self._request = self._partial = None
        if exchange is not None:
            exchange.tell_of_close()
        if exchange is None or not exchange.answered:
            self.write(b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n" % status)
        self.close()

    # Writing, and the end.

    def write(self, data: bytes) -> "asyncio.Future[None]":
        """Done when more may be written, at once for all but long answers."""
        was_sending = self.sending
        self.send(data)
        if not self.sending:
            return _done(self.loop)
        if not was_sending:
            self.deadline = self.loop.time() + ANSWER_TIMEOUT
        if self._taken is None or self._taken.done():
            self._taken = self.loop.create_future()
        return self._taken

    def take_stream(self) -> IOStream:
        """The socket, with what was read of it behind the request at hand.

        Raises `StreamClosedError` where it has gone.
        """
        if self._closing:
            raise StreamClosedError
        inbox, unsent = self._inbox, self._unsent
        stream = IOStream(self.take_socket(), max_buffer_size=2 * MAX_AHEAD)
        stream._read_buffer += inbox
        stream._read_buffer_size += len(inbox)
        if unsent:
            stream._write_buffer.append(bytes(unsent))
        self._forget()
        return stream

    def close(self) -> None:
        """Close, when what was written has been taken; drop what still comes.

        Closing a socket with unread bytes resets it, and the peer would not see
        its answer (RFC 9112, section 9.6).
        """
        if self._closing:
            return
        self._closing = True
        self._inbox.clear()
        if not self.sending:
            self._say_end()

    def _say_end(self) -> None:
        if self._ended:
            self.abort()
            return
        self.shut_down()
        self.start_reading()
        self.deadline = self.loop.time() + LINGER_TIMEOUT

    def abort(self) -> None:
        """Close at once."""
        if not self.closed:
            self.close_socket()
            self._forget()

    def _forget(self) -> None:
        """The socket is no longer ours; whoever waits for it is told."""
        self._closing = True
        self._server.deadlines.discard(self)
        self._server.bounds.body_budget.release(self)
        self._parser = None
        self._inbox = bytearray()
        exchange, self._exchange = self._exchange, None
        self._request = self._partial = None
        if exchange is not None:
            # A handler's fault must not be that of who ends many connections.
            self.loop.call_soon(exchange.tell_of_close)
        if self._answering is not None:
            self._answering.cancel()
        if self._taken is not None and not self._taken.done():
            _fail(self._taken)


class Exchange(HTTPConnection):
    """One request and its answer by a handler, which sees an `HTTPConnection`."""

    def __init__(
        self, connection: RequestConnection, server: RequestServer, request: Request
    ) -> None:
        self.context = connection.context
        self.prepared = False  # the handler wants the body
        self.answered = False  # the answer's start is on its way
        self._connection = connection
        self._application = server.application
        self._request = request
        self._delegate: HTTPMessageDelegate | None = None
        self._on_close: Callable[[], None] | None = None
        self._body_limit = server.bounds.max_body_size
        self._keep_alive = request.keep_alive
        self._chunked = False
        self._switch = b""  # a 101, which leaves with the socket

    @property
    def _is_over(self) -> bool:
        return self._connection._exchange is not self

    def begin(self) -> None:
        """Hand the head to a handler."""
        request = self._request
        headers = HTTPHeaders()
        try:
            for name, value in request.headers:
                headers.add(name.decode("latin-1"), value.decode("latin-1"))
            self._delegate = self._application.start_request(self, self)
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
            self._connection.give_up(b"400 Bad Request")
            return
        if ready is None:
            self._prepare()
        else:
            asyncio.ensure_future(ready).add_done_callback(lambda _: self._on_ready())

    def _on_ready(self) -> None:
        if not self._is_over:
            self._prepare()
            self._connection.on_prepared()

    def _prepare(self) -> None:
        self.prepared = True
        request = self._request
        if not (self.answered or request.complete) and request.expects_continue():
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.go_on()

    def go_on(self) -> None:
        """Hand over what has come of the body."""
        request, delegate = self._request, self._delegate
        if delegate is None or not self.prepared:
            return
        if request.body:
            delegate.data_received(request.take_body())
        if self._is_over:
            return
        if request.length > self._body_limit:
            self._connection.give_up(b"413 Content Too Large")
        elif request.complete:
            self._delegate = None
            delegate.finish()

    def tell_of_close(self) -> None:
        """The peer has gone, or the request can't be completed."""
        delegate, on_close = self._delegate, self._on_close
        self._delegate = self._on_close = None
        if delegate is not None and not self._request.complete:
            delegate.on_connection_close()
        elif on_close is not None:
            on_close()

    # What handlers call.

    @property
    def descriptor(self) -> int:
        """The number of its connection's socket."""
        return self._connection._sock.fileno()

    @property
    def body_budget(self) -> BodyBudget:
        """What all bodies are counted in, until handlers take them."""
        return self._connection._server.bounds.body_budget

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Call it when the peer goes before it is answered."""
        self._on_close = callback

    def set_max_body_size(self, size: int) -> None:
        """In bytes."""
        self._body_limit = size

    def set_body_timeout(self, timeout: float) -> None:
        """In seconds from now."""
        if not self._is_over:
            self._connection.deadline = self._connection.loop.time() + timeout

    def write_headers(
        self,
        start_line: Any,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> "asyncio.Future[None]":
        """Answer; with the body, or the body's first part."""
        assert isinstance(start_line, ResponseStartLine)
        connection, request = self._connection, self._request
        if self._is_over:
            return _closed(connection.loop)
        self.answered = True
        status = start_line.code
        self._keep_alive &= headers.get("Connection", "").lower() != "close"
        self._chunked = (
            request.version == "1.1"
            and "Content-Length" not in headers
            and status not in (204, 304)
            and status >= 200
            and request.method != "HEAD"
        )
        if status != SWITCHING_PROTOCOLS and not self._keep_alive:
            add_option(headers, "close")
        elif request.version == "1.0":
            headers["Connection"] = "keep-alive"
        if self._chunked:
            headers["Transfer-Encoding"] = "chunked"
        lines = [f"HTTP/1.1 {status} {start_line.reason}"]
        lines += (f"{name}: {value}" for name, value in headers.get_all())
        if any(map(LINE_END.search, lines)):
            raise ValueError("a header has a line's end in it")
        data = "\r\n".join((*lines, "", "")).encode("latin-1")
        if status == SWITCHING_PROTOCOLS:
            self._switch = data
            return _done(connection.loop)
        return connection.write(data + self._part(chunk or b""))

    def write(self, chunk: bytes) -> "asyncio.Future[None]":
        """Another part of the answer's body."""
        if self._is_over:
            return _closed(self._connection.loop)
        return self._connection.write(self._part(chunk))

    def finish(self) -> None:
        """The answer is complete."""
        if self._is_over or self._switch:
            return
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._delegate = self._on_close = None
        self._connection.on_answered(self._keep_alive and self._request.complete)

    def detach(self) -> IOStream:
        """Hand over the socket, with what was read of it and what has to leave.

        Raises `StreamClosedError` where it has gone.
        """
        if self._is_over:
            raise StreamClosedError
        self._delegate = self._on_close = None
        self._connection.send(self._switch)
        return self._connection.take_stream()

    def abort(self) -> None:
        """Close the connection at once."""
        if not self._is_over:
            self._connection.abort()

    def _part(self, chunk: bytes) -> bytes:
        if self._chunked and chunk:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        return chunk


def _start_of_line(data: bytes | bytearray, number: int) -> int:
    """Where the end of line number `number` begins, from 1; -1: there are fewer."""
    end = -1
    for _ in range(number):
        end = data.find(NEW_LINE, end + 1)
        if end < 0:
            break
    return end


def _begun(data: bytes | bytearray) -> int:
    """How many bytes at the end of `data` may be the beginning of an empty line."""
    for size in range(len(EMPTY_LINE) - 1, 0, -1):
        if data.endswith(EMPTY_LINE[:size]):
            return size
    return 0


def add_option(headers: HTTPHeaders, option: str) -> None:
    """Name one more option in `Connection` (RFC 9110, section 7.6.1)."""
    options = [each for each in headers.get_list("Connection") if each]
    if option not in map(str.lower, options):
        options.append(option)
    headers["Connection"] = ", ".join(options)


def _done(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    future: asyncio.Future[None] = loop.create_future()
    future.set_result(None)
    return future


def _closed(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    future: asyncio.Future[None] = loop.create_future()
    _fail(future)
    return future


def _fail(future: "asyncio.Future[None]") -> None:
    future.set_exception(StreamClosedError())
    future.exception()  # whoever does not await it need not hear of it
