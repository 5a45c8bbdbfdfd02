"""A small HTTP/1.1 client: POSTs over pooled keep-alive connections.

Of our own, since delivery needs what no library tells: when a request has left
whole, and how to let one go (docs/decisions/003-own-http-client.md). Parsing is
httptools', racing IPv6 against IPv4 is aiohappyeyeballs'.
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import aiohappyeyeballs
import httptools

from backends import BackendAway, BackendError

MAX_CONNECTING = 128  # TCP handshakes under way at once to one origin
ADDRESSES_TTL = 5.0  # seconds for which a name's addresses are used again
IDLE_TIMEOUT = 60.0  # seconds; a connection unused for that long is closed
HAPPY_EYEBALLS_DELAY = 0.25  # seconds; RFC 8305, section 8
MAX_HEADERS_SIZE = 64 * 1024  # bytes of an answer before its body
MAX_KEPT_BODY = 64 * 1024  # bytes of a body that is used; the rest is dropped
MAX_DROPPED_BODY = 1024 * 1024  # bytes; beyond, the connection is closed
BODY_TIMEOUT = 5.0  # seconds from an answer's headers to its end; then likewise
KEEPALIVE_PROBES = 3
MAX_KEEPALIVE = 32767  # seconds; tcp(7)
# Seconds after a TLS handshake in which its end is taken for the backend's verdict.
VERDICT_TIME = 2.0
TLS_SHUTDOWN_TIMEOUT = 1.0  # seconds for the peer's close_notify; its place waits


@dataclass(frozen=True, slots=True)
class Target:
    """Where to POST: an http(s) URL in the parts that a request needs."""

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Raises `ValueError` with what is wrong with `url`."""
        if not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
            raise ValueError("it has characters that a URL must percent-encode")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise ValueError("it is not an http:// or https:// URL")
        if not parts.hostname:
            raise ValueError("it has no host")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it has a user name or a password in it")
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except ValueError:
            raise ValueError("its port is not a number from 1 to 65535") from None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, parts.hostname, port, path)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What connections are shared by."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """The Host header's value (RFC 9110, section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = {"http": 80, "https": 443}[self.scheme]
        return host if self.port == default else f"{host}:{self.port}"

    def __str__(self) -> str:
        """Without the query, which may hold a secret."""
        return f"{self.scheme}://{self.authority}{self.path.partition('?')[0]}"


@dataclass(slots=True)
class Answer:
    """A response: its status, and its headers and body where they were asked for."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Exchange:
    """One request and what became of it.

    `on_sent` is called when the kernel has the whole request, `on_done` once
    with the answer or the `BackendError`, neither before `Client.post`
    returns. After `let_go` neither is called.
    """

    __slots__ = (
        "connection",
        "keep",
        "on_done",
        "on_sent",
        "resent",
        "target",
        "timer",
        "write",
    )

    def __init__(
        self,
        target: Target,
        write: Callable[[], bytes],
        on_done: Callable[[Answer | BackendError], None],
        on_sent: Callable[[], None] | None,
        keep: bool,
    ) -> None:
        self.target = target
        # None when the request may not be sent again.
        self.write: Callable[[], bytes] | None = write
        self.on_done: Callable[[Answer | BackendError], None] | None = on_done
        self.on_sent = on_sent
        self.keep = keep
        self.resent = False
        self.connection: _Connection | None = None
        self.timer: asyncio.TimerHandle | None = None

    def finish(self, outcome: Answer | BackendError) -> None:
        """Tell the outcome, once."""
        on_done, self.on_done, self.on_sent = self.on_done, None, None
        self.write = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if on_done is not None:
            on_done(outcome)

    @property
    def in_line(self) -> bool:
        """Whether it waits for a connection, for the first time or once more."""
        return self.connection is None

    def let_go(self) -> None:
        """Close the request's connection, or give up its place in the line."""
        self.on_done = self.on_sent = self.write = None
        if self.timer is not None:
            self.timer.cancel()
        if self.connection is not None:
            self.connection.close()

    def hold(self) -> None:
        """Never send it again: nobody closes a connection as idle that late."""
        self.write = None

    def sent(self) -> None:
        """The kernel has taken the last byte."""
        if self.on_sent is not None:
            self.on_sent()


