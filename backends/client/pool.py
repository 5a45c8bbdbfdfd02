"""The pool: connections by origin, and the requests that wait for one.

`connection` sends a request and reads its response. `resolver` looks names up, and
aiohappyeyeballs races IPv6 against IPv4.
"""

import asyncio
import errno
import itertools
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import aiohappyeyeballs

from backends import BackendAway, BackendError
from backends.client.connection import ClientSettings, Origin, PooledConnection
from backends.client.dead_peers import set_keepalive
from backends.client.exchange import (
    Exchange,
    NoConnection,
    Refused,
    SimpleExchange,
    Terms,
    stopped,
)
from backends.client.resolver import Resolver
from backends.client.response import Keep, Response
from backends.client.tls_failures import TLS_HANG_UP, connect_failure, is_hang_up
from backends.deadlines import RunningTime, after_reading
from backends.target import Target
from backends.waiting import call_one

logger = logging.getLogger(__name__)

# This process or its machine has no descriptor left: not a failure of the backend.
NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE})
NO_DESCRIPTORS_PAUSE = 0.5  # seconds until the next attempt to open a connection
MAX_ORIGINS = 1024  # that are kept although they have no connection
MAX_CONNECTING = 128  # TCP handshakes under way at once to one origin
ADDRESSES_TTL = 5.0  # seconds for which a name's addresses are used again
IDLE_TIMEOUT = 60.0  # seconds; a connection unused for that long is closed
HAPPY_EYEBALLS_DELAY = 0.25  # seconds; RFC 8305, section 8
# Seconds; longer than any --backend_connect_timeout, which ends a slow handshake.
TLS_HANDSHAKE_TIMEOUT = 86400.0
# Seconds to wait for the peer's close_notify; until then the connection counts.
TLS_SHUTDOWN_TIMEOUT = 1.0


