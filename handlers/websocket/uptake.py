"""How a peer takes what is sent to it, by what its kernel has acknowledged.

"Writable" events do not say it: the kernel reports them when a third of a large
buffer is free, and TLS when all of a message has left. `stream` asks the kernel;
`closing` and `handlers.clients.connection` decide who is too slow.
"""

import socket
import struct
import sys
from typing import NamedTuple

# struct tcp_info (linux/tcp.h): segments that are not acknowledged, milliseconds
# since the last acknowledgment came, bytes acknowledged, bytes not yet sent.
TCP_INFO = struct.Struct("=24x I 28x I 60x Q 16x I")


class Outgoing(NamedTuple):
    """What is under way to a peer.

    `acknowledged` counts the bytes that its kernel has acknowledged so far.
    `under_way` says whether there are more. `quiet` is for how many seconds its
    kernel has acknowledged nothing, not even again.
    """

    acknowledged: int
    under_way: bool
    quiet: float


def outgoing(sock: socket.socket, taken: int, waiting: int) -> Outgoing:
    """Ask the kernel, which took `taken` bytes and has yet to take `waiting`.

    Where it can't say (it is no Linux), what it has taken counts as acknowledged.
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
    """When a peer was last seen to take something, from one look to the next.

    Only where something is under way.
    """

    __slots__ = ("_acknowledged", "taken_at")

    def __init__(self, acknowledged: int, now: float) -> None:
        self._acknowledged = acknowledged
        self.taken_at = now  # on the loop's clock

    def look(self, acknowledged: int, now: float) -> float:
        """For how many seconds it has taken nothing; 0 where it has, since the last."""
        if acknowledged != self._acknowledged:
            self._acknowledged, self.taken_at = acknowledged, now
        return now - self.taken_at
