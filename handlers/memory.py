"""Gives memory that is free back to the system.

glibc keeps what was freed between what is still in use. Large messages that are
kept for long among those that pass leave such gaps: with 50 MB of held answers
the process took 280 MB after four minutes.
"""

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

STATM = Path("/proc/self/statm")  # proc(5); Linux only
INTERVAL = 10.0  # seconds between two looks
GROWTH = 32 * 2**20  # bytes of growth that are worth the few milliseconds


class MemoryTrimmer:
    """Has glibc give back free memory where the process has grown.

    Does nothing where there is no glibc, or no /proc.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._trim = _malloc_trim()
        self._least = resident() if STATM.exists() else 0  # bytes, since the last trim
        self._timer: asyncio.TimerHandle | None = None
        if self._trim is not None and STATM.exists():
            self._timer = loop.call_later(INTERVAL, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(INTERVAL, self._look)
        with contextlib.suppress(OSError):  # no descriptor is free
            if self._trim is not None and resident() > self._least + GROWTH:
                self._trim(0)
                self._least = resident()
            self._least = min(self._least, resident())


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> Callable[[int], int] | None:
    """malloc_trim(3), or None where the C library has none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim
