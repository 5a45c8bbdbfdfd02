"""A small HTTP/1.1 client: POSTs over pooled keep-alive connections.

Of our own, since delivery needs what no library tells: when a request has left
whole, and how to let one go (docs/decisions/003-own-http-client.md). `response`
reads what comes back, `resolver` looks names up, and racing IPv6 against IPv4 is
aiohappyeyeballs'.
"""

import asyncio
import errno
import fcntl
import itertools
import logging
import random
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast
from urllib.parse import urlsplit

import aiohappyeyeballs

from backends import BackendAway, BackendError
from backends.deadlines import RunningTime, after_reading
from backends.hosts import encoded_host
from backends.resolver import Resolver
from backends.response import MAX_HEAD_SIZE, MalformedResponse, ResponseReader

logger = logging.getLogger(__name__)

# This process, or its machine, may open nothing more: no fault of the backend.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE})
SHORTAGE_PAUSE = 0.5  # seconds; then a connection is tried again
MAX_CONNECTING = 128  # TCP handshakes under way at once to one origin
ADDRESSES_TTL = 5.0  # seconds for which a name's addresses are used again
IDLE_TIMEOUT = 60.0  # seconds; a connection unused for that long is closed
HAPPY_EYEBALLS_DELAY = 0.25  # seconds; RFC 8305, section 8
MAX_DROPPED_BODY = 1024 * 1024  # bytes; beyond, the connection is closed
BODY_TIMEOUT = 5.0  # seconds from an answer's headers to its end; then likewise
KEEPALIVE_PROBES = 3
MAX_KEEPALIVE = 32767  # seconds; tcp(7)
# Seconds after a TLS handshake in which its end is taken for the backend's verdict.
VERDICT_TIME = 2.0
# Seconds; above any --backend_connect_timeout, which ends a handshake that is late.
TLS_HANDSHAKE_TIMEOUT = 86400.0
TLS_SHUTDOWN_TIMEOUT = 1.0  # seconds for the peer's close_notify; its place waits
MIN_AGE_SHARE = 0.8  # of the connection age, so that not all are replaced at once
PROGRESS_CHECKS = 4  # within dead_after; after so many without progress a peer is dead
DEFAULT_PORTS = {"http": 80, "https": 443}
CALLBACK_FAILED = "a callback failed"  # for the log


@dataclass(frozen=True, eq=False)
class Target:
    """Where to POST: an http(s) URL in the parts that a request needs.

    `host` is as DNS takes it: international names are encoded, and a dot at the
    end, which keeps the resolver's search list away, is kept. There are few, and
    each is asked for the same with every request: what is made of the parts is made
    once, and one target is another's equal only where it is the same object.
    """

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Raises `ValueError` with what is wrong with `url`."""
        if any(c <= " " or c == "\x7f" for c in url):
            raise ValueError("it has characters that a URL must percent-encode")
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS:
            raise ValueError("it is not an http:// or https:// URL")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it has a user name or a password in it")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii():
            raise ValueError("it has characters that a URL must percent-encode")
        if not (parts.hostname or "").strip("."):
            raise ValueError("it has no host")
        host = encoded_host(parts.hostname or "")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError("its port is not a number from 1 to 65535")
        return cls(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], path)

    @cached_property
    def origin(self) -> tuple[str, str, int]:
        """What connections are shared by."""
        return self.scheme, self.host, self.port

    @property
    def server_name(self) -> str:
        """The host as a certificate, SNI (RFC 6066, section 3) and Host name it."""
        return self.host.removesuffix(".")

    @cached_property
    def authority(self) -> str:
        """The Host header's value (RFC 9110, section 7.2)."""
        name = self.server_name
        host = f"[{name}]" if ":" in name else name
        if self.port == DEFAULT_PORTS[self.scheme]:
            return host
        return f"{host}:{self.port}"

    @cached_property
    def url(self) -> str:
        """Without the query, which may hold a secret."""
        return f"{self.scheme}://{self.authority}{self.path.partition('?')[0]}"

    def __str__(self) -> str:
        return self.url


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
        "answer_timeout",
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
        # Seconds for the answer, from when it is sent; None: no limit of that kind.
        self.answer_timeout: float | None = None
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
            try:
                on_done(outcome)
            except Exception:
                logger.exception(CALLBACK_FAILED)

    @property
    def in_line(self) -> bool:
        """Whether it waits for a connection, for the first time or once more."""
        return self.connection is None

    def let_go(self) -> None:
        """Close the request's connection, or give up its place in the line."""
        self.on_done = self.on_sent = self.write = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.connection is not None:
            self.connection.close()

    def hold(self) -> None:
        """Never send it again at once, even if its kept connection ends."""
        self.write = None

    def sent(self) -> None:
        """The kernel has taken the last byte."""
        if self.on_sent is not None:
            call_alone(self.on_sent)

    @property
    def may_go_again(self) -> bool:
        """Whether a connection that ended before an answer costs it nothing."""
        return (
            not self.resent and self.on_done is not None and self.write is not None
        )


