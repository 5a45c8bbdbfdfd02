"""The `http` backend: sends each event as a POST.

For a message, `HTTPBackend.message` makes the event (`backends.events`), `delivery`
keeps the order, `request` writes each attempt, and `backends.client` sends it.
"""

import asyncio
from collections.abc import Awaitable
from pathlib import Path

from tornado.options import options

from backends import (
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
from backends.breaker import Breaker, breaker_settings
from backends.client import make_client
from backends.events import Ended, EventWriter
from backends.heartbeat import CONNECTIONS, Heartbeat
from backends.http.attempts import Attempts
from backends.http.batches import (
    BatchDeliveries,
    BatchDelivery,
    BatchDisconnects,
    LaneContext,
    batch_limits,
    boot_id_of,
)
from backends.http.check import HTTPCheck
from backends.http.credentials import CredentialSources
from backends.http.decisions import Decisions
from backends.http.deliveries import delivery_limits
from backends.http.delivery import Delivery, SingleDeliveries
from backends.http.disconnects import (
    DisconnectDelivery,
    DisconnectNotification,
    log_failure,
)
from backends.http.open_connections import OpenConnections, make_state
from backends.http.replies import make_replies
from backends.http.request import RequestWriter
from backends.http.targets import make_targets
from backends.target import Target

# The shared modules whose options this backend reads.
OPTION_MODULES = (
    "backends.breaker",
    "backends.client",
    "backends.heartbeat",
    "backends.journal",
)

RETRY_AFTER = "1"  # seconds, for clients rejected while the backend is unreachable


class HTTPBackend(Backend):
    """POSTs events to an HTTP service."""

    observes = True

    def __init__(
        self,
        events: EventWriter,
        decisions: Decisions,
        deliveries: SingleDeliveries | BatchDeliveries,
        disconnects: DisconnectDelivery | BatchDisconnects,
        open_connections: OpenConnections,
        credentials: CredentialSources,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self._events = events
        self._decisions = decisions
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

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Ask `--connecturi`; without it, accept every client."""
        if self._decisions.target is None:
            self._open_connections.add(connection.id)
            return None
        if not self._breaker.take():  # no connect event was sent: no other follows
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER})
        self._open_connections.add(connection.id)
        event = self._events.connect(connection.id, handshake)
        outcome: Outcome = "failed"
        try:
            subprotocol = await self._decisions.ask(
                connection.id, event, handshake.subprotocols
            )
            outcome = "delivered"
            return subprotocol
        except ConnectionRefused:
            outcome = "refused"
            self._open_connections.remove(connection.id)
            raise
        finally:
            self._observer.ended("connect", connection.id, outcome)

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Post to `--messageuri`; see `Backend.message` for the returned value."""
        delivery = self._by_id.get(connection.id)
        if delivery is None:
            delivery = self._by_id[connection.id] = self._deliveries.new(connection)
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
        """Post to `--disconnecturi`; held requests end a little later."""
        delivery = self._by_id.get(connection.id)
        ended = Ended(
            connection.id, closure, connection.trace, connection.backend_state
        )
        notification = DisconnectNotification(self._events, ended, delivery)
        if delivery is None:
            await self._notify(notification)
            return
        delivery.disconnected = True
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
                del self._by_id[connection.id]

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
            del self._by_id[notification.connection_id]

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


def credential_sources(*targets: Target | None) -> CredentialSources:
    """Return the credentials' sources for events to `targets`, from the options."""
    return CredentialSources(
        https=any(target and target.scheme == "https" for target in targets),
        webhook_secrets=options.webhook_secret,
        webhook_secret_file=options.webhook_secret_file,
        headers_file=options.backend_headers_file,
        ca=options.backend_ca,
        cert=options.backend_cert,
        key=options.backend_key,
    )


def make_check(relay: Relay) -> HTTPCheck:
    """Make the checks of `socketdock check`, from the options."""
    targets = make_targets(relay)
    return HTTPCheck(
        {f"--{name}uri": t for name, t in targets.items() if t is not None},
        credential_sources(*targets.values()).read().tls,
        connect_timeout=options.backend_connect_timeout,
        certificates=[options.backend_cert] if options.backend_cert else [],
        state_dir=Path(options.state_dir) if options.state_dir else None,
        descriptors=options.max_backend_connections,
    )


def make_backend(relay: Relay) -> HTTPBackend:
    """Make the backend for `--backend=http`, from the options."""
    targets = make_targets(relay)
    client = make_client()
    events = EventWriter(relay)
    breaker = Breaker(breaker_settings())
    requests = RequestWriter(relay.version)
    attempts = Attempts(client, requests, breaker, relay.observer)
    replies = make_replies(relay)
    deliveries: SingleDeliveries | BatchDeliveries
    disconnects: DisconnectDelivery | BatchDisconnects
    if targets["batch"] is not None:
        deliveries = BatchDeliveries(
            LaneContext(
                client,
                requests,
                breaker,
                targets["batch"],
                replies,
                relay.observer,
                batch_limits(),
                boot_id_of(relay.instance),
                relay.sample,
            ),
            options.batch_lanes,
        )
        disconnects = deliveries.disconnects(options.disconnect_timeout)
    else:
        assert targets["message"] is not None
        deliveries = SingleDeliveries(
            client,
            requests,
            breaker,
            targets["message"],
            delivery_limits(),
            relay.observer,
            None if replies.mode == "off" else replies,
        )
        disconnects = DisconnectDelivery(
            targets["disconnect"],
            attempts,
            breaker,
            options.disconnect_timeout,
            relay.observer,
        )
    state = make_state(relay.instance, disconnects.target)
    return HTTPBackend(
        events,
        Decisions(targets["connect"], attempts, replies, options.handshake_timeout),
        deliveries,
        disconnects,
        OpenConnections(state, events, disconnects),
        credential_sources(*targets.values()),
        make_heartbeat(targets["instance"], requests, relay),
    )


def make_heartbeat(
    target: Target | None, requests: RequestWriter, relay: Relay
) -> Heartbeat | None:
    """Make the heartbeat to `target`, which starts on the next turn of the loop."""
    if target is None:
        return None
    return Heartbeat(target, make_client(CONNECTIONS), requests.write, relay)