class Client(ClientSettings):
    """A pool of connections to all origins that it POSTs to.

    `max_connections` bounds those open or being opened, over all origins;
    beyond it requests are queued, and `on_starved` is called for each, so
    that its owner may abandon another request. `connect_timeout` covers name
    lookup, TCP and TLS. A dead peer is detected within `dead_after` seconds. No
    request is sent on a connection that is older than `connection_age` seconds,
    so that changes of DNS and new servers are found.
    """

    # What a client for other services may have otherwise.
    idle_timeout = IDLE_TIMEOUT
    queue_may_move = True  # a request may wait for longer if its queue moves

    def __init__(
        self,
        max_connections: int,
        connect_timeout: float,
        dead_after: float,
        connection_age: float = float("inf"),
        on_starved: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(dead_after, connection_age)
        self.max_connections = max_connections
        self.connect_timeout = connect_timeout
        self.on_starved = on_starved
        self.tls: ssl.SSLContext | None = None
        self.open = 0
        self.moved_at = float("-inf")  # when a queue last moved, on the loop's clock
        self.count = itertools.count(1)  # numbers the connections that are opened
        self.resolver = Resolver()
        self._origins: dict[tuple[str, str, int], _Origin] = {}
        self._pause: asyncio.TimerHandle | None = None  # while no descriptor is left
        self.closed = False

    def post(
        self,
        target: Target,
        write: Callable[[], bytes],
        on_done: Callable[[Response | BackendError], None],
        on_sent: Callable[[], None] | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        keep: Keep | None = None,
    ) -> Exchange:
        """Send what `write` returns, and report its outcome; see `Exchange`, `Terms`.

        `on_done` is not called before this returns.
        """
        terms = Terms(timeout, queue_timeout, keep)
        exchange = SimpleExchange(target, write, on_done, on_sent, terms)
        self.send(exchange)
        return exchange

    def send(self, exchange: Exchange) -> None:
        """Send a request on a free connection, or as soon as there is one."""
        target, terms = exchange.target, exchange.terms
        if self.closed:
            self.loop.call_soon(exchange.finish, stopped(target))
            return
        if terms.timeout is not None and terms.queue_timeout is None:
            exchange.limit(self.loop, terms.timeout)
        origin = self._origins.get(target.origin)
        if origin is None:
            origin = self._new_origin(target)
        origin.dispatch(exchange)
        if exchange.connection is None:
            self.on_queued(exchange)

    def connections_to(self, target: Target) -> float:
        """Return the most connections to a target's origin, if that has a limit."""
        return float("inf")

    def lingering_at(self, target: Target) -> float:
        """Return for how many seconds a connection is kept if nobody waits; 0: closed.

        Only then may its next request be sent.
        """
        return 0.0

    def _new_origin(self, target: Target) -> "_Origin":
        if len(self._origins) >= MAX_ORIGINS:
            used = {k: each for k, each in self._origins.items() if not each.unused}
            self._origins = used
        origin = self._origins[target.origin] = _Origin(self, target)
        return origin

    def on_queued(self, exchange: Exchange) -> None:
        """Record that it waits for a connection, for the first time or again."""
        timeout = exchange.terms.queue_timeout
        if timeout is not None:
            self._limit_queue(exchange, self.loop.time(), timeout)

    def trust(self, tls: ssl.SSLContext | None) -> None:
        """Make https connections with `tls`; needed before the first of them.

        Connections made with another context complete their requests, and get no more.
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
        """Close every connection; pending requests fail."""
        self.closed = True
        if self._pause is not None:
            self._pause.cancel()
        for origin in self._origins.values():
            await origin.close()

    def make_room(self) -> None:
        """Close an idle connection to another origin, or call `on_starved`."""
        for origin in self._origins.values():
            if origin.idle:
                origin.idle.pop().close()
                return
        call_one(self.on_starved)

    def on_slot_free(self) -> None:
        """A connection ended: an origin that waits may open another.

        The order is by the number of connections, then by when the origin last opened
        one.
        """
        if not self.closed:
            for origin in sorted(
                self._origins.values(), key=lambda each: (each.size(), each.opened_at)
            ):
                origin.connect_for_waiting()

    @property
    def paused(self) -> bool:
        """Whether no descriptor was left within the last `NO_DESCRIPTORS_PAUSE`."""
        return self._pause is not None

    def on_no_descriptors(self) -> None:
        """Open no connection for `NO_DESCRIPTORS_PAUSE`: no descriptor is left."""
        if self._pause is None and not self.closed:
            logger.warning("too many open files: events wait for a connection")
            self._pause = self.loop.call_later(NO_DESCRIPTORS_PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self.on_slot_free()

    def needs_room(self, origin: "_Origin") -> bool:
        """Whether a free connection to `origin` must be closed for another origin.

        Used when no more may be opened. Each origin gets as many as it needs, or all
        get the same number; so connections are not opened and closed in turn.
        """
        size = origin.size()
        return any(
            other.waiting
            and other is not origin
            and (not origin.waiting or other.size() == 0 or other.size() < size - 1)
            for other in self._origins.values()
        )

    def _limit_queue(self, exchange: Exchange, since: float, timeout: float) -> None:
        if exchange.timer is not None:
            exchange.timer.cancel()
        exchange.timer = self.loop.call_at(
            since + timeout,
            after_reading,
            self.loop,
            partial(self._judge_queue, exchange, since, timeout),
        )

    def _judge_queue(self, exchange: Exchange, since: float, timeout: float) -> None:
        """Fail a request if its queue has not moved for `timeout` seconds."""
        if exchange.timer is None or not exchange.queued:
            return
        if self.moved_at > since and self.queue_may_move:
            self._limit_queue(exchange, self.moved_at, timeout)
            return
        exchange.finish(
            NoConnection(
                f"POST {exchange.target}: no connection became free in {timeout:g} s"
            )
        )


class _NoDescriptors(Exception):
    """No descriptor is left for a connection."""


class _Origin(Origin):
    """One scheme, host and port: its connections, and the requests that wait."""

    def __init__(self, client: Client, target: Target) -> None:
        tls = client.tls if target.scheme == "https" else None
        super().__init__(client, tls, client.lingering_at(target))
        self.client = client
        self.target = target
        self._max_size = client.connections_to(target)
        self.idle: list[PooledConnection] = []
        # The tasks that connect; a failure is reported to a waiting request.
        self._connecting: set[asyncio.Task[None]] = set()
        self._expiry: asyncio.TimerHandle | None = None  # for all idle connections
        self._addresses: Sequence[aiohappyeyeballs.AddrInfoType] = ()
        self._resolved_at = float("-inf")
        self.opened_at = 0  # `client.count` of the connection that it opened last

    def size(self) -> int:
        """Connections that are open or being opened."""
        return len(self.idle) + len(self.busy) + len(self._connecting)

    @property
    def unused(self) -> bool:
        """Whether it has no connection, and no request waits for one."""
        return not self.size() and not self.waiting and self._expiry is None

    def dispatch(self, exchange: Exchange) -> None:
        """Send on an idle connection, or wait for one."""
        now = self.client.loop.time()
        while self.idle:
            connection = self.idle.pop()
            if connection.is_usable(now):
                connection.send(exchange)
                return
            connection.close()
        self.waiting.append(exchange)
        self.connect_for_waiting()

    def connect_for_waiting(self) -> None:
        """Open connections for the requests that wait, within the bounds."""
        loop = self.client.loop
        while self.waiting and not self.waiting[0].pending:
            self.waiting.popleft()  # timed out or abandoned
        if self.client.paused:
            return
        while len(self._connecting) < min(len(self.waiting), MAX_CONNECTING):
            if self.size() >= self._max_size:
                return
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
        except _NoDescriptors:
            self._stop_connecting()
            self.client.on_no_descriptors()
            self._slot_free()
            return
        except BaseException as error:
            self._stop_connecting()
            self._slot_free()
            # Also for a bug: otherwise each waiting request would repeat it.
            if (exchange := self._next_waiting()) is not None:
                kind = Refused if isinstance(error, Refused) else BackendAway
                exchange.finish(kind(f"POST {exchange.target}: {error}"))
            if not isinstance(error, BackendAway):
                raise
            return
        self._stop_connecting()  # first, since the connection may end below
        self._hand_on(connection)

    def _stop_connecting(self) -> None:
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

    async def _open(self) -> PooledConnection:
        """Raises `BackendAway` with the failed step and reason, or `_NoDescriptors`."""
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
                return await self._wrap(sock)
        except TimeoutError:
            raise BackendAway(f"no connection in {seconds:g} s: {late}") from None
        except (OSError, UnicodeError) as error:  # UnicodeError: not a DNS name
            if isinstance(error, OSError) and error.errno in NO_DESCRIPTORS:
                raise _NoDescriptors from error
            kind = Refused if isinstance(error, ConnectionRefusedError) else BackendAway
            raise kind(connect_failure(error)) from error

    async def _wrap(self, sock: socket.socket) -> PooledConnection:
        """Make a connection from a connected socket, with TLS for https."""
        tls = self.tls
        assert tls is not None or self.target.scheme == "http"
        connection = PooledConnection(self, tls)
        protocol = cast(asyncio.Protocol, connection)  # see `PooledConnection`
        try:
            set_keepalive(sock, self.client.dead_after)
            await self.client.loop.create_connection(
                lambda: protocol,
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
        """Return the host's addresses, looked up at most once per `ADDRESSES_TTL`."""
        loop = self.client.loop
        if loop.time() > self._resolved_at + ADDRESSES_TTL:
            self._addresses = await self.client.resolver.resolve(
                self.target.host, self.target.port
            )
            self._resolved_at = loop.time()
        return self._addresses

    def on_free(self, connection: PooledConnection) -> None:
        """A connection has finished its exchange."""
        self.busy.discard(connection)
        client = self.client
        if client.open >= client.max_connections and client.needs_room(self):
            connection.close()
        else:
            self._hand_on(connection)

    def trust(self, tls: ssl.SSLContext | None) -> None:
        """Make new connections with `tls`; close idle ones of another context."""
        if self.target.scheme == "https":
            self.tls = tls
        now = self.client.loop.time()
        fresh = [connection for connection in self.idle if connection.is_usable(now)]
        for connection in set(self.idle).difference(fresh):
            connection.close()
        self.idle = fresh

    def _hand_on(self, connection: PooledConnection) -> None:
        client = self.client
        now = client.loop.time()
        if not connection.is_usable(now):
            connection.close()
        elif self.waiting and (exchange := self._next_waiting()) is not None:
            connection.send(exchange)
        elif client.open >= client.max_connections and client.needs_room(self):
            connection.close()
        else:
            self._keep_idle(connection, now)

    def _keep_idle(self, connection: PooledConnection, now: float) -> None:
        connection.kept = True
        connection.idle_since = now
        self.idle.append(connection)
        if self._expiry is None:
            self._expiry = self.client.loop.call_later(
                self.client.idle_timeout, self._expire
            )

    def _expire(self) -> None:
        """Close connections unused for `idle_timeout`, the oldest first."""
        self._expiry = None
        now = self.client.loop.time()
        for connection in list(self.idle):
            left = connection.idle_since + self.client.idle_timeout - now
            if left > 0:
                self._expiry = self.client.loop.call_later(left, self._expire)
                return
            connection.close()

    def _next_waiting(self) -> Exchange | None:
        while self.waiting:
            exchange = self.waiting.popleft()
            if exchange.pending:
                self.client.moved_at = self.client.loop.time()
                return exchange
        return None

    def on_lost(self, connection: PooledConnection) -> None:
        """A connection was lost or closed."""
        self.busy.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self.client.open -= 1
        self.client.on_slot_free()

    def resend(self, exchange: Exchange) -> None:
        """Send again, on a new connection."""
        exchange.connection = None
        if self.client.closed:
            exchange.finish(stopped(exchange.target))
            return
        exchange.forbid_resend()
        for connection in self.idle:  # probably as stale as the one that failed
            connection.close()
        self.idle.clear()
        self.waiting.appendleft(exchange)
        self.client.on_queued(exchange)
        self.connect_for_waiting()

    async def close(self) -> None:
        """Close all connections; requests that wait fail."""
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