class Client:
    """A pool of connections to every origin that is POSTed to.

    `max_connections` bounds those open or being opened, over all origins;
    beyond it requests wait in line, and `on_starved` is called for each, so
    that somebody may let one go. `connect_timeout` covers name, TCP and TLS.
    A peer that is gone without a word is noticed within `dead_after` seconds. No
    request is sent on a connection that is older than `connection_age` seconds,
    so that changes of DNS and new servers are found.
    """

    def __init__(
        self,
        max_connections: int,
        connect_timeout: float,
        dead_after: float,
        connection_age: float = float("inf"),
        on_starved: Callable[[], None] = lambda: None,
    ) -> None:
        # Kept, since asking for it is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.max_connections = max_connections
        self.connect_timeout = connect_timeout
        self.dead_after = dead_after
        self.connection_age = connection_age
        self.on_starved = on_starved
        self.tls: ssl.SSLContext | None = None
        self.open = 0
        self.moved_at = float("-inf")  # when a line last moved, on the loop's clock
        self.count = itertools.count(1)  # of connections, ever opened
        self.resolver = Resolver()
        self._origins: dict[tuple[str, str, int], _Origin] = {}
        self._shortage: asyncio.TimerHandle | None = None  # of descriptors
        self.closed = False

    def post(
        self,
        target: Target,
        write: Callable[[], bytes],
        on_done: Callable[[Answer | BackendError], None],
        on_sent: Callable[[], None] | None = None,
        timeout: float | None = None,
        line_timeout: float | None = None,
        keep: bool = False,
    ) -> Exchange:
        """Send what `write` returns, a whole request, and report its outcome.

        `write` is called when a connection is there to send on, once more where
        the request has to go again at once: a wait in line makes no part of it old.
        `timeout` is in seconds from now to the answer; None waits for as long as
        the connection lives. With `line_timeout` it begins when the request is sent:
        before that it may wait for so many seconds, which may be infinite, in a line
        that does not move. `keep` asks for the answer's headers and body.
        """
        exchange = Exchange(target, write, on_done, on_sent, keep)
        if self.closed:
            self.loop.call_soon(exchange.finish, stopped(target))
            return exchange
        if line_timeout is not None:
            exchange.answer_timeout = timeout
        elif timeout is not None:
            self._limit(exchange, timeout)
        origin = self._origins.get(target.origin)
        if origin is None:
            origin = self._origins[target.origin] = _Origin(self, target)
        origin.dispatch(exchange)
        if line_timeout is not None and exchange.in_line:
            self._limit_line(exchange, self.loop.time(), line_timeout)
        return exchange

    def on_sending(self, exchange: Exchange) -> None:
        """Its wait in line is over: from now on it waits for its answer."""
        if exchange.timer is not None:
            exchange.timer.cancel()
        assert exchange.answer_timeout is not None
        self._limit(exchange, exchange.answer_timeout)

    def trust(self, tls: ssl.SSLContext | None) -> None:
        """Make https connections with `tls`; needed before the first of them.

        What is under way on one that was made with another context ends there,
        and nothing more is sent on it.
        """
        self.tls = tls
        for origin in self._origins.values():
            origin.trust(tls)

    @property
    def starved(self) -> bool:
        """Whether requests wait and no connection may be opened for them."""
        return self.open >= self.max_connections and any(
            origin.waiting for origin in self._origins.values()
        )

    async def close(self) -> None:
        """Close every connection; what is under way ends with an error."""
        self.closed = True
        if self._shortage is not None:
            self._shortage.cancel()
        for origin in self._origins.values():
            await origin.close()

    def make_room(self) -> None:
        """Close an idle connection to another origin, or ask for one to be let go."""
        for origin in self._origins.values():
            if origin.idle:
                origin.idle.pop().close()
                return
        call_alone(self.on_starved)

    def on_slot_free(self) -> None:
        """A connection ended: whoever waits may open another, the poorest first.

        Of those that have as many, whoever has opened none for the longest time.
        """
        if not self.closed:
            for origin in sorted(
                self._origins.values(), key=lambda each: (each.size(), each.opened_at)
            ):
                origin.connect_for_waiting()

    @property
    def has_shortage(self) -> bool:
        """Whether no descriptor was left a moment ago: requests wait for one."""
        return self._shortage is not None

    def on_shortage(self) -> None:
        """No descriptor is left: try again in a while, and open nothing until then."""
        if self._shortage is None and not self.closed:
            logger.warning("too many open files: events wait for a connection")
            self._shortage = self.loop.call_later(SHORTAGE_PAUSE, self._end_shortage)

    def _end_shortage(self) -> None:
        self._shortage = None
        self.on_slot_free()

    def needs_room(self, origin: "_Origin") -> bool:
        """Whether a free connection to `origin` has to end for another origin.

        To be asked where no more may be opened. All origins are to have as many as
        they need, or equally many, without connections that are opened and closed in
        turn.
        """
        size = origin.size()
        return any(
            other.waiting
            and other is not origin
            and (not origin.waiting or other.size() == 0 or other.size() < size - 1)
            for other in self._origins.values()
        )

    def _limit(self, exchange: Exchange, timeout: float) -> None:
        exchange.timer = self.loop.call_later(
            timeout,
            after_reading,
            self.loop,
            partial(self._on_timeout, exchange, timeout),
        )

    def _limit_line(self, exchange: Exchange, since: float, timeout: float) -> None:
        if timeout == float("inf"):
            return
        exchange.timer = self.loop.call_at(
            since + timeout,
            after_reading,
            self.loop,
            partial(self._judge_line, exchange, since, timeout),
        )

    def _judge_line(self, exchange: Exchange, since: float, timeout: float) -> None:
        """Whether the line has stood still for as long as may be."""
        if exchange.timer is None or not exchange.in_line:
            return
        if self.moved_at > since:
            self._limit_line(exchange, self.moved_at, timeout)
            return
        exchange.timer = None
        exchange.finish(
            BackendError(
                f"POST {exchange.target}: no connection became free in {timeout:g} s"
            )
        )

    @staticmethod
    def _on_timeout(exchange: Exchange, timeout: float) -> None:
        if exchange.timer is None:
            return  # what was read meanwhile was the answer
        exchange.timer = None
        connection = exchange.connection
        exchange.finish(
            BackendError(f"POST {exchange.target}: no answer in {timeout:g} s")
        )
        if connection is not None:
            connection.close()


