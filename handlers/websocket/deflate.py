"""Decompressing what clients send (RFC 7692, section 7.2.2), one client at a time.

Clients are told to compress each message on its own, so that nothing need be kept
between messages. Some do not obey: their messages refer back to those before.
"""

import zlib
from weakref import ref

WINDOW = 2**zlib.MAX_WBITS  # bytes that a message may refer back to
MAX_CONTEXT_BYTES = 32 * 1024 * 1024  # of all clients together

# Stripped from, and restored to, each compressed message (RFC 7692, 7.2.1).
DEFLATE_TAIL = b"\x00\x00\xff\xff"
# An empty last block: a stream that was whole ends with it, one that was cut short
# takes it for data.
DEFLATE_END = b"\x03\x00"
# What may stand behind the last block: nothing, since it was DEFLATE_END; or that,
# where the message's own last block was its last one (RFC 7692, section 7.2.3.4).
BEHIND_LAST_BLOCK = (
    b"",
    DEFLATE_TAIL + DEFLATE_END,
    b"\x00" + DEFLATE_TAIL + DEFLATE_END,
)


class BadStream(ValueError):
    """A message is no whole compressed stream, or refers back to what isn't there."""


class Inflater:
    """Decompresses one client's messages, in their order.

    Keeps the end of what it made of them, for a client that shows that it refers
    back to it, or may yet show it: until it has sent as much as one could refer to,
    behind its first message, and did not.
    """

    __slots__ = ("__weakref__", "_contexts", "_refers_back", "_seen", "context")

    def __init__(self, contexts: "Contexts") -> None:
        self._contexts: Contexts | None = contexts  # None: it does not refer back
        self._refers_back = False
        self._seen: int | None = None  # bytes behind the first message
        self.context = b""

    def inflate(self, payload: bytes, most: int) -> bytes:
        """Decompress one message, never making more than one byte above `most`.

        Raises `BadStream`.
        """
        if self._refers_back:
            message = _inflated(payload, most, self.context)
        else:
            try:
                message = _inflated(payload, most)
            except BadStream:
                if not self.context:
                    raise
                message = _inflated(payload, most, self.context)
                self._refers_back = True
        if self._contexts is not None:
            self._keep(message, self._contexts)
        return message

    def _keep(self, message: bytes, contexts: "Contexts") -> None:
        if not self._refers_back:
            self._seen = 0 if self._seen is None else self._seen + len(message)
            if self._seen >= WINDOW:
                contexts.drop(self)
                self._contexts = None
                return
        if len(message) < WINDOW:
            message = self.context + message
        self.context = message[-WINDOW:]
        contexts.keep(self, self._refers_back)


class Contexts:
    """What is kept for all clients, of at most `most` bytes.

    Beyond, those lose theirs that sent nothing for the longest; those first that
    have not shown that they need it. `kept` is how much it is.
    """

    def __init__(self, most: int = MAX_CONTEXT_BYTES) -> None:
        self._most = most
        self.kept = 0
        # Bytes of each, in the order of their last messages. A client that goes
        # takes its own away with it.
        self._presumed: dict[ref[Inflater], int] = {}
        self._needed: dict[ref[Inflater], int] = {}

    def keep(self, inflater: Inflater, is_needed: bool) -> None:
        """Count what `inflater` keeps now, as the last one that is dropped."""
        reference = ref(inflater, self._forget)
        self._forget(reference)
        size = len(inflater.context)
        (self._needed if is_needed else self._presumed)[reference] = size
        self.kept += size
        while self.kept > self._most:
            oldest = next(iter(self._presumed or self._needed))()
            assert oldest is not None  # its end would have been heard of
            self.drop(oldest)

    def drop(self, inflater: Inflater) -> None:
        """Keep nothing of it."""
        self._forget(ref(inflater))
        inflater.context = b""

    def _forget(self, reference: "ref[Inflater]") -> None:
        for sizes in (self._presumed, self._needed):
            self.kept -= sizes.pop(reference, 0)


def _inflated(payload: bytes, most: int, context: bytes = b"") -> bytes:
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=context)
    try:
        message = inflater.decompress(payload + DEFLATE_TAIL + DEFLATE_END, most + 1)
    except zlib.error as error:
        raise BadStream(str(error)) from None
    if len(message) <= most and (
        not inflater.eof or inflater.unused_data not in BEHIND_LAST_BLOCK
    ):
        raise BadStream("not a whole stream")
    return message
