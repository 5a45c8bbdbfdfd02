"""Time in which the relay, or the soak itself, did not run: it judges nobody."""

import asyncio
import time

TICK = 0.05  # seconds
LATE = 0.2  # seconds between two ticks: something held the soak up
RECOVERY = 1.0  # seconds that a process may take to catch up


class Stalls:
    """Intervals of `time.monotonic()` in which somebody did not run."""

    def __init__(self) -> None:
        self._intervals: list[tuple[float, float]] = []
        self._own: list[tuple[float, float]] = []  # those of the soak itself

    def add(self, begin: float, end: float) -> None:
        """Somebody stood still, and then had to catch up."""
        self._intervals.append((begin, end + RECOVERY))

    async def watch(self) -> None:
        """Notice when the soak itself is late; until cancelled."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            if now - before > LATE:
                self.add(before, now)
                self._own.append((before, now))
            before = now

    def longest_own(self, begin: float, end: float) -> float:
        """Seconds that the soak itself stood still then, at most, without a break."""
        stalls = (stop - start for start, stop in self._own
                  if stop > begin and start < end)
        return max(stalls, default=0.0)

    def running(self, begin: float, end: float) -> float:
        """Seconds from `begin` to `end` in which everybody ran."""
        seconds, at = 0.0, begin
        for start, stop in sorted(self._intervals):
            if stop <= at:
                continue
            if start >= end:
                break
            seconds += max(0.0, start - at)
            at = max(at, stop)
        return seconds + max(0.0, end - at)
