"""Detects a peer that has disappeared without closing its connection.

The kernel's keepalive does so while nothing is being sent, `SendProgress` during a
send. `connection` uses both.
"""

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable

KEEPALIVE_PROBES = 3
MAX_KEEPALIVE = 32767  # seconds; tcp(7)
PROGRESS_CHECKS = 4  # per dead_after; after as many without progress a peer is dead


class SendProgress:
    """Checks whether a peer accepts the bytes that wait to be sent.

    Calls `on_none` if it accepted none for `dead_after` seconds. A stall of the process
    counts as one check without progress, not as the whole time.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        dead_after: float,
        on_none: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._interval = dead_after / PROGRESS_CHECKS
        self._on_none = on_none
        self._waiting = self._measure()
        self._in_vain = 0  # checks without progress so far
        self._timer = loop.call_later(self._interval, self._check)

    def stop(self) -> None:
        """Stop checking."""
        self._timer.cancel()

    def _measure(self) -> tuple[int, int]:
        """Return the bytes that wait in the process, and those not acknowledged."""
        sock = self._transport.get_extra_info("socket")
        unacknowledged = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return (
            self._transport.get_write_buffer_size(),
            struct.unpack("i", unacknowledged)[0],
        )

    def _check(self) -> None:
        before, self._waiting = self._waiting, self._measure()
        self._in_vain = self._in_vain + 1 if self._waiting == before else 0
        if self._in_vain < PROGRESS_CHECKS:
            self._timer = self._loop.call_later(self._interval, self._check)
        else:
            self._on_none()


def set_keepalive(sock: socket.socket, dead_after: float) -> None:
    """Make the kernel detect a dead peer within `dead_after` seconds.

    Also sets TCP_NODELAY, so that small writes are sent immediately.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = int(min(max(1, dead_after / (KEEPALIVE_PROBES + 1)), MAX_KEEPALIVE))
    for option, value in (
        ("TCP_KEEPIDLE", step),
        ("TCP_KEEPINTVL", step),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", int(min(dead_after * 1000, 2**31 - 1))),  # milliseconds
    ):
        if hasattr(socket, option):  # Linux has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
