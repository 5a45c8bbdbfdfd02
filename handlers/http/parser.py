"""Parses the requests of one connection, by httptools (llhttp).

`handlers.http.server` feeds it pieces of which each ends one request at most, so
that the next request is not parsed before this one is answered.
"""

from typing import Any, Protocol

import httptools

from handlers.http.body_budget import joined
from handlers.http.bounds import LINES_PER_PIECE, MAX_HEADERS
from handlers.http.request import NamedRequest, Request

# Length in bytes from which a piece is searched for many short lines.
LONG_PIECE = 4096

NEW_LINE = b"\r\n"
EMPTY_LINE = NEW_LINE * 2
EMPTY_LINE_SIZE = len(EMPTY_LINE)
# Headers that say where a request ends, or that it asks for another protocol.
FRAMING_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"upgrade"})

BAD_REQUEST = b"400 Bad Request"
HEADERS_TOO_LARGE = b"431 Request Header Fields Too Large"


class MalformedRequest(Exception):
    """The request cannot be parsed; `status` is the status line's code and phrase."""

    def __init__(self, status: bytes) -> None:
        super().__init__(status)
        self.status = status


class HeadListener(Protocol):
    """What the parser calls: a connection."""

    def on_head(self, request: Request) -> None:
        """The head of `request` is complete."""


class RequestParser:
    """Turns bytes into `Request`s; calls its listener when a head is complete.

    `partial` is the request of which a part has been parsed, None between two.
    """

    __slots__ = ("_listener", "_max_header_size", "_may_exceed", "_parser",
                 "_resuming", "_status", "partial")

    def __init__(self, listener: HeadListener, max_header_size: int) -> None:
        self.partial: Request | None = None
        self._listener: HeadListener | None = listener
        self._max_header_size = max_header_size  # bytes
        self._parser: Any = httptools.HttpRequestParser(self)
        self._may_exceed = False  # whether the head may be larger than that
        self._resuming = False  # the parser reads a substitute for the head
        self._status = BAD_REQUEST  # why the parser stops, if it does

    def close(self) -> None:
        """Drop the references in both directions, so that no cycle is left."""
        self._parser = self._listener = self.partial = None

    def end_of_piece(self, data: bytes | bytearray) -> int:
        """Return how many bytes to feed, so that one request at most ends there.

        A head and the chunks end with an empty line, a body of a declared length
        where that says. An incomplete empty line at the end is left out.
        """
        partial = self.partial
        if partial is not None and partial.length < partial.declared:
            return min(len(data), partial.declared - partial.length)
        if partial is not None and partial.chunked:
            end = _end_of_lines(data, LINES_PER_PIECE)
            if end > 0 and data.find(EMPTY_LINE, 0, end + len(NEW_LINE)) < 0:
                return end
        end = data.find(EMPTY_LINE) + EMPTY_LINE_SIZE
        if end < EMPTY_LINE_SIZE:
            return len(data) - _incomplete_empty_line(data)
        if (
            end < len(data)
            and data[-1] not in b"\r\n"
            and (
                data.find(b"\n", end) < 0  # usually: a search for more takes longer
                or (
                    data.find(EMPTY_LINE, end) < 0
                    and (len(data) < LONG_PIECE or _end_of_lines(data, MAX_HEADERS) < 0)
                )
            )
        ):
            return len(data)  # only its body follows, or the beginning of a head
        return end

    def feed(self, piece: bytes) -> bytes:
        """Parse a piece; returns what follows a request for another protocol.

        Raises `MalformedRequest`; feed nothing more after that.
        """
        before, limit = self.partial, self._max_header_size
        length, size = (0, 0) if before is None else (before.length, before.size)
        self._may_exceed = size + len(piece) > limit
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._resume()
            return piece[upgrade.args[0] :]
        except httptools.HttpParserError:
            raise MalformedRequest(self._status) from None
        partial = self.partial
        if partial is None:
            return b""
        if partial.version and (partial is not before or partial.length != length):
            partial.size = 0
        else:
            # The piece belongs to an incomplete head, or to one line behind it: a
            # chunk extension or a trailer.
            partial.size += len(piece)
        if partial.size > limit:
            raise MalformedRequest(HEADERS_TOO_LARGE)
        return b""

    def _resume(self) -> None:
        """Continue with the body of a request for another protocol.

        The parser stops behind its head. A body is for no protocol of this server:
        "A server MAY ignore a received Upgrade header field" (RFC 9110, 7.8).
        """
        request = self.partial
        if request is None:
            return
        request.upgrade = request.method == "GET"
        if request.method != "POST":
            raise MalformedRequest(BAD_REQUEST)
        framing = b"".join(b"%b: %b\r\n" % header for header in request.framing())
        self._parser = httptools.HttpRequestParser(self)
        self._resuming = True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        except httptools.HttpParserError:
            raise MalformedRequest(BAD_REQUEST) from None
        finally:
            self._resuming = False

    # Callbacks of httptools; an exception stops the parser.

    def on_message_begin(self) -> None:
        if not self._resuming:
            self.partial = Request()

    def on_url(self, target: bytes) -> None:
        if not self._resuming and self.partial is not None:
            self.partial.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self.partial
        if self._resuming or request is None:
            return
        if request.version:
            request.trailers += 1  # which nothing uses
        else:
            name, value = name.lower(), value.strip(b" \t")
            request.headers.append((name, value))
            if name == b"content-length":
                request.declared = int(value)
            elif name in FRAMING_HEADERS:
                _note_framing(request, name, value)
        if len(request.headers) + request.trailers > MAX_HEADERS:
            self._status = HEADERS_TOO_LARGE
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        request, listener = self.partial, self._listener
        if self._resuming or request is None or listener is None:
            return
        parser = self._parser
        request.method = parser.get_method().decode("latin-1")
        request.version = parser.get_http_version()
        if request.version not in ("1.0", "1.1"):
            raise ValueError("not HTTP/1.0 or 1.1")
        if self._may_exceed and request.head_size() > self._max_header_size:
            self._status = HEADERS_TOO_LARGE
            raise ValueError("head too large")
        # A proxy that tunnels upgrades goes by the request: after any response but
        # 101, what follows comes from a client that the proxy no longer controls.
        asks = request.upgrade or request.method == "CONNECT"
        request.keep_alive = parser.should_keep_alive() and not asks
        request.upgrade = parser.should_upgrade()
        listener.on_head(request)

    def on_body(self, body: bytes) -> None:
        request = self.partial
        if request is not None:
            request.length += len(body)
            if not request.body:
                request.body = body
            elif request.length == request.declared:
                request.body = b"".join((request.body, body))  # the only copy
            else:
                request.body = joined(request.body, body)

    def on_message_complete(self) -> None:
        request = self.partial
        if self._resuming or request is None:
            return
        if request.upgrade:
            if request.framing():
                return  # its body follows, though the parser stops here
            request.upgrade = request.method == "GET"
        request.complete = True
        self.partial = None


