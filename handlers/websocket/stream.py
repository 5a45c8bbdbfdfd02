"""Reads and writes the socket of an open WebSocket, plain or TLS.

Unlike Tornado's streams: one system call per read and one per frame, a future only if a
caller has to wait, and a tenth of the memory (docs/decisions/010-own-streams.md).
`handlers.websocket.protocol` uses it.
"""

import asyncio
import contextlib
import socket
import ssl
from bisect import insort
from collections import deque
from operator import itemgetter
from typing import Protocol

from backends import ConnectionClosed
from handlers.http.sockets import NOT_NOW, TakenSocket, send_close_notify
from handlers.websocket.uptake import Outgoing, outgoing

RECORD = 16 * 1024  # bytes; the largest TLS record (RFC 8446, section 5.1)


class Owner(Protocol):
    """What a stream reports to."""

    def on_readable(self) -> None:
        """There is something to read."""

    def on_lost(self) -> None:
        """A write has failed: nothing more is sent."""


def client_stream(
    taken: TakenSocket, loop: asyncio.AbstractEventLoop, owner: Owner
) -> "ClientStream":
    """Return the stream of a socket, plain or TLS."""
    is_tls = isinstance(taken.sock, ssl.SSLSocket)
    return (TLSClientStream if is_tls else ClientStream)(taken, loop, owner)


