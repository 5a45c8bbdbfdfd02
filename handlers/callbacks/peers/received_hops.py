"""Answers callbacks that another instance has forwarded to this one.

That instance has authorized them: its signature is all that they need here. What is not
for a connection of this instance is never forwarded again.
"""

import re
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs

import orjson
from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher

from backends import Backend
from handlers.callbacks import actions
from handlers.callbacks.actions import GONE, Outcome
from handlers.callbacks.answering import OutcomeHandler
from handlers.callbacks.bulk import PATH, Bulk, Statuses
from handlers.callbacks.peers.forwarded import OWN_KEY
from handlers.callbacks.peers.hops import HEADER, Hops, Signed, digest_of_body
from handlers.callbacks.peers.recent import Recent
from handlers.callbacks.repeats import HEADER as KEY_HEADER
from handlers.callbacks.repeats import (
    INSTANCE,
    REPLAYED,
    REUSED,
    Answer,
    Keyed,
    KeyReused,
    Repeats,
    digest_of,
)
from handlers.callbacks.responses import JSONResponse, Response, response_of
from handlers.callbacks.routes import Action, close_action, send_action
from handlers.clients.connection import ClientConnection, Connections
from handlers.http.application import Routes
from handlers.http.body import NotFoundHandler

A = TypeVar("A", bound=Answer)

NOT_SIGNED = Response(
    Outcome(
        HTTPStatus.UNAUTHORIZED,
        f"{HEADER} must be another instance's signature of this request, not older than"
        " a minute.",
    ),
    {"WWW-Authenticate": HEADER},
)
NOT_FOUND = Response(Outcome(HTTPStatus.NOT_FOUND, NotFoundHandler.detail))
CLOSED = Response(Outcome(HTTPStatus.NO_CONTENT, ""))


class Received(NamedTuple):
    """A forwarded callback; `key` is its Idempotency-Key."""

    method: str
    target: str
    content_type: str
    key: str
    body: bytes


