"""Actions on one connection: find, send, close, describe.

They return an `Outcome` and know no HTTP, so that HTTP callbacks, the console and
other transports share them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from backends import ConnectionClosed, Initiator, SendBufferFull
from backends.deadlines import RunningTime
from handlers.clients.connection import ClientConnection, Connections


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """The result of an action: an HTTP status code and a sentence.

    `retry_after`: seconds after which a retry may succeed.
    """

    status: HTTPStatus
    detail: str
    retry_after: int | None = None


OK = Outcome(HTTPStatus.OK, "OK")
# The action follows the handshake.
ACCEPTED = Outcome(HTTPStatus.ACCEPTED, "Accepted")
GONE = Outcome(HTTPStatus.GONE, "Connection is not open on this instance.")
FULL = Outcome(
    HTTPStatus.TOO_MANY_REQUESTS,
    "Send buffer of this client is full.",
    retry_after=1,  # a slow client may have read by then
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


def send(
    connection: ClientConnection, message: str | bytes
) -> Outcome | Awaitable[Outcome]:
    """Send one frame. Returns the outcome, or an awaitable of it."""
    outcome = _now_or_later(connection)
    try:
        sent = connection.send(message)
    except SendBufferFull:
        return FULL
    except ConnectionClosed:
        return GONE
    if sent is None:
        return outcome
    return _when_sent(connection, sent, outcome)


async def _when_sent(
    connection: ClientConnection, sent: "asyncio.Future[None]", outcome: Outcome
) -> Outcome:
    try:
        async with RunningTime(asyncio.get_running_loop(), connection.send_timeout):
            await sent
    except (ConnectionClosed, TimeoutError):
        return GONE
    return outcome


def close(
    connection: ClientConnection, code: int, reason: str, initiator: Initiator
) -> Outcome:
    """Start the closing handshake; `reason` is at most 123 bytes of UTF-8."""
    outcome = _now_or_later(connection)
    connection.close(code, reason, initiator)
    return outcome


def _now_or_later(connection: ClientConnection) -> Outcome:
    """Return OK, or ACCEPTED while connecting. Call it before the action."""
    return ACCEPTED if connection.state == "connecting" else OK


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