class _Shortage(Exception):
    """No descriptor is left for a connection."""


class _Origin:
    """One scheme, host and port: its idle connections, and who waits for one."""

    def __init__(self, client: Client, target: Target) -> None:
        self.client = client
        self.target = target
        # What its connections are made with from now on; None: plain TCP.
        self.tls = client.tls if target.scheme == "https" else None
        self.idle: list[_Connection] = []
        self.busy: set[_Connection] = set()
        self.waiting: deque[Exchange] = deque()
        # Held here while they connect; each reports to who waits.
        self._connecting: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None  # one for all that are idle
        self._addresses: Sequence[aiohappyeyeballs.AddrInfoType] = ()
        self._resolved_at = float("-inf")
        self.opened_at = 0  # a count of the client's connections, at its last one

    def size(self) -> int:
        """Connections that are open or being opened."""
        return len(self.idle) + len(self.busy) + len(self._connecting)

    def dispatch(self, exchange: Exchange) -> None:
        """Send on an idle connection, or wait for one."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_usable():
                connection.send(exchange)
                return
            connection.close()
        self.waiting.append(exchange)
        self.connect_for_waiting()

    def connect_for_waiting(self) -> None:
        """Open connections for those who wait, within the bounds."""
        loop = self.client.loop
        while self.waiting and self.waiting[0].on_done is None:
            self.waiting.popleft()  # timed out or let go: no need of a connection
        if self.client.has_shortage:
            return
        while len(self._connecting) < min(len(self.waiting), MAX_CONNECTING):
            if self.client.open >= self.client.max_connections:
                self.client.make_room()
                return
            self.client.open += 1
            self.opened_at = next(self.client.count)
            task = loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._on_connecting_ended)

    async def _connect(self) -> None:
        try:
            connection = await self._open()
            if not connection.adopt():
                raise BackendAway(connection.why_lost())
        except asyncio.CancelledError:
            raise  # a task may be cancelled before it runs: see its callback
        except _Shortage:
            self._ends_connecting()
            self.client.on_shortage()
            self._slot_free()
            return
        except BaseException as error:
            self._ends_connecting()
            self._slot_free()
            # A fault of ours, too: who waits would have us try it for ever.
            if (exchange := self._next_waiting()) is not None:
                exchange.finish(BackendAway(f"POST {exchange.target}: {error}"))
            if not isinstance(error, BackendAway):
                raise
            return
        self._ends_connecting()  # before its connection may end, and free a place
        self._hand_on(connection)

    def _ends_connecting(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connecting.discard(task)

    def _on_connecting_ended(self, task: "asyncio.Task[None]") -> None:
        self._connecting.discard(task)
        if task.cancelled():
            self._slot_free()

    def _slot_free(self) -> None:
        self.client.open -= 1
        self.client.loop.call_soon(self.client.on_slot_free)

    async def _open(self) -> "_Connection":
        """Raises `BackendAway` with the step that failed, and why; or `_Shortage`."""
        seconds = self.client.connect_timeout
        late = "DNS has not answered"
        try:
            async with RunningTime(self.client.loop, seconds):
                addresses = await self._resolve()
                late = "the host has not answered"
                sock = await aiohappyeyeballs.start_connection(
                    addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1
                )
                late = "the TLS handshake has not ended"
                return await self._converse(sock)
        except TimeoutError:
            raise BackendAway(f"no connection in {seconds:g} s: {late}") from None
        except (OSError, UnicodeError) as error:  # the latter: no name for DNS
            if isinstance(error, OSError) and error.errno in SHORTAGES:
                raise _Shortage from error
            raise BackendAway(why_not_connected(error)) from error

    async def _converse(self, sock: socket.socket) -> "_Connection":
        """Make a connection of a socket that is connected, by TLS for https."""
        tls = self.tls
        assert tls is not None or self.target.scheme == "http"
        try:
            watch(sock, self.client.dead_after)
            _, connection = await self.client.loop.create_connection(
                lambda: _Connection(self, tls),
                sock=sock,
                ssl=tls,
                server_hostname=self.target.server_name if tls else None,
                ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT if tls else None,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT if tls else None,
            )
        except BaseException as error:
            sock.close()
            if tls is not None and is_hang_up(error):
                raise BackendAway(TLS_HANG_UP) from error
            raise
        return connection

    async def _resolve(self) -> Sequence[aiohappyeyeballs.AddrInfoType]:
        """The host's addresses; those of a moment ago are used again."""
        loop = self.client.loop
        if loop.time() > self._resolved_at + ADDRESSES_TTL:
            self._addresses = await self.client.resolver.resolve(
                self.target.host, self.target.port
            )
            self._resolved_at = loop.time()
        return self._addresses

    def on_free(self, connection: "_Connection") -> None:
        """A connection has finished its exchange."""
        self.busy.discard(connection)
        client = self.client
        if client.open >= client.max_connections and client.needs_room(self):
            connection.close()
        else:
            self._hand_on(connection)

    def trust(self, tls: ssl.SSLContext | None) -> None:
        """Make connections with `tls`, and close the idle ones that were not."""
        if self.target.scheme == "https":
            self.tls = tls
        fresh = [connection for connection in self.idle if connection.is_usable()]
        for connection in set(self.idle).difference(fresh):
            connection.close()
        self.idle = fresh

    def _hand_on(self, connection: "_Connection") -> None:
        client = self.client
        if not connection.is_usable():
            connection.close()
        elif self.waiting and (exchange := self._next_waiting()) is not None:
            connection.send(exchange)
        elif client.open >= client.max_connections and client.needs_room(self):
            connection.close()
        else:
            self._keep_idle(connection)

    def _keep_idle(self, connection: "_Connection") -> None:
        connection.kept = True
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
        exchange.connection = None
        if self.client.closed:
            exchange.finish(stopped(exchange.target))
            return
        exchange.resent = True
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
            exchange.finish(stopped(exchange.target))


