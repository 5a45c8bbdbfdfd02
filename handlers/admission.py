"""Limits on connections and handshakes, in total and per address.

`handlers.connections` checks each handshake here, and reports each connection that
opens or ends.
"""

import asyncio
import logging
import math
import sys
from collections import Counter
from http import HTTPStatus
from ipaddress import IPv6Address
from typing import NamedTuple

from tornado.options import define

from handlers.process.log_limit import LineQuota
from handlers.rates import BURST, Stalls, spent

logger = logging.getLogger(__name__)

define("max_connections", default=15000, metavar="COUNT",
       help="most open connections; above it handshakes get 503")
define("max_connections_per_ip", default=0, metavar="COUNT",
       help="most open connections of one address; above it its handshakes get 429; "
            "0: no limit")
define("handshakes_per_second", default=0.0, metavar="RATE",
       help="most handshakes per second of one address; above it they get 429; 0: no "
            "limit")

MAX_ADDRESSES = 100_000  # with a known rate; beyond, the least recent one is dropped
RETRY_AFTER = 1  # seconds; the cause may be over by then
RETRY_AFTER_FULL = 5  # seconds; connections end less quickly
LOGGED_REFUSALS = 20  # rejected handshakes per interval with a log line each
REFUSAL_INTERVAL = 60.0  # seconds; one warning counts the others


class Refusal(NamedTuple):
    """The response to a handshake that is rejected."""

    status: HTTPStatus
    detail: str
    retry_after: int  # seconds


class Admission:
    """Counts connections and handshakes against limits; 0 means no limit.

    A socket with a descriptor above `last_descriptor` is rejected. `stalls` says
    how long the process was stopped: handshakes that waited meanwhile do not count
    as a burst.

    An address is an IPv4 address, or an IPv6 /64 network, which one household or
    one machine usually has.
    """

    def __init__(
        self,
        max_connections: int = 15000,
        max_connections_per_ip: int = 0,
        handshakes_per_second: float = 0.0,
        last_descriptor: int = sys.maxsize,
        stalls: Stalls | None = None,
    ) -> None:
        self._max_connections = max_connections
        self._max_per_address = max_connections_per_ip
        self._rate = handshakes_per_second
        self._last_descriptor = last_descriptor
        self._stalls = stalls or Stalls()
        if handshakes_per_second:
            self._stalls.watch()
        self._present = 0
        self._present_from: Counter[str | bytes] = Counter()
        # When each address has credit again, on the loop's clock; the address with
        # the least recent handshake first.
        self._paid_until: dict[str | bytes, float] = {}

    def refusal(self, remote_ip: str, descriptor: int) -> Refusal | None:
        """Return None and count the handshake if it is allowed, else the rejection."""
        if descriptor > self._last_descriptor:
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "File descriptor limit of this instance reached.",
                RETRY_AFTER_FULL,
            )
        if self._present >= self._max_connections:
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "Connection limit of this instance reached.",
                RETRY_AFTER_FULL,
            )
        if not self._max_per_address and not self._rate:
            return None
        address = _network_of(remote_ip)
        if self._max_per_address and (
            self._present_from[address] >= self._max_per_address
        ):
            return Refusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                "Connection limit of this address reached.",
                RETRY_AFTER_FULL,
            )
        if not self._rate:
            return None
        return self._too_fast(address, asyncio.get_running_loop().time())

    def _too_fast(self, address: str | bytes, now: float) -> Refusal | None:
        paid_until = self._paid_until.pop(address, float("-inf"))
        if paid_until >= now:
            self._paid_until[address] = paid_until
            return Refusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                "Handshake rate limit of this address exceeded.",
                max(RETRY_AFTER, math.ceil(paid_until - now)),
            )
        # Handshakes that waited during a stall may have come at the allowed rate.
        burst = BURST + self._stalls.latest
        self._forget_full(now - burst)
        self._paid_until[address] = spent(paid_until, now, 1 / self._rate, burst)
        return None

    def _forget_full(self, full_at: float) -> None:
        """Drop addresses whose credit is complete again."""
        while self._paid_until:
            address, paid_until = next(iter(self._paid_until.items()))
            if paid_until > full_at and len(self._paid_until) < MAX_ADDRESSES:
                return
            del self._paid_until[address]

    def enter(self, remote_ip: str) -> None:
        """Count a connection."""
        self._present += 1
        if self._max_per_address:
            self._present_from[_network_of(remote_ip)] += 1

    def leave(self, remote_ip: str) -> None:
        """Stop counting a connection."""
        self._present -= 1
        if self._max_per_address:
            address = _network_of(remote_ip)
            self._present_from[address] -= 1
            if not self._present_from[address]:
                del self._present_from[address]


def _network_of(remote_ip: str) -> str | bytes:
    if ":" not in remote_ip:
        return remote_ip
    return IPv6Address(remote_ip).packed[:8]


class RefusalLog:
    """Logs rejected handshakes without flooding the log.

    The first ones of each interval get a line each. The others are counted, and
    one warning at the end of the interval has their number.
    """

    def __init__(
        self, lines: int = LOGGED_REFUSALS, interval: float = REFUSAL_INTERVAL
    ) -> None:
        self._interval = interval  # seconds
        self._quota = LineQuota(lines, interval)
        self._counted: Counter[int] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, remote_ip: str, status: int, reason: str) -> None:
        """Log or count a rejection; `reason` must not contain data of the client."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                self._interval, self.log_summary
            )
        if self._quota.allow():
            logger.info(
                "handshake of %s rejected with %d: %s", remote_ip, status, reason,
                extra={"event": "refuse", "remote_ip": remote_ip, "status": status},
            )
        else:
            self._counted[status] += 1

    def log_summary(self) -> None:
        """Log the number of the counted ones, and start a new interval."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._counted:
            logger.warning(
                "%d more handshakes were rejected: %s",
                self._counted.total(),
                ", ".join(f"{n} with {s}" for s, n in sorted(self._counted.items())),
                extra={"event": "repeat", "count": self._counted.total()},
            )
        self._quota.restart()
        self._counted.clear()
