"""Answers plain sends without a Tornado handler."""

import re
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from backends import Backend
from handlers.callbacks.access import CallbackAccess
from handlers.callbacks.actions import GONE, Outcome, find, send
from handlers.callbacks.bodies import message_of
from handlers.callbacks.peers.forwarded import Forwarded, without_key
from handlers.callbacks.responses import response_of
from handlers.clients.connection import Connections
from handlers.http.fast import FastResponse
from handlers.http.plain import plain_headers
from handlers.http.request import FastHandler, PlainHeaders, Request
from handlers.owners import OWNER_PART, Address
from handlers.websocket.frames import MessageFrame

if TYPE_CHECKING:
    from handlers.callbacks.peers.forward import Forwarder

# See `handlers.callbacks.capabilities` for the key.
TYPE, KEY = rb"type=(?:text|binary)", rb"key=[A-Za-z0-9_-]{22}"
PLAIN_QUERY = rb"%b(?:&%b)?|%b(?:&%b)?" % (TYPE, KEY, KEY, TYPE)


def plain_headers_of(request: Request, max_size: int) -> PlainHeaders | None:
    """Return `Content-Type` and `Authorization` headers; None if it is not plain.

    A plain request is a POST with a body of up to `max_size` bytes, which needs no
    other treatment than usual.
    """
    if request.method != "POST" or request.version != "1.1":
        return None
    if request.upgrade or not request.keep_alive or request.declared > max_size:
        return None
    return request.plain or plain_headers(request.headers)


class FastSend:
    """Answers a plain send by the rules of `SendHandler`, but without it.

    Creating a handler costs more than the rest of a callback. Requests that are not
    plain, or need another answer than 2xx, 410 or 429, are left to the handler.
    """

    def __init__(
        self,
        prefix: str,
        access: CallbackAccess,
        connections: Connections,
        backend: Backend,
        max_message_size: int,
        forwarder: "Forwarder | None" = None,
    ) -> None:
        self._max_message_size = max_message_size
        self._target = re.compile(
            rb"(?:%b)?/socket/(%b)/send(?:\?(%b))?"
            % (
                re.escape(prefix.encode()),
                connections.owners.pattern.encode(),
                PLAIN_QUERY,
            )
        )
        self._access = access
        self._guarded = access.required
        self._connections = connections
        self._backend = backend
        self._forwarder = forwarder
        # In the ids of this instance's connections, which need no other look.
        self._own_digits = connections.owners.own_digits

    def __call__(self, request: Request) -> FastHandler | None:
        """Return the function that receives the body; None if it is not plain."""
        target = self._target.fullmatch(request.target)
        if target is None:
            return None
        plain = plain_headers_of(request, self._max_message_size)
        if plain is None:
            return None
        content_type, credentials = plain
        connection_id, query = target[1].decode(), target[2]
        types: Sequence[str] = ()
        key = None
        if query is not None:
            types, key = _parse(query.decode())
        if self._guarded and (
            self._access.challenge(credentials, connection_id, key) is not None
        ):
            return None
        if (
            self._forwarder is not None
            and connection_id[OWNER_PART] != self._own_digits
        ):
            owner = self._forwarder.owner_of(connection_id)
            if owner is not None:
                sent = connection_id, content_type, types
                return partial(
                    self._forward, owner, request.target, request.headers, *sent
                )
        return partial(self._send, connection_id, content_type, types)

    def _forward(
        self,
        owner: Address,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        connection_id: str,
        content_type: str,
        types: Sequence[str],
        body: bytes,
    ) -> Awaitable[FastResponse] | None:
        """Forward a send to the instance that has its connection."""
        forwarder = self._forwarder
        assert forwarder is not None
        try:
            message_of(body, content_type, types)
        except ValueError:
            return None
        path, _, query = target.decode().partition("?")
        callback = Forwarded(
            "POST",
            without_key(path, query) if query else path,
            content_type,
            forwarder.send_timeout,
            "",
            body,
            connection_id,
            _traceparent(headers),
        )
        return forwarder.forward(owner, callback)

    def _send(
        self, connection_id: str, content_type: str, types: Sequence[str], body: bytes
    ) -> FastResponse | Awaitable[FastResponse] | None:
        try:
            message = message_of(body, content_type, types)
        except ValueError:
            return None
        connection = find(connection_id, self._connections, self._backend.called_back)
        if connection is None:
            return response_of(GONE)
        outcome = send(connection, MessageFrame(message, body))
        return response_of(outcome) if isinstance(outcome, Outcome) else _later(outcome)


def _traceparent(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the trace to which a request belongs; empty: none."""
    found = [value for name, value in headers if name == b"traceparent"]
    return found[0].decode("latin-1") if len(found) == 1 else ""


def _parse(query: str) -> tuple[Sequence[str], str | None]:
    """Return the values of `type` and the key in a plain query."""
    values = dict(part.split("=") for part in query.split("&"))
    return [values["type"]] if "type" in values else [], values.get("key")


async def _later(outcome: Awaitable[Outcome]) -> FastResponse:
    return response_of(await outcome)
