"""The socket of an open WebSocket, plain or TLS: bytes in, bytes out.

It takes the place of Tornado's stream once the handshake is answered: one system
call for what has come and one for each frame, a future only where somebody has
to wait, and a tenth of the memory (docs/decisions/010-own-streams.md).
"""

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable

from tornado.iostream import IOStream

from backends import ConnectionClosed
from handlers.websocket.uptake import Outgoing, outgoing

# What a socket raises that has nothing to read, or takes nothing, now.
NOT_NOW = (
    BlockingIOError,
    InterruptedError,
    ssl.SSLWantReadError,
    ssl.SSLWantWriteError,
)
RECORD = 16 * 1024  # bytes; the most that one record of TLS holds (RFC 8446, 5.1)


def client_stream(
    stream: IOStream, on_readable: Callable[[], None], on_lost: Callable[[], None]
) -> "ClientStream":
    """Take the socket out of `stream`, plain or TLS."""
    is_tls = isinstance(stream.socket, ssl.SSLSocket)
    return (TLSClientStream if is_tls else ClientStream)(stream, on_readable, on_lost)


class ClientStream:
    """Calls `on_readable` when there is something to read, while it is asked to.

    `on_lost` is called, in a turn of the loop of its own, when a write has failed.
    Nothing leaves from then on (`lost`), but what came before can still be read.
    Only `close` closes the socket.
    """

    # Whether the kernel goes on after `close`, where nothing is unread.
    closes_cleanly = True

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
        "lost",
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
        self.lost = False
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
        return bool(self._unread)

    def outgoing(self) -> Outgoing:
        """What is under way to the peer, by its kernel's word; a system call."""
        return outgoing(self._sock, self.taken, self.waiting)

    def write(self, data: bytes) -> "asyncio.Future[None] | None":
        """None once the kernel has all of it; else a future that is done then.

        It fails with `ConnectionClosed`, which is raised where that is known.
        """
        if self.closed or self.lost:
            raise ConnectionClosed
        if not self._unsent:
            try:
                sent = self._send(data)
            except OSError as error:
                self.lose()
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
        if self.closed or self.lost:
            _fail(drained)
        elif not self._unsent:
            drained.set_result(None)
        else:
            if self._waiting is None:
                self._waiting = deque()
            self._waiting.append((self.taken + len(self._unsent), drained))
        return drained

    def lose(self) -> None:
        """Write nothing more: it can't be done, or the peer is taken for gone.

        Nor does the kernel take more from a peer that goes on: what it has is all
        that there is to read.
        """
        if not self.closed and not self.lost:
            self.lost = True
            self._drop_unsent()
            with contextlib.suppress(OSError):  # there is no connection any more
                # Not of `ssl`, whose `shutdown` forgets how to decrypt.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
            self.loop.call_soon(self._tell_of_loss)

    def _tell_of_loss(self) -> None:
        self._on_lost()

    def shut_down(self) -> None:
        """Say that nothing more will be written. May be called again."""
        with contextlib.suppress(OSError):  # reading will find that the peer is gone
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket at once; whoever waits hears of it."""
        if self.closed:
            return
        self.stop_reading()
        self.closed = True
        self._drop_unsent()
        self._sock.close()
        self._on_readable = self._on_lost = _tell_nobody

    def _drop_unsent(self) -> None:
        if self._unsent:
            self.loop.remove_writer(self._sock)
        self._unsent = None
        waiting, self._waiting = self._waiting, None
        for _, sent in waiting or ():
            if not sent.done():
                _fail(sent)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes of `data` the kernel takes now. Raises `OSError`."""
        try:
            return self._sock.send(data)
        except NOT_NOW:
            return 0

    def _send_later(self, data: bytes | memoryview) -> None:
        if not self._unsent:
            self._unsent = bytearray()
            self.loop.add_writer(self._sock, self._on_writable)
        assert self._unsent is not None
        self._unsent += data

    def _on_writable(self) -> None:
        assert self._unsent
        try:
            sent = self._send(self._unsent)
        except OSError:
            self.lose()
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


class TLSClientStream(ClientStream):
    """The same by TLS, which can't be half closed, and says goodbye.

    A record at a time, since TLS takes either all or nothing of one write.
    """

    closes_cleanly = False  # the peer's close_notify is still to come

    __slots__ = ()
    _sock: ssl.SSLSocket

    @property
    def pending(self) -> bool:
        """Whether something was decrypted that the loop can't see."""
        return bool(self._unread) or self._sock.pending() > 0

    def shut_down(self) -> None:
        """Send close_notify (RFC 8446, section 6.1), then end the connection's half.

        What comes afterwards is good for being discarded only.
        """
        if self._goodbye():
            super().shut_down()

    def close(self) -> None:
        """Close the socket at once, with close_notify where there is room for it."""
        if not self.closed and not self.lost and not self._unsent:
            self._goodbye()
        super().close()

    def _goodbye(self) -> bool:
        """Whether close_notify has left, or can't any more. It never blocks."""
        try:
            self._sock.unwrap()
        except ssl.SSLWantWriteError:
            return False
        except (OSError, ValueError):  # the peer's has not come; there is no TLS left
            pass
        return True

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        sent = 0
        with memoryview(data) as rest:
            while sent < len(data):
                taken = super()._send(rest[sent : sent + RECORD])
                if not taken:
                    break
                sent += taken
        return sent


def _tell_nobody() -> None:
    """What a closed stream calls."""


def _fail(future: "asyncio.Future[None]") -> None:
    future.set_exception(ConnectionClosed())
    future.exception()  # whoever does not await it need not hear of it
