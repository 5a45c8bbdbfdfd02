"""permessage-deflate (RFC 7692): negotiation, compression and decompression.

Both directions are negotiated without context takeover, so that an idle connection
keeps no window of 32 KiB or more. Some clients keep their context all the same:
their messages refer back to earlier ones, and `Inflater` keeps what they need.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import ref

from handlers.websocket.negotiation import Extension

WINDOW = 2**zlib.MAX_WBITS  # bytes that a message may refer back to
MAX_CONTEXT_BYTES = 32 * 1024 * 1024  # of all clients together

# Removed from the end of each compressed message, and restored before it is
# decompressed (RFC 7692, sections 7.2.1 and 7.2.2).
DEFLATE_TAIL = b"\x00\x00\xff\xff"
# An empty last block, appended to each message. A complete stream ends with it; a
# truncated one takes it for data.
DEFLATE_END = b"\x03\x00"
# What may follow the last block: nothing, if it was DEFLATE_END; otherwise the
# client marked its own last block as the last one (RFC 7692, section 7.2.3.4).
BEHIND_LAST_BLOCK = (
    b"",
    DEFLATE_TAIL + DEFLATE_END,
    b"\x00" + DEFLATE_TAIL + DEFLATE_END,
)

_WINDOW_BITS = re.compile(r"8|9|1[0-5]")  # RFC 7692, section 7.1.2
# zlib cannot produce a raw stream with a window of 8 bits.
_SERVER_WINDOW_BITS = re.compile(r"9|1[0-5]")


class BadStream(ValueError):
    """A message is not a complete stream, or refers back to bytes that are missing."""


# Decompression.


class Inflater:
    """Decompresses one client's messages, in order.

    Keeps up to `WINDOW` bytes of the latest messages for a client that refers back
    to them. A client that has not done so within `WINDOW` bytes behind its first
    message never will, and nothing more is kept.
    """

    __slots__ = ("__weakref__", "_contexts", "_refers_back", "_seen", "context")

    def __init__(self, contexts: "Contexts") -> None:
        # None: this client does not refer back.
        self._contexts: Contexts | None = contexts
        self._refers_back = False
        self._seen: int | None = None  # bytes behind the first message
        self.context = b""

    def inflate(self, payload: bytes, max_size: int) -> bytes:
        """Decompress one message; produce at most one byte more than `max_size`.

        Raises `BadStream`.
        """
        if self._refers_back:
            message = _inflate(payload, max_size, self.context)
        else:
            try:
                message = _inflate(payload, max_size)
            except BadStream:
                if not self.context:
                    raise
                message = _inflate(payload, max_size, self.context)
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
    """Counts the contexts of all clients, and keeps at most `max_size` bytes of them.

    Above that, the contexts of the clients that have been silent longest are
    dropped, first of those that have not referred back yet. `kept` is the current
    number of bytes.
    """

    def __init__(self, max_size: int = MAX_CONTEXT_BYTES) -> None:
        self._max_size = max_size
        self.kept = 0
        # Bytes of each context, in the order of the latest messages. A context ends
        # with its client's `Inflater`.
        self._presumed: dict[ref[Inflater], int] = {}
        self._needed: dict[ref[Inflater], int] = {}

    def keep(self, inflater: Inflater, is_needed: bool) -> None:
        """Count the context that `inflater` keeps now, as the most recent one."""
        reference = ref(inflater, self._forget)
        self._forget(reference)
        size = len(inflater.context)
        (self._needed if is_needed else self._presumed)[reference] = size
        self.kept += size
        while self.kept > self._max_size:
            oldest = next(iter(self._presumed or self._needed))()
            assert oldest is not None  # `_forget` removes a reference at its end
            self.drop(oldest)

    def drop(self, inflater: Inflater) -> None:
        """Drop the context of `inflater`."""
        self._forget(ref(inflater))
        inflater.context = b""

    def _forget(self, reference: "ref[Inflater]") -> None:
        for sizes in (self._presumed, self._needed):
            self.kept -= sizes.pop(reference, 0)


def _inflate(payload: bytes, max_size: int, context: bytes = b"") -> bytes:
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=context)
    try:
        message = inflater.decompress(
            payload + DEFLATE_TAIL + DEFLATE_END, max_size + 1
        )
    except zlib.error as error:
        raise BadStream(str(error)) from None
    if len(message) <= max_size and (
        not inflater.eof or inflater.unused_data not in BEHIND_LAST_BLOCK
    ):
        raise BadStream("not a complete stream")
    return message


def deflate_bound(size: int) -> int:
    """Return the largest compressed size of `size` bytes, as zlib's deflateBound."""
    return size + (size + 7 >> 3) + (size + 63 >> 6) + 5


# Negotiation.


@dataclass(frozen=True, slots=True)
class Compression:
    """Settings of permessage-deflate, of all connections or of one.

    `level` (1 to 9) and `mem_level` (1 to 9) are zlib's. A client may request
    `window_bits`, 9 to 15 (RFC 7692, section 7.1.2.1). `contexts` is shared by all
    clients.
    """

    level: int = 6
    mem_level: int = 8
    window_bits: int = zlib.MAX_WBITS
    contexts: Contexts = field(default_factory=Contexts)

    def compress(self, message: bytes) -> bytes:
        """Compress one message on its own (RFC 7692, section 7.2.1)."""
        deflater = zlib.compressobj(
            self.level, zlib.DEFLATED, -self.window_bits, self.mem_level
        )
        data = deflater.compress(message) + deflater.flush(zlib.Z_SYNC_FLUSH)
        return data[: -len(DEFLATE_TAIL)]


class Accepted(NamedTuple):
    """An accepted offer: the answer's header, and the settings of this connection."""

    header: str
    compression: Compression


def accept_offer(
    offers: Iterable[Extension], compression: Compression
) -> Accepted | None:
    """Accept the first valid offer of permessage-deflate; None if there is none.

    An offer with an unknown, invalid or repeated parameter is declined, and the
    next one is considered (RFC 7692, section 7).
    """
    for name, listed in offers:
        parameters = dict(listed)
        if (
            name == "permessage-deflate"
            and len(parameters) == len(listed)
            and all(_is_valid(*parameter) for parameter in listed)
        ):
            header = (
                "permessage-deflate; server_no_context_takeover;"
                " client_no_context_takeover"
            )
            bits = parameters.get("server_max_window_bits")
            if bits is not None:
                header += f"; server_max_window_bits={bits}"
            window_bits = int(bits or zlib.MAX_WBITS)
            if window_bits != compression.window_bits:
                compression = replace(compression, window_bits=window_bits)
            return Accepted(header, compression)
    return None


def _is_valid(name: str, value: str | None) -> bool:
    if name in ("server_no_context_takeover", "client_no_context_takeover"):
        return value is None
    if name == "client_max_window_bits":
        return value is None or _WINDOW_BITS.fullmatch(value) is not None
    if name == "server_max_window_bits":
        return value is not None and _SERVER_WINDOW_BITS.fullmatch(value) is not None
    return False
