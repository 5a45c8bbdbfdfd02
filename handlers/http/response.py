"""How one request is answered, apart from its connection (`handlers.http.server`).

`HandlerResponse` passes the request to a Tornado handler, `PendingResponse` waits
for a response that needs none. Each belongs to one `Request`, and ends with it.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import StreamClosedError
from tornado.web import Application

from backends.waiting import done_future
from handlers.http.access_log import PEER_LEFT, log_access
from handlers.http.body_budget import BodyBudget
from handlers.http.bounds import RequestBounds
from handlers.http.fast import FastResponse, LaterResponse
from handlers.http.request import Request
from handlers.http.sockets import TakenSocket

logger = logging.getLogger(__name__)

SWITCHING_PROTOCOLS = 101
# Logged at the level debug: peers may send any number of them.
MALFORMED = "malformed request: %s"
LINE_END = re.compile(r"[\r\n\0]")


@dataclass(slots=True)
class Context:
    """What Tornado's requests ask of their connection."""

    remote_ip: str
    protocol: str


class Connection(Protocol):
    """The connection of a request, as far as its response needs it."""

    loop: asyncio.AbstractEventLoop
    remote_ip: str
    deadline: float  # on the loop's clock

    @property
    def context(self) -> Context: ...

    @property
    def has_tls(self) -> bool: ...

    @property
    def request(self) -> Request | None:
        """The request that is being answered."""

    @property
    def bounds(self) -> RequestBounds: ...

    @property
    def descriptor(self) -> int: ...

    def send(self, data: bytes) -> None: ...

    def send_dated(self, start: bytes, rest: bytes) -> None: ...

    def write(self, data: bytes) -> "asyncio.Future[None]": ...

    def on_prepared(self) -> None: ...

    def on_answered(self, keep_alive: bool) -> None: ...

    def answer(self, request: Request, response: FastResponse) -> None: ...

    def give_up(self, status: bytes) -> None: ...

    def on_bug(self) -> None: ...

    def hand_over(self) -> TakenSocket | None: ...

    def abort(self) -> None: ...


class PendingResponse:
    """Waits for a response without a handler, then writes it."""

    prepared = True
    answered = False

    def __init__(
        self,
        connection: Connection,
        request: Request,
        response: Awaitable[FastResponse],
    ) -> None:
        self._request = request
        # Kept here; `on_close` cancels it.
        self._answer: LaterResponse[Any] | asyncio.Task[None]
        if isinstance(response, LaterResponse):  # it needs no task
            self._answer = response
            response.then(partial(_on_answer, connection, request))
        else:
            answer = _when_answered(connection, request, response)
            self._answer = connection.loop.create_task(answer)

    def on_body(self) -> None:
        """Nothing: the body is complete."""

    def on_close(self) -> None:
        """Stop waiting."""
        self._answer.cancel()
        request = self._request
        log_access(request.method, request.target.decode("latin-1"), PEER_LEFT)


def _on_answer(
    connection: Connection, request: Request, answer: FastResponse
) -> None:
    if connection.request is request:
        connection.answer(request, answer)


async def _when_answered(
    connection: Connection, request: Request, response: Awaitable[FastResponse]
) -> None:
    try:
        answer = await response
    except Exception:
        if connection.request is request:
            request.response = None  # it has ended
            connection.on_bug()
        return
    _on_answer(connection, request, answer)


