"""A backend around another one: `handlers.telemetry.observers`, `backends.cluster`."""

from collections.abc import Awaitable

from backends import Backend, Choice, Closure, Condition, Connection, Handshake


class BackendWrapper(Backend):
    """Passes everything on to `backend`; a subclass overrides what it does itself."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.descriptors = backend.descriptors
        self.observes = backend.observes
        self.takes_many = backend.takes_many
        self.wants_headers = backend.wants_headers
        self.wants_fields = backend.wants_fields
        # Called for each callback, so without another call in between.
        self.called_back = backend.called_back  # type: ignore[method-assign]

    async def start(self) -> None:
        await self._backend.start()

    def connect(self, connection: Connection, handshake: Handshake) -> Choice:
        return self._backend.connect(connection, handshake)

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        return self._backend.message(connection, message)

    def disconnect(
        self, connection: Connection, closure: Closure
    ) -> Awaitable[None] | None:
        return self._backend.disconnect(connection, closure)

    async def lost(self, connection_id: str, instance: str) -> None:
        await self._backend.lost(connection_id, instance)

    def abandon(self, connection_id: str) -> None:
        self._backend.abandon(connection_id)

    def rename(self, instance: str) -> None:
        self._backend.rename(instance)

    def condition(self) -> Condition:
        return self._backend.condition()

    def reload(self) -> None:
        self._backend.reload()

    async def drain(self, timeout: float) -> int:
        return await self._backend.drain(timeout)

    async def close(self) -> None:
        await self._backend.close()
