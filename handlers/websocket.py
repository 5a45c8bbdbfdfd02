"""The client's end: one WebSocket from its handshake to its farewell.

What a client sends goes to the backend (`backends.Backend`); what the backend
sends comes back through `handlers.callback` and `ClientConnection.send`.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from tornado.iostream import IOStream, StreamClosedError
from tornado.options import define
from tornado.websocket import WebSocketHandler

from backends import (
    Backend,
    BackendError,
    Closure,
    ConnectionClosed,
    ConnectionRefused,
    Handshake,
    HandshakeOutcome,
    Initiator,
    SendBufferFull,
    TraceContext,
)
from backends.deadlines import after_reading
from handlers.closing import CLOSE_TIMEOUT, LINGER_TIMEOUT
from handlers.connections import ConnectionMap
from handlers.frames import Close, CloseCode, FrameError
from handlers.handshake import NOT_TOLD, flaw, is_key, members, told_headers
from handlers.heartbeat import Heartbeat
from handlers.lifetimes import Lifetimes
from handlers.logs import tell
from handlers.offers import subprotocols
from handlers.origins import AllowedOrigins
from handlers.problem import ProblemHandler
from handlers.protocol import (
    READ_AHEAD,
    ClientProtocol,
    Compression,
    State,
    agree_on_compression,
    switch,
)
from handlers.proxies import TrustedProxies
from handlers.rates import Rates, Stalls, Throttle
from handlers.tickets import Claim, Tickets
from handlers.trace import HandshakeSpan, Tracer, trace_context
from handlers.turns import TURN, Turns, clock
from handlers.uptake import Uptake

logger = logging.getLogger(__name__)

define("max_message_size", default=4 * 1024 * 1024, metavar="BYTES",
       help="largest message, either way; a larger one closes with 1009, or gets 413")
define("ping_interval", default=20.0, metavar="SECONDS",
       help="time between pings to each client; 0 turns them off")
define("ping_timeout", default=20.0, metavar="SECONDS",
       help="longest wait for any sign of life after a ping; 0 waits forever")
define("subprotocols", multiple=True, metavar="NAMES",
       help="subprotocols to choose from where the backend chose none: the "
            "client's first one that is named here")
define("compression", default=False,
       help="accept permessage-deflate (RFC 7692)")
define("compression_level", default=6, metavar="LEVEL",
       help="zlib's level, 1 (fast) to 9 (small)")
define("max_send_buffer", default=1024 * 1024, metavar="BYTES",
       help="most that waits to be sent to one client; above it a send gets 429")
define("send_timeout", default=10.0, metavar="SECONDS",
       help="longest that a client may take nothing while frames wait for it; "
            "then it is closed with 1008")
define("connection_queue_messages", default=64, metavar="COUNT",
       help="messages of one client that wait for the backend; then reading stops")
define("connection_queue_bytes", default=1024 * 1024, metavar="BYTES",
       help="bytes of one client's messages that wait for the backend; one "
            "message may always wait")

NEVER = float("inf")  # on the loop's clock
# Seconds in which a kernel acknowledges what came (RFC 9293, section 3.8.6.3).
DELAYED_ACK = 0.5
SLOW_READER = 40_000  # bytes per second; whoever is slower may be taken for gone
STALL_LOOKS = 8  # at a client that is slow, within `--send_timeout`
CLIENT_LEFT = 499  # what nginx logs, where there was nobody left to answer

@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What every client is held to; the options, as typed values."""

    max_message_size: int = 4 * 1024 * 1024
    allowed_origins: AllowedOrigins = field(default_factory=AllowedOrigins)
    require_origin: bool = False
    trusted_proxies: TrustedProxies = field(default_factory=TrustedProxies)
    withheld_headers: frozenset[str] = NOT_TOLD
    subprotocols: Sequence[str] = ()
    compression: Compression | None = None
    max_send_buffer: int = 1024 * 1024
    send_timeout: float = 10.0
    queue_messages: int = 64
    queue_bytes: int = 1024 * 1024
    rates: Rates = field(default_factory=Rates)
    stalls: Stalls = field(default_factory=Stalls)
    trust_traceparent: bool = True


