"""Decisions on handshakes, which stay HTTP: `--connecturi` as by the `http` backend."""

from collections.abc import Sequence

from tornado.options import options

from backends import ConnectionRefused, Relay
from backends.breaker import Breaker, breaker_settings
from backends.client import Client, make_client
from backends.events import Event
from backends.http import credential_sources
from backends.http.attempts import Attempts
from backends.http.check import HTTPCheck
from backends.http.credentials import CredentialSources
from backends.http.decisions import Decisions
from backends.http.open_connections import OpenConnections
from backends.http.replies import make_replies
from backends.http.request import RequestWriter
from backends.http.targets import target_of

RETRY_AFTER = "1"  # seconds, for clients rejected while the backend is unreachable


class Verdicts:
    """Asks `--connecturi`, through a client of its own."""

    def __init__(
        self,
        client: Client,
        requests: RequestWriter,
        breaker: Breaker,
        decisions: Decisions,
        credentials: CredentialSources,
    ) -> None:
        self._client = client
        self._requests = requests
        self._breaker = breaker
        self._decisions = decisions
        self._credentials = credentials

    async def ask(
        self,
        connection_id: str,
        event: Event,
        offered: Sequence[str],
        open_connections: OpenConnections,
    ) -> str | None:
        """Return the subprotocol that the backend chose, or None.

        Raises `ConnectionRefused` if it refuses, and `BackendError` if there is no
        decision in time.
        """
        if not self._breaker.take():  # no connect event was sent: no other follows
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER})
        open_connections.add(connection_id)
        try:
            return await self._decisions.ask(connection_id, event, offered)
        except ConnectionRefused:
            open_connections.remove(connection_id)
            raise

    def reload(self) -> None:
        """Read secrets, headers and certificates again; if one fails, change none."""
        credentials = self._credentials.read()
        self._requests.set_credentials(credentials.headers, credentials.signer)
        self._client.trust(credentials.tls)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def make_verdicts(relay: Relay) -> Verdicts | None:
    """Return what asks `--connecturi`; None: every client is accepted.

    Raises `OptionError` for invalid options.
    """
    target = target_of("connecturi")
    if target is None:
        return None
    client, requests = make_client(), RequestWriter(relay.version)
    breaker = Breaker(breaker_settings())
    attempts = Attempts(client, requests, breaker, relay.observer)
    decisions = Decisions(
        target, attempts, make_replies(relay), options.handshake_timeout
    )
    return Verdicts(client, requests, breaker, decisions, credential_sources(target))


def make_verdicts_check() -> HTTPCheck | None:
    """Return the check of `--connecturi`; None: it is not used."""
    target = target_of("connecturi")
    if target is None:
        return None
    return HTTPCheck(
        {"--connecturi": target},
        credential_sources(target).read().tls,
        connect_timeout=options.backend_connect_timeout,
        certificates=[options.backend_cert] if options.backend_cert else [],
        state_dir=None,
        descriptors=options.max_backend_connections,
        sends_disconnects=False,
    )