class HandlerResponse(HTTPConnection):
    """One request and its response by a handler, which sees an `HTTPConnection`."""

    def __init__(
        self, connection: Connection, request: Request, application: Application
    ) -> None:
        self.context = connection.context
        self.prepared = False  # the handler is ready for the body
        self.answered = False  # the beginning of the response was written
        self._connection = connection
        self._application = application
        self._request = request
        self._delegate: HTTPMessageDelegate | None = None
        self._on_close: Callable[[], None] | None = None
        self._body_limit = connection.bounds.max_body_size
        self._keep_alive = request.keep_alive
        self._chunked = False
        self._switch = b""  # a 101, which is sent by `take_socket`

    @property
    def is_over(self) -> bool:
        """Whether the request was answered, or its connection is closed."""
        return self._connection.request is not self._request

    def begin(self) -> None:
        """Pass the head to a handler."""
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
            logger.debug(MALFORMED, "400 Bad Request")
            self._delegate = self._on_close = None
            self._connection.give_up(b"400 Bad Request")
            return
        if ready is None:
            self._prepare()
        else:
            asyncio.ensure_future(ready).add_done_callback(lambda _: self._on_ready())

    def _on_ready(self) -> None:
        if not self.is_over:
            self._prepare()
            self._connection.on_prepared()

    def _prepare(self) -> None:
        self.prepared = True
        request = self._request
        if not (self.answered or request.complete) and request.expects_continue():
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.on_body()

    def on_body(self) -> None:
        """Pass on what has been parsed of the body."""
        request, delegate = self._request, self._delegate
        if delegate is None or not self.prepared:
            return
        if request.body:
            delegate.data_received(request.take_body())
        if self.is_over:
            return
        if request.length > self._body_limit:
            self._connection.give_up(b"413 Content Too Large")
        elif request.complete:
            self._delegate = None
            delegate.finish()

    def on_close(self) -> None:
        """The peer has disconnected, or the request cannot be completed."""
        delegate, on_close = self._delegate, self._on_close
        self._delegate = self._on_close = None
        if delegate is not None and not self._request.complete:
            delegate.on_connection_close()
        elif on_close is not None:
            on_close()

    # What handlers call.

    @property
    def descriptor(self) -> int:
        """File descriptor of the connection's socket."""
        return self._connection.descriptor

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Names and values of the request's headers; see `Request.fields`."""
        return self._request.fields()

    @property
    def body_budget(self) -> BodyBudget:
        """Counts all bodies until their handlers take them."""
        return self._connection.bounds.body_budget

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` if the peer disconnects before the response."""
        self._on_close = callback

    def set_max_body_size(self, size: int) -> None:
        """Set the limit of the body, in bytes."""
        self._body_limit = size

    def set_body_timeout(self, timeout: float) -> None:
        """Set the time for the rest of the body, in seconds from now."""
        if not self.is_over:
            self._connection.deadline = self._connection.loop.time() + timeout

    def write_headers(
        self,
        start_line: Any,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> "asyncio.Future[None]":
        """Write the head of the response, and the first part of its body."""
        assert isinstance(start_line, ResponseStartLine)
        connection, request = self._connection, self._request
        if self.is_over:
            return closed_future(connection.loop)
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
            raise ValueError("a header contains a line end")
        data = "\r\n".join((*lines, "", "")).encode("latin-1")
        if status == SWITCHING_PROTOCOLS:
            self._switch = data
            return done_future(connection.loop)
        return connection.write(data + self._part(chunk or b""))

    def write(self, chunk: bytes) -> "asyncio.Future[None]":
        """Write another part of the response's body."""
        if self.is_over:
            return closed_future(self._connection.loop)
        return self._connection.write(self._part(chunk))

    def finish(self) -> None:
        """End the response."""
        if self.is_over or self._switch:
            return
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._delegate = self._on_close = None
        self._connection.on_answered(self._keep_alive and self._request.complete)

    def take_socket(self) -> TakenSocket | None:
        """Send the 101, and return the socket; None if the connection is closed."""
        if self.is_over:
            return None
        self._delegate = self._on_close = None
        self._connection.send(self._switch)
        return self._connection.hand_over()

    def abort(self) -> None:
        """Close the connection immediately."""
        if not self.is_over:
            self._connection.abort()

    def _part(self, chunk: bytes) -> bytes:
        if self._chunked and chunk:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        return chunk


def add_option(headers: HTTPHeaders, option: str) -> None:
    """Add an option to the `Connection` header (RFC 9110, section 7.6.1)."""
    options = [each for each in headers.get_list("Connection") if each]
    if option not in map(str.lower, options):
        options.append(option)
    headers["Connection"] = ", ".join(options)


def closed_future(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    """Return a future that has failed with `StreamClosedError`."""
    future: asyncio.Future[None] = loop.create_future()
    fail(future)
    return future


def fail(future: "asyncio.Future[None]") -> None:
    """Fail with `StreamClosedError`, without a warning if nobody awaits it."""
    future.set_exception(StreamClosedError())
    future.exception()
