"""The client side: one WebSocket from its handshake to its disconnect event.

Messages of a client go to the backend (`backends.Backend`). Messages of the backend
arrive through `handlers.callbacks` and `ClientConnection.send`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import get_args

from backends import (
    Backend,
    BackendError,
    Closure,
    ConnectionClosed,
    Initiator,
    SendBufferFull,
    TraceContext,
)
from backends.deadlines import after_reading
from handlers.clients.heartbeat import Heartbeat
from handlers.clients.inbox import Inbox, size_of
from handlers.clients.lifetimes import Lifetimes
from handlers.clients.policy import ClientPolicy
from handlers.clients.receipts import Receipts
from handlers.clients.reception import DELAYED_ACK, Reception
from handlers.connections import ConnectionMap
from handlers.http.sockets import TakenSocket
from handlers.process.logs import log_event
from handlers.rates import Throttle
from handlers.websocket.closing import CLOSE_TIMEOUT
from handlers.websocket.deflate import Compression
from handlers.websocket.fragments import FragmentingProtocol
from handlers.websocket.frames import (
    Close,
    CloseCode,
    FrameError,
    MessageFrame,
    check_closing,
)
from handlers.websocket.protocol import READ_AHEAD, ClientProtocol, State
from handlers.websocket.turns import Turns

logger = logging.getLogger(__name__)

# One format for all values takes less time than one for each.
CLOSED = "connection %s closed with %d by %s after %.1f s: %d messages in, %d out"
INITIATORS = frozenset(get_args(Initiator))
STALL_LOOKS = 8  # checks of a slow client within `--send_timeout`


class ClientContext:
    """The objects that all connections of this process share.

    Loop, backlog, observer and turns are those of `connections`.
    """

    __slots__ = (
        "backend",
        "backlog",
        "connections",
        "heartbeat",
        "lifetimes",
        "loop",
        "observer",
        "policy",
        "turns",
    )

    def __init__(
        self,
        connections: "ConnectionMap[ClientConnection]",
        backend: Backend,
        heartbeat: Heartbeat,
        lifetimes: Lifetimes,
        policy: ClientPolicy,
    ) -> None:
        self.connections = connections
        self.backend = backend
        self.heartbeat = heartbeat
        self.lifetimes = lifetimes
        self.policy = policy
        self.loop = connections.loop
        self.backlog = connections.backlog
        self.observer = connections.observer
        self.turns = connections.turns


class EarlyFrames:
    """Frames for a connection whose handshake is not answered yet."""

    __slots__ = ("_size", "frames")

    def __init__(self) -> None:
        self.frames: list[MessageFrame] = []
        self._size = 0  # bytes

    def add(self, frame: MessageFrame, limit: int | None) -> None:
        """Add a frame; raise `SendBufferFull` if another one fills `limit` bytes."""
        size = self._size + frame.size
        if self.frames and limit is not None and size > limit:
            raise SendBufferFull
        self.frames.append(frame)
        self._size = size


class ClientConnection:
    """The connection of a client; backends see it as `backends.Connection`.

    Created before the handshake is decided. It keeps only those parts of the
    handshake that are used later: there may be a hundred thousand idle ones.

    `state` is the only state of a connection; it determines what may be sent, read
    and pinged. It is `closing` from the first close frame of either side, or the
    first failed write, and `closed` when the socket is gone.
    """

    __slots__ = (
        "_began",
        "_closing",
        "_connected_at",
        "_context",
        "_early",
        "_inbox",
        "_last_message",
        "_protocol",
        "_reception",
        "_stall_timer",
        "backend_state",
        "bytes_in",
        "bytes_out",
        "id",
        "last_heard",
        "messages_in",
        "messages_out",
        "remote_ip",
        "state",
        "subprotocol",
        "trace",
        "user_agent",
    )

    def __init__(
        self,
        remote_ip: str,
        user_agent: str,
        trace: TraceContext | None,
        context: ClientContext,
        connection_id: str | None = None,
    ) -> None:
        self.id = connection_id or context.connections.owners.new_id()
        self.remote_ip = remote_ip
        self.user_agent = user_agent
        self.trace = trace
        self._context = context

        self.state: State = "connecting"
        self._connected_at = time.time()  # as a number, since it takes less memory
        self._began = self.last_heard = self._last_message = self._now()
        self.messages_in = self.messages_out = self.bytes_in = self.bytes_out = 0
        self.subprotocol: str | None = None
        self.backend_state: bytes | None = None
        self._protocol: ClientProtocol | None = None
        self._inbox = Inbox(self, context)
        self._reception = Reception(self._began)
        self._stall_timer: asyncio.TimerHandle | None = None

        # Frames sent by callbacks while the handshake is being decided.
        self._early: EarlyFrames | None = None
        # The first close of this side, maybe before the 101: code, reason, initiator.
        self._closing: tuple[int, str, Initiator] | None = None

    def begin(
        self,
        taken: TakenSocket,
        subprotocol: str | None,
        compression: Compression | None,
    ) -> None:
        """Start the WebSocket on a socket to which the 101 was written."""
        self.subprotocol = subprotocol
        policy = self._context.policy
        if policy.rates:
            self._inbox.throttle = Throttle(policy.rates, policy.stalls)
        limits = policy.max_message_size, compression, policy.rates.bytes
        if policy.max_frame_size:
            self._protocol = FragmentingProtocol(self, *limits, policy.max_frame_size)
        else:
            self._protocol = ClientProtocol(self, *limits)
        self._protocol.begin(taken, self._context.loop)

    # Called by ClientProtocol.

    def on_open(self) -> None:
        """Send the frames of callbacks that came before the 101."""
        self.state = "open"
        context = self._context
        self._last_message = now = context.loop.time()
        context.heartbeat.add(self, now)
        context.lifetimes.add(self, now)
        context.observer.opened(self)
        if logger.isEnabledFor(logging.INFO):
            self._log_open()
        early, self._early = self._early, None
        for frame in early.frames if early is not None else ():
            with contextlib.suppress(ConnectionClosed):  # the client has gone
                self.send_frame(frame, limited=False)
        if self._closing is not None:
            self.close(*self._closing)
        elif context.connections.draining:
            self.drain()

    def _log_open(self) -> None:
        log_event(logger, f"connection {self.id} opened by {self.remote_ip}", {
            "event": "open", "connection_id": self.id, "remote_ip": self.remote_ip
        })

    def on_heard(self, size: int, at_once: bool) -> None:
        """Record `size` received bytes; `at_once` if they had already arrived."""
        self.last_heard = self._context.loop.time()
        throttle = self._inbox.throttle
        if throttle is not None:
            throttle.on_bytes(size, at_once, self.last_heard)

    def on_pong(self, payload: bytes) -> None:
        """Record a pong: the client has read everything sent before the ping."""
        self._reception.on_pong(payload)

    def on_message(self, message: str | bytes) -> None:
        """Deliver a message now, or after those that wait."""
        size = size_of(message)
        self.messages_in += 1
        self.bytes_in += size
        if self.last_heard > self._last_message:  # else it was read ahead
            self._last_message = self.last_heard
        self._context.observer.received(self, message, size)
        inbox = self._inbox
        if inbox.throttle is not None:
            inbox.throttle.on_message(self._now())
        inbox.put(message, size, self.last_heard)

    def room(self) -> "asyncio.Future[None] | None":
        """Return None if another message may be read, else a future to wait for."""
        return self._inbox.room()

    @property
    def send_timeout(self) -> float:
        """Longest time in seconds without progress while frames wait."""
        return self._context.policy.send_timeout

    @property
    def connected_at(self) -> datetime:
        """When the handshake began, in UTC."""
        return datetime.fromtimestamp(self._connected_at, UTC)

    @property
    def last_active_at(self) -> datetime:
        """Time of the last byte from the client or message to it."""
        active = max(self.last_heard, self._last_message) - self._began
        return self.connected_at + timedelta(seconds=active)

    @property
    def reading_paused(self) -> bool:
        """Whether the backlog or a rate limit has paused reading."""
        return self._inbox.reading_paused

    @property
    def waiting_since(self) -> float:
        """When the oldest waiting event was read, on the loop's clock."""
        return self._inbox.waiting_since

    @property
    def read_ahead(self) -> int:
        """Bytes that may be read ahead while reading is paused; 0 with rate limits."""
        return 0 if self._inbox.throttle is not None else READ_AHEAD

    @property
    def turns(self) -> Turns:
        """The queue in which connections take turns."""
        return self._context.turns

    @property
    def last_message_at(self) -> float:
        """Time of the last message, or part of one, in or out, on the loop's clock."""
        self._look_at_uptake()
        return max(self._last_message, self._reception.taken_at)

    @property
    def busy(self) -> bool:
        """Whether messages wait for the backend, for the client, or to be read."""
        protocol = self._protocol
        return self._inbox.busy or self._inbox.reading_paused or (
            protocol is not None and protocol.bytes_waiting > 0
        )

    def on_kept(self, size: int) -> None:
        """Record that an incomplete message holds `size` bytes."""
        if size:
            self._last_message = self.last_heard
        self._context.backlog.keep_part(self, size)

    def on_leaving(self) -> None:
        """Handle the client's close frame, or a failed write, before our close."""
        self._begin_closing(None)

    def on_failed(self, error: FrameError) -> None:
        """Close after a violation of the protocol or of a limit."""
        logger.info("connection %s: %s (%d)", self.id, error.reason, error.code, extra={
            "event": "fail", "connection_id": self.id, "code": error.code
        })
        self._begin_closing((error.code, error.reason, "relay"))
        assert self._protocol is not None
        self._protocol.fail(error.code, error.reason)

    def on_closed(self, peer: Close | None) -> None:
        """End after the socket is gone; `peer` is a close frame that came first."""
        if self._closing is not None:
            code, reason, initiator = self._closing
            self.end(Close(code, reason), initiator)
        else:
            self.end(peer or Close(CloseCode.ABNORMAL_CLOSURE, ""), "client")

    # Called by backends, callbacks and the relay.

    def send(self, message: str | bytes) -> "asyncio.Future[None] | None":
        """Send one frame; see `backends.Connection.send`."""
        return self.send_frame(MessageFrame(message))

    def send_frame(
        self, frame: MessageFrame, limited: bool = True
    ) -> "asyncio.Future[None] | None":
        """Send one frame, which other clients may get, too; returns as `send` does.

        Unless `limited`, `--max_send_buffer` does not apply.
        """
        context, protocol = self._context, self._protocol
        limit = context.policy.max_send_buffer if limited else None
        if self.state != "open" or protocol is None:
            if self.state != "connecting" or self._closing is not None:
                raise ConnectionClosed
            if self._early is None:
                self._early = EarlyFrames()
            self._early.add(frame, limit)
            return None
        sent = protocol.send(frame, limit)
        self.messages_out += 1
        self.bytes_out += frame.size
        self._last_message = context.loop.time()
        context.observer.sent(self, frame.message, frame.size)
        if sent is not None:
            self._watch_if_waiting(sent)
        return sent

    def give_up(self, error: BackendError, messages: int = 1) -> None:
        """Give up messages and those after them; see `backends.Connection`."""
        logger.warning("connection %s: delivery failed: %s", self.id, error, extra={
            "event": "give_up", "connection_id": self.id, "undelivered": messages
        })
        self._inbox.give_up(messages)
        self.close(CloseCode.TRY_AGAIN_LATER, "backend unavailable", "relay")

    def has_room(self) -> "asyncio.Future[None] | None":
        """Return None if less than half of `max_send_buffer` waits, or a future."""
        protocol = self._protocol
        if self.state != "open" or protocol is None or not protocol.bytes_waiting:
            return None
        half = max(self._context.policy.max_send_buffer // 2, 1)
        return protocol.below(half) if protocol.bytes_waiting >= half else None

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
        code: int = CloseCode.NORMAL_CLOSURE,
        reason: str = "",
        initiator: Initiator = "backend",
    ) -> None:
        """Start the closing handshake; see `backends.Connection.close`."""
        check_closing(code, reason)
        if initiator not in INITIATORS:
            raise ValueError(f"{initiator!r} closes no connection")
        if self.state == "connecting":
            self._closing = self._closing or (code, reason, initiator)
            return
        protocol = self._protocol
        if self.state != "open" or protocol is None:
            return
        self._begin_closing((code, reason, initiator))
        if protocol.bytes_waiting >= self._context.policy.max_send_buffer and (
            self._look_at_uptake() or 0.0
        ) >= CLOSE_TIMEOUT:
            protocol.give_up()  # a close frame would wait behind all the data
        else:
            protocol.close(code, reason)

    def drain(self) -> None:
        """Close because this instance shuts down; a connecting one once it is open."""
        if self.state == "open":
            self.close(CloseCode.GOING_AWAY, "going away", "relay")

    def expire(self, reason: str) -> None:
        """Close because of the idle timeout or the lifetime."""
        self.close(CloseCode.GOING_AWAY, reason, "relay")

    def abort(self) -> None:
        """Cut the connection off at once."""
        if self._protocol is not None:
            self._protocol.abort()

    def send_ping(self) -> None:
        """Send a ping, unless frames wait, which would delay it."""
        protocol, receipts = self._protocol, self._reception.receipts
        if protocol is None:
            return
        self._look_at_uptake()
        if not protocol.bytes_waiting:
            # A ping that could be answered confirms receipts, too.
            payload = receipts.next_ping() if receipts else b""
            with contextlib.suppress(ConnectionClosed):
                self._ping(protocol, payload)

    def _ping(self, protocol: ClientProtocol, payload: bytes) -> None:
        sent = protocol.send_ping(payload)
        self._reception.on_pinged(self.bytes_out)
        self._watch_if_waiting(sent)

    @property
    def awaits_receipts(self) -> int:
        """Number of receipts that are awaited."""
        receipts = self._reception.receipts
        return 0 if receipts is None else len(receipts)

    def receipt(self, timeout: float) -> "asyncio.Future[None]":
        """Send a ping, and return a future that is done when it was answered.

        The client has then read all that was sent before. The future fails with
        `ReceiptLate` after `timeout` seconds, or with `ConnectionClosed`. Raises
        `ConnectionClosed` if the connection is not open.
        """
        protocol, reception = self._protocol, self._reception
        if self.state != "open" or protocol is None:
            raise ConnectionClosed
        if reception.receipts is None:
            reception.receipts = Receipts(self._context.loop)
        self._ping(protocol, reception.receipts.next_ping())
        return reception.receipts.expect(timeout)

    def is_silent(self, since: float) -> bool:
        """Return whether there was no sign of life since the ping at `since`.

        Signs of life are received bytes, and data that the client's kernel
        acknowledges. The acknowledgment of the ping itself counts only if the pong
        cannot be seen. A client has time to read what its kernel holds before the
        ping.
        """
        protocol = self._protocol
        if self.last_heard >= since or protocol is None:
            return False
        stalled, reception = self._look_at_uptake(), self._reception
        if stalled is None:
            taken_at = max(reception.taken_at, self._last_message)
            if taken_at >= since or self.reading_paused or protocol.is_held:
                return False
            reading_time = reception.reading_time(self.bytes_out)
            return self._now() >= max(taken_at, self.last_heard) + reading_time
        if reception.taken_at >= since:
            return False
        # A slow client's kernel still reports that it is full; a dead one does not.
        return protocol.outgoing().quiet >= max(self._now() - since, DELAYED_ACK) or (
            stalled >= self._context.policy.send_timeout
        )

    def on_ping_timeout(self) -> None:
        """End the connection with 1006, after reading what the peer had sent."""
        protocol = self._protocol
        if self.state == "open" and protocol is not None:
            self._begin_closing((CloseCode.ABNORMAL_CLOSURE, "ping timeout", "relay"))
            protocol.give_up()

    def _look_at_uptake(self) -> float | None:
        """Return for how many seconds the client has acknowledged no data.

        None: no data is unacknowledged.
        """
        if self._protocol is None:
            return None
        return self._reception.look(
            self._protocol.outgoing(), self._now(), self.bytes_out
        )

    def _watch_if_waiting(self, sent: "asyncio.Future[None] | None") -> None:
        """Watch for a stall if the kernel has not taken all of a frame."""
        if sent is not None and self._stall_timer is None:
            self._look_at_uptake()
            self._watch_for_stall()

    def _watch_for_stall(self) -> None:
        """Schedule a check for a client that makes no progress for `send_timeout`."""
        self._stall_timer = self._context.loop.call_later(
            self._context.policy.send_timeout / STALL_LOOKS, self._look_for_stall
        )

    def _look_for_stall(self) -> None:
        self._stall_timer = None
        if self._is_stalled():
            # Progress made meanwhile may be visible only now.
            after_reading(self._context.loop, self._judge_stall)
        elif self._frames_wait():
            self._watch_for_stall()

    def _judge_stall(self) -> None:
        protocol = self._protocol
        if protocol is not None and self._is_stalled():
            logger.info("connection %s is a slow consumer", self.id, extra={
                "event": "stall", "connection_id": self.id
            })
            self._begin_closing((CloseCode.POLICY_VIOLATION, "slow consumer", "relay"))
            protocol.give_up()  # its buffer is full: a close frame cannot reach it
        elif self._frames_wait() and self._stall_timer is None:
            self._watch_for_stall()

    def _frames_wait(self) -> bool:
        protocol = self._protocol
        return (
            self.state == "open" and protocol is not None and protocol.bytes_waiting > 0
        )

    def _is_stalled(self) -> bool:
        return self._frames_wait() and (
            (self._look_at_uptake() or 0.0) >= self._context.policy.send_timeout
        )

    # Closing.

    def _begin_closing(self, closing: tuple[int, str, Initiator] | None) -> None:
        """Enter the state `closing`; `closing` is set if this side started it.

        Only the first call has an effect.
        """
        if self.state != "open":
            return
        self.state = "closing"
        self._closing = closing
        self._context.heartbeat.discard(self)
        self._context.lifetimes.discard(self)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if self._inbox.throttle is not None:
            self._inbox.throttle.release()

    def end(self, close: Close | None = None, initiator: Initiator = "relay") -> None:
        """Remove the connection; notify the backend if there is a `close`."""
        self._begin_closing(None)
        self.state = "closed"
        context = self._context
        context.backlog.keep_part(self, 0)
        context.connections.remove(self)
        if self._reception.receipts is not None:
            self._reception.receipts.fail()
        if close is None:
            self._inbox.close()
            return
        duration = self._now() - self._began
        if self._protocol is not None:
            context.observer.closed(self, close.code, initiator, duration)
            if logger.isEnabledFor(logging.INFO):
                self._log_close(close.code, initiator, duration)
        # Its end may take long, with thousands of others: keep only what it needs.
        self._protocol = None
        if self._inbox.busy:
            notifying = context.loop.create_task(
                self._notify_after_messages(close, initiator, duration)
            )
            context.connections.add_notification(self, notifying)
            return
        notification = self._notify_backend(close, initiator, duration)
        if notification is None:
            self._inbox.close()
        else:
            context.connections.add_notification(
                self, asyncio.ensure_future(notification, loop=context.loop)
            )

    def _log_close(self, code: int, initiator: Initiator, duration: float) -> None:
        """Log without the reason, which is text of the peer."""
        message = CLOSED % (
            self.id, code, initiator, duration, self.messages_in, self.messages_out
        )
        log_event(logger, message, {
            "event": "close",
            "connection_id": self.id,
            "code": code,
            "initiator": initiator,
            "seconds": round(duration, 3),
            "messages_in": self.messages_in,
            "messages_out": self.messages_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "undelivered": self._inbox.undelivered,
            "waiting": len(self._inbox),
        })

    def _notify_backend(
        self, close: Close, initiator: Initiator, duration: float
    ) -> Awaitable[None] | None:
        """Notify the backend of the end; return as `Backend.disconnect` does."""
        inbox = self._inbox
        inbox.waiting_since = self._began + duration
        closure = Closure(
            close.code, close.reason, initiator, duration, inbox.undelivered
        )
        try:
            return self._context.backend.disconnect(self, closure)
        except Exception as error:  # as if the awaitable had failed
            failed = self._context.loop.create_future()
            failed.set_exception(error)
            return failed

    async def _notify_after_messages(
        self, close: Close, initiator: Initiator, duration: float
    ) -> None:
        """Notify the backend after all messages that were read before the end."""
        await self._inbox.delivered()
        notification = self._notify_backend(close, initiator, duration)
        if notification is not None:
            await notification

    def on_notified(self, error: BaseException | None) -> None:
        """The backend was notified of the end; with a `BackendError` it was not."""
        self._inbox.close()
        if isinstance(error, BackendError):
            logger.error(
                "connection %s: disconnect notification failed: %s",
                self.id,
                error,
                extra={"event": "disconnect_failed", "connection_id": self.id},
            )

    def _now(self) -> float:
        return self._context.loop.time()


# The map of all clients' connections.
Connections = ConnectionMap[ClientConnection]
