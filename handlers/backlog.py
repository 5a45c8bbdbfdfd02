"""What waits for the backend in the whole process, and when reading stops."""

import asyncio
import logging
from typing import Protocol

from tornado.options import define

from handlers.websocket.frames import CloseCode, FrameError

logger = logging.getLogger(__name__)

define("max_pending", default=100_000, metavar="COUNT",
       help="most events in the whole process that wait for the backend; then reading "
            "stops and handshakes get 503")
define("max_queued_bytes", default=256 * 1024 * 1024, metavar="BYTES",
       help="most bytes in the whole process, for each of three: messages that wait "
            "for the backend, overdue messages, incomplete messages")

WARNING_INTERVAL = 60.0  # seconds between two warnings that reading stops


class Sender(Protocol):
    """Whoever sends a message in parts."""

    def on_failed(self, error: FrameError) -> None:
        """The message has no room; the connection ends with the error's code."""


class Backlog:
    """Counts events that wait and bytes of messages, whole ones and parts.

    An event is a message that was read, or a disconnect notification, whose size
    is 0. At `max_events` or `max_bytes` nothing more is read. Parts of messages
    have a bound of their own, of `max_bytes`.
    """

    def __init__(
        self, max_events: int = 100_000, max_bytes: int = 256 * 1024 * 1024
    ) -> None:
        self.events = 0
        self.bytes = 0
        self._max_events = max_events
        self._max_bytes = max_bytes
        # Bytes of each message that is not whole, the longest under way first.
        self._parts: dict[Sender, int] = {}
        self._part_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._warned_at = float("-inf")  # on the loop's clock

    @property
    def full(self) -> bool:
        """Whether so much waits that nothing more may be read."""
        return self.events >= self._max_events or self.bytes >= self._max_bytes

    def hold(self, size: int) -> None:
        """An event of `size` bytes waits from now on."""
        self.events += 1
        self.bytes += size

    def release(self, size: int) -> None:
        """An event waits no more: it was taken or given up."""
        self.events -= 1
        self.bytes -= size
        if self._room is not None and not self.full:
            room, self._room = self._room, None
            room.set_result(None)

    def room(self) -> "asyncio.Future[None] | None":
        """None where more may be read, else what to wait for."""
        if self.events < self._max_events and self.bytes < self._max_bytes:
            return None
        if self._room is None:
            loop = asyncio.get_running_loop()
            self._room = loop.create_future()
            if loop.time() >= self._warned_at + WARNING_INTERVAL:
                self._warned_at = loop.time()
                logger.warning("reading stops: %d events wait", self.events)
        return self._room

    def keep_part(self, sender: Sender, size: int) -> None:
        """Parts of a message take `size` bytes, until it is whole; 0: no more.

        Where all parts together exceed the bound, the message that has taken
        longest ends with 1013: whoever sends at a usual pace is through long before.
        """
        self._part_bytes += size - self._parts.get(sender, 0)
        if size:
            self._parts[sender] = size
        else:
            self._parts.pop(sender, None)
        if self._part_bytes <= self._max_bytes or not size:
            return
        slowest = next(iter(self._parts))
        self.keep_part(slowest, 0)
        slowest.on_failed(
            FrameError(CloseCode.TRY_AGAIN_LATER, "too much is not whole")
        )
