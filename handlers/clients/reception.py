"""What one client was seen to take of what is sent to it."""

from handlers.websocket.closing import LINGER_TIMEOUT
from handlers.websocket.uptake import Outgoing, Uptake

SLOW_READER = 40_000  # bytes per second; whoever is slower may be taken for gone
# Seconds in which a kernel acknowledges what came (RFC 9293, section 3.8.6.3).
DELAYED_ACK = 0.5
# Seconds by which the loop's clock and the kernel's may differ: it counts in ticks.
CLOCKS_APART = 0.02


class Reception:
    """Signs of life that a client gives by taking bytes, and by answering pings.

    Times are on the loop's clock.
    """

    __slots__ = ("_answered", "_pinged", "_uptake", "last_sent", "taken_at")

    def __init__(self, now: float) -> None:
        self.last_sent = now  # when a message was last sent
        # When it was last seen to have taken something, and how it takes what is
        # under way, while it was seen to be slow.
        self.taken_at = now
        self._uptake: Uptake | None = None
        # Bytes sent until the last ping that was answered, and until the oldest one
        # that was not.
        self._answered = 0
        self._pinged: int | None = None

    def look(
        self, outgoing: Outgoing, now: float, bytes_sent: int, last_heard: float
    ) -> float | None:
        """For how many seconds it has taken nothing of what is under way to it.

        None: nothing is under way. `last_heard` is when anything came from it.
        """
        if not outgoing.under_way:
            if self._uptake is not None:
                self._uptake = None
                self.taken_at = now
            elif outgoing.quiet and not self._is_pinged_since(bytes_sent):
                # Its latest acknowledgment, unless that came with bytes of its own,
                # is that of the last message.
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
        """When a message was last sent or, by the last look, something was taken."""
        taken_at = self.taken_at if self._uptake is None else self._uptake.taken_at
        return max(self.last_sent, taken_at)

    def on_pinged(self, bytes_sent: int) -> None:
        """A ping has left behind `bytes_sent`."""
        if self._pinged is None:
            self._pinged = bytes_sent

    def on_pong(self) -> None:
        """It answers a ping: it has read all that was sent before."""
        if self._pinged is not None:
            self._answered, self._pinged = self._pinged, None

    def _is_pinged_since(self, bytes_sent: int) -> bool:
        """Whether a ping has left behind all of `bytes_sent`."""
        return bytes_sent == (self._answered if self._pinged is None else self._pinged)

    def reading_time(self, bytes_sent: int) -> float:
        """Seconds for what it may have yet to read, if it is slow."""
        return min((bytes_sent - self._answered) / SLOW_READER, LINGER_TIMEOUT)
