"""Ports for programs that must be told one, and can't say which one they took."""

import contextlib
import secrets
import socket
from pathlib import Path

LOWEST = 10_000
# From here on, the kernel gives ports to whoever asks for any, and to all clients.
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(number: int) -> int:
    """The first of so many in a row that nobody uses.

    None is of those that the kernel gives away: other tests take hundreds of these
    before a program is there to use its own.
    """
    given_away = int(RANGE.read_text("ascii").split()[0])
    while True:
        # Where the kernel gives away nearly all, it is one of those after all.
        first = LOWEST + secrets.randbelow(max(given_away - LOWEST, LOWEST) - number)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + number):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
