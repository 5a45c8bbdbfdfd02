"""A circuit breaker, so that a sick backend is not stampeded.

It opens only on failures that say that the backend is away (`BackendAway`), so
that one client's poison message, answered 500, can't stop everyone.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from backends.waiting import Waiters

logger = logging.getLogger(__name__)

BUCKET = 1.0  # seconds; attempts are counted in buckets of the window


@dataclass(frozen=True, slots=True)
class Tripping:
    """When the breaker opens, and how it probes.

    At least `share` (0 to 1) of at least `attempts` in `window` seconds say
    that the backend is away, and they come from at least `connections`
    connections. Probes go `first_probe` to `last_probe` seconds apart.
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
    # Of failed attempts; no more than are needed to trip.
    connections: set[str] = field(default_factory=set)


class Breaker:
    """Closed while the backend is there; open, it lets one probe go at a time.

    Who finds it open enters the line with `wait`, and is called when its turn
    has come to probe, or when the breaker has closed.
    """

    def __init__(self, tripping: Tripping) -> None:
        self._loop = asyncio.get_running_loop()
        self._tripping = tripping
        self._buckets: deque[_Bucket] = deque()
        self._line = Waiters()
        self._between = 0.0  # seconds until the next probe
        self._probe_timer: asyncio.TimerHandle | None = None
        self._permit = False
        self.open = False
        self.opened_at = 0.0  # on the loop's clock

    def open_for(self) -> float | None:
        """Seconds since it opened; None while it is closed."""
        return self._loop.time() - self.opened_at if self.open else None

    @property
    def untried(self) -> bool:
        """Whether a probe may go, and nobody is in line to send it."""
        return self.open and self._permit

    def take(self) -> bool:
        """Whether an attempt may go now: always while closed, once per probe."""
        if not self.open:
            return True
        permit, self._permit = self._permit, False
        return permit

    def wait(self, call: Callable[[], None]) -> None:
        """Stand in line, at its end; `call` is called once."""
        self._line.wait(call)
        if self._probe_timer is None and self._permit:
            self._probe()

    def leave(self, call: Callable[[], None]) -> None:
        """Stand in line no more."""
        self._line.leave(call)

    def record(self, connection_id: str, away: bool) -> None:
        """An attempt has ended: with an answer or otherwise, or `away`."""
        if self.open:
            if away:
                self._schedule_probe()
            else:
                self._close()
            return
        now = self._loop.time()
        bucket = self._bucket(now)
        bucket.attempts += 1
        if away:
            bucket.away += 1
            if len(bucket.connections) < self._tripping.connections:
                bucket.connections.add(connection_id)
            if self._is_tripped(now):
                self._open(now)

    def record_nothing(self) -> None:
        """An attempt has ended, and nobody knows what would have become of it."""
        if self.open:
            self._schedule_probe()  # it may have been the probe

    def _bucket(self, now: float) -> _Bucket:
        if not self._buckets or now >= self._buckets[-1].began + BUCKET:
            self._buckets.append(_Bucket(now))
            self._forget_before(now - self._tripping.window)
        return self._buckets[-1]

    def _forget_before(self, when: float) -> None:
        while self._buckets and self._buckets[0].began < when:
            self._buckets.popleft()

    def _is_tripped(self, now: float) -> bool:
        self._forget_before(now - self._tripping.window)
        attempts = sum(bucket.attempts for bucket in self._buckets)
        away = sum(bucket.away for bucket in self._buckets)
        connections = set().union(*(bucket.connections for bucket in self._buckets))
        return (
            attempts >= self._tripping.attempts
            and away >= self._tripping.share * attempts
            and len(connections) >= self._tripping.connections
        )

    def _open(self, now: float) -> None:
        logger.error("the backend is away: probing", extra={"event": "away"})
        self.open, self.opened_at = True, now
        self._between = self._tripping.first_probe
        self._schedule_probe()

    def _close(self) -> None:
        now = self._loop.time()
        logger.warning("the backend is back after %.1f s", now - self.opened_at,
                       extra={"event": "back"})
        self.open = self._permit = False
        self._buckets.clear()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
        self._line.call_all()

    def _schedule_probe(self) -> None:
        if self._probe_timer is not None:
            return
        self._probe_timer = self._loop.call_later(
            self._between, self._probe
        )
        self._between = min(2 * self._between, self._tripping.last_probe)

    def _probe(self) -> None:
        """Let the first in line go; who fails enters at the end: they rotate."""
        self._probe_timer = None
        self._permit = True
        while self._permit and self._line:
            self._line.call_first()
        # With nobody in line, the permit is for whoever comes next.