class Client:
    """A pool of connections to every origin that is POSTed to.

    `max_connections` bounds those open or being opened, over all origins;
    beyond it requests wait in line, and `on_starved` is called for each, so
    that somebody may let one go. `connect_timeout` covers name, TCP and TLS.
    A peer that is gone without a word is noticed within `dead_after` seconds.
    """

    def __init__(
        self,
        max_connections: int,
        connect_timeout: float,
        dead_after: float,
        on_starved: Callable[[], None] = lambda: None,
    ) -> None:
        # Kept, since asking for it is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.max_connections = max_connections
        self.connect_timeout = connect_timeout
        self.dead_after = dead_after
        self.on_starved = on_starved
        self.tls: ssl.SSLContext | None = None
        self.open = 0
        self.moved_at = float("-inf")  # when a line last moved, on the loop's clock
        self._origins: dict[tuple[str, str, int], _Origin] = {}
        self._closed = False

    def post(
        self,
        target: Target,
        write: Callable[[], bytes],
        on_done: Callable[[Answer | BackendError], None],
        on_sent: Callable[[], None] | None = None,
        timeout: float | None = None,
        keep: bool = False,
    ) -> Exchange:
        """Send what `write` returns, a whole request, and report its outcome.

        `write` is called when a connection is there to send on, once more where
        the request has to go again at once: a wait in line makes no part of it old.
        `timeout` is in seconds from now to the answer; None waits for as long as
        the connection lives. `keep` asks for the answer's headers and body.
        """
        exchange = Exchange(target, write, on_done, on_sent, keep)
        if timeout is not None:
            exchange.timer = self.loop.call_later(
                timeout, self._on_timeout, exchange, timeout
            )
        origin = self._origins.get(target.origin)
        if origin is None:
            origin = self._origins[target.origin] = _Origin(self, target)
        origin.dispatch(exchange)
        return exchange

    def trust(self, tls: ssl.SSLContext | None) -> None:
        """Make https connections with `tls`; needed before the first of them.

        What is under way on one that was made with another context ends there,
        and nothing more is sent on it.
        """
        self.tls = tls
        for origin in self._origins.values():
            origin.close_stale()

    @property
    def starved(self) -> bool:
        """Whether requests wait and no connection may be opened for them."""
        return self.open >= self.max_connections and any(
            origin.waiting for origin in self._origins.values()
        )

    async def close(self) -> None:
        """Close every connection; what is under way ends with an error."""
        self._closed = True
        for origin in self._origins.values():
            await origin.close()

    def make_room(self) -> None:
        """Close an idle connection to another origin, or ask for one to be let go."""
        for origin in self._origins.values():
            if origin.idle:
                origin.idle.pop().close()
                return
        self.on_starved()

    def on_slot_free(self) -> None:
        """A connection ended: whoever waits may open another."""
        if not self._closed:
            for origin in self._origins.values():
                origin.connect_for_waiting()

    @staticmethod
    def _on_timeout(exchange: Exchange, timeout: float) -> None:
        exchange.timer = None
        connection = exchange.connection
        exchange.finish(
            BackendError(f"POST {exchange.target}: no answer in {timeout:g} s")
        )
        if connection is not None:
            connection.close()


