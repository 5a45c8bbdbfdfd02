"""The socket of an open WebSocket, plain or TLS: bytes in, bytes out.

It takes the place of Tornado's stream once the handshake is answered: one system
call for what has come and one for each frame, a future only where somebody has
to wait, and a tenth of the memory (docs/decisions/010-own-streams.md).
"""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable

from tornado.iostream import IOStream

from backends import ConnectionClosed

# What a socket raises that has nothing to read, or takes nothing, now.
NOT_NOW = (
    BlockingIOError,
    InterruptedError,
    ssl.SSLWantReadError,
    ssl.SSLWantWriteError,
)


class ClientStream:
    """Calls `on_readable` when there is something to read, while it is asked to.

    `on_lost` is called, in a turn of the loop of its own, when a write has found
    that the peer is gone.
    """

    __slots__ = (
        "_on_lost",
        "_on_readable",
        "_reading",
        "_sock",
        "_unread",
        "_unsent",
        "_waiting",
        "closed",
        "loop",
        "taken",
    )

    def __init__(
        self,
        stream: IOStream,
        on_readable: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        # Kept, since asking for it is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self._on_readable = on_readable
        self._on_lost = on_lost
        self._reading = False
        self.closed = stream.closed()
        self.taken = 0  # bytes that the kernel has taken
        # Bytes that were written and that the kernel has not taken.
        self._unsent: bytearray | None = None
        # Who waits for how much to be taken.
        self._waiting: deque[tuple[int, asyncio.Future[None]]] | None = None
        self._unread = b""  # what Tornado has read of what follows the handshake
        if self.closed:
            return
        if stream._state is not None:
            stream.io_loop.remove_handler(stream.fileno())
            stream._state = None
        self._sock: socket.socket = stream.socket
        self._unread = bytes(stream._read_buffer)
        unsent = len(stream._write_buffer)
        if unsent:
            with stream._write_buffer.peek(unsent) as data:
                self._send_later(data)
        stream.socket = None  # type: ignore[assignment] # as IOStream.close_fd does
        stream._closed = True
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def waiting(self) -> int:
        """Bytes that were written and that the kernel has not taken."""
        return len(self._unsent) if self._unsent else 0

    def start_reading(self) -> None:
        """Call `on_readable` whenever something has come; level-triggered."""
        if not self._reading and not self.closed:
            self._reading = True
            self.loop.add_reader(self._sock, self._on_readable)

    def stop_reading(self) -> None:
        """Leave what comes to the kernel, so that the peer has to wait."""
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self._sock)

    def read(self, size: int) -> bytes | None:
        """What has come, `size` bytes at most; None: nothing; empty: the end."""
        if self._unread:
            data, self._unread = self._unread[:size], self._unread[size:]
            return data
        try:
            return self._sock.recv(size)
        except NOT_NOW:
            return None
        except OSError:  # of TLS too: the connection is over, in whatever way
            return b""

    @property
    def pending(self) -> bool:
        """Whether there are bytes to read of which the kernel does not know."""
        return bool(self._unread) or (
            isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0
        )

    def write(self, data: bytes) -> "asyncio.Future[None] | None":
        """None once the kernel has all of it; else a future that is done then.

        It fails with `ConnectionClosed`, which is raised where that is known.
        """
        if self.closed:
            raise ConnectionClosed
        if not self._unsent:
            try:
                sent = self._sock.send(data)
            except NOT_NOW:
                sent = 0
            except OSError as error:
                self.loop.call_soon(self._on_lost)
                self.close()
                raise ConnectionClosed from error
            self.taken += sent
            if sent == len(data):
                return None
            self._send_later(memoryview(data)[sent:])
        else:
            self._send_later(data)
        return self.drained()

    def drained(self) -> "asyncio.Future[None]":
        """Done when the kernel has taken all that was written before."""
        drained: asyncio.Future[None] = self.loop.create_future()
        if self.closed:
            _fail(drained)
        elif not self._unsent:
            drained.set_result(None)
        else:
            if self._waiting is None:
                self._waiting = deque()
            self._waiting.append((self.taken + len(self._unsent), drained))
        return drained

    def shut_down(self) -> None:
        """Say that nothing more will be written. Raises `OSError`; not for TLS."""
        if not isinstance(self._sock, ssl.SSLSocket):  # it can't be half closed
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket at once; whoever waits hears of it."""
        if self.closed:
            return
        self.closed = True
        self.stop_reading()
        if self._unsent:
            self.loop.remove_writer(self._sock)
        self._sock.close()
        self._on_readable = self._on_lost = _tell_nobody
        self._unsent = None
        waiting, self._waiting = self._waiting, None
        for _, sent in waiting or ():
            if not sent.done():
                _fail(sent)

    def _send_later(self, data: bytes | memoryview) -> None:
        if not self._unsent:
            self._unsent = bytearray()
            self.loop.add_writer(self._sock, self._on_writable)
        assert self._unsent is not None
        self._unsent += data

    def _on_writable(self) -> None:
        assert self._unsent
        try:
            sent = self._sock.send(self._unsent)
        except NOT_NOW:
            return
        except OSError:
            on_lost = self._on_lost
            self.close()
            on_lost()
            return
        self.taken += sent
        del self._unsent[:sent]
        if not self._unsent:
            self._unsent = None
            self.loop.remove_writer(self._sock)
        while self._waiting and self._waiting[0][0] <= self.taken:
            _, waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if not self._waiting:
            self._waiting = None


def _tell_nobody() -> None:
    """What a closed stream calls."""


def _fail(future: "asyncio.Future[None]") -> None:
    future.set_exception(ConnectionClosed())
    future.exception()  # whoever does not await it need not hear of it
