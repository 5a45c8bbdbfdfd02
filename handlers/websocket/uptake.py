"""Measures how fast a peer accepts what is sent, by its kernel's acknowledgments.

"Writable" events do not show it: the kernel reports them when a third of a large
buffer is free, and TLS when a whole message was sent. `stream` asks the kernel;
`closing` and `handlers.clients.connection` decide which peer is too slow.
"""

import socket
import struct
import sys
from typing import NamedTuple

# struct tcp_info (linux/tcp.h): unacknowledged segments, milliseconds since the last
# acknowledgment, acknowledged bytes, bytes that are not sent yet.
TCP_INFO = struct.Struct("=24x I 28x I 60x Q 16x I")


class Outgoing(NamedTuple):
    """What was sent to a peer and not acknowledged yet.

    `acknowledged` is the number of bytes that its kernel has acknowledged so far;
    `under_way` is set if there are more. `quiet` is the time in seconds since the last
    acknowledgment, duplicates included.
    """

    acknowledged: int
    under_way: bool
    quiet: float


def outgoing(sock: socket.socket, taken: int, waiting: int) -> Outgoing:
    """Ask the kernel, which took `taken` bytes, while `waiting` bytes wait for it.

    Except on Linux, the kernel cannot tell: then what it took counts as acknowledged.
    """
    if sys.platform == "linux":
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
        except OSError:
            info = b""
        if len(info) == TCP_INFO.size:
            unacknowledged, quiet, acknowledged, unsent = TCP_INFO.unpack(info)
            under_way = bool(waiting or unacknowledged or unsent)
            return Outgoing(acknowledged, under_way, quiet / 1000)
    return Outgoing(taken, waiting > 0, 0.0)


class Uptake:
    """Remembers when a peer's acknowledged bytes last increased.

    Used only while bytes are unacknowledged.
    """

    __slots__ = ("_acknowledged", "taken_at")

    def __init__(self, acknowledged: int, now: float) -> None:
        self._acknowledged = acknowledged
        self.taken_at = now  # on the loop's clock

    def look(self, acknowledged: int, now: float) -> float:
        """Return for how many seconds `acknowledged` has not changed."""
        if acknowledged != self._acknowledged:
            self._acknowledged, self.taken_at = acknowledged, now
        return now - self.taken_at
