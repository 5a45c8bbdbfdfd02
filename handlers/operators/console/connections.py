"""Searches, lists, sends to and closes open connections for the console.

The relay searches, so that the page needs only the connections that it shows.
"""

import asyncio
import heapq
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from handlers.callbacks.actions import describe
from handlers.callbacks.routes import Closing, OneConnectionHandler, Sending
from handlers.clients.connection import ClientConnection, Connections
from handlers.operators.console.guarded import GuardedHandler
from handlers.operators.console.tail import Tail
from handlers.operators.guard import OperatorGuard

MAX_LISTED = 100
DEFAULT_LISTED = 50
MAX_SEARCH = 100  # characters
AT_A_TIME = 1000  # connections that are searched in one turn of the loop

# Sort keys by name; the largest comes first.
ORDERS: dict[str, Callable[[ClientConnection], Any]] = {
    "newest": lambda c: c.connected_at,
    "oldest": lambda c: -c.connected_at.timestamp(),
    "active": lambda c: c.last_active_at,
    "received": lambda c: c.messages_in,
    "sent": lambda c: c.messages_out,
    "bytes": lambda c: c.bytes_in + c.bytes_out,
}


async def search(
    connections: Iterable[ClientConnection], words: str
) -> list[ClientConnection]:
    """Return the connections that match each word.

    A word matches the beginning of the id, or any part of address, user agent or
    subprotocol.
    """
    wanted = words.lower().split()
    found = []
    for number, connection in enumerate(connections, 1):
        if not wanted or _has(connection, wanted):
            found.append(connection)
        if number % AT_A_TIME == 0:
            await asyncio.sleep(0)
    return found


def _has(connection: ClientConnection, wanted: list[str]) -> bool:
    texts = (connection.remote_ip, connection.user_agent, connection.subprotocol or "")
    text = "\n".join(texts).lower()
    return all(word in text or connection.id.startswith(word) for word in wanted)


class ConnectionsHandler(GuardedHandler):
    """`GET /console/connections?search=&sort=&limit=&state=`: matches, their number.

    Describes each as `GET /socket/<id>` does, but does not count as a callback. Adds
    the length in bytes of what the backend keeps with it, and with `state` its text.
    """

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, connections: Connections, may_show_state: bool
    ) -> None:
        super().initialize(guard)
        self.connections = connections
        self.may_show_state = may_show_state

    async def get(self) -> None:
        order = ORDERS.get(self.get_query_argument("sort", "newest"))
        limit = self.get_query_argument("limit", str(DEFAULT_LISTED))
        words = self.get_query_argument("search", "")
        if (
            order is None
            or not (limit.isascii() and limit.isdigit() and len(limit) < 4)
            or not 1 <= int(limit) <= MAX_LISTED
            or len(words) > MAX_SEARCH
        ):
            self.problem(
                HTTPStatus.BAD_REQUEST,
                f"sort is one of {', '.join(ORDERS)}; limit is 1 to {MAX_LISTED};"
                f" search has up to {MAX_SEARCH} characters.",
            )
            return
        found = await search(self.connections, words)
        self.answer(
            {
                "connections": [
                    describe(connection) | self._state(connection)
                    for connection in heapq.nlargest(int(limit), found, key=order)
                ],
                "found": len(found),
                "total": len(self.connections),
                "now": datetime.now(UTC).isoformat(),
            }
        )

    def _state(self, connection: ClientConnection) -> dict[str, Any]:
        state = connection.backend_state
        described: dict[str, Any] = {"backend_state_size": len(state or b"")}
        if self.may_show_state and self.get_query_argument("state", ""):
            described["backend_state"] = (state or b"").decode()
        return described


class OneHandler(GuardedHandler, OneConnectionHandler):
    """Base of the routes by which an operator, not the backend, uses one connection."""

    initiator = "relay"

    def initialize(  # type: ignore[override] # each route's own keywords
        self,
        guard: OperatorGuard,
        connections: Connections,
        max_body_size: int | None = None,
    ) -> None:
        super().initialize(guard)
        self.connections = connections
        if max_body_size is not None:
            self.max_body_size = max_body_size


class SendHandler(OneHandler, Sending):
    """`POST /console/connections/<id>/send`: the body becomes one frame."""


class CloseHandler(OneHandler, Closing):
    """`POST /console/connections/<id>/close`: with a code and a reason."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, connections: Connections, tail: Tail
    ) -> None:
        super().initialize(guard, connections)
        self.tail = tail

    def on_asked(self, connection: ClientConnection) -> None:
        self.tail.operator_closes(connection)
