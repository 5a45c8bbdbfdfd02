"""Callbacks as AWS's SDKs send them: `/@connections/{id}` of a WebSocket API.

`POST` sends, `GET` describes and `DELETE` closes, by the rules of `actions`, also at
other instances. The routes exist only with `--backend=apigateway`. `apigateway_access`
decides who may use them, and `apigateway_errors` has the form of errors.
"""

import json
import re
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher

from handlers.callbacks import actions
from handlers.callbacks.access import CallbackAccess
from handlers.callbacks.actions import GONE, Outcome
from handlers.callbacks.apigateway.access import (
    ConnectionsAccess,
    UnverifiedSignature,
)
from handlers.callbacks.apigateway.errors import AWSErrorHandler, Refusal
from handlers.callbacks.apigateway.sigv4_keys import SigningKeys
from handlers.callbacks.peers.forwarded import Forwarded
from handlers.callbacks.repeats import KEY, Keyed, digest_of
from handlers.callbacks.responses import Response
from handlers.callbacks.routes import Action, CallbackHandler, close_action
from handlers.http.application import Routes
from handlers.http.body import DISCARD_TIMEOUT, BodyHandler
from handlers.websocket.frames import MessageFrame

# Ids of this relay and of AWS. Those of AWS are gone: a table may still hold them.
CONNECTION_ID = re.compile(r"[\w+/=-]{1,128}", re.ASCII)
INVOCATION_ID = "amz-sdk-invocation-id"  # the same for all attempts of one call


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


