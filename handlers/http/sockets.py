"""One accepted socket, plain or TLS, whose owner is told what comes.

`handlers.http.server` reads requests on it, and hands the socket itself over where
one becomes a WebSocket: no second descriptor is needed for that, and the state of
TLS stays where it is.
"""

import asyncio
import contextlib
import socket
import ssl

READ_SIZE = 64 * 1024  # bytes taken from a socket at a time

# What a socket raises that has nothing to read, or takes nothing, now.
NOT_NOW = (
    BlockingIOError,
    InterruptedError,
    ssl.SSLWantReadError,
    ssl.SSLWantWriteError,
)


class SocketConnection:
    """Reads and writes one socket; a subclass says what that means.

    By TLS the handshake comes first, by itself. Raises `OSError` when made with
    TLS for a peer that has gone already.
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
        # What was written and the kernel has not taken.
        self._unsent: bytearray | None = None
        self._sock = sock
        self._tls: ssl.SSLSocket | None = None  # the same, where it is TLS
        if tls is not None:
            self._sock = self._tls = tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )

    # What a subclass is told.

    def room(self) -> int:
        """How many bytes may be read now; more than 0 while it reads."""
        raise NotImplementedError

    def on_data(self, data: bytes) -> None:
        """Bytes came, at least one."""
        raise NotImplementedError

    def on_end(self) -> None:
        """The peer says nothing more."""
        raise NotImplementedError

    def on_sent(self) -> None:
        """The kernel has taken all that was written."""
        raise NotImplementedError

    def on_lost(self) -> None:
        """The connection failed: it is to be closed."""
        raise NotImplementedError

    # Reading.

    @property
    def has_tls(self) -> bool:
        """Whether it is TLS, which can't be half closed."""
        return self._tls is not None

    def start_reading(self) -> None:
        """Read whenever something has come."""
        if self._reading or self.closed:
            return
        self._reading = True
        self.loop.add_reader(self._sock, self._on_readable)
        if self._tls is not None and self._tls.pending():
            self.loop.call_soon(self._on_readable)  # the kernel knows nothing of it

    def stop_reading(self) -> None:
        """Leave what comes to the kernel, so that the peer has to wait."""
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
        self.on_data(data)
        if self._tls is not None and self._reading and self._tls.pending():
            self.loop.call_soon(self._on_readable)

    def _shake_hands(self) -> bool:
        """Go on with the TLS handshake; whether it is over."""
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
        """Whether something was written that the kernel has not taken."""
        return self._unsent is not None

    def send(self, data: bytes) -> None:
        """Write; what the kernel does not take now follows when it does."""
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
        """Say that nothing more will be written; by TLS in its own words, too."""
        with contextlib.suppress(OSError, ValueError):
            if self._tls is not None and not self._shaking_hands:
                # It sends close_notify (RFC 8446, section 6.1), and then waits for
                # the peer's, for which nobody here does.
                self._tls.unwrap()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    # The end.

    def close_socket(self) -> None:
        """Close at once; what was not sent is not sent any more."""
        if not self.closed:
            self._let_go()
            self._sock.close()

    def take_socket(self) -> socket.socket:
        """The socket, which is the caller's from now on."""
        self._let_go()
        return self._sock

    def _let_go(self) -> None:
        self.closed = True
        self.stop_reading()
        if self._unsent is not None or self._shaking_hands:
            self._unsent = None
            self.loop.remove_writer(self._sock)
