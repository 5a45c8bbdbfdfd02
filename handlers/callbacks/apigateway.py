"""Callbacks as AWS's SDKs send them: `/@connections/{id}` of a WebSocket API.

`POST` sends, `GET` describes and `DELETE` closes, by the rules of `actions`. Errors
have the form from which the SDKs make their exceptions. The routes exist only with
`--backend=apigateway`; `sigv4` verifies signatures.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher

from backends import Backend
from handlers.callbacks import actions
from handlers.callbacks.access import CallbackAccess
from handlers.callbacks.actions import GONE, Outcome
from handlers.callbacks.apigateway_access import (
    ConnectionsAccess,
    Refusal,
    UnverifiedSignature,
)
from handlers.callbacks.repeats import KEY, Keyed, Repeats
from handlers.callbacks.routes import Action, CallbackHandler
from handlers.callbacks.sigv4_keys import SigningKeys
from handlers.clients.connection import ClientConnection, Connections
from handlers.http.application import Routes
from handlers.http.body import DISCARD_TIMEOUT, BodyHandler
from handlers.websocket.frames import CloseCode

# The names of AWS's errors, by which the SDKs choose their exceptions.
ERROR_TYPES: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: "BadRequestException",
    HTTPStatus.FORBIDDEN: "ForbiddenException",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedException",
    HTTPStatus.GONE: "GoneException",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "PayloadTooLargeException",
    HTTPStatus.TOO_MANY_REQUESTS: "LimitExceededException",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerErrorException",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableException",
}
# Ids of this relay and of AWS. Those of AWS are gone: a table may still hold them.
CONNECTION_ID = re.compile(r"[\w+/=-]{1,128}", re.ASCII)
INVOCATION_ID = "amz-sdk-invocation-id"  # the same for all attempts of one call
CLIENT_ERRORS = range(400, 500)


class ConnectionsPath(Matcher):
    """Matches `/@connections/{id}`, with or without a stage and the path prefix.

    The parts may be percent-encoded once or twice. The keywords are the stage, None
    without one, and the id.
    """

    def __init__(self, prefix: str) -> None:
        start = f"(?:{re.escape(prefix)})?(?:/([^/]+))?"
        self._path = re.compile(rf"{start}/(?:@|%(?:25)?40)connections/([^/]*)")

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        found = self._path.fullmatch(request.path)
        if found is None:
            return None
        stage, connection_id = found[1], decoded(found[2])
        stage = None if stage is None else decoded(stage)
        return {"path_kwargs": {"connection_id": connection_id, "stage": stage}}


def decoded(part: str) -> str:
    """Return a part of a path without its percent-encoding, which may be twofold."""
    return unquote(unquote(part))


class ConnectionsHandler(CallbackHandler):
    """`POST`, `GET` and `DELETE` of `/@connections/{id}`.

    Checks in this order: access, stage, method, size, id, connection.
    """

    sends = True

    def initialize(  # type: ignore[override] # two more
        self,
        access: ConnectionsAccess,
        stage: str,
        connections: Connections,
        backend: Backend,
        repeats: Repeats,
        max_message_size: int,
    ) -> None:
        super().initialize(connections, backend, repeats, max_message_size)
        self._access = access
        self._stage = stage
        self._signature: UnverifiedSignature | None = None
        self._refusal: Refusal | None = None  # decided before the body is read

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.set_header("Cache-Control", "no-store")

    # Refusals.

    async def prepare(self) -> None:
        try:
            self._signature = self._access.check(self.request, self._connection_id)
            if self.path_kwargs["stage"] not in (None, self._stage):
                raise _refusal(HTTPStatus.FORBIDDEN, "Forbidden")
        except Refusal as refusal:
            self._refusal = refusal
        await super().prepare()
        if self._refusal is not None and not self._finished:
            connection: Any = self.request.connection
            connection.set_body_timeout(DISCARD_TIMEOUT)
            self._refuse(self._refusal)

    def data_received(self, chunk: bytes) -> None:
        if self._signature is not None:
            self._signature.update(chunk)
        super().data_received(chunk)

    def _is_verified(self) -> bool:
        """Return whether the signature is right, if there is one; else answer 403."""
        if self._finished:
            return False
        try:
            if self._signature is not None:
                self._signature.verify()
        except Refusal as refusal:
            self._refuse(refusal)
            return False
        return True

    def _refuse_body(self) -> None:
        self._refuse(self._refusal or _refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The data is larger than {self.max_body_size} bytes.",
        ))

    def problem(self, status: int, detail: str) -> None:
        """Answer with an error in AWS's form."""
        self._refuse(_refusal(status, detail))

    def _refuse(self, refusal: Refusal) -> None:
        self.set_status(refusal.status)
        self.set_header("Content-Type", "application/json")
        self.set_header("x-amzn-ErrorType", refusal.error_type)
        if refusal.challenge is not None:
            self.set_header("WWW-Authenticate", refusal.challenge)
        self.finish(json.dumps({
            "message": str(refusal),
            "connectionId": self._connection_id,
            "requestId": self._headers["x-amzn-RequestId"],
        }))

    @property
    def _connection_id(self) -> str:
        connection_id: str = self.path_kwargs["connection_id"]
        return connection_id

    # The three methods.

    async def post(self, connection_id: str, stage: str | None) -> None:
        if not self._is_verified():
            return
        body = BodyHandler.take_body(self)  # of any Content-Type
        if body is None:
            return
        try:
            message: str | bytes = body.decode()
        except UnicodeDecodeError:
            message = body
        digest = hashlib.sha256(body).digest()
        send = partial(actions.send, message=message)
        await self._carry_out_once(connection_id, send, digest)

    async def get(self, connection_id: str, stage: str | None) -> None:
        if not (self._is_verified() and self._is_valid(connection_id)):
            return
        connection = self._find(connection_id)
        if connection is None:
            self.send_outcome(GONE)
            return
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({
            "connectedAt": _iso(connection.connected_at),
            "identity": {
                "sourceIp": connection.remote_ip,
                "userAgent": connection.user_agent,
            },
            "lastActiveAt": _iso(connection.last_active_at),
        }))

    async def delete(self, connection_id: str, stage: str | None) -> None:
        if not self._is_verified():
            return
        close = partial(
            actions.close,
            code=CloseCode.NORMAL_CLOSURE,
            reason="",
            initiator=self.initiator,
        )
        await self._carry_out_once(connection_id, close, b"")

    def _is_valid(self, connection_id: str) -> bool:
        """Return whether an id has a possible form; else answer 400."""
        if CONNECTION_ID.fullmatch(connection_id):
            return True
        self.problem(
            HTTPStatus.BAD_REQUEST, f"Invalid connectionId: {connection_id}"
        )
        return False

    def _find(self, connection_id: str) -> ClientConnection | None:
        """Return an open connection; on AWS it is not one before `$connect` ends."""
        found = actions.find(connection_id, self.connections, self.on_asked)
        return None if found is None or found.state == "connecting" else found

    async def _carry_out_once(
        self, connection_id: str, action: Action, digest: bytes
    ) -> None:
        """Carry out `action`, once for all attempts of one call of an SDK."""
        if not self._is_valid(connection_id):
            return
        act = partial(self._outcome, connection_id, action)
        invocations = self.request.headers.get_list(INVOCATION_ID)
        if len(invocations) != 1 or not KEY.fullmatch(invocations[0]):
            outcome: Outcome | None = await act()
        else:
            # A part of the key, since AWS ignores the header for other requests.
            key = f"{invocations[0]} {digest.hex()}"
            route = f"@connections {self.request.method}"
            outcome = await self.once(Keyed(connection_id, route, key, b""), act)
        assert outcome is not None  # no key is reused
        self.send_outcome(outcome)

    async def _outcome(self, connection_id: str, action: Action) -> Outcome:
        connection = self._find(connection_id)
        if connection is None:
            return GONE
        outcome = action(connection)
        return outcome if isinstance(outcome, Outcome) else await outcome

    def send_outcome(self, outcome: Outcome) -> None:
        """Finish with the answer that AWS gives for `outcome`."""
        if outcome.status in CLIENT_ERRORS:
            if outcome.retry_after is not None:
                self.set_header("Retry-After", str(outcome.retry_after))
            self.problem(outcome.status, outcome.detail)
            return
        self.clear_header("Content-Type")
        if self.request.method == "DELETE":
            self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


def _refusal(status: int, message: str) -> Refusal:
    return Refusal(status, ERROR_TYPES.get(status, "UnknownException"), message)


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def connections_routes(
    prefix: str,
    stage: str,
    keys: SigningKeys | None,
    access: CallbackAccess,
    **shared: Any,
) -> Routes:
    """Return the routes of `/@connections`, with and without stage and prefix."""
    return [
        (
            ConnectionsPath(prefix),
            ConnectionsHandler,
            {
                "access": ConnectionsAccess(keys, access, prefix),
                "stage": stage,
                **shared,
            },
        )
    ]
