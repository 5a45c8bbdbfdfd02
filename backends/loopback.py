"""The `loopback` backend: an echo server, in process, for local tests."""

from collections.abc import Awaitable

from backends import (
    Backend,
    Choice,
    Connection,
    ConnectionClosed,
    Handshake,
    Relay,
    SendBufferFull,
)


class LoopbackBackend(Backend):
    """Sends every message straight back, text as text and binary as binary."""

    wants_headers = False

    def connect(self, connection: Connection, handshake: Handshake) -> Choice:
        """Take the client's first subprotocol, as an echo server would."""
        return handshake.subprotocols[0] if handshake.subprotocols else None

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Echo; the next message is read once this one has left."""
        try:
            sent = connection.send(message)
        except ConnectionClosed:
            return None  # the client has left
        except SendBufferFull:  # by callbacks: an echo alone waits for the one before
            return self._echo_when_drained(connection, message)
        return None if sent is None else _unless_closed(sent)

    async def _echo_when_drained(
        self, connection: Connection, message: str | bytes
    ) -> None:
        await connection.drained()
        echo = self.message(connection, message)
        if echo is not None:
            await echo


async def _unless_closed(sent: Awaitable[None]) -> None:
    try:
        await sent
    except ConnectionClosed:
        pass  # the client has left


def make_backend(relay: Relay) -> LoopbackBackend:
    """The backend for `--backend=loopback`."""
    return LoopbackBackend()
