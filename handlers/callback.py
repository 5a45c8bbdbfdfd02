"""The backend's end: HTTP requests that reach one client.

The other direction starts in `handlers.websocket`.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from tornado.web import stream_request_body

from backends import Backend, ConnectionClosed, SendBufferFull
from handlers.connections import ConnectionMap
from handlers.frames import MAX_CLOSE_REASON, CloseCode
from handlers.problem import ProblemHandler
from handlers.websocket import ClientSocketHandler

# A body that is too large is read to its end and dropped, so that the peer sees
# the answer and no reset; beyond these bounds the connection ends instead.
MAX_DISCARDED_BODY = 64 * 1024 * 1024  # bytes
DISCARD_TIMEOUT = 5.0  # seconds

RETRY_AFTER = "1"  # seconds; a slow client may have read on by then


class CallbackHandler(ProblemHandler):
    """What the callback routes share: finding the connection."""

    def initialize(
        self, connections: ConnectionMap, backend: Backend, max_message_size: int
    ) -> None:
        self.connections = connections
        self.backend = backend
        self.max_message_size = max_message_size

    def find(self, connection_id: str) -> ClientSocketHandler | None:
        """The connection if it is connecting or open; else answers 410."""
        connection = self.connections.get(connection_id)
        if connection is not None:
            self.backend.called_back(connection)
            if connection.state in ("connecting", "open"):
                return connection
        self.gone()
        return None

    def gone(self) -> None:
        """Answer 410."""
        self.problem(HTTPStatus.GONE, "This connection is not open here.")

    def ok(self, connecting: bool) -> None:
        """Answer 200, or 202 where it will be done after the handshake."""
        self.set_status(HTTPStatus.ACCEPTED if connecting else HTTPStatus.OK)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish("Accepted" if connecting else "OK")


@stream_request_body
class BodyHandler(CallbackHandler):
    """A callback with a body, which is bounded here and not by Tornado.

    Tornado would answer an oversized body with a bare 400.
    """

    async def prepare(self) -> None:
        self._chunks: list[bytes] = []
        self._length = 0
        if self.request.method != "POST":
            return
        connection = self.request.connection
        connection.set_max_body_size(MAX_DISCARDED_BODY)  # type: ignore[union-attr]
        headers = self.request.headers
        length = headers.get("Content-Length", "0")
        if length.isdigit() and int(length) > self.max_message_size:
            if int(length) > MAX_DISCARDED_BODY or "Expect" in headers:
                self._refuse_body()
            connection.set_body_timeout(DISCARD_TIMEOUT)  # type: ignore[union-attr]

    def data_received(self, chunk: bytes) -> None:
        self._length += len(chunk)
        if self._length <= self.max_message_size:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()
            if self._length > MAX_DISCARDED_BODY - len(chunk) and not self._finished:
                self._refuse_body()

    def _refuse_body(self) -> None:
        self.problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"A body may have {self.max_message_size} bytes.",
        )

    def take_body(self) -> bytes | None:
        """The whole body; None where it was too large, which has been answered."""
        if self._length > self.max_message_size:
            self._refuse_body()
            return None
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class SendHandler(BodyHandler):
    """`POST /socket/<id>/send`: the body becomes one frame."""

    async def post(self, connection_id: str) -> None:
        body = self.take_body()
        if body is None:
            return
        message: str | bytes = body
        text = is_text(
            self.request.headers.get("Content-Type", ""),
            self.get_query_arguments("type"),
        )
        if text is None:
            self.problem(HTTPStatus.BAD_REQUEST, "type is either text or binary.")
            return
        if text:
            try:
                message = body.decode()
            except UnicodeDecodeError:
                self.problem(HTTPStatus.BAD_REQUEST, "A text frame must be UTF-8.")
                return
        if (connection := self.find(connection_id)) is None:
            return
        connecting = connection.state == "connecting"
        try:
            if (sent := connection.send(message)) is not None:
                await asyncio.wait_for(sent, connection.policy.send_timeout)
        except SendBufferFull:
            self.set_header("Retry-After", RETRY_AFTER)
            self.problem(
                HTTPStatus.TOO_MANY_REQUESTS, "Too much waits for this client already."
            )
        except (ConnectionClosed, TimeoutError):
            self.gone()
        else:
            self.ok(connecting)


class DisconnectHandler(BodyHandler):
    """`POST /socket/<id>/disconnect`: closes, with a code and a reason."""

    async def post(self, connection_id: str) -> None:
        body = self.take_body()
        if body is None:
            return
        try:
            code, reason = parse_closing(body)
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        if (connection := self.find(connection_id)) is None:
            return
        connecting = connection.state == "connecting"
        connection.close(code, reason, "backend")
        self.ok(connecting)


class ConnectionHandler(CallbackHandler):
    """`GET /socket/<id>` and `DELETE /socket/<id>`."""

    async def get(self, connection_id: str) -> None:
        if (connection := self.find(connection_id)) is None:
            return
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(describe(connection)))

    async def delete(self, connection_id: str) -> None:
        if (connection := self.find(connection_id)) is None:
            return
        connection.close(CloseCode.NORMAL, "", "backend")
        self.clear_header("Content-Type")
        self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


def describe(connection: ClientSocketHandler) -> dict[str, Any]:
    """What `GET /socket/<id>` tells of a connection."""
    return {
        "connection_id": connection.id,
        "state": connection.state,
        "connected_at": connection.connected_at.isoformat(),
        "last_active_at": connection.last_active_at.isoformat(),
        "remote_ip": connection.remote_ip,
        "user_agent": connection.user_agent,
        "subprotocol": connection.subprotocol,
        "messages_in": connection.messages_in,
        "messages_out": connection.messages_out,
        "bytes_in": connection.bytes_in,
        "bytes_out": connection.bytes_out,
    }


def is_text(content_type: str, overrides: list[str]) -> bool | None:
    """Whether a body makes a text frame; None where `?type=` is neither."""
    if overrides:
        return {"text": True, "binary": False}.get(overrides[-1])
    media_type = content_type.partition(";")[0].strip().lower()
    return (
        media_type.startswith("text/")
        or media_type == "application/json"
        or media_type.endswith("+json")
    )


def parse_closing(body: bytes) -> tuple[int, str]:
    """Code and reason of a disconnect callback; 1000 and none by default.

    Raises `ValueError` with the sentence for the caller.
    """
    if not body.strip():
        return CloseCode.NORMAL, ""
    try:
        closing = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("The body is not JSON.") from None
    if not isinstance(closing, dict):
        raise ValueError("The body is not a JSON object.")
    code = closing.get("code", CloseCode.NORMAL)
    if not isinstance(code, int) or isinstance(code, bool) or not (
        code in (1000, 1001, 1008) or 1011 <= code <= 1014 or 3000 <= code <= 4999
    ):
        raise ValueError("code is one of 1000, 1001, 1008, 1011-1014, 3000-4999.")
    reason = closing.get("reason", "")
    try:
        fits = len(reason.encode()) <= MAX_CLOSE_REASON
    except (AttributeError, UnicodeEncodeError):
        raise ValueError("reason is a string of UTF-8.") from None
    if not fits:
        raise ValueError(f"reason is at most {MAX_CLOSE_REASON} bytes of UTF-8.")
    return code, reason