class ConnectionsHandler(AWSErrorHandler, CallbackHandler):
    """`POST`, `GET` and `DELETE` of `/@connections/{id}`.

    Checks in this order: access, stage, method, size, id, connection.
    """

    sends = True

    def initialize(  # type: ignore[override] # two more
        self, access: ConnectionsAccess, stage: str, **shared: Any
    ) -> None:
        super().initialize(**shared)
        self._access = access
        self._stage = stage
        self._signature: UnverifiedSignature | None = None
        self._refusal: Refusal | None = None  # decided before the body is read

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Cache-Control", "no-store")

    # What is checked first.

    async def prepare(self) -> None:
        self.connection_id = self.path_kwargs["connection_id"]
        try:
            self._signature = self._access.check(self.request, self.connection_id)
            if self.path_kwargs["stage"] not in (None, self._stage):
                raise Refusal(HTTPStatus.FORBIDDEN, "Forbidden")
        except Refusal as refusal:
            self._refusal = refusal
        await super().prepare()
        if self._refusal is not None and not self._finished:
            connection: Any = self.request.connection
            connection.set_body_timeout(DISCARD_TIMEOUT)
            self.refuse(self._refusal)

    def data_received(self, chunk: bytes) -> None:
        if self._signature is not None:
            self._signature.update(chunk)
        super().data_received(chunk)

    def _refuse_body(self) -> None:
        self.refuse(self._refusal or Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The data is larger than {self.max_body_size} bytes.",
        ))

    def take_valid_body(self, connection_id: str) -> bytes | None:
        """Return the body, of any Content-Type, of an authorized request with an id.

        None: the request was refused, and has been answered.
        """
        if self._finished:
            return None
        try:
            if self._signature is not None:
                self._signature.verify()
        except Refusal as refusal:
            self.refuse(refusal)
            return None
        body = BodyHandler.take_body(self)
        if body is not None and not CONNECTION_ID.fullmatch(connection_id):
            wrong = f"Invalid connectionId: {connection_id}"
            self.refuse(Refusal(HTTPStatus.BAD_REQUEST, wrong))
            return None
        return body

    # The three methods.

    async def post(self, connection_id: str, stage: str | None) -> None:
        body = self.take_valid_body(connection_id)
        if body is None:
            return
        try:
            message: str | bytes = body.decode()
        except UnicodeDecodeError:
            message = body
        kind = "text" if isinstance(message, str) else "binary"
        send = partial(actions.send, frame=MessageFrame(message))
        await self._carry_out_once(
            f"/socket/{connection_id}/send?type={kind}", "send", send, kind, body
        )

    async def delete(self, connection_id: str, stage: str | None) -> None:
        if self.take_valid_body(connection_id) is None:
            return
        close, kind = close_action(b"", self.initiator)
        await self._carry_out_once(
            f"/socket/{connection_id}/disconnect", "disconnect", close, kind, b""
        )

    async def get(self, connection_id: str, stage: str | None) -> None:
        if self.take_valid_body(connection_id) is None:
            return
        answer = await self._forwarded("GET", f"/socket/{connection_id}")
        if answer is None:
            connection = self.find(connection_id)
            if connection is None:
                return
            described = actions.describe(connection)
        elif answer.status == HTTPStatus.OK:
            described = json.loads(answer.body)
        else:
            self.respond(answer)
            return
        if described["state"] == "connecting":
            self.send_outcome(GONE)
            return
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({
            "connectedAt": _in_utc(described["connected_at"]),
            "identity": {
                "sourceIp": described["remote_ip"],
                "userAgent": described["user_agent"],
            },
            "lastActiveAt": _in_utc(described["last_active_at"]),
        }))

    async def outcome(self, connection_id: str, action: Action) -> Outcome:
        """Carry out `action`; on AWS nothing is open before `$connect` has ended."""
        connection = self.connections.get(connection_id)
        if connection is not None and connection.state == "connecting":
            self.on_asked(connection)
            return GONE
        return await super().outcome(connection_id, action)

    async def _carry_out_once(
        self, target: str, route: str, action: Action, kind: str, body: bytes
    ) -> None:
        """Carry out `action`, once for all attempts of one call of an SDK.

        `target`, `route` and `kind` are those of the callback that does the same.
        """
        connection_id = self.connection_id
        key = self._invocation_key(body)
        answer = await self._forwarded("POST", target, key, body)
        if answer is not None:
            self.respond(answer)
            return
        act = partial(self.outcome, connection_id, action)
        if not key:
            self.send_outcome(await act())
            return
        outcome = await self.once(
            Keyed(connection_id, route, key, digest_of(kind, body)), act
        )
        if outcome is not None:
            self.send_outcome(outcome)

    def _invocation_key(self, body: bytes) -> str:
        """Return an Idempotency-Key for this call of an SDK; empty: there is none.

        Other data has another key, since AWS ignores the header.
        """
        invocations = self.request.headers.get_list(INVOCATION_ID)
        if len(invocations) != 1 or not KEY.fullmatch(invocations[0]):
            return ""
        return digest_of(f"{self.request.method} {invocations[0]}", body).hex()

    async def _forwarded(
        self, method: str, target: str, key: str = "", body: bytes = b""
    ) -> Response | None:
        """Return the answer of the instance that has the connection.

        None: no other one has it.
        """
        forwarder, connection_id = self.forwarder, self.connection_id
        owner = None if forwarder is None else forwarder.owner_of(connection_id)
        if forwarder is None or owner is None:
            return None
        callback = Forwarded(
            method, target, "", forwarder.send_timeout, key, body, connection_id
        )
        return await forwarder.forward(owner, callback)

    def respond(self, response: Response) -> None:
        """Finish with the answer that AWS gives instead of `response`."""
        if response.status >= HTTPStatus.BAD_REQUEST:
            if "Retry-After" in response.headers:
                self.set_header("Retry-After", response.headers["Retry-After"])
            self.problem(response.status, json.loads(response.body)["detail"])
            return
        self.clear_header("Content-Type")
        if self.request.method == "DELETE":
            self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


def _in_utc(time: str) -> str:
    """Return a time in UTC in AWS's form: milliseconds and a Z."""
    parsed = datetime.fromisoformat(time)
    return parsed.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def connections_routes(
    prefix: str,
    stage: str,
    keys: SigningKeys | None,
    access: CallbackAccess,
    **shared: Any,
) -> Routes:
    """Return the routes of `/@connections`, with and without stage and prefix."""
    given = {"access": ConnectionsAccess(keys, access, prefix), "stage": stage}
    return [(ConnectionsPath(prefix), ConnectionsHandler, {**given, **shared})]
