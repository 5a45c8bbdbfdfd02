"""Wraps a backend: records its connections in Redis, and stops what others have ended.

The moments are those of the journal (`backends.journal`): an id is written before the
first event leaves, and removed when the disconnect event was accepted or given up.
"""

import asyncio
from collections.abc import Awaitable, Collection, Iterable

from backends import (
    Backend,
    BackendError,
    Closure,
    Connection,
    ConnectionRefused,
    Handshake,
    chosen,
)
from backends.cluster.lease import Lease
from backends.cluster.reaper import Reaper
from backends.cluster.stall import StallHold
from backends.wrapper import BackendWrapper

SERVICE_RESTART = 1012  # IANA's registry of close codes: clients reconnect at once


class LeasedBackend(BackendWrapper):
    """A backend whose connections are recorded by `lease`."""

    def __init__(
        self, backend: Backend, lease: Lease, hold: StallHold, reaper: Reaper
    ) -> None:
        super().__init__(backend)
        self._lease = lease
        self._hold = hold
        self._reaper = reaper
        self._later = 0  # messages that wait for the end of the hold
        self._closing = False
        # Connections whose disconnect event others have sent, until they end here.
        self._fenced: set[str] = set()
        # The tasks that send disconnect events, by the connection's id.
        self._ending: dict[str, asyncio.Task[None] | None] = {}
        self.descriptors += DESCRIPTORS

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Record the connection, then ask the backend."""
        while self._hold.active:
            await self._hold.passed()
        written = self._lease.ids.add(connection.id)
        if written is not None:
            await written
        try:
            subprotocol = await chosen(self._backend.connect(connection, handshake))
            if connection.id in self._fenced:
                raise ConnectionRefused(503)
            return subprotocol
        except ConnectionRefused:
            self._lease.ids.remove(connection.id)
            self._fenced.discard(connection.id)
            raise

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Give the message to the backend, after a hold in the order of the calls."""
        if self._hold.active or self._later:
            self._later += 1
            passed = self._hold.passed()
            passed.add_done_callback(self._on_passed)
            return self._message_later(connection, message, passed)
        if self._fenced and connection.id in self._fenced:
            return None
        return self._backend.message(connection, message)

    def _on_passed(self, passed: "asyncio.Future[None]") -> None:
        self._later -= 1

    async def _message_later(
        self,
        connection: Connection,
        message: str | bytes,
        passed: "asyncio.Future[None]",
    ) -> None:
        await passed
        if connection.id not in self._fenced:
            taken = self._backend.message(connection, message)
            if taken is not None:
                await taken

    async def disconnect(self, connection: Connection, closure: Closure) -> None:
        """Send the disconnect event, unless others have; then remove the connection."""
        task = self._ending[connection.id] = asyncio.current_task()
        try:
            while self._hold.active:
                await self._hold.passed()
            if connection.id in self._fenced:
                return
            delivered = self._backend.disconnect(connection, closure)
            if delivered is not None:
                await delivered
        except BackendError:
            if not self._closing:  # otherwise others send it
                self._lease.ids.remove(connection.id)
            raise
        except asyncio.CancelledError:
            if connection.id not in self._fenced or task is None:
                raise
            task.uncancel()
        else:
            self._lease.ids.remove(connection.id)
        finally:
            del self._ending[connection.id]
            self._fenced.discard(connection.id)

    def fence(self, connections: Iterable[Connection], ended: Collection[str]) -> None:
        """Close all connections, and send nothing more for those in `ended`.

        Some of these are closed, but their messages or disconnect events still wait.
        """
        for connection_id in ended:
            self._fenced.add(connection_id)
            self._backend.abandon(connection_id)
            if (task := self._ending.get(connection_id)) is not None:
                task.cancel()
        for connection in connections:
            connection.close(SERVICE_RESTART, "taken for dead", "relay")

    async def drain(self, timeout: float) -> int:
        """Begin no more events of dead instances, and let the backend drain."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        await self._reaper.stop(timeout)
        return await self._backend.drain(max(0.0, deadline - loop.time()))

    async def close(self) -> None:
        """Close the backend, then give the lease back."""
        self._closing = True
        await self._reaper.close()
        await self._backend.close()
        await self._lease.release()
        await self._reaper.release()


DESCRIPTORS = 8  # for connections to Redis
