"""Every connection of this process by its id, and the farewells still under way.

One `ConnectionMap` is made on the running IOLoop and handed to each handler by
its route; nothing else is shared between the two ends.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from handlers.websocket import ClientSocketHandler

logger = logging.getLogger(__name__)


class ConnectionMap:
    """Connections from before their handshake is decided until they close."""

    def __init__(self) -> None:
        self._connections: dict[str, ClientSocketHandler] = {}
        # Kept here so that they aren't collected while they run; awaited by drain().
        self._farewells: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.draining = False

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> "Iterator[ClientSocketHandler]":
        return iter(list(self._connections.values()))

    @property
    def farewells(self) -> int:
        """Closed connections of which the backend is still being told."""
        return len(self._farewells)

    def get(self, connection_id: str) -> "ClientSocketHandler | None":
        """The connection of that id, connecting or open or closing, or None."""
        return self._connections.get(connection_id)

    def add(self, connection: "ClientSocketHandler") -> None:
        """List a connection."""
        self._connections[connection.id] = connection

    def remove(self, connection: "ClientSocketHandler") -> None:
        """Forget a connection; nothing where it is not listed."""
        self._connections.pop(connection.id, None)
        self._changed.set()

    def say_farewell(self, farewell: Coroutine[None, None, None]) -> None:
        """Run `farewell`, which tells the backend that a connection has ended."""
        task = asyncio.get_running_loop().create_task(farewell)
        self._farewells.add(task)
        task.add_done_callback(self._on_farewell_said)

    def _on_farewell_said(self, task: asyncio.Task[None]) -> None:
        self._farewells.discard(task)
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            logger.error("telling the backend failed", exc_info=task.exception())

    async def drain(self, timeout: float) -> bool:
        """Close every connection with 1001 and wait for the farewells.

        False where `timeout` seconds were not enough; what is left is cut off.
        """
        self.draining = True
        for connection in self:
            connection.drain()
        try:
            async with asyncio.timeout(timeout):
                while self._connections or self._farewells:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.error(
                "not drained in %g s: %d connections and %d farewells are cut off",
                timeout,
                len(self._connections),
                len(self._farewells),
            )
            for connection in self:
                connection.abort()
            for task in list(self._farewells):
                task.cancel()
            return False
        return True
