"""Actions on one connection: find, send, close, describe.

They return an `Outcome` and know no HTTP, so that HTTP callbacks, the console and
other transports share them.
"""

import asyncio
import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from backends import ConnectionClosed, Initiator, SendBufferFull
from backends.deadlines import RunningTime
from handlers.clients.connection import ClientConnection, Connections
from handlers.clients.receipts import MAX_AWAITED, ReceiptLate
from handlers.websocket.frames import MessageFrame


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """The result of an action: an HTTP status code and a sentence.

    `retry_after`: seconds after which a retry may succeed. `problem` is the type of
    its problem document, if it has one.
    """

    status: HTTPStatus
    detail: str
    retry_after: int | None = None
    problem: str | None = None

    @property
    def statuses(self) -> int:
        """Number of statuses of a bulk callback: none."""
        return 0


OK = Outcome(HTTPStatus.OK, "OK")
# The action follows the handshake.
ACCEPTED = Outcome(HTTPStatus.ACCEPTED, "Accepted")
GONE = Outcome(HTTPStatus.GONE, "Connection is not open on this instance.")
FULL = Outcome(
    HTTPStatus.TOO_MANY_REQUESTS,
    "Send buffer of this client is full.",
    retry_after=1,  # a slow client may have read by then
)
TOO_MANY_RECEIPTS = Outcome(
    HTTPStatus.TOO_MANY_REQUESTS,
    f"{MAX_AWAITED} receipts of this client are awaited already.",
    retry_after=1,
)
UNCONFIRMED = Outcome(
    HTTPStatus.GATEWAY_TIMEOUT,
    "The client has not confirmed the frame in time; it may have received it.",
)


def find(
    connection_id: str,
    connections: Connections,
    on_asked: Callable[[ClientConnection], None],
) -> ClientConnection | None:
    """Return the connection if it is connecting or open.

    `on_asked` is called for a closing one, too.
    """
    connection = connections.get(connection_id)
    if connection is None:
        return None
    on_asked(connection)
    return connection if connection.state in ("connecting", "open") else None


class Sending:
    """A send whose outcome is not known yet; await it for the outcome.

    `ended` is done, or fails, without being awaited: when the kernel has taken the
    frame, or the client has confirmed it. `accepted` is the outcome then, and `late`
    the one after `timeout` seconds.
    """

    __slots__ = ("accepted", "ended", "late", "timeout")

    def __init__(
        self,
        ended: "asyncio.Future[None]",
        timeout: float,
        accepted: Outcome,
        late: Outcome = GONE,
    ) -> None:
        self.ended = ended
        self.timeout = timeout
        self.accepted = accepted
        self.late = late

    @property
    def outcome(self) -> Outcome:
        """The outcome if nobody waits any longer."""
        ended = self.ended
        if not ended.done() or ended.cancelled():
            return self.late
        error = ended.exception()
        if error is None:
            return self.accepted
        return self.late if isinstance(error, ReceiptLate) else GONE

    def __await__(self) -> Generator[Any, None, Outcome]:
        yield from all_ended((self,)).__await__()
        return self.outcome


async def all_ended(sendings: Sequence[Sending]) -> None:
    """Wait until all have ended, or for the longest of their timeouts."""
    longest = max(sending.timeout for sending in sendings)
    with contextlib.suppress(TimeoutError):
        async with RunningTime(asyncio.get_running_loop(), longest):
            for sending in sendings:
                with contextlib.suppress(ConnectionClosed, ReceiptLate):
                    await sending.ended


def send(
    connection: ClientConnection,
    frame: MessageFrame,
    limited: bool = True,
    receipt: float | None = None,
) -> Outcome | Sending:
    """Send, as `ClientConnection.send_frame`; return the outcome, now or later.

    `receipt`: seconds that the client has to confirm it; None: it need not.
    """
    outcome = ACCEPTED if connection.state == "connecting" else OK
    if receipt is not None and connection.awaits_receipts >= MAX_AWAITED:
        return TOO_MANY_RECEIPTS
    try:
        sent = connection.send_frame(frame, limited)
        if receipt is not None and outcome is OK:
            return Sending(connection.receipt(receipt), receipt, OK, UNCONFIRMED)
    except SendBufferFull:
        return FULL
    except ConnectionClosed:
        return GONE
    if sent is None:
        return outcome
    return Sending(sent, connection.send_timeout, outcome)


def close(
    connection: ClientConnection, code: int, reason: str, initiator: Initiator
) -> Outcome:
    """Start the closing handshake; `reason` is at most 123 bytes of UTF-8."""
    outcome = ACCEPTED if connection.state == "connecting" else OK
    connection.close(code, reason, initiator)
    return outcome


def describe(connection: ClientConnection) -> dict[str, Any]:
    """Return the body of `GET /socket/<id>`."""
    return {
        "connection_id": connection.id,
        "state": connection.state,
        "connected_at": connection.connected_at.isoformat(),
        "last_active_at": connection.last_active_at.isoformat(),
        "remote_ip": connection.remote_ip,
        "user_agent": connection.user_agent,
        "subprotocol": connection.subprotocol,
        "messages_in": connection.messages_in,
        "messages_out": connection.messages_out,
        "bytes_in": connection.bytes_in,
        "bytes_out": connection.bytes_out,
    }
