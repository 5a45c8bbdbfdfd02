"""An event that a worker has read from a stream."""

import re
from collections.abc import Sequence
from typing import Any

import orjson

from backends import TraceContext
from backends.events import Event

# The field of an entry that was dead, and is read again.
REPLAYED = b"replayed"
# What may be in a header of a request: anyone who may write to Redis can add an entry.
ID = re.compile("[!-~]{1,300}")
TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})")
MAX_DIGITS = 18  # of the number of a message


class StoredEvent:
    """An event of a stream, until it is acknowledged.

    `ids` are those of its entries: the relay may have added it more than once. One
    without an id that fits into a header is known by that of its entry.
    """

    __slots__ = (
        "alone_since",
        "connection_id",
        "event",
        "failed",
        "failed_at",
        "ids",
        "name",
        "replayed",
    )

    def __init__(self, entry_id: str, fields: Sequence[bytes]) -> None:
        pairs = dict(zip(fields[::2], fields[1::2], strict=True))
        self.ids = [entry_id]
        self.name = pairs.get(b"event", b"").decode(errors="replace")
        self.connection_id = pairs.get(b"connection_id", b"").decode(errors="replace")
        self.replayed = REPLAYED in pairs
        event_id = pairs.get(b"id", b"").decode(errors="replace")
        traceparent = pairs.get(b"traceparent", b"").decode(errors="replace")
        trace = trace_of(traceparent)
        self.event = Event(
            event_id if ID.fullmatch(event_id) else f"{entry_id}-entry",
            pairs.get(b"payload", b""),
            traceparent if trace is not None else "",
            trace,
        )
        self.failed = False  # an attempt has failed, or it was given up
        # On the loop's clock: its first failure, and its first failure while others
        # were accepted and the backend could be reached.
        self.failed_at = self.alone_since = float("inf")

    @property
    def number(self) -> int:
        """The number of a message within its connection; 0 for other events."""
        last = self.event.id.rpartition("-")[2]
        is_number = last.isascii() and last.isdecimal() and len(last) <= MAX_DIGITS
        return int(last) if is_number else 0

    def meta(self) -> dict[str, Any]:
        """Return `meta` of the payload, or nothing."""
        try:
            found = orjson.loads(memoryview(self.event.body))["meta"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}


def trace_of(traceparent: str) -> TraceContext | None:
    """Return the trace that an event belongs to, if its field is well-formed."""
    found = TRACEPARENT.fullmatch(traceparent)
    return TraceContext(found[1], found[2]) if found else None
