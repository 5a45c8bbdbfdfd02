"""What backends share that POST events: all but the format of connect and message.

A subclass makes the events of connects and messages. `delivery` keeps the order of
messages, `disconnects` sends the end of each connection after them.
"""

import asyncio
from collections.abc import Awaitable

from backends import (
    LOST,
    Backend,
    BackendError,
    Closure,
    Condition,
    Connection,
)
from backends.events import Ended
from backends.heartbeat import Heartbeat
from backends.http.batches import BatchDeliveries, BatchDelivery, BatchDisconnects
from backends.http.credentials import CredentialSources
from backends.http.delivery import Delivery, SingleDeliveries
from backends.http.disconnects import (
    DisconnectDelivery,
    DisconnectEvents,
    DisconnectNotification,
    log_failure,
)
from backends.http.open_connections import OpenConnections


class PostingBackend(Backend):
    """POSTs messages in order, and a disconnect event after them."""

    observes = True

    def __init__(
        self,
        events: DisconnectEvents,
        deliveries: SingleDeliveries | BatchDeliveries,
        disconnects: DisconnectDelivery | BatchDisconnects,
        open_connections: OpenConnections,
        credentials: CredentialSources,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self._disconnect_events = events
        self._deliveries = deliveries
        self._disconnects = disconnects
        self._open_connections = open_connections
        self._credentials = credentials
        self._heartbeat = heartbeat
        self._observer = deliveries.observer
        self._client = deliveries.client
        self._breaker = deliveries.breaker
        self.descriptors = self._client.max_connections
        self.takes_many = isinstance(deliveries, BatchDeliveries)
        # By id of each connection that has sent a message, until its requests ended.
        self._by_id: dict[str, Delivery | BatchDelivery] = {}
        # One for each connection whose requests outlive it; awaited by drain(),
        # cancelled by close().
        self._ending: set[asyncio.Task[None]] = set()
        self.reload()
        open_connections.start_recovery()

    def disconnect(
        self, connection: Connection, closure: Closure
    ) -> Awaitable[None] | None:
        """Post to `--disconnecturi`; held requests end a little later."""
        delivery = self._by_id.get(connection.id)
        events = self.disconnect_events(connection)
        if self._disconnects.target is None and (
            delivery is None or not (delivery.busy or delivery.holding)
        ):
            self._by_id.pop(connection.id, None)
            self._open_connections.remove(connection.id)
            return None
        ended = Ended(
            connection.id, closure, connection.trace, connection.backend_state
        )
        notification = DisconnectNotification(events, ended, delivery)
        if delivery is None:
            return self._notify(notification)
        delivery.disconnected = True
        return self._notify_after(delivery, notification)

    async def _notify_after(
        self,
        delivery: Delivery | BatchDelivery,
        notification: DisconnectNotification,
    ) -> None:
        """Deliver the disconnect event of a connection that has sent messages."""
        try:
            await self._notify(notification)
            if self._disconnects.target is not None:
                delivery.on_disconnect_answered()
        finally:
            if delivery.holding or delivery.failures != notification.failures:
                ending = asyncio.create_task(self._end(delivery, notification))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
            else:
                self._by_id.pop(notification.connection_id, None)

    def disconnect_events(self, connection: Connection) -> DisconnectEvents:
        """Return what makes the disconnect event of a connection that has ended."""
        return self._disconnect_events

    async def _notify(self, notification: DisconnectNotification) -> None:
        """Deliver a disconnect event; raises `BackendError` if that fails."""
        try:
            await self._disconnects.deliver(notification)
        except BackendError:
            if not self._disconnects.closing:  # otherwise the next start sends it
                self._open_connections.remove(notification.connection_id)
            raise
        self._open_connections.remove(notification.connection_id)

    async def _end(
        self,
        delivery: Delivery | BatchDelivery,
        notification: DisconnectNotification,
    ) -> None:
        """Wait for held requests, then abandon them; retry those that fail before."""
        try:
            while await delivery.until_failure(notification.failures):
                # The backend may have cleaned up before that message came.
                notification = notification.again()
                try:
                    await self._notify(notification)
                except BackendError as error:
                    log_failure(notification.connection_id, error)
        finally:
            delivery.end()
            self._by_id.pop(notification.connection_id, None)

    async def lost(self, connection_id: str, instance: str) -> None:
        """Post the disconnect event of a dead run's connection."""
        ended = Ended(connection_id, LOST, instance=instance)
        await self._disconnects.deliver(
            DisconnectNotification(self._disconnect_events, ended)
        )

    def abandon(self, connection_id: str) -> None:
        """Drop what waits, and abandon what is unanswered."""
        self._open_connections.remove(connection_id)
        if (delivery := self._by_id.pop(connection_id, None)) is not None:
            delivery.end()

    def rename(self, instance: str) -> None:
        """Name another instance in heartbeats and the journal."""
        self._open_connections.rename(instance)
        if self._heartbeat is not None:
            self._heartbeat.rename(instance)

    def called_back(self, connection: Connection) -> None:
        """Record that the backend has seen this connection's earlier messages."""
        if (delivery := self._by_id.get(connection.id)) is not None:
            delivery.called_back()

    def condition(self) -> Condition:
        """Return the condition; `away` is set while the breaker is open."""
        return Condition(
            self._breaker.open_for(),
            self._breaker.untried,
            self._deliveries.overdue,
            self._client.open,
            self._breaker.cause,
        )

    def reload(self) -> None:
        """Read secrets, headers and certificates again; if one fails, change none."""
        credentials = self._credentials.read()
        self._deliveries.requests.set_credentials(
            credentials.headers, credentials.signer
        )
        self._client.trust(credentials.tls)
        if self._heartbeat is not None:
            self._heartbeat.client.trust(credentials.tls)

    async def drain(self, timeout: float) -> int:
        """Wait for held requests; those that fail meanwhile are retried.

        Disconnect events of earlier runs that are being sent may end first, so that the
        next start does not repeat them.
        """
        deadline = self._client.loop.time() + timeout
        await self._open_connections.stop(timeout)
        if self._ending:
            left = max(0.0, deadline - self._client.loop.time())
            await asyncio.wait(self._ending, timeout=left)
        return self._deliveries.failed

    async def close(self) -> None:
        """Close every connection to the backend.

        The next start sends the remaining disconnect events.
        """
        self._disconnects.closing = True
        self._deliveries.close()
        ending = list(self._ending)
        for task in ending:
            task.cancel()
        await self._open_connections.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await self._client.close()
        if self._heartbeat is not None:
            await self._heartbeat.close()
        self._open_connections.close()
