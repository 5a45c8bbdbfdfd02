"""One TCP connection to an origin, for one exchange at a time.

`pool` makes it. The connection calls its `Origin` when it is free, when it has ended,
and when a request must be sent again.
"""

import asyncio
import logging
import random
import ssl
from collections import deque
from functools import partial
from typing import cast

from backends import BackendAway, BackendError
from backends.client.dead_peers import SendProgress
from backends.client.exchange import Exchange, ended
from backends.client.response import KnownHeads, MalformedResponse, ResponseReader
from backends.client.tls_failures import TLS_NO_RESPONSE, tls_failure
from backends.deadlines import after_reading
from backends.waiting import call_one

logger = logging.getLogger(__name__)

BODY_TIMEOUT = 5.0  # seconds from a response's headers to its end; then it is closed
# Seconds after a TLS handshake in which a lost connection may mean its rejection.
REJECTION_TIME = 2.0
MIN_AGE_SHARE = 0.8  # of the connection age, so that not all are replaced at once


class ClientSettings:
    """What the connections of a client need of it; `pool` has the client.

    A dead peer is detected within `dead_after` seconds. A connection takes no request
    once it is older than `connection_age` seconds.
    """

    resends = True  # a request that was lost with an idle connection

    def __init__(self, dead_after: float, connection_age: float) -> None:
        # Stored, since `get_running_loop` makes a system call before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.dead_after = dead_after
        self.connection_age = connection_age


class Origin:
    """One scheme, host and port, as its connections see it; `pool` derives from it.

    `tls` is for new connections; None: plain TCP. A connection is kept for `lingering`
    seconds if nobody waits for its response; 0: closed.
    """

    def __init__(
        self, settings: ClientSettings, tls: ssl.SSLContext | None, lingering: float
    ) -> None:
        self.settings = settings
        self.tls = tls
        self.lingering = lingering
        self.heads = KnownHeads()
        self.busy: set[PooledConnection] = set()
        self.waiting: deque[Exchange] = deque()

    def on_free(self, connection: "PooledConnection") -> None:
        """A connection has finished its exchange."""
        raise NotImplementedError

    def on_lost(self, connection: "PooledConnection") -> None:
        """A connection was lost or closed."""
        raise NotImplementedError

    def resend(self, exchange: Exchange) -> None:
        """Send again, on a new connection."""
        raise NotImplementedError