class NamingParser(RequestParser):
    """A parser whose requests keep the names of headers as they were written."""

    __slots__ = ()

    def on_message_begin(self) -> None:
        if not self._resuming:
            self.partial = NamedRequest()

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self.partial
        is_in_head = not (self._resuming or request is None or request.version)
        if is_in_head and isinstance(request, NamedRequest):
            request.names.append(name)
        super().on_header(name, value)


def _note_framing(request: Request, name: bytes, value: bytes) -> None:
    """Record a header that says that chunks follow, or asks for a protocol."""
    if name == b"upgrade":
        request.upgrade = True
    elif request.chunked or value.lower() != b"chunked":
        raise ValueError("a transfer coding that is not supported")
    else:
        request.chunked = True


def _end_of_lines(data: bytes | bytearray, count: int) -> int:
    """Return where the line end of line number `count` is; -1 if there are fewer."""
    end = -1
    for _ in range(count):
        end = data.find(NEW_LINE, end + 1)
        if end < 0:
            break
    return end


def _incomplete_empty_line(data: bytes | bytearray) -> int:
    """Return how many bytes at the end of `data` may begin an empty line."""
    for size in range(len(EMPTY_LINE) - 1, 0, -1):
        if data.endswith(EMPTY_LINE[:size]):
            return size
    return 0
