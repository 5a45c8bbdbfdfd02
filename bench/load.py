"""Clients and backend of the benchmark, in one process: protocols with minimal work.

`bench.wire` makes the bytes that they send before the measurement. `bench.modes`
decides what is sent when, and gets each event by the callbacks passed here.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import cast

from bench import wire

SEND_URL = re.compile(rb'"send": ?"http://([^/"]+)(/[^"]+)"')
META_SIZE = 1500  # bytes; the beginning of an event with its head and `meta.send`
MAX_CALLBACKS = 64  # keep-alive connections to one callback listener

Callback = tuple[bytes, bytes]  # a request's head and body


class BenchError(Exception):
    """The measurement failed: there are no figures."""


class Peer(asyncio.Protocol):
    """The benchmark's end of a TCP connection."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)


class Client(Peer):
    """A WebSocket client; calls `on_message` for each message that it receives."""

    on_message: Callable[["Client"], None]

    def __init__(self, number: int, path: str, on_broken: Callable[[str], None]):
        self.number = number
        self.opened = False
        self.frame = b""  # the message that it sends
        self.callback: Callback = b"", b""  # the request that sends it a message
        self.callbacks: Callbacks
        self.reply = b""  # the response to an event that sends it a message
        self.command = b""  # the command of a bulk callback that sends it a message
        self._path = path
        self._on_broken = on_broken
        self._cut = b""  # an incomplete head
        self._left = 0  # bytes of the current message that have not arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(wire.handshake(self._path))

    def send(self) -> None:
        """Send its message."""
        self.transport.write(self.frame)

    def data_received(self, data: bytes) -> None:
        if self._cut:
            data, self._cut = self._cut + data, b""
        if not self.opened:
            data = self._read_answer(data)
        if self._left > len(data):
            self._left -= len(data)
            return
        at = self._left
        if at:
            self._left = 0
            self.on_message(self)
        while at < len(data):
            first = data[at]
            end = wire.frame_end(data, at)
            if end is None or (first != wire.TEXT and end > len(data)):
                self._cut = data[at:]
                return
            if first == wire.TEXT:
                if end > len(data):
                    self._left = end - len(data)
                    return
                self.on_message(self)
            elif first == wire.PING:
                self.transport.write(wire.EMPTY_PONG)
            at = end

    def _read_answer(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._cut = data
            return b""
        self.opened = data[9:12] == b"101"
        if not self.opened:
            self._on_broken(f"a handshake got {data[:80]!r}")
        return data[end + 4 :]

    def connection_lost(self, error: Exception | None) -> None:
        self._on_broken("a client's connection was lost")


class Visitor(Peer):
    """A client that sends `words` after the handshake; calls `on_gone` at the end.

    `words` end with a close frame.
    """

    def __init__(
        self,
        handshake: bytes,
        words: bytes,
        on_gone: Callable[[], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._handshake = handshake
        self._words = words
        self._on_gone = on_gone
        self._on_broken = on_broken
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(self._handshake)

    def data_received(self, data: bytes) -> None:
        if self._words:
            self._answer += data
            if b"\r\n\r\n" not in self._answer:
                return
            self.transport.write(self._words)
            self._words = b""

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answer.startswith(b"HTTP/1.1 101"):
            self._on_broken(f"a handshake got {self._answer[:80]!r}")
        self._on_gone()


class Events(Peer):
    """The backend: answers each request, then calls `on_event`.

    Passes the beginning of the request, with path and `meta`, and the last bytes.
    `answer` returns the response and gets the last bytes.
    """

    def __init__(
        self,
        answer: Callable[[bytes], bytes],
        on_event: Callable[[bytes, bytes], None],
    ) -> None:
        self._answer = answer
        self._on_event = on_event
        self._start = b""
        self._tail = b""
        self._left = 0  # bytes of the current request that have not arrived

    def data_received(self, data: bytes) -> None:
        if not self._left:
            data = self._start + data
            sizes = wire.http_size(data)
            if sizes is None or len(data) < min(sum(sizes), META_SIZE):
                self._start = data
                return
            self._left = sum(sizes)
            self._start = data
        self._left -= len(data)
        self._tail = data[-16:] if len(data) >= 16 else (self._tail + data)[-16:]
        if not self._left:
            start, self._start = self._start, b""
            self.transport.write(self._answer(self._tail))
            self._on_event(start, self._tail)


class Batches(Peer):
    """The backend of batches: calls `answer` with each body, and sends the result."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self._request = bytearray()

    def data_received(self, data: bytes) -> None:
        self._request += data
        sizes = wire.http_size(self._request)
        if sizes is not None and len(self._request) >= sum(sizes):
            body = bytes(self._request[sizes[0] :])
            self._request.clear()
            self.transport.write(self._answer(body))


class Callbacks:
    """Keep-alive connections to one callback listener, made when needed."""

    def __init__(self, host: bytes, on_broken: Callable[[str], None]) -> None:
        self.host = host
        self.on_broken = on_broken
        # The one that waits longest is next: a relay closes those that are not used.
        self.idle: deque[CallbackConnection] = deque()
        self.waiting: deque[Callback] = deque()
        self._made: list[asyncio.Task[object]] = []

    def post(self, callback: Callback) -> None:
        """Send a request, at once if a connection is free."""
        if self.idle:
            self.idle.popleft().send(callback)
            return
        self.waiting.append(callback)
        if len(self._made) < MAX_CALLBACKS:
            address, _, port = self.host.decode().partition(":")
            connecting = asyncio.get_running_loop().create_connection(
                lambda: CallbackConnection(self), address, int(port)
            )
            self._made.append(asyncio.create_task(connecting))


class CallbackConnection(Peer):
    """One of these connections: sends a request, and is free after the response."""

    def __init__(self, pool: Callbacks) -> None:
        self._pool = pool
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._next()

    def send(self, callback: Callback) -> None:
        """Send one request."""
        self.transport.writelines(callback)

    def data_received(self, data: bytes) -> None:
        answer = self._answer + data
        sizes = wire.http_size(answer)
        if sizes is None or len(answer) < sum(sizes):
            self._answer = answer
            return
        self._answer = b""
        if answer[9:10] != b"2":
            self._pool.on_broken(f"a callback got {answer[:80]!r}")
        self._next()

    def _next(self) -> None:
        if self._pool.waiting:
            self.send(self._pool.waiting.popleft())
        else:
            self._pool.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.on_broken("a callback connection was lost")
