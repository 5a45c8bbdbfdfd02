"""ApiGatewayBackend, and what makes it from the options."""

from collections.abc import Awaitable
from pathlib import Path

from tornado.options import options

from backends import Connection, ConnectionRefused, Handshake, Relay
from backends.apigateway.answers import (
    FORBIDDEN,
    INVOCATION_RULES,
    Answers,
    error_frame,
    keep_answer,
)
from backends.apigateway.authorizer import Authorizer
from backends.apigateway.decisions import Decisions
from backends.apigateway.events import Caller, ConnectionEnd, FunctionEvents
from backends.apigateway.functions import (
    FunctionClient,
    FunctionDeliveries,
    function_limits,
    invoke_timeouts,
    make_function_client,
    make_no_breaker,
)
from backends.apigateway.routes import Routes
from backends.apigateway.settings import Settings, make_settings
from backends.apigateway.trial import FunctionTrial
from backends.events import Event
from backends.http import credential_sources
from backends.http.attempts import Attempts
from backends.http.check import HTTPCheck
from backends.http.credentials import CredentialSources
from backends.http.delivery import Delivery
from backends.http.disconnects import DisconnectDelivery, DisconnectEvents
from backends.http.open_connections import OpenConnections, make_state
from backends.http.posting import PostingBackend
from backends.http.request import RequestWriter


class ApiGatewayBackend(PostingBackend):
    """Invokes functions as API Gateway does.

    Without `authorizer` nobody is asked before `$connect`.
    """

    wants_fields = True

    def __init__(
        self,
        events: FunctionEvents,
        routes: Routes,
        authorizer: Authorizer | None,
        decisions: Decisions,
        deliveries: FunctionDeliveries,
        disconnects: DisconnectDelivery,
        open_connections: OpenConnections,
        credentials: CredentialSources,
    ) -> None:
        super().__init__(
            events, deliveries, disconnects, open_connections, credentials
        )
        self._events = events
        self._routes = routes
        self._authorizer = authorizer
        self._decisions = decisions
        self._functions = deliveries
        self._callers: dict[str, Caller] = {}  # by id of each accepted connection

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Ask the authorizer, then `$connect`; without them, accept every client."""
        caller = self._events.caller(connection, handshake)
        if self._authorizer is not None:
            context = await self._authorizer.ask(connection.id, caller, handshake)
            caller = caller._replace(authorizer=context)
        self._open_connections.add(connection.id)
        self._callers[connection.id] = caller
        try:
            return await self._decisions.ask(connection.id, caller, handshake)
        except ConnectionRefused:
            self._open_connections.remove(connection.id)
            self._callers.pop(connection.id, None)
            raise

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Invoke the function of the message's route."""
        delivery = self._by_id.get(connection.id)
        if delivery is None:
            delivery = self._by_id[connection.id] = self._functions.new(connection)
        assert isinstance(delivery, Delivery)
        delivery.number += 1
        key = self._routes.key_of(message)
        event = self._events.message(
            connection, self._callers[connection.id], delivery.number, key, message
        )
        target = self._routes.target_of(key)
        if target is None:  # there is no $default
            return self._forbid(connection, event)
        return delivery.post(event, target)

    def _forbid(
        self, connection: Connection, event: Event
    ) -> Awaitable[None] | None:
        self._observer.ended("message", connection.id, "refused")
        frame = error_frame(FORBIDDEN, connection.id, event)
        return self._functions.answers.send(connection, frame)

    def called_back(self, connection: Connection) -> None:
        """Do nothing: no invocation is abandoned."""

    def abandon(self, connection_id: str) -> None:
        """Forget a connection whose end another instance has sent."""
        super().abandon(connection_id)
        self._callers.pop(connection_id, None)

    def disconnect_events(self, connection: Connection) -> DisconnectEvents:
        """Return what makes the connection's last event."""
        return ConnectionEnd(self._events, self._callers.pop(connection.id, None))


def make_check(relay: Relay) -> HTTPCheck:
    """Make the checks of `socketdock check`, from the options."""
    settings = make_settings(relay)
    return HTTPCheck(
        settings.targets,
        credential_sources(*settings.targets.values()).read().tls,
        connect_timeout=options.backend_connect_timeout,
        certificates=[options.backend_cert] if options.backend_cert else [],
        state_dir=Path(options.state_dir) if options.state_dir else None,
        descriptors=options.max_backend_connections,
        sends_disconnects=settings.routes.disconnect is not None,
    )


def make_trial(relay: Relay) -> FunctionTrial:
    """Make the test invocations of `socketdock check --send`, from the options."""
    settings = make_settings(relay)
    targets = settings.targets.values()
    credentials = credential_sources(*targets).read()
    requests = RequestWriter(relay.version)
    requests.set_credentials(credentials.headers, credentials.signer)
    client = make_function_client(targets)
    client.trust(credentials.tls)
    return FunctionTrial(
        settings,
        make_events(relay, settings),
        client,
        make_attempts(relay, client, requests),
        invoke_timeouts(),
    )


def make_events(relay: Relay, settings: Settings) -> FunctionEvents:
    """Make what makes the events of an API."""
    return FunctionEvents(
        relay, settings.stage, settings.api_id, settings.domain_name
    )


def make_attempts(
    relay: Relay, client: FunctionClient, requests: RequestWriter
) -> Attempts:
    """Make what invokes functions for all but messages."""
    return Attempts(
        client,
        requests,
        make_no_breaker(None),
        relay.observer,
        INVOCATION_RULES,
        keep_answer,
    )


def make_backend(relay: Relay) -> ApiGatewayBackend:
    """Make the backend for `--backend=apigateway`, from the options."""
    settings = make_settings(relay)
    routes, targets = settings.routes, settings.targets.values()
    events = make_events(relay, settings)
    client = make_function_client(targets)
    requests = RequestWriter(relay.version)
    breaker = make_no_breaker(relay.hold)
    attempts = make_attempts(relay, client, requests)
    timeouts = invoke_timeouts()
    authorizer = None
    if settings.authorizer is not None:
        authorizer = Authorizer(
            settings.authorizer, settings.identity, events, attempts, timeouts
        )
    assert relay.executor is not None
    disconnects = DisconnectDelivery(
        routes.disconnect,
        attempts,
        breaker,
        options.disconnect_timeout,
        relay.observer,
        options.function_retries,
    )
    state = make_state(relay.instance, routes.disconnect)
    return ApiGatewayBackend(
        events,
        routes,
        authorizer,
        Decisions(routes.connect, events, attempts, timeouts, relay.observer),
        FunctionDeliveries(
            client,
            requests,
            breaker,
            routes.function,
            function_limits(),
            relay.observer,
            Answers(relay.executor, options.route_response),
        ),
        disconnects,
        OpenConnections(state, events, disconnects, relay.dead_runs),
        credential_sources(*targets),
    )
