"""Receipts: pongs which show that a client has read all that was sent before a ping.

A connection has `Receipts` only while some are awaited; see `Reception`.
"""

import asyncio
import hashlib
import hmac
import secrets

from backends import ConnectionClosed
from backends.deadlines import STALL, after_reading

MAX_AWAITED = 64  # receipts of one connection
NUMBER_SIZE = MAC_SIZE = 8  # bytes


class ReceiptLate(TimeoutError):
    """The client has not answered the ping in time."""


class Receipts:
    """The receipts that are awaited from one client, in the order of their pings.

    The payload of a ping is its number and a MAC, so that a pong says by itself which
    pings it confirms: a client answers the latest one, and may leave out those before
    (RFC 6455, section 5.5.3). No client can make the payload of a ping that it has
    not received.
    """

    __slots__ = ("_awaited", "_loop", "_pinged", "_secret")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._secret = secrets.token_bytes(16)
        self._pinged = 0  # number of the latest ping
        # Each receipt and the timer that ends it, by ping, in order.
        self._awaited: dict[int, tuple[asyncio.Future[None], asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._awaited)

    def next_ping(self) -> bytes:
        """Return the payload of the next ping."""
        self._pinged += 1
        return self._payload(self._pinged)

    def expect(self, timeout: float) -> "asyncio.Future[None]":
        """Return a future that is done when the latest ping is answered.

        Or a later one. It fails with `ReceiptLate` after `timeout` seconds, or with
        `ConnectionClosed`.
        """
        receipt: asyncio.Future[None] = self._loop.create_future()
        self._watch(self._pinged, receipt, timeout)
        return receipt

    def on_pong(self, payload: bytes) -> None:
        """Confirm the pings up to that of `payload`; ignore any other pong."""
        number = int.from_bytes(payload[:NUMBER_SIZE])
        if number > self._pinged or not hmac.compare_digest(
            payload, self._payload(number)
        ):
            return
        for awaited in [each for each in self._awaited if each <= number]:
            self._end(awaited)

    def fail(self) -> None:
        """The connection has ended."""
        for awaited in list(self._awaited):
            self._end(awaited, ConnectionClosed())

    def _payload(self, number: int) -> bytes:
        text = number.to_bytes(NUMBER_SIZE)
        mac = hashlib.blake2b(text, digest_size=MAC_SIZE, key=self._secret)
        return text + mac.digest()

    def _watch(
        self, number: int, receipt: "asyncio.Future[None]", timeout: float
    ) -> None:
        due = self._loop.time() + timeout
        timer = self._loop.call_at(due, self._on_time, number, timeout, due)
        self._awaited[number] = receipt, timer

    def _on_time(self, number: int, timeout: float, due: float) -> None:
        if self._loop.time() > due + STALL:  # the process was stopped
            self._watch(number, self._awaited[number][0], timeout)
        else:
            after_reading(self._loop, lambda: self._end(number, ReceiptLate()))

    def _end(self, number: int, error: Exception | None = None) -> None:
        receipt, timer = self._awaited.pop(number, (None, None))
        if receipt is None or timer is None:  # a pong was read before the timeout
            return
        timer.cancel()
        if receipt.done():  # cancelled
            return
        if error is None:
            receipt.set_result(None)
        else:
            receipt.set_exception(error)
            receipt.exception()  # no warning if nobody awaits it any more
