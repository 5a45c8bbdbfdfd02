"""Clients that read as slowly as they are told, plain and by TLS.

Each is a blocking socket in a thread, so that neither the pace nor the buffers are
those of a library.
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
# Of their own: asyncio's few are for looking up names.
THREADS = ThreadPoolExecutor(64)


async def in_thread(act: Callable[..., T], *arguments: object) -> T:
    """What `act` returns, which may block."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(THREADS, act, *arguments)


class SlowClient:
    """A WebSocket client of which each byte is the test's own.

    Its kernel takes about `receive_buffer` bytes that are not read; 0: as many as it
    likes. `data` is what
    was read after the handshake; `end` is how the connection ended, or None.
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
            # An end without close_notify is an error, and not taken for one.
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
        """Send bytes as they are."""
        await in_thread(self.sock.sendall, data)

    async def read(
        self,
        until: Callable[[bytearray], bool] = lambda data: False,
        rate: float = float("inf"),
        seconds: float = 60.0,
    ) -> None:
        """Read at `rate` bytes a second, until the end, `until(data)` or `stop`."""
        await in_thread(self._read, until, rate, seconds)

    def stop(self) -> None:
        """Have `read` return."""
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
        """Opcode and payload of each frame that was read whole."""
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
