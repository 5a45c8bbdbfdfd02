"""One HTTP request, as `handlers.http.parser` or `handlers.http.plain` reads it."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from handlers.http.fast import FastResponse

Fields = list[tuple[bytes, bytes]]  # names in lower case, and values
# Content-Type, and all Authorization headers; see `handlers.http.plain`.
PlainHeaders = tuple[str, Sequence[str]]
# Answers a complete body; None leaves the request to its handler after all.
FastHandler = Callable[[bytes], FastResponse | Awaitable[FastResponse] | None]


class Response(Protocol):
    """How one request is answered, while that takes more than one step."""

    @property
    def prepared(self) -> bool:
        """Whether more of the body may be parsed."""

    @property
    def answered(self) -> bool:
        """Whether the beginning of the response was written."""

    def on_body(self) -> None:
        """More of the body has been parsed."""

    def on_close(self) -> None:
        """The peer has disconnected, or the request cannot be completed."""


class Request:
    """One request, from the first byte of its head until it is answered.

    Names in `headers` are in lower case. `upgrade` says that it asks for another
    protocol, by its headers or by CONNECT. `plain` is set by `handlers.http.plain`.
    """

    __slots__ = (
        "body",
        "chunked",
        "complete",
        "declared",
        "fast",
        "headers",
        "in_budget",
        "keep_alive",
        "length",
        "method",
        "plain",
        "response",
        "size",
        "target",
        "trailers",
        "upgrade",
        "version",
    )

    def __init__(self) -> None:
        self.method = self.version = ""
        self.target = b""
        self.headers: Fields = []
        self.plain: PlainHeaders | None = None
        self.trailers = 0
        # Bytes of an incomplete head; then bytes since the body last grew.
        self.size = 0
        self.body: bytes | bytearray = b""  # what no handler has taken yet
        self.in_budget = False  # whether the `BodyBudget` counts the body
        self.declared = 0  # bytes of the body, by Content-Length
        self.length = 0  # bytes of the body so far
        self.chunked = self.complete = self.keep_alive = self.upgrade = False
        self.fast: FastHandler | None = None  # answers it without a handler
        self.response: Response | None = None  # None: not begun, or needs none

    def fields(self) -> list[tuple[str, str]]:
        """Return names and values of the headers, as text."""
        return [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.headers
        ]

    def take_body(self) -> bytes:
        """Return the received part of the body, and keep nothing of it."""
        body, self.body = self.body, b""
        return bytes(body)  # no copy if it came in one piece

    def head_size(self) -> int:
        """Bytes of the target and the headers, colons and line ends included."""
        return len(self.target) + sum(
            len(name) + len(value) + 4 for name, value in self.headers
        )

    def framing(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that say where the body ends; empty: no body."""
        return [
            (name, value)
            for name, value in self.headers
            if name == b"transfer-encoding"
            or (name == b"content-length" and value.strip(b"0"))
        ]

    def expects_continue(self) -> bool:
        """Whether the peer waits for 100 before the body (RFC 9110, 10.1.1)."""
        return any(
            name == b"expect" and value.lower() == b"100-continue"
            for name, value in self.headers
        )


class NamedRequest(Request):
    """A request that also keeps the names of its headers as they were written."""

    __slots__ = ("names",)

    def __init__(self) -> None:
        super().__init__()
        self.names: list[bytes] = []

    def fields(self) -> list[tuple[str, str]]:
        """Return names, as they were written, and values of the headers."""
        values = (value for _, value in self.headers)
        return [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in zip(self.names, values, strict=True)
        ]
