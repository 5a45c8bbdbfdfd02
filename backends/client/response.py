"""Reads responses for `connection`; the status counts, even with a malformed head.

httptools parses them, with those leniencies that keep the end of a response
unambiguous. If it rejects a head, `repaired` makes one that it accepts; the connection
is then not used again, since the peer, or a proxy in between, may see the end of the
response in another place. If the end cannot be determined, the status counts and the
body is dropped. A head that equals the one before, byte by byte, is not parsed again:
most servers send the same one for a second, with the same date.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import httptools

MAX_HEAD_SIZE = 64 * 1024  # bytes of a response before its body, interim ones included
MAX_KEPT_BODY = 64 * 1024  # bytes of a decision's body; the rest is dropped
MAX_DROPPED_BODY = 1024 * 1024  # bytes; with a larger body the connection is closed

MAX_KNOWN_HEAD = 1024  # bytes of a head that is remembered

# RFC 9112, section 4, in the forms that clients accept: any case, no reason.
STATUS_LINE = re.compile(rb"(?i)HTTP/\d(?:\.\d)?[ \t]+([1-9]\d\d)(?=[ \t\r\n])[^\n]*\n")
BEGINNING = b"HTTP/"
HEAD_END = re.compile(rb"\n\r*\n")
FOLD = re.compile(rb"\r?\n[ \t]+")  # RFC 9112, section 5.2
FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROLS = re.compile(rb"[\0-\x08\n-\x1f\x7f]")
LENGTH = re.compile(rb"\d{1,18}")  # less than 2**63

# These headers determine where a response ends.
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
FRAMING_NAMES = frozenset(map(bytes.decode, FRAMING))
CONNECTION = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"upgrade"})

WITHOUT_BODY = (204, 304)  # RFC 9110, section 6.4.1
SWITCHING_PROTOCOLS = 101  # final here: it was not requested


class MalformedResponse(Exception):
    """What was received is not a response; the message is the reason."""


# From status and headers, the number of bytes to keep of the body; 0: drop it.
Keep = Callable[[int, Mapping[str, str]], int]


class Response:
    """A response: its status, its headers, and its body if that was kept.

    `body` is None if it was dropped. `complete` is False if the body was cut off, late
    or larger than what was to be kept.
    """

    __slots__ = ("body", "complete", "headers", "status")

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes | None,
        complete: bool = True,
    ) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.complete = complete


class KnownHead:
    """A head that was parsed, of a response whose length it gives.

    `size` is that of the whole response, in bytes.
    """

    __slots__ = ("data", "headers", "size", "status")

    def __init__(
        self, data: bytes, status: int, headers: dict[str, str], size: int
    ) -> None:
        self.data = data
        self.status = status
        self.headers = headers
        self.size = size


class KnownHeads:
    """The head that the servers of one origin sent last."""

    __slots__ = ("latest",)

    def __init__(self) -> None:
        self.latest: KnownHead | None = None


class ResponseReader:
    """Reads the responses of one connection, one after the other.

    `headers` are by lower-case name, repeated ones as a list (RFC 9110, section
    5.3), without trailers. Interim responses (1xx) are skipped.
    """

    __slots__ = (
        "_body",
        "_head",
        "_heads",
        "_keep",
        "_kept",
        "_parser",
        "_repairing",
        "complete",
        "has_head",
        "headers",
        "limit",
        "reusable",
        "size",
        "started",
        "status",
        "whole",
    )

    def __init__(self, heads: KnownHeads) -> None:
        self._heads = heads
        self._parser: Any = self._new_parser()
        self._forget()
        self.begin(None)

    def _new_parser(self) -> Any:
        parser = httptools.HttpResponseParser(self)
        parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True
        )
        return parser

    def begin(self, keep: Keep | None) -> None:
        """Expect the next response; `keep` decides about its body. None: dropped."""
        self._keep = keep
        self.started = False  # a byte was received
        self.has_head = False  # status and headers are known
        self.complete = False  # nothing more is read

    def _forget(self) -> None:
        """Forget the response before."""
        self.whole = False  # complete, and the body is not cut off
        self.reusable = True  # its end is unambiguous: another one may follow
        self.status = 0
        self.headers: dict[str, str] = {}
        self.size = 0  # bytes read so far
        self.limit = 0  # bytes of the body that are kept
        self._body: bytes | bytearray = b""
        self._kept = 0  # bytes of a body to keep that have arrived
        self._head = b""  # bytes received before the head was complete
        self._repairing = False  # whether the parser has rejected the head

    @property
    def excessive(self) -> bool:
        """Whether more has arrived than is worth reading."""
        return self.size > MAX_DROPPED_BODY + MAX_HEAD_SIZE and (
            not self.limit or self._kept > self.limit
        )

    def response(self) -> Response:
        """Return what has been read."""
        if not self.limit:
            return Response(self.status, self.headers, None)
        # Not kept here: the connection may be idle for long.
        body, self._body = bytes(self._body), b""
        complete = self.whole and self._kept <= self.limit
        return Response(self.status, self.headers, body, complete)

    def end(self) -> None:
        """Drop the parser, which refers to this object and forms a cycle with it."""
        self._parser = None

    def feed(self, data: bytes) -> None:
        """Read the next bytes. Raises `MalformedResponse`."""
        if not self.started:
            self.started = True
            self._forget()
            known = self._heads.latest
            if (
                known is not None
                and known.size == len(data)
                and data.startswith(known.data)
            ):
                self._recognize(known, data)
                return
            self._parse(data)
            if self.complete and self.reusable:
                self._remember(data)
        else:
            self._parse(data)

    def _recognize(self, known: KnownHead, data: bytes) -> None:
        """Read a whole response, whose head was parsed before."""
        self.size = known.size
        self.status, self.headers = known.status, known.headers
        self.has_head = self.complete = self.whole = True
        if self._keep is not None:
            self.limit = self._keep(known.status, known.headers)
            if self.limit:
                self.on_body(data[len(known.data) :])

    def _remember(self, data: bytes) -> None:
        """Remember the head of a response that has arrived in one piece.

        Behind an interim response, the final one is longer than its own length.
        """
        end = data.find(b"\r\n\r\n", 0, MAX_KNOWN_HEAD) + 4
        size = len(data) - end
        length = self.headers.get("content-length")
        if self.status in WITHOUT_BODY:
            length = "0"
        if end >= 4 and length == str(size):
            head = KnownHead(data[:end], self.status, self.headers, len(data))
            self._heads.latest = head

    def _parse(self, data: bytes) -> None:
        self.size += len(data)
        if self._repairing:
            self._repair(data)
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                if not self.has_head:
                    self._repair(data)
                else:  # a bad body, or bytes behind it: the status counts
                    self.reusable, self.complete = False, True
            else:
                if not self.has_head:
                    self._head += data
        if not self.has_head and self.size > MAX_HEAD_SIZE:
            self._head = self._head[: self._head.rfind(b"\n") + 1]
            self.complete, self.whole = self.cut(), False  # the body is not reached
            if not self.complete:
                raise MalformedResponse("the response headers are too long")

    def cut(self) -> bool:
        """Handle the end of the connection; return whether there is a status.

        A head that lacks only its empty line has one. A head that ends within a line is
        incomplete: the lost headers may change the meaning of its status (RFC 9112,
        section 8).
        """
        if not self.has_head and self._head.endswith(b"\n"):
            with contextlib.suppress(MalformedResponse):
                self._repair(b"\n")
        if self.has_head and not FRAMING_NAMES.intersection(self.headers):
            self.whole = True  # only the end of the connection shows that of the body
        return self.has_head

    def _repair(self, data: bytes) -> None:
        """Read a head that the parser has rejected, once it is complete."""
        self._repairing = True
        left = self._head = self._head + data
        while True:
            left = left.lstrip(b"\r\n")
            line = STATUS_LINE.match(left)
            if line is None:
                begun = left[: len(BEGINNING)].upper()
                if b"\n" in left or not BEGINNING.startswith(begun):
                    raise MalformedResponse("not an HTTP response")
                return
            end = HEAD_END.search(left)
            if end is None:
                return
            status = int(line[1])
            head, left = left[line.end() : end.end()], left[end.end() :]
            if not is_interim(status):
                break
        self._repairing, self._head = False, b""
        self.headers = {}
        self._parser = self._new_parser()
        head, has_length = repaired(status, head)
        try:
            self._parser.feed_data(head)
            if left and not self.complete:
                self._parser.feed_data(left)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.complete = True  # a body that cannot be read: the status counts
        self.reusable = False
        self.whole = self.whole and has_length
        self.complete = self.complete or not self.limit

    # The parser's callbacks.

    def on_message_begin(self) -> None:
        if self.complete:  # bytes behind the response, which nobody requested
            raise ValueError("a second response, which was not requested")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer, which is not used
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1").strip(" \t")
        if key in self.headers:
            text = f"{self.headers[key]}, {text}"
        self.headers[key] = text

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 100:
            raise ValueError("no status (RFC 9110, section 15)")
        if is_interim(status):
            self.headers = {}
        else:
            self.status = status
            self.has_head = True
            self._head = b""
            self.reusable = self._ends_plainly(status)
            if self._keep is not None:
                self.limit = self._keep(status, self.headers)

    def on_body(self, body: bytes) -> None:
        if not self.limit:
            return
        if self._kept < self.limit:
            part = body[: self.limit - self._kept]
            if not self._body:
                self._body = part
            else:
                if isinstance(self._body, bytes):
                    self._body = bytearray(self._body)
                self._body += part
        self._kept += len(body)

    def on_message_complete(self) -> None:
        self.complete = self.whole = self.has_head
        # Only here: afterwards the parser has reset its state.
        if not self._parser.should_keep_alive():
            self.reusable = False

    def _ends_plainly(self, status: int) -> bool:
        """Whether every reader sees the end of the response in the same place."""
        if status == SWITCHING_PROTOCOLS:
            return False
        coding = self.headers.get("transfer-encoding")
        if coding is not None:  # not defined for HTTP/1.0 (RFC 9112, section 6.1)
            version = self._parser.get_http_version()
            return coding.lower() == "chunked" and version != "1.0"
        length = self.headers.get("content-length", "")
        return length.isdecimal() or status in WITHOUT_BODY


def is_interim(status: int) -> bool:
    """Whether another response follows, the final one (RFC 9110, section 15.2)."""
    return 100 <= status < 200 and status != SWITCHING_PROTOCOLS


def repaired(status: int, head: bytes) -> tuple[bytes, bool]:
    """Return a well-formed head with `status` and the valid lines of `head`.

    `head` is without the status line. Lines that are not fields are removed. A body
    with an invalid length must be discarded (RFC 9112, section 6.3): its length is 0,
    and the second value is False.
    """
    has_length = True
    fields: list[bytes] = []
    framing: dict[bytes, list[bytes]] = {name: [] for name in FRAMING}
    for line in FOLD.sub(b" ", head).split(b"\n"):
        name, colon, value = line.partition(b":")
        name = name.strip()
        if not colon or FIELD_NAME.fullmatch(name) is None:
            continue
        value = CONTROLS.sub(b" ", value).strip()
        if name.lower() in framing:
            framing[name.lower()] += map(bytes.strip, value.lower().split(b","))
        elif name.lower() not in CONNECTION:
            fields.append(b"%b: %b\r\n" % (name, value))
    codings = [
        each
        for each in framing[b"transfer-encoding"]
        if each not in (b"", b"identity")
    ]
    lengths = set(framing[b"content-length"])
    if codings:  # they override a length (RFC 9112, section 6.3)
        fields.append(b"Transfer-Encoding: %b\r\n" % b", ".join(codings))
    elif lengths:
        length, *others = lengths
        if others or LENGTH.fullmatch(length) is None:
            length, has_length = b"0", False
        fields.append(b"Content-Length: %b\r\n" % length)
    head = b"HTTP/1.1 %d\r\n%bConnection: close\r\n\r\n" % (status, b"".join(fields))
    return head, has_length
