"""Decides when the socket of a closing connection is closed.

Closing a socket with unacknowledged or unread bytes loses the close frame and what was
sent before it. `handlers.websocket.protocol` makes a `Closing` when either side begins
to close, so that an open connection needs no memory for it.
"""

import asyncio
from collections.abc import Callable

from backends.deadlines import after_reading
from handlers.websocket.frames import Close
from handlers.websocket.stream import ClientStream
from handlers.websocket.uptake import Uptake

CLOSE_TIMEOUT = 2.0  # seconds for the peer's close frame, after it acknowledged ours
LINGER_TIMEOUT = 120.0  # seconds from the first close frame, even for a slow peer
LOOK_INTERVAL = 0.5  # seconds between two checks of a slow peer


class Closing:
    """Calls `on_over` when the socket of a closing connection must be closed.

    While bytes are unacknowledged, the peer must acknowledge some of them every
    `send_timeout` seconds; afterwards it has `CLOSE_TIMEOUT`. `peer` is the peer's
    close frame if that came first. `discarding` is set if what arrives is discarded.
    """

    __slots__ = (
        "_answer_by",
        "_ends_at",
        "_on_over",
        "_send_timeout",
        "_stream",
        "_timer",
        "_uptake",
        "discarding",
        "peer",
    )

    def __init__(
        self, stream: ClientStream, send_timeout: float, on_over: Callable[[], None]
    ) -> None:
        self._stream = stream
        self._send_timeout = send_timeout
        self._on_over = on_over
        self._answer_by = self._ends_at = 0.0  # on the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._uptake: Uptake | None = None
        self.discarding = False
        self.peer: Close | None = None

    def watch(self) -> None:
        """Check the peer from `CLOSE_TIMEOUT` on; another call restarts that time."""
        loop = self._stream.loop
        now = loop.time()
        if self._timer is None:
            self._ends_at = now + LINGER_TIMEOUT
        self.cancel()
        self._answer_by = now + CLOSE_TIMEOUT
        self._timer = loop.call_at(self._answer_by, self._look)

    def shut_down(self) -> None:
        """End the writing side as soon as the kernel has all that was written."""
        stream = self._stream
        if not stream.closed and not stream.waiting:
            stream.shut_down()
        elif stream.waiting:
            stream.drained().add_done_callback(lambda drained: self.shut_down())

    def cancel(self) -> None:
        """Stop checking."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self._is_over():
            # The peer's close frame or end may have arrived already.
            after_reading(self._stream.loop, self._judge)
        else:
            self._look_again()

    def _judge(self) -> None:
        if self._stream.closed:
            return
        if self._is_over():
            self._on_over()
        else:
            self._look_again()

    def _look_again(self) -> None:
        if self.discarding and not self._stream.waiting:
            self._stream.shut_down()  # again: TLS may have had no room for close_notify
        loop = self._stream.loop
        self._timer = loop.call_later(LOOK_INTERVAL, self._look)

    def _is_over(self) -> bool:
        now = self._stream.loop.time()
        acknowledged, under_way, _ = self._stream.outgoing()
        if now >= self._ends_at:
            return True
        if not under_way:
            return now >= self._answer_by
        self._answer_by = now + CLOSE_TIMEOUT
        if self._uptake is None:
            self._uptake = Uptake(acknowledged, now)
        return self._uptake.look(acknowledged, now) >= self._send_timeout
