"""Who comes in while there is room: limits in all, and for each address.

`handlers.connections` asks here before a handshake goes any further, and tells
who came and who left.
"""

import asyncio
import logging
import math
import sys
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv6Address

from tornado.options import define

from handlers.rates import BURST, Stalls, spent

logger = logging.getLogger(__name__)

define("max_connections", default=15000, metavar="COUNT",
       help="most open connections; above it handshakes get 503")
define("max_connections_per_ip", default=0, metavar="COUNT0",
       help="most open connections of one address; above it its handshakes get 429; "
            "0: no limit")
define("handshakes_per_second", default=0.0, metavar="RATE",
       help="most handshakes per second of one address; above it they get 429; 0: no "
            "limit")

MAX_ADDRESSES = 100_000  # whose rate is known; beyond, the longest unseen is forgotten
RETRY_AFTER = 1  # seconds; what keeps a handshake out may be over by then
RETRY_AFTER_FULL = 5  # seconds; connections don't end that quickly
REFUSALS_TOLD = 20  # handshakes refused, in one interval, with a line each
REFUSAL_INTERVAL = 60.0  # seconds; the others of it are told in one warning


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a handshake is answered that may not come in now."""

    status: HTTPStatus
    detail: str
    retry_after: int  # seconds


class Admission:
    """Counts connections and handshakes; 0 stands for any number.

    What has a descriptor above `last_descriptor` may not become a WebSocket. By
    `stalls`, handshakes that waited while the process stood still have their rate.

    An address is an IPv4 address, or an IPv6 network of 64 bits, which is what
    one household or one machine gets.
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
        # When the handshakes of each address are paid for, on the loop's clock;
        # in the order in which they came last.
        self._paid_until: dict[str | bytes, float] = {}

    def refusal(self, remote_ip: str, descriptor: int) -> Refusal | None:
        """None where one more handshake may come in now, and is counted."""
        if descriptor > self._last_descriptor:
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "This instance has as many files open as it may.",
                RETRY_AFTER_FULL,
            )
        if self._present >= self._max_connections:
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "This instance has as many connections as it may.",
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
                "This address has as many connections as it may.",
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
                "This address makes handshakes faster than it may.",
                max(RETRY_AFTER, math.ceil(paid_until - now)),
            )
        # Who waited while the process stood still came at the rate, as far as we know.
        burst = BURST + self._stalls.latest
        self._forget_those_of_before(now - burst)
        self._paid_until[address] = spent(paid_until, now, 1 / self._rate, burst)
        return None

    def _forget_those_of_before(self, full_at: float) -> None:
        """Drop addresses whose credit is whole again."""
        while self._paid_until:
            address, paid_until = next(iter(self._paid_until.items()))
            if paid_until > full_at and len(self._paid_until) < MAX_ADDRESSES:
                return
            del self._paid_until[address]

    def enter(self, remote_ip: str) -> None:
        """One more connection is here."""
        self._present += 1
        if self._max_per_address:
            self._present_from[_network_of(remote_ip)] += 1

    def leave(self, remote_ip: str) -> None:
        """One has gone."""
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
    """Tells operators of handshakes that are refused, however many they are.

    The first ones of each interval have a line each; the others are counted,
    and told in one warning at its end.
    """

    def __init__(
        self, lines: int = REFUSALS_TOLD, interval: float = REFUSAL_INTERVAL
    ) -> None:
        self._lines = lines
        self._interval = interval  # seconds
        self._told = 0
        self._untold: Counter[int] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, remote_ip: str, status: int, reason: str) -> None:
        """One was refused; `reason` holds nothing that the client sent."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                self._interval, self.sum_up
            )
        if self._told < self._lines:
            self._told += 1
            logger.info(
                "handshake of %s refused with %d: %s", remote_ip, status, reason,
                extra={"event": "refuse", "remote_ip": remote_ip, "status": status},
            )
        else:
            self._untold[status] += 1

    def sum_up(self) -> None:
        """Tell of those that were counted, and begin anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._untold:
            logger.warning(
                "%d more handshakes were refused: %s",
                self._untold.total(),
                ", ".join(f"{n} with {s}" for s, n in sorted(self._untold.items())),
                extra={"event": "repeat", "count": self._untold.total()},
            )
        self._told = 0
        self._untold.clear()
