"""The backend itself: gives each event of a connection to the part that adds it."""

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass

from tornado.options import Error as OptionError

from backends import (
    LOST,
    Backend,
    BackendError,
    Closure,
    Condition,
    Connection,
    ConnectionRefused,
    Handshake,
    Outcome,
    Relay,
)
from backends.deadlines import RunningTime
from backends.events import Ended, Event, EventWriter
from backends.http.disconnects import DisconnectNotification
from backends.http.open_connections import OpenConnections
from backends.journal import StateDirectory
from backends.redis.commands import CommandStream
from backends.redis.delivery import StreamDelivery
from backends.redis.entry import NotAdded, Reports
from backends.redis.janitor import Janitor
from backends.redis.keys import Keys
from backends.redis.returns import Returns
from backends.redis.single import SingleEvent, StreamDisconnects
from backends.redis.verdicts import Verdicts
from backends.redis.writer import StreamWriter
from backends.redis_client import RedisClient

RETRY_AFTER = "1"  # seconds, for clients rejected during an outage
START_TIMEOUT = 5.0  # seconds for the first connection to Redis


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """The number of partitions, most entries of each, and times in seconds."""

    partitions: int
    backlog: int
    handshake_timeout: float
    delivery_timeout: float
    disconnect_timeout: float


class RedisBackend(Backend):
    """Adds events to streams, and carries out the commands of this instance's one."""

    observes = True
    takes_many = True
    descriptors = 8  # its connections to Redis, and those of Sentinels and a Cluster

    def __init__(
        self,
        relay: Relay,
        client: RedisClient,
        keys: Keys,
        settings: StreamSettings,
        verdicts: Verdicts | None,
        state: StateDirectory | None,
    ) -> None:
        """Without `verdicts` every client is accepted.

        `state` keeps the ids of open connections; None: they are not kept.
        """
        self._observer = relay.observer
        self._client = client
        self._keys = keys
        self._settings = settings
        self._verdicts = verdicts
        commands = keys.commands(relay.instance)
        self._events = EventWriter(relay, commands)
        self._reports = Reports(relay.observer)
        self._writer = StreamWriter(
            client,
            keys,
            settings.partitions,
            settings.backlog,
            min(settings.delivery_timeout, settings.disconnect_timeout),
            relay.hold,
        )
        self._disconnects = StreamDisconnects(
            self._writer, settings.disconnect_timeout, relay.observer
        )
        self._open_connections = OpenConnections(
            state, self._events, self._disconnects, relay.dead_runs
        )
        self._returns = Returns(self._writer, self._events)
        assert relay.executor is not None
        self._commands = CommandStream(
            client, commands, relay.executor, relay.observer, self._returns.add
        )
        self._commands.on_failed = self._writer.probe
        self._janitor = Janitor(client, keys, relay.instance, settings.partitions)
        # By id of each connection that has sent a message.
        self._by_id: dict[str, StreamDelivery] = {}
        self.reload()

    async def start(self) -> None:
        """Connect, and compare the number of partitions.

        Raises `OptionError` if it differs. If Redis cannot be reached, the relay starts
        nevertheless, and rejects clients.
        """
        self._writer.begin()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT):
                await asyncio.shield(self._writer.tried)
        if (stored := self._writer.wrong_count) is not None:
            await self.close()
            raise OptionError(
                f"--redis_partitions={self._settings.partitions}, but"
                f" {self._keys.partitions} is {stored}: give the same number, or grow"
                " it with `socketdock redis-partitions`"
            )
        await self._commands.begin()
        self._janitor.begin()
        self._open_connections.start_recovery()

    # Events.

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Ask `--connecturi`, or add a connect event; reject during an outage."""
        if self._writer.away_for() is not None:
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER})
        event = self._events.connect(connection.id, handshake)
        outcome: Outcome = "failed"
        try:
            subprotocol = None
            if self._verdicts is None:
                await self._add_connect(connection.id, event)
            else:
                subprotocol = await self._verdicts.ask(
                    connection.id, event, handshake.subprotocols, self._open_connections
                )
            outcome = "delivered"
            return subprotocol
        except ConnectionRefused:
            outcome = "refused"
            raise
        finally:
            self._observer.ended("connect", connection.id, outcome)

    async def _add_connect(self, connection_id: str, event: Event) -> None:
        """Add a connect event.

        Raises `ConnectionRefused` if it was certainly not added, and `BackendError` if
        it may have been.
        """
        self._open_connections.add(connection_id)
        single = SingleEvent("connect", connection_id, 0.0, self._reports)
        try:
            async with RunningTime(self._writer.loop, self._settings.handshake_timeout):
                await single.send(self._writer, event)
        except NotAdded:
            self._open_connections.remove(connection_id)
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER}) from None
        except TimeoutError:
            error = BackendError("Redis has not added the connect event in time")
            single.give_up(error)
            raise error from None

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Add to the stream; see `Backend.message` for the returned value."""
        delivery = self._by_id.get(connection.id)
        if delivery is None:
            delivery = self._by_id[connection.id] = StreamDelivery(
                connection, self._writer, self._settings.delivery_timeout, self._reports
            )
        delivery.number += 1
        return delivery.post(
            self._events.message(
                connection.id,
                delivery.number,
                message,
                connection.trace,
                connection.backend_state,
            )
        )

    async def disconnect(self, connection: Connection, closure: Closure) -> None:
        """Add a disconnect event: all messages are added or given up."""
        self._by_id.pop(connection.id, None)
        ended = Ended(
            connection.id, closure, connection.trace, connection.backend_state
        )
        try:
            await self._disconnects.deliver(DisconnectNotification(self._events, ended))
        except BackendError:
            if self._disconnects.closing:
                raise  # the next start sends it
            self._open_connections.remove(connection.id)
            raise
        self._open_connections.remove(connection.id)

    async def lost(self, connection_id: str, instance: str) -> None:
        """Add the disconnect event of a dead run's connection."""
        ended = Ended(connection_id, LOST, instance=instance)
        await self._disconnects.deliver(DisconnectNotification(self._events, ended))

    def abandon(self, connection_id: str) -> None:
        """Add no more events of a connection."""
        self._open_connections.remove(connection_id)
        delivery = self._by_id.pop(connection_id, None)
        if delivery is not None:
            delivery.end()

    def rename(self, instance: str) -> None:
        """Name another instance in events; the stream of commands stays the same."""
        self._events.rename(instance)
        self._open_connections.rename(instance)

    # The relay's other questions.

    def condition(self) -> Condition:
        """Return the condition; `away` is set during an outage."""
        away = self._writer.away_for()
        return Condition(
            away,
            connections=int(self._writer.connected),
            cause=None if away is None else self._writer.why,
            entries=self._writer.longest,
        )

    def reload(self) -> None:
        """Read the credentials for `--connecturi` again."""
        if self._verdicts is not None:
            self._verdicts.reload()

    async def drain(self, timeout: float) -> int:
        """Return what is left in the stream of commands, and add the last events."""
        deadline = self._writer.loop.time() + timeout
        await self._commands.end(timeout)
        await self._open_connections.stop(
            max(0.0, deadline - self._writer.loop.time())
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._writer.emptied()
        return self._returns.waiting

    async def close(self) -> None:
        """Close every connection. The next start sends the remaining events."""
        self._disconnects.closing = True
        await self._commands.end(0.0)
        await self._janitor.end()
        await self._open_connections.cancel()
        await self._writer.close()
        await self._client.close()
        if self._verdicts is not None:
            await self._verdicts.close()
        self._open_connections.close()
