"""Limits the memory for incomplete request bodies in the whole process.

Each body has its own limit where it is read (`handlers.http.body`,
`handlers.http.server`), but there may be many connections. Both servers and both
listeners share one `BodyBudget`.
"""

import asyncio
import logging
from typing import Protocol

logger = logging.getLogger(__name__)

# Bytes; more if one of the limits of a body is so large that two would not fit.
MAX_BODY_BYTES = 64 * 1024 * 1024
RETRY_AFTER = 1  # seconds; the bodies that exhausted the budget end meanwhile


class BodyHolder(Protocol):
    """An owner of a body, complete or not, which no handler has taken yet."""

    def on_over_budget(self) -> None:
        """Drop the body and answer 503, unless a handler has taken it meanwhile."""


class BodyBudget:
    """Counts the bytes of all holders' bodies; at most `max_size` are kept.

    Above that the oldest body is dropped. That is never one whose sender sends it
    at once, but one whose sender is slow, or never completes it. For the current
    turn of the loop, one read may exceed the limit.
    """

    def __init__(self, max_size: int = MAX_BODY_BYTES) -> None:
        self._max_size = max_size
        self._sizes: dict[BodyHolder, int] = {}  # in the order of their first bytes
        self._total = 0
        self._dropped: set[BodyHolder] = set()  # `on_over_budget` is still to be called

    def hold(self, holder: BodyHolder, size: int) -> None:
        """Record that `holder` has `size` bytes of a body now."""
        if holder in self._dropped:
            return  # otherwise its bytes would count again
        self._total += size - self._sizes.get(holder, 0)
        self._sizes[holder] = size
        while self._total > self._max_size:
            oldest = next(iter(self._sizes))
            self.release(oldest)
            logger.warning(
                "incomplete request bodies take %d bytes: rejecting the oldest",
                self._max_size,
            )
            # Later, since the holder may be in the middle of delivering a chunk.
            self._dropped.add(oldest)
            asyncio.get_running_loop().call_soon(self._drop, oldest)

    def _drop(self, holder: BodyHolder) -> None:
        self._dropped.discard(holder)
        holder.on_over_budget()

    def release(self, holder: BodyHolder) -> None:
        """Record that `holder` has no body any more; it need not have had one."""
        self._total -= self._sizes.pop(holder, 0)


def joined(body: bytes | bytearray, chunk: bytes) -> bytes | bytearray:
    """Return `body` with `chunk` appended, in place from the third chunk on.

    A list of chunks would need 50 bytes more for each chunk, which may be one byte
    long.
    """
    if not body:
        return chunk
    if isinstance(body, bytes):
        body = bytearray(body)
    body += chunk
    return body