class PooledConnection:
    """One TCP connection; after each exchange its origin decides how it is used.

    It has the methods of `asyncio.Protocol` without deriving from it, which would make
    each access to an attribute slower when compiled.
    """

    __slots__ = (
        "_adopted",
        "_body_timer",
        "_exchange",
        "_linger_timer",
        "_loop",
        "_made_at",
        "_may_read",
        "_origin",
        "_paused",
        "_progress",
        "_response",
        "_retire_at",
        "_ssl_object",
        "_tls",
        "_transport",
        "_why_lost",
        "idle_since",
        "kept",
    )

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None) -> None:
        self._origin = origin
        self._loop = origin.settings.loop
        self._tls = tls
        self._why_lost = ""  # the reason, if TLS has reported one
        self._transport: asyncio.Transport | None = None
        # Stored, since asyncio's transport does not return it after the end.
        self._ssl_object: ssl.SSLObject | None = None
        self._made_at = 0.0  # on the loop's clock
        self._retire_at = 0.0  # on the loop's clock; no request is sent from then on
        self._response = ResponseReader(origin.heads)
        self._exchange: Exchange | None = None
        self._adopted = False  # whether the origin counts it; then `on_lost` is called
        self.kept = False  # used before, or idle: the server may have closed it
        self._paused = False
        # Set while the kernel has not taken the whole request.
        self._progress: SendProgress | None = None
        self.idle_since = 0.0  # on the loop's clock
        self._body_timer: asyncio.TimerHandle | None = None
        # What `Exchange.may_read` has returned for the body; None: it was not asked.
        self._may_read: bool | None = None
        self._linger_timer: asyncio.TimerHandle | None = None  # see `leave`

    # The transport's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._ssl_object = transport.get_extra_info("ssl_object")
        self._made_at = self._loop.time()
        age = self._origin.settings.connection_age
        self._retire_at = self._made_at + age * random.uniform(MIN_AGE_SHARE, 1)
        # With these limits writing pauses exactly while the kernel has not taken all. A
        # TLS transport pauses at its limit, a plain one above it. Bytes that TLS has
        # passed to its own transport (64 KiB at most) count as sent.
        self._transport.set_write_buffer_limits(high=1 if self._tls else 0, low=0)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._exchange is not None and self._exchange.pending:
            call_one(self._exchange.on_sent)

    def data_received(self, data: bytes) -> None:
        response, exchange = self._response, self._exchange
        if exchange is None:
            self.close()  # a response without a request
            return
        try:
            response.feed(data)
        except MalformedResponse as error:
            self._fail(BackendError, str(error))
            self.close()
            return
        if not response.has_head:
            return
        if response.status == 408 and self._may_resend(exchange):
            # The server closes an idle kept connection (RFC 9110, section 15.5.9).
            self._exchange = None
            self.close()
            self._origin.busy.discard(self)
            self._origin.resend(exchange)
            return
        if exchange.timer is not None:
            exchange.on_head()
        if response.limit and self._must_wait(exchange):
            if self._transport is not None:
                self._transport.pause_reading()
        elif response.complete:
            self._finish()
        else:
            self._go_on(exchange)

    def _may_resend(self, exchange: Exchange) -> bool:
        """Whether to send it again: the server may have closed an idle connection."""
        return self.kept and exchange.may_resend and self._origin.settings.resends

    def _must_wait(self, exchange: Exchange) -> bool:
        """Whether the body must not be read yet; asks at most once."""
        if self._may_read is None:
            self._may_read = exchange.may_read()
        return not self._may_read

    def _go_on(self, exchange: Exchange) -> None:
        """Finish if the response has ended, else wait for the rest."""
        response = self._response
        if response.complete or response.excessive:
            self._finish()
        elif self._body_timer is None:
            self._body_timer = self._loop.call_later(
                BODY_TIMEOUT,
                after_reading,
                self._loop,
                partial(self._on_body_timeout, exchange),
            )

    def eof_received(self) -> bool:
        return False  # close; connection_lost() reports it

    def connection_lost(self, error: Exception | None) -> None:
        if isinstance(error, ssl.SSLError):
            self._why_lost = tls_failure(error)
        elif self._may_be_rejected():
            self._why_lost = TLS_NO_RESPONSE
        self._transport = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._stop_lingering()
        exchange = self._exchange
        if exchange is None:
            pass
        elif not self._response.started and self._may_resend(exchange):
            # The server closed an idle connection while the request was on its
            # way (RFC 9112, section 9.3.1), and has not processed it.
            self._exchange = None
            self._origin.on_lost(self)
            self._origin.resend(exchange)
            self._response.end()
            return
        elif self._response.cut():
            # The connection ended within its head or body: the status counts.
            self._finish()
        else:
            self._fail(BackendAway, self.why_lost())
        self._response.end()
        if self._adopted:
            self._origin.on_lost(self)

    # Called by the exchange.

    def read_on(self) -> None:
        """Read the body of the response, which waited."""
        exchange = self._exchange
        if (
            self._may_read is False
            and self._transport is not None
            and exchange is not None
        ):
            self._may_read = True
            self._transport.resume_reading()
            self._go_on(exchange)

    def leave(self) -> None:
        """Nobody waits for the response any more: close, or keep it for some time."""
        origin, exchange = self._origin, self._exchange
        if exchange is None or not origin.lingering:
            self.close()
            return
        self._exchange = ended(exchange.target)  # the request is not kept
        self._linger_timer = self._loop.call_later(origin.lingering, self.close)

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    # Called by the origin.

    def adopt(self) -> bool:
        """Return whether it is open; from now on, `on_lost` is called at its end."""
        self._adopted = self._transport is not None
        return self._adopted

    def why_lost(self) -> str:
        """Describe why the connection ended before its response."""
        if self._why_lost:
            return self._why_lost
        if self._response.started:
            return "connection lost during the response"
        return "connection lost before the response"

    def _may_be_rejected(self) -> bool:
        """Whether the peer may have rejected our certificate without an alert.

        In TLS 1.3 a client receives the alert only when it reads after the handshake,
        and never if the connection was reset. A peer that sends a session ticket has
        accepted the certificate (RFC 8446, section 4.6.1).
        """
        tls = self._ssl_object
        if tls is None or self._transport is None or self._response.started:
            return False
        age = self._loop.time() - self._made_at
        return (
            not self.kept
            and age < REJECTION_TIME
            and tls.version() == "TLSv1.3"
            and not (tls.session and tls.session.has_ticket)
        )

    def is_usable(self, now: float) -> bool:
        """Whether another request may be sent on it; `now` is on the loop's clock."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._tls is self._origin.tls
            and now < self._retire_at
        )

    def send(self, exchange: Exchange) -> None:
        """Write one request."""
        assert self._transport is not None
        self._response.begin(exchange.terms.keep)
        self._exchange = exchange
        self._origin.busy.add(self)
        exchange.begin(self, self._loop)
        try:
            self._transport.write(exchange.write())
        except Exception:
            logger.exception("POST %s: no request could be made", exchange.target)
            self._why_lost = "no request could be made"
            exchange.forbid_resend()
            self.close()
            return
        if self._paused:
            self._progress = SendProgress(
                self._loop,
                self._transport,
                self._origin.settings.dead_after,
                self._on_no_progress,
            )
        else:
            call_one(exchange.on_sent)

    def close(self) -> None:
        """Close after sending what was written, or now if the kernel has no room."""
        if self._transport is not None:
            if self._paused:
                self._transport.abort()
            else:
                self._transport.close()

    def _finish(self) -> None:
        """Report the response; the connection is free if the response has ended."""
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if self._linger_timer is not None:
            self._stop_lingering()
        self._may_read = None
        response = self._response
        exchange, self._exchange = self._exchange, None
        outcome = response.response()
        self.kept = True
        reusable = response.complete and response.reusable and not self._paused
        has_waiting = bool(self._origin.waiting)
        if not reusable:
            self.close()
        elif not has_waiting:  # `finish` below may send the next request on it
            self._origin.on_free(self)
        if exchange is not None:
            exchange.connection = None
            exchange.finish(outcome)
        if reusable and has_waiting:  # `finish` may have emptied the queue
            self._origin.on_free(self)

    def _on_body_timeout(self, exchange: Exchange) -> None:
        if self._exchange is exchange:
            self._finish()

    def _fail(self, kind: type[BackendError], why: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.connection = None
            exchange.finish(kind(f"POST {exchange.target}: {why}"))

    def _on_no_progress(self) -> None:
        dead_after = self._origin.settings.dead_after
        self._fail(BackendAway, f"no bytes accepted in {dead_after:g} s")
        if self._transport is not None:
            self._transport.abort()
