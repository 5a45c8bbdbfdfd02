"""Round trips between soak and relay: the clock of `books`.

Seconds depend on the machine's speed; round trips show what each side has read.
"""

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import AsyncIterator

from soaking.callers import Caller

PAUSE = 0.05  # seconds between two beats
TICK = 0.05  # seconds
LATE = 0.2  # seconds between two ticks: something delayed the soak


class Pulse:
    """Round trips from the soak to the relay and back, one after the other.

    Within one, the loops of both take a turn, and in each turn a loop reads every
    socket that is readable. So what was sent to either before a beat began was read
    by its end, if its connection was open. Where the machine is slow, or one of the
    two is stopped, beats take longer, and there are fewer of them.
    """

    def __init__(self) -> None:
        # Of `time.monotonic()`; both lists have one entry for each beat, in order.
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._own: list[tuple[float, float]] = []  # when the soak itself stood still

    def add(self, begin: float, end: float) -> None:
        """Record a beat, which is later than all before."""
        self._begins.append(begin)
        self._ends.append(end)

    @contextlib.asynccontextmanager
    async def taken(self, url: str) -> AsyncIterator[None]:
        """Measure during the block; `url` is one that the relay answers at once."""
        tasks = (self._measure(url), self._watch())
        taking = [asyncio.create_task(task) for task in tasks]
        try:
            yield
        finally:
            for task in taking:
                task.cancel()
            await asyncio.gather(*taking, return_exceptions=True)

    async def _measure(self, url: str) -> None:
        async with Caller(url) as caller:
            while True:
                begin = time.monotonic()
                if await caller.request("GET") == 200:
                    self.add(begin, time.monotonic())
                await asyncio.sleep(PAUSE)

    async def _watch(self) -> None:
        """Record when the soak itself is late."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            if now - before > LATE:
                self._own.append((before, now))
            before = now

    def count(self, begin: float, end: float) -> int:
        """Return the number of beats that lie completely in that time."""
        first = bisect_left(self._begins, begin)
        behind = bisect_left(self._ends, end)
        return max(0, behind - first)

    def ago(self, beats: int, at: float) -> float:
        """Return when the beat began that is `beats` before `at`; -inf: too few."""
        first = bisect_left(self._ends, at) - beats
        return self._begins[first] if first >= 0 else float("-inf")

    def longest_own(self, begin: float, end: float) -> float:
        """Return the longest time, in seconds, for which the soak stood still."""
        stalls = (stop - start for start, stop in self._own
                  if stop > begin and start < end)
        return max(stalls, default=0.0)
