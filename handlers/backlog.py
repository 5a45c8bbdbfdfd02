"""Limits what waits for the backend in the whole process."""

import asyncio
import logging
from typing import Protocol

from tornado.options import define

from handlers.process.log_limit import LineQuota
from handlers.websocket.frames import CloseCode, FrameError

logger = logging.getLogger(__name__)

define("max_pending", default=100_000, group=__name__, metavar="COUNT",
       help="most events in the whole process that wait for the backend; then reading "
            "stops and handshakes get 503")
define("max_queued_bytes", default=256 * 1024 * 1024, group=__name__, metavar="BYTES",
       help="most bytes in the whole process, for each of three: messages that wait "
            "for the backend, overdue messages, incomplete messages")

WARNING_INTERVAL = 60.0  # seconds between warnings that reading stops


class Sender(Protocol):
    """The sender of a message that arrives in parts."""

    def on_failed(self, error: FrameError) -> None:
        """Close the connection with the error's code, because the bound is reached."""


class Backlog:
    """Counts waiting events, their bytes, and the bytes of incomplete messages.

    An event is a message that was read, or a disconnect event, whose size is 0.
    At `max_events` or `max_bytes` reading stops. Incomplete messages have a
    separate bound, also `max_bytes`.
    """

    def __init__(
        self, max_events: int = 100_000, max_bytes: int = 256 * 1024 * 1024
    ) -> None:
        self.events = 0
        self.bytes = 0
        self._max_events = max_events
        self._max_bytes = max_bytes
        # Bytes of each incomplete message, the oldest message first.
        self._parts: dict[Sender, int] = {}
        self._part_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._warnings = LineQuota(1, WARNING_INTERVAL)

    @property
    def full(self) -> bool:
        """Whether a bound is reached, so that reading must stop."""
        return self.events >= self._max_events or self.bytes >= self._max_bytes

    def hold(self, size: int) -> None:
        """Count an event of `size` bytes that starts to wait."""
        self.events += 1
        self.bytes += size

    def release(self, size: int) -> None:
        """Stop counting an event that was accepted or given up."""
        self.events -= 1
        self.bytes -= size
        if self._room is not None and not self.full:
            room, self._room = self._room, None
            room.set_result(None)

    def room(self) -> "asyncio.Future[None] | None":
        """Return None if reading may continue, else a future to wait for."""
        if self.events < self._max_events and self.bytes < self._max_bytes:
            return None
        if self._room is None:
            self._room = asyncio.get_running_loop().create_future()
            if self._warnings.allow():
                logger.warning("reading pauses: %d events are waiting", self.events)
        return self._room

    def keep_part(self, sender: Sender, size: int) -> None:
        """Record that an incomplete message holds `size` bytes; 0: it is complete.

        If all incomplete messages together exceed the bound, the oldest one fails
        with 1013. Messages that arrive at a usual rate complete long before.
        """
        if not size:
            self._part_bytes -= self._parts.pop(sender, 0)
            return
        self._part_bytes += size - self._parts.get(sender, 0)
        self._parts[sender] = size
        if self._part_bytes <= self._max_bytes:
            return
        slowest = next(iter(self._parts))
        self.keep_part(slowest, 0)
        slowest.on_failed(
            FrameError(CloseCode.TRY_AGAIN_LATER, "too many incomplete messages")
        )
