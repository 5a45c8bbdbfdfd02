"""The callback routes: HTTP requests that reach one client.

`actions` has what they do. The other direction starts in
`handlers.clients.connection`.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from tornado.web import RequestHandler

from backends import Backend, Initiator
from handlers.callbacks import actions
from handlers.callbacks.access import (
    CallbackAccess,
    Unauthorized,
    UnauthorizedHandler,
)
from handlers.callbacks.actions import GONE, Outcome
from handlers.callbacks.answering import OutcomeHandler, RepeatableHandler
from handlers.callbacks.bodies import message_of, parse_closing, receipt_of
from handlers.callbacks.openapi import OpenAPIHandler
from handlers.callbacks.peers.forwarded import Forwarded, without_key
from handlers.callbacks.repeats import Keyed, Repeats, digest_of
from handlers.clients.connection import ClientConnection, Connections
from handlers.http.application import Routes
from handlers.http.body import NotFoundHandler
from handlers.probes import LiveHandler, Readiness, ReadyHandler
from handlers.websocket.frames import CloseCode, MessageFrame

if TYPE_CHECKING:
    from handlers.callbacks.peers.forward import Forwarder

Action = Callable[[ClientConnection], Outcome | Awaitable[Outcome]]


def send_action(
    body: bytes, content_type: str, query: Mapping[str, Sequence[str]]
) -> tuple[Action, str]:
    """Return what a send does, and a word for it; `query` has the values by name.

    Raises `ValueError` with the detail for a 400.
    """
    message = message_of(body, content_type, query.get("type", ()))
    receipt = receipt_of(query.get("receipt", ()), query.get("timeout", ()))
    kind = "text" if isinstance(message, str) else "binary"
    if receipt is not None:
        kind += " with receipt"
    return partial(actions.send, frame=MessageFrame(message), receipt=receipt), kind


def close_action(body: bytes, initiator: Initiator) -> tuple[Action, str]:
    """Return what a disconnect does, and a word for it; raises as `send_action`."""
    code, reason = parse_closing(body)
    return (
        partial(actions.close, code=code, reason=reason, initiator=initiator),
        "close",
    )


class OneConnectionHandler(OutcomeHandler):
    """A request about one connection, from the backend or from an operator."""

    connections: Connections
    initiator: Initiator  # of closes by this request

    def on_asked(self, connection: ClientConnection) -> None:
        """Handle a request about `connection`."""

    def find(self, connection_id: str) -> ClientConnection | None:
        """Return the connection if it is connecting or open; else answer 410."""
        connection = actions.find(connection_id, self.connections, self.on_asked)
        if connection is None:
            self.send_outcome(GONE)
        return connection

    async def carry_out(
        self, connection_id: str, action: Action, kind: str, body: bytes
    ) -> None:
        """Carry out `action`, and answer with its outcome.

        `kind` and `body` say what it does.
        """
        self.send_outcome(await self.outcome(connection_id, action))

    async def outcome(self, connection_id: str, action: Action) -> Outcome:
        """Carry out `action`; the outcome is `GONE` without a connection."""
        connection = actions.find(connection_id, self.connections, self.on_asked)
        if connection is None:
            return GONE
        outcome = action(connection)
        return outcome if isinstance(outcome, Outcome) else await outcome


class Sending(OneConnectionHandler):
    """Sends the body as one frame."""

    async def post(self, connection_id: str) -> None:
        body = self.take_body()
        if body is None:
            return
        content_type = self.request.headers.get("Content-Type", "")
        values = {
            name: self.get_query_arguments(name, strip=False)
            for name in ("type", "receipt", "timeout")
        }
        try:
            send, kind = send_action(body, content_type, values)
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        await self.carry_out(connection_id, send, kind, body)


class Closing(OneConnectionHandler):
    """Closes with the code and reason of the body."""

    async def post(self, connection_id: str) -> None:
        body = self.take_body()
        if body is None:
            return
        try:
            close, kind = close_action(body, self.initiator)
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        await self.carry_out(connection_id, close, kind, body)


class CallbackHandler(RepeatableHandler, OneConnectionHandler):
    """A request of the backend about one connection."""

    initiator: Initiator = "backend"
    route = ""  # of requests that have an effect
    sends = False  # whether POST is a send

    def initialize(
        self,
        connections: Connections,
        backend: Backend,
        repeats: Repeats,
        max_message_size: int,
        forwarder: "Forwarder | None" = None,
    ) -> None:
        self.connections = connections
        self.backend = backend
        self.repeats = repeats
        self.max_body_size = max_message_size
        self.forwarder = forwarder

    def on_asked(self, connection: ClientConnection) -> None:
        self.backend.called_back(connection)

    async def carry_out(
        self, connection_id: str, action: Action, kind: str, body: bytes
    ) -> None:
        """Carry out `action`, once for all requests with the same key."""
        key = self.take_key()
        if key is None or await self.is_forwarded(connection_id, key, body):
            return
        if not key:
            await super().carry_out(connection_id, action, kind, body)
            return
        outcome = await self.once(
            Keyed(connection_id, self.route, key, digest_of(kind, body)),
            partial(self.outcome, connection_id, action),
        )
        if outcome is not None:
            self.send_outcome(outcome)

    async def is_forwarded(
        self, connection_id: str, key: str = "", body: bytes = b""
    ) -> bool:
        """Forward a request for a connection of another instance, and answer it.

        Returns False for one that is here, or gone.
        """
        forwarder = self.forwarder
        owner = None if forwarder is None else forwarder.owner_of(connection_id)
        if forwarder is None or owner is None:
            return False
        request = self.request
        callback = Forwarded(
            # The owner's answer to a HEAD would have no body to read.
            "GET" if request.method == "HEAD" else f"{request.method}",
            without_key(request.path, request.query),
            request.headers.get("Content-Type", ""),
            self.longest(forwarder.send_timeout),
            key,
            body,
            connection_id,
            self.traceparent,
        )
        self.respond(await forwarder.forward(owner, callback))
        return True

    def longest(self, send_timeout: float) -> float:
        """Return how many seconds the request itself may take."""
        return send_timeout


class SendHandler(CallbackHandler, Sending):
    """`POST /socket/<id>/send`: sends the body as one frame."""

    route = "send"
    sends = True

    def longest(self, send_timeout: float) -> float:
        receipt = receipt_of(
            self.get_query_arguments("receipt", strip=False),
            self.get_query_arguments("timeout", strip=False),
        )
        return max(send_timeout, receipt or 0.0)


class DisconnectHandler(CallbackHandler, Closing):
    """`POST /socket/<id>/disconnect`: closes, with a code and a reason."""

    route = "disconnect"


class ConnectionHandler(CallbackHandler):
    """`GET`, `HEAD` and `DELETE` of `/socket/<id>`."""

    async def get(self, connection_id: str) -> None:
        if await self.is_forwarded(connection_id):
            return
        if (connection := self.find(connection_id)) is None:
            return
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(actions.describe(connection)))

    head = get

    async def delete(self, connection_id: str) -> None:
        if await self.is_forwarded(connection_id):
            return
        if (connection := self.find(connection_id)) is None:
            return
        actions.close(connection, CloseCode.NORMAL_CLOSURE, "", self.initiator)
        self.clear_header("Content-Type")
        self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


class NoConnectionHandler(NotFoundHandler):
    """404 for a connection route with an invalid id."""

    detail = (
        "Invalid connection id: expected 32 lowercase hex digits, or 60 or 84 with"
        " --peer_address."
    )


def callback_routes(
    prefix: str,
    access: CallbackAccess,
    readiness: Readiness,
    version: str,
    stage: str | None = None,
    **shared: Any,
) -> Routes:
    """Return the callback routes, with and without the path prefix.

    For a `stage`, the OpenAPI document describes `/@connections`, too.
    """
    sockets = f"(?:{re.escape(prefix)})?/socket"
    pattern = shared["connections"].owners.pattern
    start = f"{sockets}/({pattern})"
    description = {
        "version": version, "access": access, "pattern": pattern, "stage": stage
    }
    return [
        (Unauthorized(prefix, access), UnauthorizedHandler, {}),
        (rf"{start}/send", SendHandler, shared),
        (rf"{start}/disconnect", DisconnectHandler, shared),
        (start, ConnectionHandler, shared),
        (rf"{sockets}/[^/]*(?:/(?:send|disconnect))?", NoConnectionHandler, {}),
        (r"/livez", LiveHandler, {}),
        (r"/readyz", ReadyHandler, {"readiness": readiness}),
        (r"/openapi\.json", OpenAPIHandler, description),
    ]


def is_send(handler: RequestHandler) -> bool:
    """Return whether a request is a send, with or without a token."""
    return handler.request.method == "POST" and (
        (isinstance(handler, CallbackHandler) and handler.sends)
        or (
            isinstance(handler, UnauthorizedHandler)
            and handler.request.path.endswith("/send")
        )
    )