class _Connection(asyncio.Protocol):
    """One TCP connection: one exchange at a time, then back to its origin."""

    def __init__(self, origin: _Origin, tls: ssl.SSLContext | None) -> None:
        self._origin = origin
        self._tls = tls
        self._why_lost = ""  # where TLS told
        self._transport: asyncio.Transport | None = None
        self._made_at = 0.0  # on the loop's clock, as the next one
        self._retire_at = 0.0  # no request is sent from then on
        self._response = ResponseReader()
        self._exchange: Exchange | None = None
        self._adopted = False  # the origin counts it, and hears of its end
        self.kept = False  # used before, or idle: the server may have closed it
        self._paused = False
        self._progress: _Progress | None = None  # while the kernel has not taken all
        self.idle_since = 0.0  # on the loop's clock
        self._body_timer: asyncio.TimerHandle | None = None

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none
        client = self._origin.client
        self._made_at = client.loop.time()
        self._retire_at = self._made_at + client.connection_age * random.uniform(
            MIN_AGE_SHARE, 1
        )
        # So that writing pauses exactly while the kernel has not taken all. A
        # TLS transport pauses at its limit, a plain one above it; what TLS has
        # handed to its own transport (64 KiB at most) counts as sent.
        self._transport.set_write_buffer_limits(high=1 if self._tls else 0, low=0)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._exchange is not None:
            self._exchange.sent()

    def data_received(self, data: bytes) -> None:
        response, exchange = self._response, self._exchange
        if exchange is None:
            self.close()  # an answer that nobody asked for
            return
        try:
            response.feed(data)
        except MalformedResponse as error:
            self._fail(BackendError, str(error))
            self.close()
            return
        if not response.has_head:
            return
        if response.status == 408 and self.kept and exchange.may_go_again:
            # The server's word for a kept connection that it ends for lack of
            # a request (RFC 9110, section 15.5.9).
            self._exchange = None
            self.close()
            self._origin.busy.discard(self)
            self._origin.resend(exchange)
            return
        if exchange.timer is not None:
            exchange.timer.cancel()  # the body has a limit of its own
            exchange.timer = None
        if response.complete or response.size > MAX_DROPPED_BODY + MAX_HEAD_SIZE:
            self._answer()
        elif self._body_timer is None:
            loop = self._origin.client.loop
            self._body_timer = loop.call_later(
                BODY_TIMEOUT, after_reading, loop, self._on_body_timeout
            )

    def eof_received(self) -> bool:
        return False  # close: whoever waits hears of it in connection_lost()

    def connection_lost(self, error: Exception | None) -> None:
        if isinstance(error, ssl.SSLError):
            self._why_lost = tls_failure(error)
        elif self._has_no_verdict():
            self._why_lost = TLS_NO_VERDICT
        self._transport = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        exchange = self._exchange
        if exchange is None:
            pass
        elif self.kept and not self._response.started and exchange.may_go_again:
            # The server closed an idle connection while the request was on
            # its way (RFC 9112, section 9.3.1): nobody has seen it.
            self._exchange = None
            self._origin.on_lost(self)
            self._origin.resend(exchange)
            self._response.end()
            return
        elif self._response.cut():
            # Its body or its head ended with the connection: the status stands.
            self._answer()
        else:
            self._fail(BackendAway, self.why_lost())
        self._response.end()
        if self._adopted:
            self._origin.on_lost(self)

    # What the origin asks.

    def adopt(self) -> bool:
        """Whether it lives; from now on its end frees a place."""
        self._adopted = self._transport is not None
        return self._adopted

    def why_lost(self) -> str:
        """What to say of a connection that has ended before its answer had."""
        if self._why_lost:
            return self._why_lost
        if self._response.started:
            return "connection lost in the answer's middle"
        return "connection lost before an answer"

    def _has_no_verdict(self) -> bool:
        """Whether the peer may have refused the handshake without our hearing it.

        By TLS 1.3 a client learns only when it reads that its certificate is not
        taken, and not even then where the connection was reset. Whoever sends a
        session ticket has taken it (RFC 8446, section 4.6.1).
        """
        if self._tls is None or self._transport is None or self._response.started:
            return False
        age = self._origin.client.loop.time() - self._made_at
        tls = self._transport.get_extra_info("ssl_object")
        return (
            not self.kept
            and age < VERDICT_TIME
            and tls.version() == "TLSv1.3"
            and not (tls.session and tls.session.has_ticket)
        )

    def is_usable(self) -> bool:
        """Whether another request may go."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._tls is self._origin.tls
            and self._origin.client.loop.time() < self._retire_at
        )

    def send(self, exchange: Exchange) -> None:
        """Write one request."""
        assert self._transport is not None and exchange.write is not None
        self._response.begin(exchange.keep)
        self._exchange = exchange
        self._origin.busy.add(self)
        exchange.connection = self
        client = self._origin.client
        if exchange.answer_timeout is not None:
            client.on_sending(exchange)
        try:
            self._transport.write(exchange.write())
        except Exception:
            logger.exception("POST %s: no request could be made", exchange.target)
            self._why_lost = "no request could be made"
            exchange.write = None  # nor is it tried again
            self.close()
            return
        if self._paused:
            self._progress = _Progress(
                client.loop, self._transport, client.dead_after, self._on_no_progress
            )
        elif exchange.on_sent is not None:
            client.loop.call_soon(exchange.sent)

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
        response = self._response
        exchange, self._exchange = self._exchange, None
        answer = Answer(
            response.status, response.headers, response.body if response.keep else b""
        )
        self.kept = True
        reusable = response.complete and response.reusable and not self._paused
        awaited = bool(self._origin.waiting)
        if not reusable:
            self.close()
        elif not awaited:  # free for what goes because of the answer
            self._origin.on_free(self)
        if exchange is not None:
            exchange.connection = None
            exchange.finish(answer)
        if reusable and awaited:  # unless the answer took whoever waits out of line
            self._origin.on_free(self)

    def _on_body_timeout(self) -> None:
        if self._body_timer is not None:
            self._answer()

    def _fail(self, kind: type[BackendError], why: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.connection = None
            exchange.finish(kind(f"POST {exchange.target}: {why}"))

    def _on_no_progress(self) -> None:
        self._fail(BackendAway, f"not taken in {self._origin.client.dead_after:g} s")
        if self._transport is not None:
            self._transport.abort()


class _Progress:
    """Watches whether a peer takes what waits to be sent.

    `on_none` is called once nothing was taken for `dead_after` seconds, in which
    the process ran: a stall of it makes one check late, not all.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        dead_after: float,
        on_none: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._pause = dead_after / PROGRESS_CHECKS
        self._on_none = on_none
        self._waiting = self._measure()
        self._in_vain = 0  # checks without progress so far
        self._timer = loop.call_later(self._pause, self._check)

    def stop(self) -> None:
        """Watch no more."""
        self._timer.cancel()

    def _measure(self) -> tuple[int, int]:
        """Bytes that wait here, and those that the peer's kernel has not got."""
        sock = self._transport.get_extra_info("socket")
        unacknowledged = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return (
            self._transport.get_write_buffer_size(),
            struct.unpack("i", unacknowledged)[0],
        )

    def _check(self) -> None:
        before, self._waiting = self._waiting, self._measure()
        self._in_vain = self._in_vain + 1 if self._waiting == before else 0
        if self._in_vain < PROGRESS_CHECKS:
            self._timer = self._loop.call_later(self._pause, self._check)
        else:
            self._on_none()


def stopped(target: Target) -> BackendError:
    """What becomes of a request when the client is closed."""
    return BackendError(f"POST {target}: the relay stops")


def call_alone(callback: Callable[[], None]) -> None:
    """Call it; where it has a fault, those that are called after it go on."""
    try:
        callback()
    except Exception:
        logger.exception(CALLBACK_FAILED)


TLS_HANG_UP = "TLS: the connection was closed in the handshake"
TLS_NO_VERDICT = "TLS: connection lost at once: it may want a client certificate"


def is_hang_up(error: BaseException) -> bool:
    """Whether a TLS handshake failed since the peer, or the network, ended it."""
    return isinstance(error, ConnectionError | ssl.SSLEOFError)


def why_not_connected(error: OSError | UnicodeError) -> str:
    """One line, whatever the error does not say."""
    if isinstance(error, ssl.SSLError):
        return tls_failure(error)
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot connect: {why}"


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

