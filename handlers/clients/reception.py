"""Tracks what one client has acknowledged of the data sent to it."""

from handlers.websocket.closing import LINGER_TIMEOUT
from handlers.websocket.uptake import Outgoing, Uptake

SLOW_READER = 40_000  # bytes per second; a slower client may be considered dead
# Seconds within which a kernel acknowledges data (RFC 9293, section 3.8.6.3).
DELAYED_ACK = 0.5
# Seconds by which the loop's clock and the kernel's may differ: it counts in ticks.
CLOCKS_APART = 0.02


class Reception:
    """Signs of life of a client: acknowledged bytes, and pongs.

    Times are on the loop's clock.
    """

    __slots__ = ("_answered", "_pinged", "_uptake", "last_sent", "taken_at")

    def __init__(self, now: float) -> None:
        self.last_sent = now  # when a message was last sent
        # When it last acknowledged data, and its progress while data is
        # unacknowledged.
        self.taken_at = now
        self._uptake: Uptake | None = None
        # Bytes sent before the last answered ping, and before the oldest unanswered
        # one.
        self._answered = 0
        self._pinged: int | None = None

    def look(
        self, outgoing: Outgoing, now: float, bytes_sent: int, last_heard: float
    ) -> float | None:
        """Return for how many seconds it has acknowledged no data.

        None: no data is unacknowledged. `last_heard` is when its last byte arrived.
        """
        if not outgoing.under_way:
            if self._uptake is not None:
                self._uptake = None
                self.taken_at = now
            elif outgoing.quiet and not self._is_pinged_since(bytes_sent):
                # The latest acknowledgment is that of the last message, unless it
                # arrived with data of the client.
                acknowledged_at = now - outgoing.quiet
                if acknowledged_at > last_heard + CLOCKS_APART:
                    self.taken_at = max(self.taken_at, acknowledged_at)
            return None
        if self._uptake is None:
            self._uptake = Uptake(outgoing.acknowledged, now)
            return 0.0
        stalled = self._uptake.look(outgoing.acknowledged, now)
        self.taken_at = max(self.taken_at, self._uptake.taken_at)
        return stalled

    @property
    def last_active_at(self) -> float:
        """When a message was last sent, or data was last seen to be acknowledged."""
        taken_at = self.taken_at if self._uptake is None else self._uptake.taken_at
        return max(self.last_sent, taken_at)

    def on_pinged(self, bytes_sent: int) -> None:
        """Record a ping after `bytes_sent`."""
        if self._pinged is None:
            self._pinged = bytes_sent

    def on_pong(self) -> None:
        """Record a pong: the client has read everything sent before the ping."""
        if self._pinged is not None:
            self._answered, self._pinged = self._pinged, None

    def _is_pinged_since(self, bytes_sent: int) -> bool:
        """Return whether a ping was sent after all of `bytes_sent`."""
        return bytes_sent == (self._answered if self._pinged is None else self._pinged)

    def reading_time(self, bytes_sent: int) -> float:
        """Return the seconds that a slow client may need to read what it holds."""
        return min((bytes_sent - self._answered) / SLOW_READER, LINGER_TIMEOUT)
