"""The `http` backend: sends each event as a POST.

For a message, `HTTPBackend.message` makes the event (`backends.events`), `delivery`
keeps the order, `request` writes each attempt, and `backends.client` sends it.
`posting` has what does not depend on the format of events.
"""

from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tornado.options import options

from backends import Choice, Connection, ConnectionRefused, Handshake, Outcome, Relay
from backends.breaker import make_breaker
from backends.client import make_client
from backends.events import EventWriter
from backends.heartbeat import CONNECTIONS, Heartbeat
from backends.http.attempts import Attempts
from backends.http.batches import (
    BatchDeliveries,
    BatchDisconnects,
    LaneContext,
    batch_limits,
    boot_id_of,
)
from backends.http.credentials import CredentialSources
from backends.http.decisions import Decisions
from backends.http.deliveries import delivery_limits
from backends.http.delivery import SingleDeliveries
from backends.http.disconnects import DisconnectDelivery
from backends.http.open_connections import OpenConnections, make_state
from backends.http.posting import PostingBackend
from backends.http.replies import make_replies
from backends.http.request import RequestWriter
from backends.http.targets import make_targets
from backends.target import Target

if TYPE_CHECKING:
    from backends.http.check import HTTPCheck
    from backends.http.trial import HTTPTrial

# The shared modules whose options this backend reads.
OPTION_MODULES = (
    "backends.breaker",
    "backends.client",
    "backends.heartbeat",
    "backends.journal",
)

RETRY_AFTER = "1"  # seconds, for clients rejected while the backend is unreachable


class HTTPBackend(PostingBackend):
    """POSTs events to an HTTP service."""

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
        super().__init__(
            events, deliveries, disconnects, open_connections, credentials, heartbeat
        )
        self._events = events
        self._decisions = decisions
        self.wants_headers = decisions.target is not None

    def connect(self, connection: Connection, handshake: Handshake) -> Choice:
        """Ask `--connecturi`; without it, accept every client."""
        if self._decisions.target is None:
            self._open_connections.add(connection.id)
            return None
        return self._ask(connection, handshake)

    async def _ask(self, connection: Connection, handshake: Handshake) -> str | None:
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

    def rename(self, instance: str) -> None:
        """Name another instance in events, too."""
        super().rename(instance)
        self._events.rename(instance)

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


def make_check(relay: Relay) -> "HTTPCheck":
    """Make the checks of `socketdock check`, from the options."""
    from backends.http.check import HTTPCheck

    targets = make_targets(relay)
    return HTTPCheck(
        by_option(targets),
        credential_sources(*targets.values()).read().tls,
        connect_timeout=options.backend_connect_timeout,
        certificates=[options.backend_cert] if options.backend_cert else [],
        state_dir=Path(options.state_dir) if options.state_dir else None,
        descriptors=options.max_backend_connections,
        sends_disconnects=targets["disconnect"] is not None,
    )


def make_trial(relay: Relay) -> "HTTPTrial":
    """Make the test events of `socketdock check --send`, from the options."""
    from backends.http.trial import HTTPTrial

    targets = make_targets(relay)
    credentials = credential_sources(*targets.values()).read()
    requests = RequestWriter(relay.version)
    requests.set_credentials(credentials.headers, credentials.signer)
    client = make_client()
    client.trust(credentials.tls)
    return HTTPTrial(
        relay,
        by_option(targets),
        client,
        Attempts(client, requests, make_breaker(None), relay.observer),
        make_replies(relay),
        {
            "--connecturi": options.handshake_timeout,
            "--messageuri": options.backend_timeout,
        },
    )


def by_option(targets: Mapping[str, Target | None]) -> dict[str, Target]:
    """Return the targets that are set, by their option."""
    return {f"--{name}uri": t for name, t in targets.items() if t is not None}


def make_backend(relay: Relay) -> HTTPBackend:
    """Make the backend for `--backend=http`, from the options."""
    targets = make_targets(relay)
    client = make_client()
    events = EventWriter(relay)
    breaker = make_breaker(relay.hold)
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
        OpenConnections(state, events, disconnects, relay.dead_runs),
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
