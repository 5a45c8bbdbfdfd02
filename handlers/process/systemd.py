"""Sends this process's state to systemd, if systemd started it.

The datagrams are those of sd_notify(3), the variables those of a unit with
`Type=notify`: conf/socketdock.service.
"""

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)

SEND_TIMEOUT = 1.0  # seconds; systemd normally reads immediately


class SystemdNotifier:
    """Sends notifications to the socket `NOTIFY_SOCKET`; without it, does nothing.

    From `ready()` to `close()` a timer of the loop feeds the watchdog, if
    `WATCHDOG_USEC` is set. So systemd notices a loop that hangs.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._socket = _connect(environ.get("NOTIFY_SOCKET", ""))
        self._interval = _watchdog_interval(environ) if self._socket else None
        self._timer: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """Notify that the relay has started, or has reloaded its files."""
        self._notify("READY=1")
        if self._timer is None:
            self._feed_watchdog()

    def reloading(self) -> None:
        """Notify that files are being read again; `ready()` must follow."""
        # By this time systemd knows to which reload the next `ready()` belongs.
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Notify that the relay drains."""
        self._notify("STOPPING=1")

    def close(self) -> None:
        """Stop the watchdog, and close the socket."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _feed_watchdog(self) -> None:
        if self._interval is not None:
            self._notify("WATCHDOG=1")
            self._timer = asyncio.get_running_loop().call_later(
                self._interval, self._feed_watchdog
            )

    def _notify(self, state: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(state.encode())
        except OSError as error:
            name = state.partition("=")[0]
            logger.warning("can't notify systemd of %s: %s", name, error)


def _connect(address: str) -> socket.socket | None:
    """Connect to `address`, a path or an abstract name; None if that fails."""
    if not address:
        return None
    to_systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        to_systemd.settimeout(SEND_TIMEOUT)
        to_systemd.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        to_systemd.close()
        logger.warning("can't notify systemd: NOTIFY_SOCKET: %s", error)
        return None
    return to_systemd


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Return the watchdog interval in seconds; None if there is no watchdog."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    meant = environ.get("WATCHDOG_PID") or str(os.getpid())
    if not re.fullmatch("[0-9]{1,18}", microseconds) or meant != str(os.getpid()):
        return None
    # "every half of the time" (sd_watchdog_enabled(3))
    return int(microseconds) / 1_000_000 / 2 or None
