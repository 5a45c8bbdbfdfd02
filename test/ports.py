"""Free ports for programs that cannot choose one and report it."""

import contextlib
import secrets
import socket
from pathlib import Path

LOWEST = 10_000
# The range from which the kernel assigns ports to sockets without a chosen one.
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(number: int) -> int:
    """Return the first of `number` consecutive free ports.

    They are outside of the kernel's range: other tests use hundreds of ports of that
    before the program binds its own.
    """
    given_away = int(RANGE.read_text("ascii").split()[0])
    while True:
        # If the kernel's range is nearly all ports, the result is inside of it.
        first = LOWEST + secrets.randbelow(max(given_away - LOWEST, LOWEST) - number)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + number):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