class ReceivedHops:
    """Verifies forwarded callbacks, and carries them out.

    `repeats` remembers those that a backend has given a key, and `recent` the others:
    these do not displace answers that a backend may ask for.
    """

    def __init__(
        self,
        prefix: str,
        hops: Hops,
        connections: Connections,
        backend: Backend,
        bulk: Bulk,
        repeats: Repeats,
    ) -> None:
        self.prefix = prefix
        self.hops = hops
        self.connections = connections
        self.backend = backend
        self.recent = Recent(connections.loop)
        self._bulk = bulk
        self._repeats = repeats
        start = rf"(?:{re.escape(prefix)})?"
        one = rf"{start}/socket/({connections.owners.pattern})(?:/(send|disconnect))?"
        self._one = re.compile(rf"{one}(?:\?(.*))?", re.DOTALL)
        self._many = re.compile(rf"{start}{PATH}")

    async def answer(self, hop: str, request: Received) -> Response:
        """Verify a request, and carry it out."""
        if not self.hops.accepts(hop.encode("latin-1"), signed(request)):
            return NOT_SIGNED
        one = self._one.fullmatch(request.target)
        try:
            if one is not None:
                query = parse_qs(one[3] or "", keep_blank_values=True)
                return await self._act(one[1], one[2], query, request)
            if self._many.fullmatch(request.target) and request.method == "POST":
                return await self._carry_out_bulk(request)
        except ValueError as error:  # the other instance has checked it, too
            return Response(Outcome(HTTPStatus.BAD_REQUEST, str(error)))
        return NOT_FOUND

    def find(self, connection_id: str) -> ClientConnection | None:
        """Return a connection that is here, and connecting or open."""
        return actions.find(connection_id, self.connections, self.backend.called_back)

    async def _act(
        self,
        connection_id: str,
        route: str | None,
        query: Mapping[str, list[str]],
        request: Received,
    ) -> Response:
        """Carry out a callback for one connection. Raises `ValueError`."""
        match request.method, route:
            case "GET", None:
                connection = self.find(connection_id)
                if connection is None:
                    return response_of(GONE)
                description = JSONResponse(orjson.dumps(actions.describe(connection)))
                return description.with_header("Cache-Control", "no-store")
            case "DELETE", None:
                close, _ = close_action(b"", "backend")
                outcome = await self._outcome(connection_id, close)
                return response_of(GONE) if outcome is GONE else CLOSED
            case "POST", "send":
                action, kind = send_action(request.body, request.content_type, query)
            case "POST", "disconnect":
                action, kind = close_action(request.body, "backend")
            case _:
                return NOT_FOUND
        act = partial(self._outcome, connection_id, action)
        if request.key.startswith(OWN_KEY):
            return response_of(await self.recent.once(request.key, act))
        digest = digest_of(kind, request.body)
        keyed = Keyed(connection_id, f"{route}", request.key, digest)
        return await self._once(keyed, act, response_of)

    async def _carry_out_bulk(self, request: Received) -> Response:
        """Carry out commands. Raises `ValueError`."""
        commands = await self._bulk.parse(request.body)

        def response(statuses: Statuses) -> Response:
            return JSONResponse(statuses.document(commands))

        act = partial(self._bulk.statuses, commands)
        if request.key.startswith(OWN_KEY):
            return response(await self.recent.once(request.key, act))
        digest = digest_of("commands", request.body)
        keyed = Keyed(INSTANCE, "commands", request.key, digest)
        return await self._once(keyed, act, response)

    async def _outcome(self, connection_id: str, action: Action) -> Outcome:
        connection = self.find(connection_id)
        if connection is None:
            return GONE
        outcome = action(connection)
        return outcome if isinstance(outcome, Outcome) else await outcome

    async def _once(
        self,
        keyed: Keyed,
        act: Callable[[], Coroutine[Any, Any, A]],
        response: Callable[[A], Response],
    ) -> Response:
        """Carry it out once for all requests with the same key of a backend."""
        try:
            answer, is_repeat = await self._repeats.once(keyed, act)
        except KeyReused:
            return response_of(REUSED)
        given = response(answer)
        return given.with_header(*REPLAYED) if is_repeat else given


def signed(request: Received) -> Signed:
    """Return the parts that are signed."""
    method, target, content_type, key, body = request
    return (
        method.encode(),
        target.encode("latin-1"),
        content_type.encode("latin-1"),
        key.encode("latin-1"),
        digest_of_body(body),
    )


class HopHandler(OutcomeHandler):
    """Answers each forwarded callback that `FastHop` leaves to it."""

    def initialize(self, received: ReceivedHops, max_body_size: int) -> None:
        self.received = received
        self.max_body_size = max_body_size

    async def post(self) -> None:
        body = self.take_body()
        if body is not None:
            await self._answer(body)

    async def get(self) -> None:
        await self._answer(b"")

    delete = get

    async def _answer(self, body: bytes) -> None:
        headers = self.request.headers
        request = Received(
            self.request.method or "",
            self.request.uri or "",
            headers.get("Content-Type", ""),
            headers.get(KEY_HEADER, ""),
            body,
        )
        self.respond(await self.received.answer(headers[HEADER], request))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer 401 to another method, which no instance sends."""
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.respond(NOT_SIGNED)
        else:
            super().write_error(status_code, **kwargs)


class _Hop(Matcher):
    """Matches callbacks that claim to be forwarded."""

    def __init__(self, prefix: str) -> None:
        starts = ("/socket/", PATH)
        self._starts = (*starts, *(f"{prefix}{start}" for start in starts))

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        if HEADER in request.headers and request.path.startswith(self._starts):
            return {}
        return None


def hop_routes(received: ReceivedHops, max_body_size: int) -> Routes:
    """Return the route of forwarded callbacks, which precedes all others."""
    shared = {"received": received, "max_body_size": max_body_size}
    return [(_Hop(received.prefix), HopHandler, shared)]
