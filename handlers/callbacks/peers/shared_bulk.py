"""Bulk callbacks for connections that several instances have.

Each instance carries out the commands for its own connections. The requests to the
others leave together; the results have the order of the request.
"""

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from backends.commands import Command, CommandError
from handlers.callbacks.actions import Outcome
from handlers.callbacks.bulk import Bulk, BulkHandler, Statuses
from handlers.callbacks.executor import CommandExecutor
from handlers.callbacks.peers.forward import Forwarder
from handlers.callbacks.peers.parts import Part, Parts, statuses_in
from handlers.callbacks.repeats import (
    INSTANCE,
    REPLAYED,
    REUSED,
    Keyed,
    KeyReused,
    Repeats,
    digest_of,
)
from handlers.callbacks.responses import JSONResponse, Response, response_of
from handlers.clients.connection import Connections
from handlers.http.request import FastHandler, Request

Fast = Callable[[Request], FastHandler | None]

# Statuses of a part, and whether they are those of an earlier request.
Carried = tuple[Sequence[int], bool]


class SharedBulk(Bulk):
    """Carries out bulk callbacks together with other instances.

    `statuses` carries out what is for this instance, for a part that was forwarded.
    """

    def __init__(
        self,
        executor: CommandExecutor,
        connections: Connections,
        forwarder: Forwarder,
        repeats: Repeats,
    ) -> None:
        super().__init__(executor, connections.turns, connections.observer)
        self._forwarder = forwarder
        self._repeats = repeats

    async def answer(self, body: bytes, traceparent: str = "") -> Response:
        try:
            commands = await self.parse(body)
        except CommandError as error:
            return Response(Outcome(HTTPStatus.BAD_REQUEST, str(error)))
        del body  # it may wait for slow clients
        return await self._answer(commands, "", None, traceparent)

    async def answer_once(self, key: str, body: bytes, traceparent: str) -> Response:
        """Answer a request with a key: each owner carries out its part once."""
        try:
            commands = await self.parse(body)
        except CommandError as error:
            return Response(Outcome(HTTPStatus.BAD_REQUEST, str(error)))
        try:
            return await self._answer(commands, key, body, traceparent)
        except KeyReused:
            return response_of(REUSED)

    async def _answer(
        self,
        commands: Sequence[Command],
        key: str,
        body: bytes | None,
        traceparent: str,
    ) -> Response:
        """Raises `KeyReused` if an owner knows the key from another request."""
        parts = Parts(self._forwarder)
        divided = self._turns.run(parts.divide(commands))
        if divided is not None:
            await divided
        carried = await asyncio.gather(*self._begin(parts, key, body, traceparent))
        each = array("H", bytes(2 * parts.pairs))
        for part, (statuses, _) in zip(parts, carried, strict=True):
            for index, status in zip(part.indexes, statuses, strict=True):
                each[index] = status
        answer = JSONResponse(Statuses(each).document(commands))
        if carried and all(is_repeat for _, is_repeat in carried):
            return answer.with_header(*REPLAYED)
        return answer

    def _begin(
        self, parts: Parts, key: str, body: bytes | None, traceparent: str
    ) -> list[Awaitable[Carried]]:
        """Begin with this instance's part: if its key was reused, nothing leaves."""
        own = [part for part in parts if part.owner is None]
        bodies = {part: part.body(body) for part in parts if key or part.owner}
        for part in own:
            if key:
                self._repeats.check(_keyed(key, bodies[part]))
        return [
            self._here(part, key, bodies.get(part, b""))
            if part.owner is None
            else self._elsewhere(part, bodies[part], key, traceparent)
            for part in parts
        ]

    async def _here(self, part: Part, key: str, body: bytes) -> Carried:
        act: Callable[[], Coroutine[Any, Any, Statuses]]
        act = partial(self.statuses, part.commands)
        if not key:
            return (await act()).each, False
        statuses, is_repeat = await self._repeats.once(_keyed(key, body), act)
        return statuses.each, is_repeat

    async def _elsewhere(
        self, part: Part, body: bytes, key: str, traceparent: str
    ) -> Carried:
        assert part.owner is not None
        callback = part.callback(
            self._forwarder.send_timeout, body, key, traceparent
        )
        answer = await self._forwarder.forward(part.owner, callback)
        if answer.status == HTTPStatus.UNPROCESSABLE_ENTITY:
            raise KeyReused
        is_repeat = REPLAYED[0] in answer.headers
        return statuses_in(answer, len(part.indexes)), is_repeat


def _keyed(key: str, body: bytes) -> Keyed:
    """Return a part as its owner would remember it if it had been forwarded."""
    return Keyed(INSTANCE, "commands", key, digest_of("commands", body))


class SharedBulkHandler(BulkHandler):
    """Answers each bulk callback that `FastBulk` leaves to it."""

    bulk: SharedBulk

    async def answer(self, body: bytes) -> Response:
        return await self.bulk.answer(body, self.traceparent)

    async def _answer_once(self, key: str, body: bytes) -> None:
        self.respond(await self.bulk.answer_once(key, body, self.traceparent))


def without_trace(fast: Fast) -> Fast:
    """Return what answers only bulk callbacks without a trace, by `fast`.

    `SharedBulkHandler` forwards the trace, which a body does not have.
    """

    def answer(request: Request) -> FastHandler | None:
        if any(name == b"traceparent" for name, _ in request.headers):
            return None
        return fast(request)

    return answer
