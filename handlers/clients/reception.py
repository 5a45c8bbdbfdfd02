"""Tracks what one client has acknowledged of the data sent to it."""

from handlers.clients.receipts import Receipts
from handlers.websocket.closing import LINGER_TIMEOUT
from handlers.websocket.uptake import Outgoing, Uptake

SLOW_READER = 40_000  # bytes per second; a slower client may be considered dead
# Seconds within which a kernel acknowledges data (RFC 9293, section 3.8.6.3).
DELAYED_ACK = 0.5


class Reception:
    """Signs of life of a client: acknowledged bytes, and pongs.

    Times are on the loop's clock.
    """

    __slots__ = ("_answered", "_pinged", "_settled", "_uptake", "receipts", "taken_at")

    def __init__(self, now: float) -> None:
        # When it last acknowledged data of messages, and its progress while data is
        # unacknowledged.
        self.taken_at = now
        self._uptake: Uptake | None = None
        # Bytes sent before nothing was under way. If these are all, only pings and
        # pongs are under way.
        self._settled = 0
        # Bytes sent before the last answered ping, and before the oldest unanswered
        # one.
        self._answered = 0
        self._pinged: int | None = None
        self.receipts: Receipts | None = None  # while some are awaited

    def look(self, outgoing: Outgoing, now: float, bytes_sent: int) -> float | None:
        """Return for how many seconds it has acknowledged no data.

        None: no data is unacknowledged. `bytes_sent` is the size of all messages.
        Pings and pongs, and their acknowledgments, do not change `taken_at`.
        """
        uptake, stalled = self._uptake, None
        if outgoing.under_way and uptake is not None:
            stalled = uptake.look(outgoing.acknowledged, now)
            taken_at = uptake.taken_at
        else:
            taken_at = now - outgoing.quiet
            self._uptake = None
            if outgoing.under_way:
                self._uptake, stalled = Uptake(outgoing.acknowledged, now), 0.0
        if bytes_sent not in (self._settled, self._answered):
            self.taken_at = max(self.taken_at, taken_at)
            if not outgoing.under_way:
                self._settled = bytes_sent
        return stalled

    def on_pinged(self, bytes_sent: int) -> None:
        """Record a ping after `bytes_sent`."""
        if self._pinged is None:
            self._pinged = bytes_sent

    def on_pong(self, payload: bytes) -> None:
        """Record a pong: the client has read everything sent before the ping."""
        if self._pinged is not None:
            self._answered, self._pinged = self._pinged, None
        if self.receipts is not None:
            self.receipts.on_pong(payload)
            if not self.receipts:
                self.receipts = None

    def reading_time(self, bytes_sent: int) -> float:
        """Return the seconds that a slow client may need to read what it holds."""
        return min((bytes_sent - self._answered) / SLOW_READER, LINGER_TIMEOUT)
