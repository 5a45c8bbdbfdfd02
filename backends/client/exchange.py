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
from backends.waiting import call_one

logger = logging.getLogger(__name__)


class NoConnection(BackendError):
    """The request was not sent: no request of its queue got a connection in time."""


class Refused(BackendAway):
    """The host refused the connection: nothing listens on the port."""


class Used(Protocol):
    """The connection that a request was sent on."""

    def close(self) -> None:
        """Close it, after what was written has been sent."""

    def read_on(self) -> None:
        """Read the body of the response, for which `may_read` returned False."""


class Exchange:
    """One request, from when it is queued until it has an outcome.

    `on_sent` is called when the kernel has the whole request, `on_done` once, with the
    response or a `BackendError`. Neither is called before `Client.post` returns, nor
    after `abandon`. `may_read` is asked once, before a body that is kept is read; if it
    returns False, the body is read after `read_on`.
    """

    __slots__ = (
        "answer_timeout",
        "connection",
        "keep",
        "may_read",
        "on_done",
        "on_sent",
        "queue_timeout",
        "resent",
        "target",
        "timer",
        "write",
    )

    def __init__(
        self,
        target: Target,
        write: Callable[[], bytes],
        on_done: Callable[[Response | BackendError], None],
        on_sent: Callable[[], None] | None = None,
        keep: Keep | None = None,
        may_read: Callable[[], bool] | None = None,
    ) -> None:
        self.target = target
        # None when the request may not be sent again.
        self.write: Callable[[], bytes] | None = write
        self.on_done: Callable[[Response | BackendError], None] | None = on_done
        self.on_sent = on_sent
        self.keep = keep
        self.may_read = may_read
        # Seconds for the response from when it is sent, and for a connection while the
        # queue does not move; None: no limit of that kind.
        self.answer_timeout: float | None = None
        self.queue_timeout: float | None = None
        self.resent = False
        self.connection: Used | None = None
        self.timer: asyncio.TimerHandle | None = None

    def finish(self, outcome: Response | BackendError) -> None:
        """Report the outcome; does nothing if one was reported before."""
        on_done, self.on_done, self.on_sent = self.on_done, None, None
        self.write = self.may_read = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if on_done is not None:
            try:
                on_done(outcome)
            except Exception:  # a bug that must not stop other requests
                logger.exception("bug in %r", on_done)

    @property
    def queued(self) -> bool:
        """Whether it waits for a connection, for the first time or again."""
        return self.connection is None

    @property
    def pending(self) -> bool:
        """Whether it has no outcome yet and was not abandoned."""
        return self.on_done is not None

    @property
    def may_resend(self) -> bool:
        """Whether it may be sent again immediately if its kept connection ends."""
        return (
            not self.resent and self.on_done is not None and self.write is not None
        )

    def abandon(self) -> None:
        """Close the request's connection, or give up its place in the queue."""
        self.on_done = self.on_sent = self.write = self.may_read = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.connection is not None:
            self.leave(self.connection)

    def leave(self, connection: Used) -> None:
        """Nobody waits for the response on `connection` any more: close it."""
        connection.close()

    def asks_first(self) -> bool:
        """Ask whether the body may be read now; return whether it has to wait."""
        may_read, self.may_read = self.may_read, None
        return may_read is not None and not may_read()

    def read_on(self) -> None:
        """Read the body of the response, which waited."""
        if self.connection is not None:
            self.connection.read_on()

    def forbid_resend(self) -> None:
        """Never send it again immediately, even if its kept connection ends."""
        self.write = None

    def limit(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        """Fail it unless there is a response in `timeout` seconds."""
        self.timer = loop.call_later(
            timeout, after_reading, loop, partial(self._on_timeout, timeout)
        )

    def begin(self, connection: Used, loop: asyncio.AbstractEventLoop) -> None:
        """Record that it is being sent on `connection`; start its response timeout."""
        self.connection = connection
        if self.queue_timeout is not None and self.timer is not None:
            self.timer.cancel()  # for its wait in the queue
            self.timer = None
        if self.answer_timeout is not None:
            self.limit(loop, self.answer_timeout)

    def _on_timeout(self, timeout: float) -> None:
        if self.timer is None:
            return  # the response was read meanwhile
        self.timer = None
        connection = self.connection
        self.finish(BackendError(f"POST {self.target}: no response in {timeout:g} s"))
        if connection is not None:
            self.leave(connection)

    def sent(self) -> None:
        """The kernel has taken the last byte."""
        if self.on_sent is not None:
            call_one(self.on_sent)


def stopped(target: Target) -> BackendError:
    """Return the outcome of a request when the client is closed."""
    return BackendError(f"POST {target}: the relay stops")
