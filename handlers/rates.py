"""How fast one client may send: reading slows, and in the end it is closed.

A bucket of credit is one number, the time at which it is full but for one burst:
what is spent pushes it into the future, and while it lies there, there is no
credit (the "virtual scheduling" of ITU-T I.371).
"""

import asyncio
from dataclasses import dataclass

from tornado.options import define

from handlers.frames import CloseCode, FrameError

define("messages_per_second", default=0.0, metavar="RATE",
       help="most messages of one client in a second; then reading slows; 0: "
            "any number")
define("bytes_per_second", default=0, metavar="BYTES0",
       help="most bytes of one client's frames in a second; then reading slows; "
            "0: any number")
define("rate_patience", default=10.0, metavar="SECONDS",
       help="longest that a client may send more than these without a break; "
            "then it is closed with 1008")

BURST = 1.0  # seconds' worth that may come at once, and one more in any case


def spent(paid_until: float, now: float, seconds: float) -> float:
    """A bucket from which `seconds` worth of its rate is taken.

    There is credit again when `now` is past what this returns.
    """
    return max(paid_until, now - BURST) + seconds


@dataclass(frozen=True, slots=True)
class Rates:
    """What one client may send in a second; 0 stands for any number."""

    messages: float = 0.0
    bytes: int = 0
    patience: float = 10.0  # seconds

    def __bool__(self) -> bool:
        return bool(self.messages or self.bytes)


class Throttle:
    """Holds the reading of one client to its rates."""

    __slots__ = (
        "_bytes_paid",
        "_held",
        "_messages_paid",
        "_pushing_since",
        "_rates",
        "_released",
        "_timer",
    )

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._messages_paid = self._bytes_paid = float("-inf")  # on the loop's clock
        # Since when it has been sending more than it may, on the loop's clock.
        self._pushing_since: float | None = None
        self._held: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._released = False

    def on_bytes(self, size: int, at_once: bool, now: float) -> None:
        """`size` bytes came, `at_once` where they were there before we asked."""
        if not at_once:
            self._pushing_since = None
        if self._rates.bytes:
            self._bytes_paid = spent(self._bytes_paid, now, size / self._rates.bytes)

    def on_message(self, now: float) -> None:
        """A message came."""
        if self._rates.messages:
            self._messages_paid = spent(
                self._messages_paid, now, 1 / self._rates.messages
            )

    def room(self, now: float) -> "asyncio.Future[None] | None":
        """None where more may be read, else what to wait for.

        Raises `FrameError` with 1008 where the client's time is up.
        """
        credit_at = max(self._messages_paid, self._bytes_paid)
        if credit_at < now or self._released:
            return None
        if self._pushing_since is None:
            # Not from now on: whoever waits for credit may yet be quiet.
            self._pushing_since = credit_at
        elif now - self._pushing_since >= self._rates.patience:
            raise FrameError(CloseCode.POLICY, "rate exceeded")
        loop = asyncio.get_running_loop()
        self._held = loop.create_future()
        self._timer = loop.call_at(credit_at, self._on_credit, credit_at)
        return self._held

    def _on_credit(self, credit_at: float) -> None:
        if self._pushing_since is not None:
            # By how much we are late is no time in which the client pushed.
            late = asyncio.get_running_loop().time() - credit_at
            self._pushing_since += max(0.0, late)
        self._resume()

    def release(self) -> None:
        """Hold nothing more: the connection ends."""
        self._released = True
        if self._timer is not None:
            self._timer.cancel()
            self._resume()

    def _resume(self) -> None:
        self._timer = None
        if self._held is not None and not self._held.done():
            self._held.set_result(None)
