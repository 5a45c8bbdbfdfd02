"""`POST /commands`: carries out commands for many connections in one request.

`backends.commands` parses them, and `executor` carries them out.
"""

import codecs
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any, ClassVar

import orjson
from tornado.httputil import HTTPServerRequest
from tornado.options import define
from tornado.routing import Matcher

from backends import Observer
from backends.commands import Command, CommandError, command_steps
from backends.media_types import media_type_of
from handlers.callbacks.access import UnauthorizedHandler
from handlers.callbacks.actions import Outcome
from handlers.callbacks.answering import RepeatableHandler
from handlers.callbacks.executor import CommandExecutor
from handlers.callbacks.repeats import INSTANCE, Keyed, Repeats, digest_of
from handlers.callbacks.responses import JSONResponse, Response
from handlers.callbacks.tokens import TOKEN_REQUIRED, CallbackTokens
from handlers.http.application import Routes
from handlers.websocket.turns import Turns

define("max_bulk_size", default=8 * 1024 * 1024, metavar="BYTES",
       help="largest body of a bulk callback")

JSON = "application/json"
OTHER_TYPE = Response(
    Outcome(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The Content-Type must be application/json."
    ),
    {"Accept": JSON},  # RFC 9110, section 15.5.16
)
PATH = "/commands"


class Bulk:
    """Carries out the bodies of bulk callbacks."""

    def __init__(
        self, executor: CommandExecutor, turns: Turns, observer: Observer
    ) -> None:
        self._executor = executor
        self._turns = turns
        self._observer = observer

    async def answer(self, body: bytes) -> Response:
        """Answer when each command was carried out or refused for each connection."""
        try:
            commands = await self.parse(body)
        except CommandError as error:
            return Response(Outcome(HTTPStatus.BAD_REQUEST, str(error)))
        del body  # it may wait for slow clients
        statuses = await self.statuses(commands)
        return JSONResponse(statuses.document(commands))

    async def statuses(self, commands: Sequence[Command]) -> "Statuses":
        """Return the statuses when each command was carried out or refused."""
        outcomes = await self._executor.outcomes(commands)
        return Statuses(array("H", [outcome.status for outcome in outcomes]))

    async def parse(self, body: bytes) -> list[Command]:
        """Return the commands in the body. Raises `CommandError`, and counts it."""
        try:
            return await self._parse(body)
        except CommandError:
            self._observer.commanded("callback", "none", "invalid", "")
            raise

    async def _parse(self, body: bytes) -> list[Command]:
        try:
            document: Any = orjson.loads(body.removeprefix(codecs.BOM_UTF8))
        except ValueError:
            raise CommandError("The body must be JSON in UTF-8.") from None
        if not isinstance(document, dict):
            raise CommandError("The body must be a JSON object.")
        if "commands" not in document:
            raise CommandError("commands is missing.")
        commands: list[Command] = []
        steps = command_steps(document["commands"], commands, named=True)
        if (parsed := self._turns.run(steps)) is not None:
            await parsed
        return commands


@dataclass(frozen=True, eq=False, slots=True)
class Statuses:
    """The answer to a bulk callback, as it is remembered.

    It has no connection ids: these are in a repeat, which has the same commands.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.OK
    each: "array[int]"

    @property
    def statuses(self) -> int:
        """Number of statuses."""
        return len(self.each)

    def document(self, commands: Iterable[Command]) -> bytes:
        """Return the JSON of the answer to `commands`."""
        ids = chain.from_iterable(each.connection_ids or () for each in commands)
        return orjson.dumps({
            "results": [
                {"connection_id": connection_id, "status": status}
                for connection_id, status in zip(ids, self.each, strict=True)
            ]
        })


class BulkHandler(RepeatableHandler):
    """Answers each bulk callback that `FastBulk` leaves to it."""

    def initialize(self, bulk: Bulk, repeats: Repeats, max_bulk_size: int) -> None:
        self.bulk = bulk
        self.repeats = repeats
        self.max_body_size = max_bulk_size

    async def post(self) -> None:
        body = self.take_body()
        if body is None:
            return
        if media_type_of(self.request.headers.get("Content-Type", "")) != JSON:
            self.respond(OTHER_TYPE)
            return
        key = self.take_key()
        if key is None:
            return
        if key:
            await self._answer_once(key, body)
        else:
            self.respond(await self.answer(body))

    async def answer(self, body: bytes) -> Response:
        """Return the answer to a request without a key."""
        return await self.bulk.answer(body)

    async def _answer_once(self, key: str, body: bytes) -> None:
        try:
            commands = await self.bulk.parse(body)
        except CommandError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        request = Keyed(INSTANCE, "commands", key, digest_of("commands", body))
        del body  # it may wait for slow clients
        statuses = await self.once(request, partial(self.bulk.statuses, commands))
        if statuses is not None:
            self.respond(JSONResponse(statuses.document(commands)))


class _Unauthorized(Matcher):
    """Matches bulk callbacks without a token; a connection's key does not count."""

    def __init__(self, path: str, tokens: CallbackTokens) -> None:
        self._path = re.compile(path)
        self._tokens = tokens

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        if self._path.fullmatch(request.path) is None:
            return None
        challenge = self._tokens.challenge(request.headers.get_list("Authorization"))
        if challenge is None:
            return None
        return {"target_kwargs": {"challenge": challenge, "detail": TOKEN_REQUIRED}}


def bulk_routes(
    prefix: str,
    tokens: CallbackTokens,
    handler: "type[BulkHandler]" = BulkHandler,
    **shared: Any,
) -> Routes:
    """Return the routes of bulk callbacks, with and without the path prefix.

    They exist only if there are tokens: one request may reach all clients.
    """
    if not tokens.required:
        return []
    path = rf"(?:{re.escape(prefix)})?{PATH}"
    return [
        (_Unauthorized(path, tokens), UnauthorizedHandler, {}),
        (path, handler, shared),
    ]