class ClientSocketHandler(ProblemHandler, WebSocketHandler):
    """A client's handshake, until it is refused or its `ClientConnection` open."""

    def initialize(
        self,
        connections: ConnectionMap,
        backend: Backend,
        heartbeat: Heartbeat,
        lifetimes: Lifetimes,
        policy: ClientPolicy,
        tickets: Tickets,
        tracer: Tracer | None = None,
    ) -> None:
        self.connections = connections
        self.backend = backend
        self.heartbeat = heartbeat
        self.lifetimes = lifetimes
        self.policy = policy
        self._asked = policy.trusted_proxies.read(
            self.request.remote_ip or "",
            self.request.headers,
            self.request.host,
            self.request.protocol == "https",
        )
        self.remote_ip = self._asked.remote_ip
        self._tickets = tickets
        self._claim: Claim | None = None
        self._tracer = tracer
        self._span: HandshakeSpan | None = None
        self._connection_id: str | None = None
        self._peer_gone = False

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Check the request, ask the backend, and only then accept.

        Not in `prepare()`, which would ask before the checks.
        """
        trace = self._trace()
        if not self._is_acceptable():
            return
        handshake = self._handshake(trace)
        connection = ClientConnection(
            self.remote_ip,
            self.request.headers.get("User-Agent", ""),
            # Of a trace that begins here, what follows later is no part.
            trace and handshake.trace,
            self.connections,
            self.backend,
            self.heartbeat,
            self.lifetimes,
            self.policy,
        )
        if self._claim is not None:
            connection.id = self._claim.connection_id
        self._connection_id = connection.id
        self.connections.add(connection)
        try:
            await self._decide(connection, handshake)
        except BaseException:  # a bug, ours or the backend's, which may have said yes
            if connection.state == "connecting":
                self._abandon(connection, "relay")
                self._tell("no_verdict", HTTPStatus.INTERNAL_SERVER_ERROR)
            raise

    async def _decide(
        self, connection: "ClientConnection", handshake: Handshake
    ) -> None:
        """Ask the backend, and answer the handshake as it says."""
        try:
            subprotocol = await self.backend.connect(connection, handshake)
            if subprotocol is not None and subprotocol not in handshake.subprotocols:
                raise BackendError(
                    "the backend chose a subprotocol that was not offered"
                )
        except ConnectionRefused as refused:
            connection.end()
            self._tell("refused", refused.status)
            self._refuse(connection, refused)
            return
        except BackendError as error:
            logger.warning("connection %s has no verdict: %s", connection.id, error,
                           extra={"connection_id": connection.id})
            self._abandon(connection, "relay")
            self._tell("no_verdict", HTTPStatus.SERVICE_UNAVAILABLE)
            self.problem(HTTPStatus.SERVICE_UNAVAILABLE, "The backend gave no verdict.")
            return
        if self._peer_gone or self.request.connection is None:
            self._leave(connection)
            return
        if subprotocol is None:
            subprotocol = next(
                (p for p in handshake.subprotocols if p in self.policy.subprotocols),
                None,
            )
        compression = agree_on_compression(self, self.policy.compression)
        try:
            stream = switch(self, subprotocol)
        except StreamClosedError:
            self._leave(connection)
            return
        self._tell("opened", HTTPStatus.SWITCHING_PROTOCOLS)
        connection.begin(stream, subprotocol, compression)

    def _leave(self, connection: "ClientConnection") -> None:
        """The client has gone before it could be told that it may come in."""
        self._abandon(connection, "client")
        self._tell("left", CLIENT_LEFT)

    def _abandon(self, connection: "ClientConnection", initiator: Initiator) -> None:
        """End what never opened, and of which the backend may think that it did."""
        connection.end(Close(CloseCode.ABNORMAL, ""), initiator)

    def _is_acceptable(self) -> bool:
        """Check headers and Origin (RFC 6455, section 4.2.1), then the limits."""
        headers = self.request.headers
        if headers.get("Upgrade", "").lower() != "websocket" or (
            "upgrade" not in members(headers, "Connection")
        ):
            self._turn_away(
                HTTPStatus.UPGRADE_REQUIRED,
                "Only WebSockets are here.",
                {"Upgrade": "websocket", "Connection": "Upgrade"},
            )
        elif headers.get("Sec-WebSocket-Version") != "13":
            self._turn_away(
                HTTPStatus.UPGRADE_REQUIRED,
                "Only version 13 is served here.",
                {"Sec-WebSocket-Version": "13"},
            )
        elif self.request.version != "HTTP/1.1":
            self._turn_away(HTTPStatus.BAD_REQUEST, "A WebSocket needs HTTP/1.1.")
        elif not is_key(headers.get("Sec-WebSocket-Key", "")):
            self._turn_away(
                HTTPStatus.BAD_REQUEST, "Sec-WebSocket-Key is not 16 bytes."
            )
        elif malformed := flaw(self.request, self.policy.compression is not None):
            self._turn_away(HTTPStatus.BAD_REQUEST, malformed)
        elif not self._is_origin_allowed(headers.get_list("Origin")):
            self._turn_away(HTTPStatus.FORBIDDEN, "This origin may not connect.")
        elif (
            refusal := self.connections.refusal(self.remote_ip, self._descriptor)
        ) is not None:
            self._turn_away(
                refusal.status,
                refusal.detail,
                {"Retry-After": str(refusal.retry_after)},
            )
        else:
            return True
        return False

    @property
    def _descriptor(self) -> int:
        connection: Any = self.request.connection
        descriptor: int = connection.descriptor
        return descriptor

    def _turn_away(
        self, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.connections.refusals.add(self.remote_ip, status, detail)
        self._tell("turned_away", status)
        for name, value in (headers or {}).items():
            self.set_header(name, value)
        self.problem(status, detail)

    def _is_origin_allowed(self, origins: list[str]) -> bool:
        self._claim = self._tickets.claim(self.request.query, origins)
        if self._claim is not None:
            return True
        if not origins:
            return not self.policy.require_origin
        if len(origins) > 1:
            return False
        return self.policy.allowed_origins.allow(
            origins[0], self._asked.host, self._asked.scheme
        )

    def _trace(self) -> TraceContext | None:
        """The client's, and a span for this handshake where somebody makes them."""
        trace = None
        if self.policy.trust_traceparent:
            trace = trace_context(self.request.headers.get_list("traceparent"))
        if self._tracer is not None:
            self._span = self._tracer.handshake(
                trace,
                self.request.protocol,
                self.request.path,
                self.request.request_time(),
            )
        return trace

    def _handshake(self, trace: TraceContext | None) -> Handshake:
        headers = self.request.headers
        return Handshake(
            headers=told_headers(headers, self.policy.withheld_headers),
            path=self.request.path,
            query=self.request.query if self._claim is None else self._claim.query,
            remote_ip=self.remote_ip,
            subprotocols=subprotocols(headers.get_list("Sec-WebSocket-Protocol")),
            trace=trace if self._span is None else self._span.trace,
        )

    def _refuse(
        self, connection: "ClientConnection", refused: ConnectionRefused
    ) -> None:
        logger.debug("connection %s refused with %d", connection.id, refused.status,
                     extra={"connection_id": connection.id})
        self.connections.refusals.add(
            self.remote_ip, refused.status, "That is the backend's verdict."
        )
        if self._peer_gone:
            return
        self.set_status(refused.status)
        self.clear_header("Content-Type")
        for name, value in refused.headers.items():
            with contextlib.suppress(ValueError):  # it is no header's value
                self.set_header(name, value)
        self.finish(refused.body)

    def _tell(self, outcome: HandshakeOutcome, status: int) -> None:
        self.connections.observer.handshake_ended(
            outcome, status, self.remote_ip, self.request.request_time()
        )
        if self._span is not None:
            self._span.end(outcome, status, self.remote_ip, self._connection_id)

    def on_connection_close(self) -> None:
        """The client left before the handshake was answered."""
        self._peer_gone = True

    def on_finish(self) -> None:
        """It was answered, and this handler is of no more use.

        What templates would need of it, were there any, refers to it, and Tornado
        keeps that of a `WebSocketHandler`: each would be left to the collector.
        """
        self.ui.clear()


