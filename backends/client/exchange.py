"""One request and its outcome.

`pool` makes it and sends it on a `connection`, which reports the outcome to it.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from backends import BackendAway, BackendError
from backends.client.response import Keep, Response
from backends.deadlines import after_reading
from backends.target import Target

logger = logging.getLogger(__name__)


class NoConnection(BackendError):
    """The request was not sent: no request of its queue got a connection in time."""


class Refused(BackendAway):
    """The host refused the connection: nothing listens on the port."""


class Used(Protocol):
    """The connection that a request was sent on."""

    def leave(self) -> None:
        """Nobody waits for the response any more."""

    def read_on(self) -> None:
        """Read the body of the response, for which `may_read` returned False."""


class Terms:
    """What applies to many requests alike.

    `timeout` is in seconds until the response; None waits as long as the connection
    lives. With `queue_timeout` it begins when the request is sent. Before, the outcome
    is `NoConnection` if no request of its queue gets a connection for `queue_timeout`
    seconds. `keep` decides how much of the response's body is kept; None: nothing.
    """

    __slots__ = ("keep", "queue_timeout", "timeout")

    def __init__(
        self,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.timeout = timeout
        self.queue_timeout = queue_timeout
        self.keep = keep


class Exchange:
    """One request, from when it is queued until it has an outcome.

    A subclass writes the request, and gets what becomes of it.
    """

    __slots__ = ("connection", "pending", "resendable", "target", "terms", "timer")

    def __init__(self, target: Target, terms: Terms) -> None:
        self.target = target
        self.terms = terms
        self.pending = True  # it has no outcome yet and was not abandoned
        self.resendable = True  # see `may_resend`
        self.connection: Used | None = None  # None: it waits for one
        self.timer: asyncio.TimerHandle | None = None

    def write(self) -> bytes:
        """Return the whole request.

        It is called when there is a connection to send on, so that a timestamp is
        current, and again if the request is sent again.
        """
        raise NotImplementedError

    def on_sent(self) -> None:
        """The kernel has the whole request, maybe before `Client.send` returns."""

    def may_read(self) -> bool:
        """Whether the body, which is kept, may be read now, or only after `read_on`.

        It is asked once.
        """
        return True

    def on_done(self, outcome: Response | BackendError) -> None:
        """There is an outcome; called once, after `Client.send` has returned."""
        raise NotImplementedError

    def finish(self, outcome: Response | BackendError) -> None:
        """Report the outcome; does nothing if one was reported before."""
        if self.timer is not None:
            self._stop_timer()
        if self.pending:
            self.pending = False
            try:
                self.on_done(outcome)
            except Exception:  # a bug that must not stop other requests
                logger.exception("bug in %r", self.on_done)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @property
    def queued(self) -> bool:
        """Whether it waits for a connection, for the first time or again."""
        return self.connection is None

    @property
    def may_resend(self) -> bool:
        """Whether it may be sent again immediately if its kept connection ends."""
        return self.pending and self.resendable

    def abandon(self) -> None:
        """Close the request's connection, or give up its place in the queue."""
        self.pending = False
        self._stop_timer()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.leave()

    def read_on(self) -> None:
        """Read the body of the response, which waited."""
        if self.connection is not None:
            self.connection.read_on()

    def forbid_resend(self) -> None:
        """Never send it again immediately, even if its kept connection ends."""
        self.resendable = False

    def limit(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        """Fail it unless there is a response in `timeout` seconds."""
        self.timer = loop.call_later(
            timeout, after_reading, loop, partial(self._on_timeout, timeout)
        )

    def begin(self, connection: Used, loop: asyncio.AbstractEventLoop) -> None:
        """Record that it is being sent on `connection`; start its response timeout."""
        self.connection = connection
        terms = self.terms
        if terms.queue_timeout is not None:
            if self.timer is not None:
                self._stop_timer()  # for its wait in the queue
            if terms.timeout is not None:
                self.limit(loop, terms.timeout)

    def on_head(self) -> None:
        """The response has begun in time: its body has a time limit of its own."""
        if self.timer is not None:
            self._stop_timer()

    def _on_timeout(self, timeout: float) -> None:
        if self.timer is None:
            return  # the response was read meanwhile
        self.timer = None
        connection = self.connection
        self.finish(BackendError(f"POST {self.target}: no response in {timeout:g} s"))
        if connection is not None:
            self.connection = None
            connection.leave()


class SimpleExchange(Exchange):
    """A request whose parts are functions; see `Exchange`."""

    __slots__ = ("_on_done", "_on_sent", "_write")

    def __init__(
        self,
        target: Target,
        write: Callable[[], bytes],
        on_done: Callable[[Response | BackendError], None],
        on_sent: Callable[[], None] | None,
        terms: Terms,
    ) -> None:
        super().__init__(target, terms)
        self._write = write
        self._on_done = on_done
        self._on_sent = on_sent

    def write(self) -> bytes:
        return self._write()

    def on_sent(self) -> None:
        if self._on_sent is not None:
            self._on_sent()

    def on_done(self, outcome: Response | BackendError) -> None:
        self._on_done(outcome)


def ended(target: Target) -> Exchange:
    """Return a request that nobody waits for, in place of one that was abandoned."""
    exchange = Exchange(target, Terms())
    exchange.pending = False
    return exchange


def stopped(target: Target) -> BackendError:
    """Return the outcome of a request when the client is closed."""
    return BackendError(f"POST {target}: the relay stops")
