"""The circuit breaker: limits attempts while the backend is unreachable.

It opens only on failures that show that the backend is unreachable (`BackendAway`): a
message that is always answered 500 must not stop other clients.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Hold
from backends.waiting import Waiters

logger = logging.getLogger(__name__)

define("breaker_window", default=10.0, group=__name__, metavar="SECONDS",
       help="period over which the circuit breaker counts attempts")
define("breaker_attempts", default=20, group=__name__, metavar="COUNT",
       help="fewest attempts in the window before the breaker opens")
define("breaker_share", default=0.5, group=__name__, metavar="SHARE",
       help="share of the attempts in the window, 0 to 1, that must fail to reach the "
            "backend before the breaker opens")
define("breaker_connections", default=5, group=__name__, metavar="COUNT",
       help="fewest client connections that the failed attempts must come from before "
            "the breaker opens")
define("breaker_first_probe", default=0.5, group=__name__, metavar="SECONDS",
       help="time from the opening of the breaker to its first probe")
define("breaker_last_probe", default=5.0, group=__name__, metavar="SECONDS",
       help="longest interval between probes; each interval doubles up to this")

BUCKET = 1.0  # seconds; attempts are counted in buckets of the window


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When the breaker opens, and how often it probes.

    It opens when at least `share` (0 to 1) of at least `attempts` in `window`
    seconds found the backend unreachable, from at least `connections` connections.
    Probes are `first_probe` to `last_probe` seconds apart.
    """

    window: float = 10.0
    attempts: int = 20
    share: float = 0.5
    connections: int = 5
    first_probe: float = 0.5
    last_probe: float = 5.0


@dataclass(slots=True)
class _Bucket:
    began: float
    attempts: int = 0
    away: int = 0
    # Ids of connections with a failed attempt; no more than are needed to open.
    connections: set[str] = field(default_factory=set)


class Breaker:
    """Closed while the backend is reachable; open, it permits one probe at a time.

    A caller that finds it open enters the line with `wait`, and is called when it
    is its turn to probe, or when the breaker has closed.
    """

    def __init__(self, settings: BreakerSettings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._buckets: deque[_Bucket] = deque()
        self._line = Waiters()
        self._between = 0.0  # seconds until the next probe
        self._probe_timer: asyncio.TimerHandle | None = None
        self._permit = False
        # The breaker opens on failures from that many connections.
        self.connections = settings.connections
        self.open = False
        self.opened_at = 0.0  # on the loop's clock
        # Why the latest attempt did not reach the backend; None while closed.
        self.cause: str | None = None

    def open_for(self) -> float | None:
        """Seconds since it opened; None while it is closed."""
        return self._loop.time() - self.opened_at if self.open else None

    @property
    def untried(self) -> bool:
        """Whether a probe is permitted, and no caller is in line to send it."""
        return self.open and self._permit

    def take(self) -> bool:
        """Whether an attempt is permitted: always while closed, once per probe."""
        if not self.open:
            return True
        permit, self._permit = self._permit, False
        return permit

    def wait(self, call: Callable[[], None]) -> None:
        """Enter the line at its end; `call` is called once."""
        self._line.wait(call)
        if self._probe_timer is None and self._permit:
            self._probe()

    def leave(self, call: Callable[[], None]) -> None:
        """Leave the line."""
        self._line.leave(call)

    def record(self, connection_id: str, cause: str | None) -> None:
        """Record the end of an attempt.

        `cause` says why it did not reach the backend; None: it did.
        """
        if self.open:
            if cause is not None:
                self.cause = cause
                self._schedule_probe()
            else:
                self._close()
            return
        now = self._loop.time()
        bucket = self._bucket(now)
        bucket.attempts += 1
        if cause is not None:
            bucket.away += 1
            if len(bucket.connections) < self._settings.connections:
                bucket.connections.add(connection_id)
            if self._is_tripped(now):
                self._open(now, cause)

    def record_nothing(self) -> None:
        """Record that an attempt has ended without an outcome."""
        if self.open:
            self._schedule_probe()  # it may have been the probe

    def _bucket(self, now: float) -> _Bucket:
        if not self._buckets or now >= self._buckets[-1].began + BUCKET:
            self._buckets.append(_Bucket(now))
            self._forget_before(now - self._settings.window)
        return self._buckets[-1]

    def _forget_before(self, when: float) -> None:
        while self._buckets and self._buckets[0].began < when:
            self._buckets.popleft()

    def _is_tripped(self, now: float) -> bool:
        self._forget_before(now - self._settings.window)
        attempts = sum(bucket.attempts for bucket in self._buckets)
        away = sum(bucket.away for bucket in self._buckets)
        connections = set().union(*(bucket.connections for bucket in self._buckets))
        return (
            attempts >= self._settings.attempts
            and away >= self._settings.share * attempts
            and len(connections) >= self._settings.connections
        )

    def _open(self, now: float, cause: str) -> None:
        logger.error("backend unavailable: probing",
                     extra={"event": "backend_unavailable"})
        self.open, self.opened_at, self.cause = True, now, cause
        self._between = self._settings.first_probe
        self._schedule_probe()

    def _close(self) -> None:
        now = self._loop.time()
        logger.warning("backend available again after %.1f s", now - self.opened_at,
                       extra={"event": "backend_available"})
        self.open = self._permit = False
        self.cause = None
        self._buckets.clear()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
        self._line.call_all()

    def _schedule_probe(self) -> None:
        if self._probe_timer is not None:
            return
        self._probe_timer = self._loop.call_later(self._between, self._probe)
        self._between = min(2 * self._between, self._settings.last_probe)

    def _probe(self) -> None:
        """Permit a probe by the first in line; one that fails enters at the end."""
        self._probe_timer = None
        self._permit = True
        while self._permit and self._line:
            self._line.call_first()
        # If the line is empty, the next caller of `take` gets the permit.


class HeldBreaker(Breaker):
    """A breaker that also permits nothing while `hold` is active."""

    def __init__(self, settings: BreakerSettings, hold: Hold) -> None:
        super().__init__(settings)
        self._hold = hold

    def take(self) -> bool:
        """Whether an attempt is permitted."""
        return not self._hold.active and super().take()

    def wait(self, call: Callable[[], None]) -> None:
        """Enter the line, or wait for the end of the hold."""
        if self._hold.active:
            self._hold.wait(call)
        else:
            super().wait(call)

    def leave(self, call: Callable[[], None]) -> None:
        """Leave both."""
        self._hold.leave(call)
        super().leave(call)


def make_breaker(hold: Hold | None) -> Breaker:
    """Make a breaker from the options. Raises `OptionError` if they conflict."""
    settings = breaker_settings()
    return Breaker(settings) if hold is None else HeldBreaker(settings, hold)


def breaker_settings() -> BreakerSettings:
    """Read the settings from the options. Raises `OptionError` if they conflict."""
    if options.breaker_first_probe > options.breaker_last_probe:
        raise OptionError("--breaker_first_probe is above --breaker_last_probe")
    return BreakerSettings(
        options.breaker_window,
        options.breaker_attempts,
        options.breaker_share,
        options.breaker_connections,
        options.breaker_first_probe,
        options.breaker_last_probe,
    )