class ClientStream:
    """Calls `owner.on_readable` when there is something to read, while reading is on.

    Reading is on at first; the loop reports what there is in its next turn.
    When a write has failed, `lost` is set, and the loop calls `owner.on_lost` later.
    From then on nothing is sent, but what arrived before can still be read. Only
    `close` closes the socket.
    """

    # Whether the kernel still sends what was written after `close`, if all was read.
    closes_cleanly = True

    __slots__ = (
        "_owner",
        "_reading",
        "_sock",
        "_unread",
        "_waiting",
        "closed",
        "loop",
        "lost",
        "taken",
        "unsent",
    )

    def __init__(
        self, taken: TakenSocket, loop: asyncio.AbstractEventLoop, owner: Owner
    ) -> None:
        self.loop = loop
        self._owner: Owner | None = owner  # None once it is closed
        self._reading = False
        self.closed = False
        self.lost = False
        self.taken = 0  # bytes that the kernel has taken
        # Bytes that were written and that the kernel has not taken.
        self.unsent: bytearray | None = None
        # Futures, each with the value of `taken` at which it is done.
        self._waiting: deque[tuple[int, asyncio.Future[None]]] | None = None
        self._sock: socket.socket = taken.sock
        self._unread = taken.unread
        if taken.unsent:
            self._send_later(taken.unsent)
        self.start_reading()  # replaces the reader of the HTTP server

    @property
    def waiting(self) -> int:
        """Bytes that were written and that the kernel has not taken."""
        return len(self.unsent) if self.unsent else 0

    def start_reading(self) -> None:
        """Call `on_readable` whenever there are bytes to read (level-triggered)."""
        if not self._reading and self._owner is not None and not self.closed:
            self._reading = True
            self.loop.add_reader(self._sock, self._owner.on_readable)

    def stop_reading(self) -> None:
        """Leave what arrives in the kernel, so that the peer must wait."""
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self._sock)

    def read(self, size: int) -> bytes | None:
        """Return up to `size` bytes; None: nothing has arrived; empty: the end."""
        if self._unread:
            data, self._unread = self._unread[:size], self._unread[size:]
            return data
        try:
            return self._sock.recv(size)
        except NOT_NOW:
            return None
        except OSError:  # `ssl.SSLError` too: the connection has ended
            return b""

    @property
    def pending(self) -> bool:
        """Whether there are bytes to read that are no longer in the kernel."""
        return bool(self._unread)

    def outgoing(self) -> Outgoing:
        """Ask the kernel what the peer has not acknowledged yet; a system call."""
        return outgoing(self._sock, self.taken, self.waiting)

    def write(self, data: bytes) -> "asyncio.Future[None] | None":
        """Return None if the kernel took all of `data`, else a future.

        The future is done when the kernel has taken all, and fails with
        `ConnectionClosed` if the connection ends before. Raises `ConnectionClosed` if
        it has ended already.
        """
        if self.closed or self.lost:
            raise ConnectionClosed
        if not self.unsent:
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
        """Return a future that is done when the kernel has all that was written.

        It fails with `ConnectionClosed`.
        """
        return self.below(1)

    def below(self, size: int) -> "asyncio.Future[None]":
        """Return a future that is done when fewer than `size` bytes wait.

        It fails with `ConnectionClosed`.
        """
        future: asyncio.Future[None] = self.loop.create_future()
        if self.closed or self.lost:
            _fail(future)
        elif self.waiting < size:
            future.set_result(None)
        else:
            if self._waiting is None:
                self._waiting = deque()
            taken = self.taken + self.waiting - size + 1
            insort(self._waiting, (taken, future), key=itemgetter(0))
        return future

    def lose(self) -> None:
        """Write nothing more: a write failed, or the peer is considered dead.

        The kernel accepts no more bytes from the peer either; only those that it has
        already can still be read.
        """
        if not self.closed and not self.lost:
            self.lost = True
            self._drop_unsent()
            with contextlib.suppress(OSError):  # the kernel has no connection any more
                # Not SSLSocket.shutdown(), which drops the TLS state: nothing could
                # be decrypted any more.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
            self.loop.call_soon(self._report_loss)

    def _report_loss(self) -> None:
        if self._owner is not None:
            self._owner.on_lost()

    def shut_down(self) -> None:
        """End the writing side. May be called again."""
        with contextlib.suppress(OSError):  # the next read reports the disconnect
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket at once; futures that are not done fail."""
        if self.closed:
            return
        self.stop_reading()
        self.closed = True
        self._drop_unsent()
        self._sock.close()
        self._owner = None

    def _drop_unsent(self) -> None:
        if self.unsent:
            self.loop.remove_writer(self._sock)
        self.unsent = None
        waiting, self._waiting = self._waiting, None
        for _, sent in waiting or ():
            if not sent.done():
                _fail(sent)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        """Return how many bytes of `data` the kernel took. Raises `OSError`."""
        try:
            return self._sock.send(data)
        except NOT_NOW:
            return 0

    def _send_later(self, data: bytes | memoryview) -> None:
        if not self.unsent:
            self.unsent = bytearray()
            self.loop.add_writer(self._sock, self._on_writable)
        assert self.unsent is not None
        self.unsent += data

    def _on_writable(self) -> None:
        assert self.unsent
        try:
            sent = self._send(self.unsent)
        except OSError:
            self.lose()
            return
        self.taken += sent
        del self.unsent[:sent]
        if not self.unsent:
            self.unsent = None
            self.loop.remove_writer(self._sock)
        while self._waiting and self._waiting[0][0] <= self.taken:
            _, waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if not self._waiting:
            self._waiting = None


class TLSClientStream(ClientStream):
    """The same over TLS, which cannot be half closed, and sends close_notify.

    It writes one record at a time, since a TLS write takes either all bytes or none.
    """

    closes_cleanly = False  # the peer's close_notify is usually unread

    __slots__ = ()
    _sock: ssl.SSLSocket

    @property
    def pending(self) -> bool:
        """Whether there are decrypted bytes, which wake no selector."""
        return bool(self._unread) or self._sock.pending() > 0

    def shut_down(self) -> None:
        """Send close_notify (RFC 8446, section 6.1), then end TCP's writing side.

        What arrives afterwards can only be discarded.
        """
        if send_close_notify(self._sock):
            super().shut_down()

    def close(self) -> None:
        """Close the socket at once; send close_notify if the kernel has room for it."""
        if not self.closed and not self.lost and not self.unsent:
            send_close_notify(self._sock)
        super().close()

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        sent = 0
        with memoryview(data) as rest:
            while sent < len(data):
                taken = super()._send(rest[sent : sent + RECORD])
                if not taken:
                    break
                sent += taken
        return sent


def _fail(future: "asyncio.Future[None]") -> None:
    future.set_exception(ConnectionClosed())
    future.exception()  # no "never retrieved" warning if nobody awaits it