class _Origin:
    """One scheme, host and port: its idle connections, and who waits for one."""

    def __init__(self, client: Client, target: Target) -> None:
        self.client = client
        self.target = target
        self.idle: list[_Connection] = []
        self.busy: set[_Connection] = set()
        self.waiting: deque[Exchange] = deque()
        # Held here while they connect; each reports to who waits.
        self._connecting: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None  # one for all that are idle
        self._addresses: Sequence[aiohappyeyeballs.AddrInfoType] = ()
        self._resolved_at = float("-inf")
        self._resolving: asyncio.Future[None] | None = None

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What its connections are made with from now on; None: plain TCP."""
        return self.client.tls if self.target.scheme == "https" else None

    def dispatch(self, exchange: Exchange) -> None:
        """Send on an idle connection, or wait for one."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_usable():
                connection.send(exchange)
                return
        self.waiting.append(exchange)
        self.connect_for_waiting()

    def connect_for_waiting(self) -> None:
        """Open connections for those who wait, within the bounds."""
        loop = self.client.loop
        while self.waiting and self.waiting[0].on_done is None:
            self.waiting.popleft()  # timed out or let go: no need of a connection
        while len(self._connecting) < min(len(self.waiting), MAX_CONNECTING):
            if self.client.open >= self.client.max_connections:
                self.client.make_room()
                return
            self.client.open += 1
            task = loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        try:
            try:
                async with asyncio.timeout(self.client.connect_timeout):
                    connection = await self._open()
            except TimeoutError:
                raise BackendAway(
                    f"no connection in {self.client.connect_timeout:g} s"
                ) from None
            except ssl.SSLError as error:
                raise BackendAway(tls_failure(error)) from error
            except (OSError, ValueError) as error:  # the latter: no name for DNS
                why = getattr(error, "strerror", None) or error
                raise BackendAway(f"cannot connect: {why}") from error
            if not connection.adopt():
                raise BackendAway(connection.why_lost())
        except BaseException as error:
            self._slot_free()
            if isinstance(error, asyncio.CancelledError):
                raise
            # A fault of ours, too: who waits would have us try it for ever.
            if (exchange := self._next_waiting()) is not None:
                exchange.finish(BackendAway(f"POST {exchange.target}: {error}"))
            if not isinstance(error, BackendAway):
                raise
            return
        self._hand_on(connection)

    def _slot_free(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connecting.discard(task)
        self.client.open -= 1
        self.client.loop.call_soon(self.client.on_slot_free)

    async def _open(self) -> "_Connection":
        addresses = await self._resolve()
        sock = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1
        )
        try:
            watch(sock, self.client.dead_after)
            tls = self.tls
            assert tls is not None or self.target.scheme == "http"
            _, connection = await self.client.loop.create_connection(
                lambda: _Connection(self, tls),
                sock=sock,
                ssl=tls,
                server_hostname=self.target.host if tls else None,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT if tls else None,
            )
        except BaseException:
            sock.close()
            raise
        return connection

    async def _resolve(self) -> Sequence[aiohappyeyeballs.AddrInfoType]:
        """The host's addresses; one look-up at a time."""
        loop = self.client.loop
        while loop.time() > self._resolved_at + ADDRESSES_TTL:
            if self._resolving is not None:
                await asyncio.shield(self._resolving)
                continue
            self._resolving = loop.create_future()
            try:
                self._addresses = await loop.getaddrinfo(
                    self.target.host, self.target.port, type=socket.SOCK_STREAM
                )
                self._resolved_at = loop.time()
            finally:
                self._resolving.set_result(None)
                self._resolving = None
        return self._addresses

    def on_free(self, connection: "_Connection") -> None:
        """A connection has finished its exchange."""
        self.busy.discard(connection)
        self._hand_on(connection)

    def close_stale(self) -> None:
        """Close the idle connections that are not usable any more."""
        fresh = [connection for connection in self.idle if connection.is_usable()]
        for connection in set(self.idle).difference(fresh):
            connection.close()
        self.idle = fresh

    def _hand_on(self, connection: "_Connection") -> None:
        if not connection.is_usable():
            connection.close()
            return
        if (exchange := self._next_waiting()) is not None:
            connection.send(exchange)
        else:
            self._keep_idle(connection)

    def _keep_idle(self, connection: "_Connection") -> None:
        connection.idle_since = self.client.loop.time()
        self.idle.append(connection)
        if self._expiry is None:
            self._expiry = self.client.loop.call_later(IDLE_TIMEOUT, self._expire)

    def _expire(self) -> None:
        """Close what is unused for too long; the oldest stand in front."""
        self._expiry = None
        now = self.client.loop.time()
        for connection in list(self.idle):
            left = connection.idle_since + IDLE_TIMEOUT - now
            if left > 0:
                self._expiry = self.client.loop.call_later(left, self._expire)
                return
            connection.close()

    def _next_waiting(self) -> Exchange | None:
        while self.waiting:
            exchange = self.waiting.popleft()
            if exchange.on_done is not None:  # neither timed out nor let go
                self.client.moved_at = self.client.loop.time()
                return exchange
        return None

    def on_lost(self, connection: "_Connection") -> None:
        """A connection's socket is gone."""
        self.busy.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self.client.open -= 1
        self.client.on_slot_free()

    def resend(self, exchange: Exchange) -> None:
        """Send once more, on a connection that is new."""
        exchange.resent = True
        exchange.connection = None
        for connection in self.idle:  # as stale as the one that failed, likely
            connection.close()
        self.idle.clear()
        self.waiting.appendleft(exchange)
        self.connect_for_waiting()

    async def close(self) -> None:
        """End everything."""
        if self._expiry is not None:
            self._expiry.cancel()
        connecting = list(self._connecting)
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        for connection in [*self.idle, *self.busy]:
            connection.close()
        self.idle.clear()
        while (exchange := self._next_waiting()) is not None:
            exchange.finish(BackendError(f"POST {exchange.target}: the relay stops"))