class ClientConnection:
    """A client's connection, which backends know as `backends.Connection`.

    Made before the handshake is decided. It keeps nothing of the handshake but
    what others ask for: there may be a hundred thousand that are idle.

    `state` is the only one that a connection has: what may be sent, read and
    pinged goes by it. It is `closing` from the first close frame on, of either
    side, and from the first write that failed; `closed` when the socket is gone.
    """

    __slots__ = (
        "_answered",
        "_began",
        "_closing",
        "_delivered_size",
        "_delivering",
        "_early",
        "_early_close",
        "_full",
        "_given_up",
        "_idle",
        "_last_received",
        "_last_sent",
        "_pinged",
        "_protocol",
        "_queue",
        "_queued_bytes",
        "_room",
        "_stall_timer",
        "_taken_at",
        "_throttle",
        "_undelivered",
        "_uptake",
        "backend",
        "bytes_in",
        "bytes_out",
        "connected_at",
        "connections",
        "heartbeat",
        "id",
        "last_heard",
        "lifetimes",
        "messages_in",
        "messages_out",
        "policy",
        "remote_ip",
        "state",
        "subprotocol",
        "trace",
        "user_agent",
        "waiting_since",
    )

    def __init__(
        self,
        remote_ip: str,
        user_agent: str,
        trace: TraceContext | None,
        connections: ConnectionMap,
        backend: Backend,
        heartbeat: Heartbeat,
        lifetimes: Lifetimes,
        policy: ClientPolicy,
    ) -> None:
        self.remote_ip = remote_ip
        self.user_agent = user_agent
        self.trace = trace
        self.connections = connections
        self.backend = backend
        self.heartbeat = heartbeat
        self.lifetimes = lifetimes
        self.policy = policy

        self.id = secrets.token_hex(16)
        self.state: State = "connecting"
        self.connected_at = datetime.now(UTC)
        self._began = self.last_heard = self._last_sent = self._now()
        self._last_received = self._began  # a message, or a part of one
        self.messages_in = self.messages_out = self.bytes_in = self.bytes_out = 0
        self.subprotocol: str | None = None
        self._protocol: ClientProtocol | None = None

        # Frames sent by callbacks while the handshake is being decided.
        self._early: list[str | bytes] = []
        self._early_close: tuple[int, str, Initiator] | None = None
        # Set by whoever closes first on this side: code, reason, initiator.
        self._closing: tuple[int, str, Initiator] | None = None
        # Messages between reading and delivering; none while the backend is quick.
        self._queue: deque[tuple[str | bytes, float]] | None = None
        self._queued_bytes = 0
        # When the oldest of its events that wait was read, or it ended.
        self.waiting_since = NEVER
        self._delivering = False
        self._delivered_size = 0  # bytes of the message being delivered
        self._given_up = False
        self._undelivered = 0
        # What reading waits for: the queue's own room (`_full`), the process's, or
        # the throttle's, of which there is one where rates are limited.
        self._room: asyncio.Future[None] | None = None
        self._full = False
        self._throttle: Throttle | None = None
        self._idle: asyncio.Future[None] | None = None
        # How it takes what is under way to it, while it was seen to be slow; and
        # when it was last seen to have taken some, on the loop's clock.
        self._stall_timer: asyncio.TimerHandle | None = None
        self._uptake: Uptake | None = None
        self._taken_at = self._began
        # What `bytes_out` was at the last ping that was answered, and at the oldest
        # that was not.
        self._answered = 0
        self._pinged: int | None = None

    def begin(
        self,
        stream: IOStream,
        subprotocol: str | None,
        compression: Compression | None,
    ) -> None:
        """The handshake was answered with 101, on `stream`."""
        self.subprotocol = subprotocol
        rates = self.policy.rates
        if rates:
            self._throttle = Throttle(rates, self.policy.stalls)
        self._protocol = ClientProtocol(
            self, self.policy.max_message_size, compression, rates.bytes
        )
        self._protocol.begin(stream)

    # What ClientProtocol tells.

    def on_open(self) -> None:
        """The 101 is on its way: send what callbacks sent meanwhile."""
        self.state = "open"
        self._last_received = self._now()
        self.heartbeat.add(self)
        self.lifetimes.add(self)
        self.connections.observer.opened(self)
        if logger.isEnabledFor(logging.INFO):
            self._log_open()
        early, self._early = self._early, []
        for message in early:
            with contextlib.suppress(ConnectionClosed):  # the client has gone
                self.send(message)
        if self._early_close is not None:
            self.close(*self._early_close)
        elif self.connections.draining:
            self.drain()

    def _log_open(self) -> None:
        tell(logger, f"connection {self.id} opened by {self.remote_ip}", {
            "event": "open", "connection_id": self.id, "remote_ip": self.remote_ip
        })

    def on_heard(self, size: int, at_once: bool) -> None:
        """`size` bytes came, `at_once` where they did not have to be waited for."""
        self.last_heard = self.connections.loop.time()
        if self._throttle is not None:
            self._throttle.on_bytes(size, at_once, self.last_heard)

    def on_pong(self) -> None:
        """It answers a ping: it has read all that was sent before."""
        if self._pinged is not None:
            self._answered, self._pinged = self._pinged, None

    def on_message(self, message: str | bytes) -> None:
        """Deliver a message now, or behind those that wait."""
        size = size_of(message)
        self.messages_in += 1
        self.bytes_in += size
        self._last_received = self.last_heard
        self.connections.observer.received(self, message, size)
        if self._throttle is not None:
            self._throttle.on_message(self._now())
        if self._given_up:
            self._count_undelivered(1)
            return
        self.connections.hold(size)
        if self._delivering:
            if self._queue is None:
                self._queue = deque()
            self._queue.append((message, self.last_heard))
            self._queued_bytes += size
        else:
            self._deliver(message, size, self.last_heard)

    def room(self) -> "asyncio.Future[None] | None":
        """None where another message may be read, else what to wait for.

        Raises `FrameError` where the client has sent too much for too long.
        """
        if self._throttle is not None:
            held = self._throttle.room(self._now())
            if held is not None:
                self._room = held
                return held
        queue = self._queue
        if not queue or (
            len(queue) < self.policy.queue_messages
            and self._queued_bytes < self.policy.queue_bytes
        ):
            self._room = self.connections.room()
        elif self._room is None or self._room.done():
            self._room = self.connections.loop.create_future()
            self._full = True
        if self._throttle is not None and self._room is not None:
            self._throttle.on_full(self._now())
        return self._room

    @property
    def last_active_at(self) -> datetime:
        """When anything was last heard from the client or sent to it."""
        active = max(self.last_heard, self._last_sent) - self._began
        return self.connected_at + timedelta(seconds=active)

    @property
    def reading_paused(self) -> bool:
        """Whether nothing is read: too much waits for the backend, or came at once."""
        return self._room is not None and not self._room.done()

    @property
    def patience(self) -> float:
        """Longest that it may take nothing of what waits for it, in seconds."""
        return self.policy.send_timeout

    @property
    def read_ahead(self) -> int:
        """Bytes that may be read while there is no room: none above a rate."""
        return 0 if self._throttle is not None else READ_AHEAD

    @property
    def turns(self) -> Turns:
        """Where its work waits until others have had their turn."""
        return self.connections.turns

    @property
    def last_message_at(self) -> float:
        """When a message, or a part of one, went either way, on the loop's clock."""
        self._look_at_uptake()
        taken_at = self._taken_at if self._uptake is None else self._uptake.taken_at
        return max(self._last_received, self._last_sent, taken_at)

    @property
    def busy(self) -> bool:
        """Whether messages wait, for the backend, for the client, or to be read."""
        protocol = self._protocol
        return self._delivering or self.reading_paused or (
            protocol is not None and protocol.bytes_waiting > 0
        )

    def on_kept(self, size: int) -> None:
        """So many bytes are kept of a message that is not whole yet."""
        if size:
            self._last_received = self.last_heard
        self.connections.keep(self, size)

    def on_leaving(self) -> None:
        """The client's close frame came before ours, or a write has failed."""
        self._begin_closing(None)

    def on_failed(self, error: FrameError) -> None:
        """The client broke the protocol, or a rule, or its message has no room."""
        logger.info("connection %s: %s (%d)", self.id, error.reason, error.code, extra={
            "event": "fail", "connection_id": self.id, "code": error.code
        })
        self._begin_closing((error.code, error.reason, "relay"))
        assert self._protocol is not None
        self._protocol.fail(error.code, error.reason)

    def on_closed(self, peer: Close | None) -> None:
        """The socket is gone; `peer` is the client's close frame if it came first."""
        if self._closing is not None:
            code, reason, initiator = self._closing
            self.end(Close(code, reason), initiator)
        else:
            self.end(peer or Close(CloseCode.ABNORMAL, ""), "client")

    # Delivering.

    def _deliver(self, message: str | bytes, size: int, read_at: float) -> None:
        """Hand messages to the backend, until one has to be waited for.

        Those behind it that have waited already, only while its turn lasts.
        """
        ends_at = 0.0
        while True:
            self._delivered_size = size
            try:
                taken = self.backend.message(self, message)
            except Exception as error:
                self._on_undeliverable(error)
                return
            if taken is not None:
                self._delivering = True
                self.waiting_since = read_at
                if not isinstance(taken, asyncio.Future):
                    taken = asyncio.ensure_future(taken)
                taken.add_done_callback(self._on_delivered)
                return
            self.connections.release(size)
            if not self._queue:
                self._rest()
                return
            if not ends_at:
                ends_at = clock() + TURN
            elif clock() >= ends_at:
                self.waiting_since = self._queue[0][1]
                self.turns.wait(self._deliver_next)
                return
            message, size, read_at = self._next()

    def _deliver_next(self) -> None:
        if self._queue:
            self._deliver(*self._next())
        else:
            self._rest()

    def _on_delivered(self, taken: "asyncio.Future[None]") -> None:
        if taken.cancelled():
            self._on_undeliverable(BackendError("the relay stops"))
        elif (error := taken.exception()) is not None:
            self._on_undeliverable(error)
        else:
            self.connections.release(self._delivered_size)
            self._deliver_next()

    def _next(self) -> tuple[str | bytes, int, float]:
        assert self._queue
        message, read_at = self._queue.popleft()
        size = size_of(message)
        self._queued_bytes -= size
        if self._full and self._room is not None:  # it is this connection's own
            self._full = False
            self._room.set_result(None)
            self._room = None
        return message, size, read_at

    def _rest(self) -> None:
        """Everything read so far has been taken."""
        self._delivering = False
        self.waiting_since = NEVER
        self._queue = None
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _on_undeliverable(self, error: BaseException) -> None:
        """The message at the head can't be delivered."""
        self.connections.release(self._delivered_size)
        if isinstance(error, BackendError):
            self.give_up(error)
        else:
            logger.error("bug on a message of %s", self.id, exc_info=error,
                         extra={"connection_id": self.id})
            self._count_undelivered(1)
            self._give_up(CloseCode.INTERNAL_ERROR, "internal error")
        self._rest()

    def give_up(self, error: BackendError, messages: int = 1) -> None:
        """Give up messages and those behind them; see `backends.Connection`."""
        logger.warning("connection %s gives up: %s", self.id, error, extra={
            "event": "give_up", "connection_id": self.id, "undelivered": messages
        })
        self._count_undelivered(messages)
        self._give_up(CloseCode.TRY_AGAIN_LATER, "backend unavailable")

    def _give_up(self, code: CloseCode, reason: str) -> None:
        self._given_up = True
        self._count_undelivered(len(self._queue or ()))
        while self._queue:
            _, size, _ = self._next()
            self.connections.release(size)
        self.close(code, reason, "relay")

    def _count_undelivered(self, messages: int) -> None:
        if messages:
            self._undelivered += messages
            self.connections.observer.ended("message", self.id, "failed", messages)

    # What backends, callbacks and the relay ask of a connection.

    def send(self, message: str | bytes) -> "asyncio.Future[None] | None":
        """Send one frame; see `backends.Connection.send`."""
        if self.state == "connecting" and self._early_close is None:
            early = sum(map(size_of, self._early))
            if self._early and early + size_of(message) > self.policy.max_send_buffer:
                raise SendBufferFull
            self._early.append(message)
            return None
        protocol = self._protocol
        if self.state != "open" or protocol is None:
            raise ConnectionClosed
        size, waiting = size_of(message), protocol.bytes_waiting
        if waiting and waiting + size > self.policy.max_send_buffer:
            raise SendBufferFull
        sent = protocol.send(message)
        self.messages_out += 1
        self.bytes_out += size
        self._last_sent = self._now()
        self.connections.observer.sent(self, message, size)
        if sent is not None and self._stall_timer is None:
            self._look_at_uptake()
            self._watch_for_stall()
        return sent

    async def drained(self) -> None:
        """Wait until the kernel has taken all frames, or the socket is gone."""
        protocol = self._protocol
        while self.state == "open" and protocol is not None and protocol.bytes_waiting:
            try:
                await protocol.drained()
            except ConnectionClosed:
                return

    def close(
        self,
        code: int = CloseCode.NORMAL,
        reason: str = "",
        initiator: Initiator = "backend",
    ) -> None:
        """Start the closing handshake; see `backends.Connection.close`."""
        if self.state == "connecting":
            self._early_close = self._early_close or (code, reason, initiator)
            return
        protocol = self._protocol
        if self.state != "open" or protocol is None:
            return
        self._begin_closing((code, reason, initiator))
        if protocol.bytes_waiting >= self.policy.max_send_buffer and (
            self._look_at_uptake() or 0.0
        ) >= CLOSE_TIMEOUT:
            protocol.give_up()  # a close frame would wait behind all of it
        else:
            protocol.close(code, reason)

    def drain(self) -> None:
        """Close because this instance stops; once open, if it is still connecting."""
        if self.state == "open":
            self.close(CloseCode.GOING_AWAY, "going away", "relay")

    def expire(self, reason: str) -> None:
        """Close because it has been silent, or open, for as long as it may."""
        self.close(CloseCode.GOING_AWAY, reason, "relay")

    def abort(self) -> None:
        """Cut the connection off at once."""
        if self._protocol is not None:
            self._protocol.abort()

    def beat(self) -> None:
        """Send a ping, and note what stands before it."""
        if self._protocol is not None:
            self._look_at_uptake()
            if self._protocol.send_ping() and self._pinged is None:
                self._pinged = self.bytes_out

    def is_silent(self, since: float) -> bool:
        """Whether no sign of life came since the beat at `since`.

        What comes from it is one, and so is what its kernel acknowledges, but for
        the ping, unless its answer can't be seen. Its kernel may have much that it
        has yet to read before the ping: it has time for that.
        """
        protocol = self._protocol
        if self.last_heard >= since or protocol is None:
            return False
        stalled = self._look_at_uptake()
        if stalled is None:
            taken_at = max(self._taken_at, self._last_sent)
            if taken_at >= since or self.reading_paused or protocol.is_held:
                return False
            return self._now() >= max(taken_at, self.last_heard) + self._reading_time()
        if self._taken_at >= since:
            return False
        # A slow client's kernel answers that it has no room: only nobody does not.
        return protocol.outgoing().quiet >= max(self._now() - since, DELAYED_ACK) or (
            stalled >= self.policy.send_timeout
        )

    def _reading_time(self) -> float:
        """Seconds for what it may have yet to read, if it is slow."""
        unanswered = self.bytes_out - self._answered
        return min(unanswered / SLOW_READER, LINGER_TIMEOUT)

    def vanish(self) -> None:
        """Give up a peer that shows no sign of life, once what it sent was read."""
        protocol = self._protocol
        if self.state == "open" and protocol is not None:
            self._begin_closing((CloseCode.ABNORMAL, "ping timeout", "relay"))
            protocol.give_up()

    def _look_at_uptake(self) -> float | None:
        """For how many seconds it has taken nothing of what is under way to it.

        None: nothing is under way.
        """
        if self._protocol is None:
            return None
        now = self._now()
        acknowledged, under_way, _ = self._protocol.outgoing()
        if not under_way:
            if self._uptake is not None:
                self._uptake = None
                self._taken_at = now
            return None
        if self._uptake is None:
            self._uptake = Uptake(acknowledged, now)
            return 0.0
        stalled = self._uptake.look(acknowledged, now)
        self._taken_at = max(self._taken_at, self._uptake.taken_at)
        return stalled

    def _watch_for_stall(self) -> None:
        """Close with 1008 a client that takes nothing for `send_timeout`."""
        self._stall_timer = self.connections.loop.call_later(
            self.policy.send_timeout / STALL_LOOKS, self._look_for_stall
        )

    def _look_for_stall(self) -> None:
        self._stall_timer = None
        if self._is_stalled():
            # What it took meanwhile may be seen only now.
            after_reading(self.connections.loop, self._judge_stall)
        elif self._frames_wait():
            self._watch_for_stall()

    def _judge_stall(self) -> None:
        protocol = self._protocol
        if protocol is not None and self._is_stalled():
            logger.info("connection %s takes nothing", self.id, extra={
                "event": "stall", "connection_id": self.id
            })
            self._begin_closing((CloseCode.POLICY, "slow consumer", "relay"))
            protocol.give_up()  # its buffer is full: a close frame can't reach it
        elif self._frames_wait() and self._stall_timer is None:
            self._watch_for_stall()

    def _frames_wait(self) -> bool:
        protocol = self._protocol
        return (
            self.state == "open" and protocol is not None and protocol.bytes_waiting > 0
        )

    def _is_stalled(self) -> bool:
        return self._frames_wait() and (
            (self._look_at_uptake() or 0.0) >= self.policy.send_timeout
        )

    # The end.

    def _begin_closing(self, closing: tuple[int, str, Initiator] | None) -> None:
        """Be `closing` from now on; `closing` is ours where this side began.

        Whatever is decided after that changes nothing.
        """
        if self.state != "open":
            return
        self.state = "closing"
        self._closing = closing
        self.heartbeat.discard(self)
        self.lifetimes.discard(self)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if self._throttle is not None:
            self._throttle.release()

    def end(self, close: Close | None = None, initiator: Initiator = "relay") -> None:
        """Forget the connection; tell the backend of its `close`, if there is one."""
        self._begin_closing(None)
        self.state = "closed"
        self.connections.keep(self, 0)
        self.connections.remove(self)
        if close is None:
            return
        duration = self._now() - self._began
        if self._protocol is not None:
            self.connections.observer.closed(self, close.code, initiator, duration)
            if logger.isEnabledFor(logging.INFO):
                self._log_close(close.code, initiator, duration)
        self.connections.say_farewell(
            self, self._farewell(close, initiator, duration)
        )

    def _log_close(self, code: int, initiator: Initiator, duration: float) -> None:
        """Without the reason, which is the peer's text."""
        message = (
            f"connection {self.id} closed with {code:d} by {initiator} after"
            f" {duration:.1f} s:"
            f" {self.messages_in} messages in, {self.messages_out} out"
        )
        tell(logger, message, {
            "event": "close",
            "connection_id": self.id,
            "code": code,
            "initiator": initiator,
            "seconds": round(duration, 3),
            "messages_in": self.messages_in,
            "messages_out": self.messages_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "undelivered": self._undelivered,
            "waiting": len(self._queue or ()) + self._delivering,
        })

    async def _farewell(
        self, close: Close, initiator: Initiator, duration: float
    ) -> None:
        """Tell the backend of the end, after all that was read before it."""
        # A farewell may wait for long, with thousands of others: let go of all
        # that it does not need.
        self._protocol = None
        if self._delivering:
            self._idle = self.connections.loop.create_future()
            await self._idle
        self.waiting_since = self._began + duration
        closure = Closure(
            close.code, close.reason, initiator, duration, self._undelivered
        )
        try:
            await self.backend.disconnect(self, closure)
        except BackendError as error:
            logger.error(
                "connection %s: disconnect not told: %s",
                self.id,
                error,
                extra={"event": "untold", "connection_id": self.id},
            )

    def _now(self) -> float:
        return self.connections.loop.time()


def size_of(message: str | bytes) -> int:
    """Bytes of a message on the wire, before compression."""
    if isinstance(message, str) and not message.isascii():
        return len(message.encode())
    return len(message)
