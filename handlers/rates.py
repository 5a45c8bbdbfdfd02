"""Rate limits of one client: reading slows, then the connection is closed.

A bucket of credit is one number, the time at which there is credit again. Spending
moves it into the future; while it is in the future, there is no credit (the
"virtual scheduling" of ITU-T I.371).
"""

import asyncio
import time
from dataclasses import dataclass

from tornado.options import define

from backends.deadlines import STALL
from handlers.websocket.frames import CloseCode, FrameError

define("messages_per_second", default=0.0, metavar="RATE",
       help="most messages per second of one client; above it reading slows; 0: no "
            "limit")
define("bytes_per_second", default=0, metavar="BYTES",
       help="most bytes per second of one client's frames; above it reading slows; 0: "
            "no limit")
define("rate_patience", default=10.0, metavar="SECONDS",
       help="longest time that a client may exceed its rates without a break; then it "
            "is closed with 1008")

BURST = 1.0  # seconds' worth that may arrive at once, and one more in any case
STALL_INTERVAL = 0.5  # seconds between checks whether the process was stopped
CATCH_UP_TIME = 10.0  # seconds after a stall in which the backlog is read


def spent(
    paid_until: float, now: float, seconds: float, burst: float = BURST
) -> float:
    """Take `seconds` worth of its rate from a bucket, and return its new value.

    There is credit again when `now` is past that value. `burst` is the most
    credit that the bucket can hold, in seconds' worth.
    """
    return max(paid_until, now - burst) + seconds


class Stalls:
    """Measures how long the process was stopped: by SIGSTOP, or with its machine.

    It uses a clock that continues meanwhile, if there is one, and a timer that
    starts with the first use.
    """

    __slots__ = ("_due", "_latest", "_over_at", "_seconds", "_timer")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._latest = 0.0  # seconds
        self._over_at = float("-inf")
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def seconds(self) -> float:
        """Total seconds, including a stall that the timer has not seen yet."""
        self.watch()
        return self._seconds + self._late()

    @property
    def latest(self) -> float:
        """Seconds of the last stall while its backlog may still be arriving, else 0."""
        late = self._late()
        if late or _clock() >= self._over_at + CATCH_UP_TIME:
            return late
        return self._latest

    def watch(self) -> None:
        """Start measuring."""
        if self._timer is None:
            self._start()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _start(self) -> None:
        self._due = _clock() + STALL_INTERVAL
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STALL_INTERVAL, self._tick)

    def _tick(self) -> None:
        late = self._late()
        if late:
            self._seconds += late
            self._latest, self._over_at = late, _clock()
        self._start()

    def _late(self) -> float:
        late = _clock() - self._due
        return late if self._timer is not None and late > STALL else 0.0


def _clock() -> float:
    """Return seconds, including time in suspension if the system counts it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Bucket:
    """Credit at a rate: at most `BURST`, plus credit for time without reading.

    The credit for time in which nothing was read is added once.
    """

    __slots__ = ("_burst", "paid_until")

    def __init__(self) -> None:
        self.paid_until = float("-inf")  # on the loop's clock
        self._burst = BURST  # seconds' worth

    def spend(self, seconds: float, now: float) -> None:
        """Spend `seconds` worth of credit."""
        self.paid_until = spent(self.paid_until, now, seconds, self._burst)
        self._burst = max(BURST, min(self._burst, now - self.paid_until))

    def excuse(self, seconds: float) -> None:
        """Add credit for `seconds` in which nothing was read."""
        self._burst += seconds


@dataclass(frozen=True, slots=True)
class Rates:
    """What one client may send per second; 0 means no limit."""

    messages: float = 0.0
    bytes: int = 0
    patience: float = 10.0  # seconds

    def __bool__(self) -> bool:
        return bool(self.messages or self.bytes)


class Throttle:
    """Limits reading from one client to its rates.

    Time in which nothing was read does not count against the client: what it sent
    meanwhile arrives at once when reading continues.
    """

    __slots__ = (
        "_bytes",
        "_held",
        "_messages",
        "_pushing_since",
        "_rates",
        "_released",
        "_stalled",
        "_stalls",
        "_timer",
        "_unread_since",
    )

    def __init__(self, rates: Rates, stalls: Stalls) -> None:
        self._rates = rates
        self._stalls = stalls
        self._stalled = stalls.seconds  # seconds that are excused already
        self._messages, self._bytes = _Bucket(), _Bucket()
        # Since when it has exceeded its rates, on the loop's clock.
        self._pushing_since: float | None = None
        # Since when the backend's backlog has stopped reading, on the loop's clock.
        self._unread_since: float | None = None
        self._held: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._released = False

    def on_bytes(self, size: int, at_once: bool, now: float) -> None:
        """Count `size` bytes; `at_once` if they had arrived before the read."""
        if not at_once:
            self._pushing_since = None
        self._excuse_stalls(now)
        if self._rates.bytes:
            self._bytes.spend(size / self._rates.bytes, now)

    def on_message(self, now: float) -> None:
        """Count a message."""
        if self._rates.messages:
            self._messages.spend(1 / self._rates.messages, now)

    def on_full(self, now: float) -> None:
        """Note that the backlog stops reading although there is credit."""
        if self._unread_since is None:
            self._unread_since = now

    def room(self, now: float) -> "asyncio.Future[None] | None":
        """Return None if reading may continue, else a future to wait for.

        Raises `FrameError` with 1008 when `patience` is over.
        """
        if self._unread_since is not None:
            self._excuse(now - self._unread_since, now)
            self._unread_since = None
        credit_at = max(self._messages.paid_until, self._bytes.paid_until)
        if credit_at < now or self._released:
            return None
        self._excuse_stalls(now)
        if self._pushing_since is None:
            # Not from `now`: a client that waits for credit may still pause.
            self._pushing_since = credit_at
        elif now - self._pushing_since >= self._rates.patience:
            raise FrameError(CloseCode.POLICY_VIOLATION, "rate exceeded")
        loop = asyncio.get_running_loop()
        self._held = loop.create_future()
        self._timer = loop.call_at(credit_at, self._on_credit, credit_at)
        return self._held

    def _on_credit(self, credit_at: float) -> None:
        now = asyncio.get_running_loop().time()
        self._excuse(max(0.0, now - credit_at), now)
        self._resume()

    def _excuse_stalls(self, now: float) -> None:
        stalled = self._stalls.seconds
        if stalled > self._stalled:
            self._excuse(stalled - self._stalled, now)
            self._stalled = stalled

    def _excuse(self, seconds: float, now: float) -> None:
        """Excuse the last `seconds`, in which nothing was read."""
        self._messages.excuse(seconds)
        self._bytes.excuse(seconds)
        if self._pushing_since is not None:
            self._pushing_since = min(now, self._pushing_since + seconds)

    def release(self) -> None:
        """Stop limiting: the connection ends."""
        self._released = True
        if self._timer is not None:
            self._timer.cancel()
            self._resume()

    def _resume(self) -> None:
        self._timer = None
        if self._held is not None and not self._held.done():
            self._held.set_result(None)
