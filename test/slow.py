"""Clients that read at a given rate, plain and over TLS.

Each is a blocking socket in a thread, so that no library changes rate and buffers.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar
from urllib.parse import urlsplit

from service import DEADLINE
from wire import handshake

T = TypeVar("T")

STEP = 0.05  # seconds between two reads
# Separate from asyncio's few threads, which look up names.
THREADS = ThreadPoolExecutor(64)


async def in_thread(act: Callable[..., T], *arguments: object) -> T:
    """Call `act`, which may block, in a thread, and return its result."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(THREADS, act, *arguments)


class SlowClient:
    """A WebSocket client whose bytes the test makes.

    Its kernel accepts about `receive_buffer` bytes that are not read; 0: its default.
    `data` is what was read after the handshake; `end` is how the connection ended, or
    None.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = bytearray()
        self.end: str | None = None
        self._enough = threading.Event()

    @classmethod
    async def connect(
        cls,
        url: str,
        receive_buffer: int = 64 * 1024,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        return await in_thread(cls._connect, url, receive_buffer, tls)

    @classmethod
    def _connect(
        cls, url: str, receive_buffer: int, tls: ssl.SSLContext | None
    ) -> Self:
        parts = urlsplit(url)
        sock = socket.socket()
        sock.settimeout(DEADLINE)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((parts.hostname, parts.port))
        if tls is not None:
            # An end without close_notify raises an error instead of an empty read.
            sock = tls.wrap_socket(
                sock, server_hostname=parts.hostname, suppress_ragged_eofs=False
            )
        client = cls(sock)
        client.sock.sendall(handshake())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += (byte := sock.recv(1))
            assert byte, head
        assert head.startswith(b"HTTP/1.1 101 "), head
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self.sock.close()

    async def send(self, data: bytes) -> None:
        """Send bytes unchanged."""
        await in_thread(self.sock.sendall, data)

    async def read(
        self,
        until: Callable[[bytearray], bool] = lambda data: False,
        rate: float = float("inf"),
        seconds: float = 60.0,
    ) -> None:
        """Read `rate` bytes per second until the end, `until(data)` or `stop`."""
        await in_thread(self._read, until, rate, seconds)

    def stop(self) -> None:
        """Make `read` return."""
        self._enough.set()

    def _read(
        self, until: Callable[[bytearray], bool], rate: float, seconds: float
    ) -> None:
        self._enough.clear()
        began, read, size = time.monotonic(), 0, 65536
        while not self._enough.is_set() and not until(self.data):
            passed = time.monotonic() - began
            if passed > seconds:
                return
            if rate < float("inf"):
                size = int(rate * passed) - read
                if size <= 0:
                    time.sleep(STEP)
                    continue
            try:
                data = self.sock.recv(min(size, 65536))
            except TimeoutError:
                return
            except ssl.SSLZeroReturnError:  # after the client's own close_notify
                data = b""
            except OSError as error:
                self.end = type(error).__name__
                return
            if not data:
                self.end = "end"
                return
            self.data += data
            read += len(data)

    def frames(self) -> list[tuple[int, bytes]]:
        """Return opcode and payload of each frame that was read completely."""
        found, rest = [], memoryview(self.data)
        with contextlib.suppress(IndexError):
            while rest:
                length, start = rest[1] & 0x7F, 2
                if length > 125:
                    start = 4 if length == 126 else 10
                    if len(rest) < start:
                        break
                    length = int.from_bytes(rest[2:start])
                if len(rest) < start + length:
                    break
                found.append((rest[0] & 0xF, bytes(rest[start : start + length])))
                rest = rest[start + length :]
        return found
