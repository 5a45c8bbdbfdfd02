"""What is kept of requests' bodies in the whole process, until handlers take them.

Each body is bounded where it is read (`handlers.http.body`, `handlers.http.server`),
and connections may be many. Both servers and both listeners count here.
"""

import asyncio
import logging
from typing import Protocol

logger = logging.getLogger(__name__)

MAX_KEPT_BODIES = 64 * 1024 * 1024  # bytes; more where two messages would not fit
RETRY_AFTER = 1  # seconds; whoever filled the room is being ended meanwhile


class Keeper(Protocol):
    """Who keeps a body, or as much of it as has come."""

    def refuse_to_keep(self) -> None:
        """Answer 503 instead, unless the body has been taken meanwhile."""


class KeptBodies:
    """How much all keepers keep: at most `most` bytes, and what one turn reads.

    Above that the body that has been under way longest has to go. A caller that
    sends at once is never that one; one that sends slowly, or never all of it, is.
    """

    def __init__(self, most: int = MAX_KEPT_BODIES) -> None:
        self._most = most
        self._sizes: dict[Keeper, int] = {}  # in the order of their first bytes
        self._total = 0
        self._refused: set[Keeper] = set()  # who will hear of it in the next turn

    def keep(self, keeper: Keeper, size: int) -> None:
        """`keeper` keeps so many bytes now; more than before, or the first ones."""
        if keeper in self._refused:
            return  # else what it gives up would count once more, against the others
        self._total += size - self._sizes.get(keeper, 0)
        self._sizes[keeper] = size
        while self._total > self._most:
            longest = next(iter(self._sizes))
            self.discard(longest)
            logger.warning(
                "requests' bodies that are not complete take %d bytes: the one that"
                " has been under way longest is refused",
                self._most,
            )
            # Not while somebody is in the middle of handing one over.
            self._refused.add(longest)
            asyncio.get_running_loop().call_soon(self._refuse, longest)

    def _refuse(self, keeper: Keeper) -> None:
        self._refused.discard(keeper)
        keeper.refuse_to_keep()

    def discard(self, keeper: Keeper) -> None:
        """`keeper` keeps nothing any more, if it did."""
        self._total -= self._sizes.pop(keeper, 0)


def joined(body: bytes | bytearray, chunk: bytes) -> bytes | bytearray:
    """Return `body` with `chunk` behind it, in place where it has several already.

    A list of chunks would take fifty bytes more for each, which may have one.
    """
    if not body:
        return chunk
    if isinstance(body, bytes):
        body = bytearray(body)
    body += chunk
    return body
