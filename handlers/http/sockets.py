"""Reads and writes one accepted socket, plain or TLS.

`handlers.http.server` reads requests from it. If one becomes a WebSocket, the socket
itself is handed over: that needs no second descriptor, and keeps the TLS state.
"""

import asyncio
import contextlib
import socket
import ssl

READ_SIZE = 64 * 1024  # bytes taken from a socket at a time

# Raised by a socket that has nothing to read, or accepts nothing, now.
NOT_NOW = (
    BlockingIOError,
    InterruptedError,
    ssl.SSLWantReadError,
    ssl.SSLWantWriteError,
)


def send_close_notify(sock: ssl.SSLSocket) -> bool:
    """Send close_notify (RFC 8446, section 6.1) without blocking.

    Returns False if the kernel has no room for it. The peer's is not waited for.
    """
    try:
        sock.unwrap()
    except ssl.SSLWantWriteError:
        return False
    except (OSError, ValueError):
        pass  # the peer's has not arrived, or TLS has ended
    return True


class TakenSocket:
    """The socket of a connection that speaks another protocol from now on.

    `unread` was read behind the request for that protocol, and `unsent` was written
    before it, but not taken by the kernel.
    """

    __slots__ = ("sock", "unread", "unsent")

    def __init__(self, sock: socket.socket, unread: bytes, unsent: bytes) -> None:
        self.sock = sock
        self.unread = unread
        self.unsent = unsent


class SocketConnection:
    """Reads and writes one socket; a subclass handles the bytes.

    With TLS, it performs the handshake first. Its constructor raises `OSError` if
    the peer of a TLS connection has disconnected already.
    """

    __slots__ = (
        "_reading",
        "_shaking_hands",
        "_sock",
        "_tls",
        "_unsent",
        "closed",
        "loop",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.loop = loop
        self.closed = False
        self._reading = False
        self._shaking_hands = tls is not None
        # Bytes that were written and that the kernel has not taken.
        self._unsent: bytearray | None = None
        self._sock = sock
        self._tls: ssl.SSLSocket | None = None  # the same, where it is TLS
        if tls is not None:
            self._sock = self._tls = tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )

    # Callbacks of a subclass.

    def room(self) -> int:
        """Return how many bytes may be read now; more than 0 while it reads."""
        raise NotImplementedError

    def on_data(self, data: bytes) -> None:
        """At least one byte has arrived."""
        raise NotImplementedError

    def on_end(self) -> None:
        """The peer sends nothing more."""
        raise NotImplementedError

    def on_sent(self) -> None:
        """The kernel has taken all that was written."""
        raise NotImplementedError

    def on_lost(self) -> None:
        """The connection has failed, and must be closed."""
        raise NotImplementedError

    def on_bug(self) -> None:
        """Log the exception that is being handled, and answer the peer."""
        raise NotImplementedError

    # Reading.

    @property
    def has_tls(self) -> bool:
        """Whether it is TLS, which can't be half closed."""
        return self._tls is not None

    def start_reading(self) -> None:
        """Read whenever something has arrived."""
        if self._reading or self.closed:
            return
        self._reading = True
        self.loop.add_reader(self._sock, self._on_readable)
        if self._tls is not None and self._tls.pending():
            self.loop.call_soon(self._on_readable)  # these bytes wake no selector

    def read_first(self) -> None:
        """Read what has arrived, and from then on whenever there is more.

        Many connections need no reader at all: they are closed or handed over at once.
        """
        self._reading = True
        self._on_readable()
        if self._reading and not self.closed:
            self.loop.add_reader(self._sock, self._on_readable)

    def stop_reading(self) -> None:
        """Leave what arrives in the kernel, so that the peer must wait."""
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self._sock)

    def _on_readable(self) -> None:
        if not self._reading or (self._shaking_hands and not self._shake_hands()):
            return
        try:
            data = self._sock.recv(self.room())
        except NOT_NOW:
            return
        except OSError:
            self.on_lost()
            return
        if not data:
            self.stop_reading()
            self.on_end()
            return
        try:
            self.on_data(data)
        except Exception:
            self.on_bug()
        if self._tls is not None and self._reading and self._tls.pending():
            self.loop.call_soon(self._on_readable)

    def _shake_hands(self) -> bool:
        """Continue the TLS handshake; returns whether it is complete."""
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self.loop.add_writer(self._sock, self._on_readable)
            return False
        except OSError:  # `ssl.SSLError`, too
            self.on_lost()
            return False
        self._shaking_hands = False
        self.loop.remove_writer(self._sock)
        return True

    # Writing.

    @property
    def sending(self) -> bool:
        """Whether written bytes wait for the kernel."""
        return self._unsent is not None

    def send(self, data: bytes) -> None:
        """Write; bytes that the kernel does not take now are sent later."""
        if self.closed:
            return
        if self._unsent is not None:
            self._unsent += data
            return
        try:
            sent = self._sock.send(data)
        except NOT_NOW:
            sent = 0
        except OSError:
            self.loop.call_soon(self.on_lost)  # not while its owner writes
            return
        if sent < len(data):
            self._unsent = bytearray(memoryview(data)[sent:])
            self.loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        assert self._unsent is not None
        try:
            sent = self._sock.send(self._unsent)
        except NOT_NOW:
            return
        except OSError:
            self.on_lost()
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._unsent = None
            self.loop.remove_writer(self._sock)
            self.on_sent()

    def shut_down(self) -> None:
        """End the writing side, with close_notify on TLS."""
        self._end_tls()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    # Closing.

    def close_socket(self) -> None:
        """Close immediately; bytes that were not sent are dropped."""
        if not self.closed:
            self.stop_reading()
            self._end_tls()
            self._stop_writing()
            self._sock.close()

    def take_socket(self) -> socket.socket:
        """Return the socket, which belongs to the caller from now on.

        Its reader stays registered if there is one: for the loop it is cheaper to
        replace a reader than to forget the socket and to register it again.
        """
        self._reading = False
        self._stop_writing()
        return self._sock

    def _end_tls(self) -> None:
        """Send close_notify, unless a part of what was written is not sent."""
        if self._tls is not None and not self._shaking_hands and not self.sending:
            send_close_notify(self._tls)

    def _stop_writing(self) -> None:
        self.closed = True
        if self._unsent is not None or self._shaking_hands:
            self._unsent = None
            self.loop.remove_writer(self._sock)