class _Connection(asyncio.Protocol):
    """One TCP connection: one exchange at a time, then back to its origin."""

    def __init__(self, origin: _Origin, tls: ssl.SSLContext | None) -> None:
        self._origin = origin
        self._tls = tls
        self._why_lost = ""  # where TLS told
        self._transport: asyncio.Transport | None = None
        self._made_at = 0.0  # on the loop's clock
        self._parser: Any = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._adopted = False  # the origin counts it, and hears of its end
        self._used = False
        self._paused = False
        self._send_timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0  # on the loop's clock
        self._body_timer: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._started = False  # a byte of an answer came
        self._has_headers = False
        self._complete = False
        self._keep_alive = False
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none
        self._made_at = self._origin.client.loop.time()
        # So that writing pauses exactly while the kernel has not taken all. A
        # TLS transport pauses at its limit, a plain one above it; what TLS has
        # handed to its own transport (64 KiB at most) counts as sent.
        self._transport.set_write_buffer_limits(high=1 if self._tls else 0, low=0)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        if self._exchange is not None:
            self._exchange.sent()

    def data_received(self, data: bytes) -> None:
        if self._exchange is None and not self._has_headers:
            self.close()  # an answer that nobody asked for
            return
        self._started = True
        self._size += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._has_headers:
                self._fail(BackendError, "not an HTTP answer")
            self.close()
            return
        if self._complete:
            self._answer()
        elif not self._has_headers:
            if self._size > MAX_HEADERS_SIZE:
                self._fail(BackendError, "the answer's headers are too long")
                self.close()
        elif self._size > MAX_DROPPED_BODY + MAX_HEADERS_SIZE:
            self._answer()
        elif self._body_timer is None:
            self._body_timer = self._origin.client.loop.call_later(
                BODY_TIMEOUT, self._answer
            )

    def eof_received(self) -> bool:
        return False  # close: whoever waits hears of it in connection_lost()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if isinstance(error, ssl.SSLError):
            self._why_lost = tls_failure(error)
        for timer in (self._send_timer, self._body_timer):
            if timer is not None:
                timer.cancel()
        exchange = self._exchange
        if exchange is None:
            pass
        elif self._used and not self._started and not exchange.resent and (
            exchange.on_done is not None and exchange.write is not None
        ):
            # The server closed an idle connection while the request was on
            # its way (RFC 9112, section 9.3.1): nobody has seen it.
            self._exchange = None
            self._origin.on_lost(self)
            self._origin.resend(exchange)
            return
        elif self._has_headers:
            # Its body ended with the connection, or was cut: the status stands.
            self._answer()
        else:
            self._fail(BackendAway, self.why_lost())
        if self._adopted:
            self._origin.on_lost(self)

    # The parser's callbacks.

    def on_message_begin(self) -> None:
        if self._complete:  # at its first byte, which would spoil the next answer
            raise ValueError("a second answer, which nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_headers:
            return  # a trailer: nothing there is of use
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        if key in self._headers:  # as one list (RFC 9110, section 5.3)
            text = f"{self._headers[key]}, {text}"
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 100:
            raise ValueError("no status (RFC 9110, section 15)")
        if status >= 200:
            self._status = status
            self._has_headers = True
            if self._exchange is not None and self._exchange.timer is not None:
                self._exchange.timer.cancel()  # the body has a limit of its own
                self._exchange.timer = None
        elif status == 101:
            raise ValueError("switching protocols was not asked for")
        else:  # an interim response (RFC 9110, section 15.2): the answer follows
            self._headers = {}

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is not None and exchange.keep:
            kept = sum(map(len, self._body))
            if kept < MAX_KEPT_BODY:
                self._body.append(body[: MAX_KEPT_BODY - kept])

    def on_message_complete(self) -> None:
        self._complete = self._has_headers
        # Here only: the parser forgets the framing when the message is over.
        self._keep_alive = self._parser.should_keep_alive()

    # What the origin asks.

    def adopt(self) -> bool:
        """Whether it lives; from now on its end frees a place."""
        self._adopted = self._transport is not None
        return self._adopted

    def why_lost(self) -> str:
        """What to say of a connection that has ended before its answer had."""
        if self._why_lost:
            return self._why_lost
        if self._started:
            return "connection lost in the answer's middle"
        age = self._origin.client.loop.time() - self._made_at
        if self._tls is not None and age < VERDICT_TIME and not self._used:
            # By TLS 1.3 a client learns only when it reads that its certificate is
            # not taken, and not even then where the connection was reset.
            return "TLS: connection lost at once: it may want a client certificate"
        return "connection lost before an answer"

    def is_usable(self) -> bool:
        """Whether another request may go."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._tls is self._origin.tls
        )

    def send(self, exchange: Exchange) -> None:
        """Write one request."""
        assert self._transport is not None and exchange.write is not None
        self._reset()
        self._exchange = exchange
        self._origin.busy.add(self)
        exchange.connection = self
        self._transport.write(exchange.write())
        loop = self._origin.client.loop
        if self._paused:
            self._send_timer = loop.call_later(
                self._origin.client.dead_after, self._on_send_timeout
            )
        elif exchange.on_sent is not None:
            loop.call_soon(exchange.sent)

    def close(self) -> None:
        """Close, letting what was written leave."""
        if self._transport is not None:
            if self._paused:
                self._transport.abort()
            else:
                self._transport.close()

    def _answer(self) -> None:
        """Tell the outcome, and be free again where the answer has ended."""
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        exchange, self._exchange = self._exchange, None
        answer = Answer(self._status, self._headers, b"".join(self._body))
        self._has_headers = False
        self._used = True
        if self._complete and self._keep_alive and not self._paused:
            self._origin.on_free(self)
        else:
            self.close()
        if exchange is not None:
            exchange.connection = None
            exchange.finish(answer)

    def _fail(self, kind: type[BackendError], why: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.connection = None
            exchange.finish(kind(f"POST {exchange.target}: {why}"))

    def _on_send_timeout(self) -> None:
        self._fail(
            BackendAway, f"not taken in {self._origin.client.dead_after:g} s"
        )
        if self._transport is not None:
            self._transport.abort()


def tls_failure(error: ssl.SSLError) -> str:
    """What a failed handshake, or an alert, has told."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message.rstrip('.')}"
    if error.reason == "WRONG_VERSION_NUMBER":
        return "TLS: the backend speaks another protocol"
    # OpenSSL's name for it, such as TLSV13_ALERT_CERTIFICATE_REQUIRED.
    return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"


def watch(sock: socket.socket, dead_after: float) -> None:
    """Have the kernel notice a dead peer within `dead_after` seconds."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = int(min(max(1, dead_after / (KEEPALIVE_PROBES + 1)), MAX_KEEPALIVE))
    for option, value in (
        ("TCP_KEEPIDLE", step),
        ("TCP_KEEPINTVL", step),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", int(min(dead_after * 1000, 2**31 - 1))),  # milliseconds
    ):
        if hasattr(socket, option):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

