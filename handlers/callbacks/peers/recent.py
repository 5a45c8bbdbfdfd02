"""Remembers forwarded callbacks, so that none is carried out twice.

They have a key that an instance has added and signed. `repeats` remembers those with a
key of a backend.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from handlers.callbacks.peers.hops import MAX_DIFFERENCE
from handlers.callbacks.repeats import Answer

# Seconds for which a callback is remembered at least: its time may be that much ahead,
# and is accepted until it is that much old.
PERIOD = 2.0 * MAX_DIFFERENCE
# Of these at most twice as many are remembered. With more in a period, the oldest are
# forgotten earlier.
MAX_IN_GENERATION = 100_000  # callbacks; each takes about 200 bytes, and its statuses
MAX_STATUSES = 5_000_000  # in answers to bulk callbacks; each takes two bytes

A = TypeVar("A", bound=Answer)


class Recent:
    """The answers to the latest forwarded callbacks, by key.

    They are kept in two generations: the older one is forgotten as a whole, so that no
    callback needs a timer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Answers, and tasks that will return one.
        self._new: dict[str, object] = {}
        self._old: dict[str, object] = {}
        self._statuses = 0  # in answers of the new one
        self._begun_at = loop.time()

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self._old

    def add(self, key: str, answer: object) -> None:
        """Remember the answer to a callback that was not known, or its task."""
        now = self._loop.time()
        if (
            now > self._begun_at + PERIOD
            or len(self._new) >= MAX_IN_GENERATION
            or self._statuses >= MAX_STATUSES
        ):
            self._old, self._new, self._begun_at = self._new, {}, now
            self._statuses = 0
        self._new[key] = answer

    async def once(self, key: str, act: Callable[[], Coroutine[Any, Any, A]]) -> A:
        """Return the answer of `act`, which is called for the first request only."""
        known = self._new.get(key) or self._old.get(key)
        if known is None:
            known = self._loop.create_task(act())
            self.add(key, known)
            known.add_done_callback(self._count)
        if isinstance(known, asyncio.Task):
            known = await asyncio.shield(known)
        return cast(A, known)

    def _count(self, task: "asyncio.Task[A]") -> None:
        if not task.cancelled() and task.exception() is None:
            self._statuses += task.result().statuses
