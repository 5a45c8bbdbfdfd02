"""Responses, and how `connection` reads them: the status counts, even of a bad head.

httptools parses them, with those leniencies that leave no doubt where a response
ends. Of a head that it gives up, `repaired` makes one that it reads; the
connection is then not used again, since the peer, or a proxy in between, may
see the end of the response elsewhere. Where the end cannot be known, the status
counts and the body does not.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httptools

MAX_HEAD_SIZE = 64 * 1024  # bytes of a response before its body, interim ones included
MAX_KEPT_BODY = 64 * 1024  # bytes of a body that is used; the rest is dropped

# RFC 9112, section 4, in the forms that clients accept: any case, no reason.
STATUS_LINE = re.compile(rb"(?i)HTTP/\d(?:\.\d)?[ \t]+([1-9]\d\d)(?=[ \t\r\n])[^\n]*\n")
BEGINNING = b"HTTP/"
HEAD_END = re.compile(rb"\n\r*\n")
FOLD = re.compile(rb"\r?\n[ \t]+")  # RFC 9112, section 5.2
FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROLS = re.compile(rb"[\0-\x08\n-\x1f\x7f]")
LENGTH = re.compile(rb"\d{1,18}")  # less than 2**63

# They say where a response ends, and whether another one may follow.
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
CONNECTION = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"upgrade"})

SWITCHING_PROTOCOLS = 101  # final here: nobody asked for it


class MalformedResponse(Exception):
    """What was received is not a response; the message says why."""


@dataclass(slots=True)
class Response:
    """A response: its status, and its headers and body where they were asked for."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ResponseReader:
    """Reads the responses of one connection, one after the other.

    `headers` are by lower-case name, repeated ones as a list (RFC 9110, section
    5.3), without trailers. Interim responses (1xx) are skipped.
    """

    __slots__ = (
        "_body",
        "_head",
        "_kept",
        "_parser",
        "_repairing",
        "complete",
        "has_head",
        "headers",
        "keep",
        "reusable",
        "size",
        "started",
        "status",
    )

    def __init__(self) -> None:
        self._parser: Any = self._new_parser()
        self.begin(keep=False)

    def _new_parser(self) -> Any:
        parser = httptools.HttpResponseParser(self)
        parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True
        )
        return parser

    def begin(self, keep: bool) -> None:
        """Expect the next response; `keep` its body, up to `MAX_KEPT_BODY`."""
        self.keep = keep
        self.started = False  # a byte came
        self.has_head = False  # status and headers are known
        self.complete = False  # nothing more is to be read
        self.reusable = True  # no doubt where it ends: another one may follow
        self.status = 0
        self.headers: dict[str, str] = {}
        self.size = 0  # bytes read so far
        self._body: list[bytes] = []
        self._kept = 0
        self._head = b""  # what came before the head was complete
        self._repairing = False  # the parser has given up the head

    @property
    def body(self) -> bytes:
        """What was kept of it."""
        return b"".join(self._body)

    def end(self) -> None:
        """Read no more. The parser refers to this object, and would keep it."""
        self._parser = None

    def feed(self, data: bytes) -> None:
        """Read what came. Raises `MalformedResponse`."""
        self.started = True
        self.size += len(data)
        if self._repairing:
            self._repair(data)
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                if not self.has_head:
                    self._repair(data)
                else:  # the body, or what follows it: the status stands
                    self.reusable, self.complete = False, True
            else:
                if not self.has_head:
                    self._head += data
        if not self.has_head and self.size > MAX_HEAD_SIZE:
            self._head = self._head[: self._head.rfind(b"\n") + 1]
            self.complete = self.cut()
            if not self.complete:
                raise MalformedResponse("the answer's headers are too long")

    def cut(self) -> bool:
        """Nothing more comes. Whether there is a status.

        A head that lacks only its empty line has one. One that ends within a line
        was cut, and may lack what gives its status its meaning (RFC 9112, section 8).
        """
        if not self.has_head and self._head.endswith(b"\n"):
            with contextlib.suppress(MalformedResponse):
                self._repair(b"\n")
        return self.has_head

    def _repair(self, data: bytes) -> None:
        """Read a head that the parser has given up, once all of it is there."""
        self._repairing = True
        left = self._head = self._head + data
        while True:
            left = left.lstrip(b"\r\n")
            line = STATUS_LINE.match(left)
            if line is None:
                begun = left[: len(BEGINNING)].upper()
                if b"\n" in left or not BEGINNING.startswith(begun):
                    raise MalformedResponse("not an HTTP answer")
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
        try:
            self._parser.feed_data(repaired(status, head))
            if left and not self.complete:
                self._parser.feed_data(left)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.complete = True  # a body that cannot be read: the status stands
        self.reusable = False
        self.complete = self.complete or not self.keep

    # The parser's callbacks.

    def on_message_begin(self) -> None:
        if self.complete:  # at its first byte, which would spoil the next response
            raise ValueError("a second response, which nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer: nothing there is of use
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

    def on_body(self, body: bytes) -> None:
        if self.keep and self._kept < MAX_KEPT_BODY:
            self._body.append(body[: MAX_KEPT_BODY - self._kept])
            self._kept += len(body)

    def on_message_complete(self) -> None:
        self.complete = self.has_head
        # Here only: the parser forgets the framing when the message is over.
        if not self._parser.should_keep_alive():
            self.reusable = False

    def _ends_plainly(self, status: int) -> bool:
        """Whether every reader sees the end of the response in the same place."""
        if status == SWITCHING_PROTOCOLS:
            return False
        coding = self.headers.get("transfer-encoding")
        if coding is not None:  # HTTP/1.0 has none (RFC 9112, section 6.1)
            version = self._parser.get_http_version()
            return coding.lower() == "chunked" and version != "1.0"
        length = self.headers.get("content-length", "")
        return length.isdecimal() or status in (204, 304)


def is_interim(status: int) -> bool:
    """Whether the final response is still to come (RFC 9110, section 15.2)."""
    return 100 <= status < 200 and status != SWITCHING_PROTOCOLS


def repaired(status: int, head: bytes) -> bytes:
    """A head that says what can be understood of `head`, the lines after the first.

    Lines that are no fields are left out. A body whose length is invalid is to be
    discarded (RFC 9112, section 6.3): its length is 0.
    """
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
            length = b"0"
        fields.append(b"Content-Length: %b\r\n" % length)
    return b"HTTP/1.1 %d\r\n%bConnection: close\r\n\r\n" % (status, b"".join(fields))
