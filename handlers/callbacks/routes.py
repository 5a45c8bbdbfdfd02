"""The backend's end: HTTP requests that reach one client.

The other direction starts in `handlers.clients.connection`.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from typing import Any

from backends import Backend, ConnectionClosed, Initiator, SendBufferFull
from backends.deadlines import RunningTime
from handlers.callbacks.tokens import CallbackTokens
from handlers.clients.connection import ClientConnection, Connections
from handlers.http.body import BodyHandler, NotFoundHandler
from handlers.http.problem import PROBLEM_TYPE, problem_document
from handlers.http.server import Quick, QuickAnswer, Request
from handlers.websocket.frames import MAX_CLOSE_REASON, CloseCode

# Backends send few content types and hosts, each many times. Beyond those of each that
# are remembered (64 KiB each at most, as a header) the oldest is read anew.
MAX_REMEMBERED = 64

# What a body of a text type may say of its characters: text is sent on as UTF-8.
TEXT_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
# One parameter of a media type (RFC 9110, section 5.6.6), with spaces where some
# write them.
_PARAMETER = re.compile(
    r"""\s*;\s*(?:([^\s;="]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"]*)|[^;="]*)"""
)

PLAIN_HOST = re.compile(rb"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")


@lru_cache(MAX_REMEMBERED)
def is_plain_host(value: bytes) -> bool:
    """Whether a Host header names a host as nearly all do."""
    return PLAIN_HOST.fullmatch(value) is not None


# The rules, on plain values: whatever reads the request, they decide.


@dataclass(frozen=True)
class Answer(QuickAnswer):
    """What a callback is answered; `detail` is its sentence, for 2xx the body."""

    status: HTTPStatus
    detail: str
    more_headers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def body(self) -> bytes:
        """Text, or a problem document."""
        if self.status < HTTPStatus.BAD_REQUEST:
            return self.detail.encode()
        return problem_document(self.status, self.detail)

    @cached_property
    def start(self) -> bytes:
        """Its status line."""
        return f"HTTP/1.1 {self.status} {self.status.phrase}\r\n".encode()

    @cached_property
    def rest(self) -> bytes:
        """The rest of an HTTP answer, but for its `Date`."""
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join((*lines, "", "")).encode() + self.body

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """All but those of the exchange itself."""
        good = self.status < HTTPStatus.BAD_REQUEST
        media_type = "text/plain; charset=utf-8" if good else PROBLEM_TYPE
        return {"Content-Type": media_type, **self.more_headers}


OK = Answer(HTTPStatus.OK, "OK")
ACCEPTED = Answer(HTTPStatus.ACCEPTED, "Accepted")  # to be done after the handshake
GONE = Answer(HTTPStatus.GONE, "This connection is not open here.")
FULL = Answer(
    HTTPStatus.TOO_MANY_REQUESTS,
    "Too much waits for this client already.",
    {"Retry-After": "1"},  # seconds; a slow client may have read on by then
)
CODED = Answer(
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "A body is taken as it comes: send it without a Content-Encoding.",
    {"Accept-Encoding": "identity"},  # RFC 9110, section 15.5.16
)
NOT_UTF8 = Answer(
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A body of a text type has to be UTF-8."
)


def find(
    connection_id: str,
    connections: Connections,
    on_asked: Callable[[ClientConnection], None],
) -> ClientConnection | None:
    """The connection if it is connecting or open.

    `on_asked` is called for one that is closing, too.
    """
    connection = connections.get(connection_id)
    if connection is None:
        return None
    on_asked(connection)
    return connection if connection.state in ("connecting", "open") else None


def done(connection: ClientConnection) -> Answer:
    """To what is done at once, or after the handshake. Ask before it is done."""
    return ACCEPTED if connection.state == "connecting" else OK


def unsupported(content_type: str, codings: Sequence[str]) -> Answer | None:
    """The 415 for a body that would have to be decoded first; None for others.

    `codings` are its Content-Encoding headers.
    """
    for coding in ",".join(codings).split(","):
        if coding.strip().lower() not in ("", "identity"):
            return CODED
    return None if has_text_charset(content_type) else NOT_UTF8


@lru_cache(MAX_REMEMBERED)
def has_text_charset(content_type: str) -> bool:
    """Whether it is no text type, names no charset, or only UTF-8 or a part of it."""
    parameters = content_type[len(content_type.partition(";")[0]) :].lower()
    if "charset" not in parameters or not is_text_type(content_type):
        return True
    position = 0
    while parameter := _PARAMETER.match(parameters, position):
        name, value = parameter.groups()
        if name == "charset" and value.strip(" \t\"'") not in TEXT_CHARSETS:
            return False
        position = parameter.end()
    return position == len(parameters)


def message_of(body: bytes, content_type: str, types: Sequence[str]) -> str | bytes:
    """The message that a send's body makes; `types` are the values of `?type=`.

    Raises `ValueError` with the sentence for a 400.
    """
    text = is_text(content_type, types)
    if text is None:
        raise ValueError("type is either text or binary.")
    if not text:
        return body
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise ValueError("A text frame must be UTF-8.") from None


def send(
    connection: ClientConnection, message: str | bytes
) -> Answer | Awaitable[Answer]:
    """Send one frame: the answer, or what to await it from while it waits."""
    answer = done(connection)
    try:
        sent = connection.send(message)
    except SendBufferFull:
        return FULL
    except ConnectionClosed:
        return GONE
    if sent is None:
        return answer
    return _when_sent(connection, sent, answer)


async def _when_sent(
    connection: ClientConnection, sent: "asyncio.Future[None]", answer: Answer
) -> Answer:
    try:
        async with RunningTime(asyncio.get_running_loop(), connection.send_timeout):
            await sent
    except (ConnectionClosed, TimeoutError):
        return GONE
    return answer


# The routes.


class OneConnectionHandler(BodyHandler):
    """What asks for one connection: finding it, and answering.

    The backend does, and in the console an operator.
    """

    connections: Connections
    initiator: Initiator  # of what it closes

    def on_asked(self, connection: ClientConnection) -> None:
        """Somebody asks for `connection`."""

    def find(self, connection_id: str) -> ClientConnection | None:
        """The connection if it is connecting or open; else answers 410."""
        connection = find(connection_id, self.connections, self.on_asked)
        if connection is None:
            self.tell(GONE)
        return connection

    def tell(self, answer: Answer) -> None:
        """Finish with `answer`."""
        self.set_status(answer.status)
        for name, value in answer.headers.items():
            self.set_header(name, value)
        self.finish(answer.body)

    def take_body(self) -> bytes | None:
        """The whole body; None for one that isn't taken, which has been answered."""
        body = super().take_body()
        if body is None:
            return None
        headers = self.request.headers
        refusal = unsupported(
            headers.get("Content-Type", ""), headers.get_list("Content-Encoding")
        )
        if refusal is not None:
            self.tell(refusal)
            return None
        return body


class Sending(OneConnectionHandler):
    """The body becomes one frame."""

    async def post(self, connection_id: str) -> None:
        body = self.take_body()
        if body is None:
            return
        try:
            message = message_of(
                body,
                self.request.headers.get("Content-Type", ""),
                self.get_query_arguments("type", strip=False),
            )
        except ValueError as error:
            self.problem(HTTPStatus.BAD_REQUEST, str(error))
            return
        if (connection := self.find(connection_id)) is None:
            return
        answer = send(connection, message)
        self.tell(answer if isinstance(answer, Answer) else await answer)


class Closing(OneConnectionHandler):
    """Closes, with the body's code and reason."""

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
        answer = done(connection)
        connection.close(code, reason, self.initiator)
        self.tell(answer)


class CallbackHandler(OneConnectionHandler):
    """What the callback routes share: it is the backend that asks."""

    initiator = "backend"

    def initialize(
        self, connections: Connections, backend: Backend, max_message_size: int
    ) -> None:
        self.connections = connections
        self.backend = backend
        self.max_body_size = max_message_size

    def on_asked(self, connection: ClientConnection) -> None:
        self.backend.called_back(connection)


class SendHandler(CallbackHandler, Sending):
    """`POST /socket/<id>/send`: the body becomes one frame."""


class QuickSend:
    """Answers a plain send as `SendHandler` would, by the same rules, without it.

    Making a handler costs more than all the rest of a callback. Whatever is not
    plain, or is not to be answered with 2xx, 410 or 429, is left to the handler.
    """

    def __init__(
        self,
        prefix: str,
        tokens: CallbackTokens,
        connections: Connections,
        backend: Backend,
        max_message_size: int,
    ) -> None:
        self._max_message_size = max_message_size
        self._target = re.compile(
            rb"(?:%b)?/socket/([0-9a-f]{32})/send(?:\?type=(text|binary))?"
            % re.escape(prefix.encode())
        )
        self._tokens = tokens
        self._connections = connections
        self._backend = backend

    def __call__(self, request: Request) -> Quick | None:
        """What takes the body; None for what is not plain."""
        if request.method != "POST" or request.version != "1.1":
            return None
        if request.upgrade or not request.keep_alive:
            return None
        if request.declared > self._max_message_size:
            return None
        target = self._target.fullmatch(request.target)
        if target is None:
            return None
        content_type = host = None
        credentials = []
        for name, value in request.headers:
            if name == b"content-type":
                if content_type is not None:
                    return None
                content_type = value.decode("latin-1")
                if ";" in content_type and not has_text_charset(content_type):
                    return None
            elif name == b"host":
                if host is not None or not is_plain_host(value):
                    return None
                host = value
            elif name == b"authorization":
                credentials.append(value.decode("latin-1"))
            elif name in (b"expect", b"content-encoding"):
                return None
        if host is None or self._tokens.challenge(credentials) is not None:
            return None
        types = (target[2].decode(),) if target[2] else ()
        return partial(self._send, target[1].decode(), content_type or "", types)

    def _send(
        self, connection_id: str, content_type: str, types: Sequence[str], body: bytes
    ) -> Answer | Awaitable[Answer] | None:
        try:
            message = message_of(body, content_type, types)
        except ValueError:
            return None
        connection = find(connection_id, self._connections, self._backend.called_back)
        return GONE if connection is None else send(connection, message)


class DisconnectHandler(CallbackHandler, Closing):
    """`POST /socket/<id>/disconnect`: closes, with a code and a reason."""


class ConnectionHandler(CallbackHandler):
    """`GET`, `HEAD` and `DELETE` of `/socket/<id>`."""

    async def get(self, connection_id: str) -> None:
        if (connection := self.find(connection_id)) is None:
            return
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(describe(connection)))

    head = get

    async def delete(self, connection_id: str) -> None:
        if (connection := self.find(connection_id)) is None:
            return
        connection.close(CloseCode.NORMAL, "", self.initiator)
        self.clear_header("Content-Type")
        self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()


class NoConnectionHandler(NotFoundHandler):
    """404, for the routes of a connection with what can be no id of one."""

    detail = "There is no such connection: an id has 32 hex digits, in lower case."


def describe(connection: ClientConnection) -> dict[str, Any]:
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


def is_text(content_type: str, overrides: Sequence[str]) -> bool | None:
    """Whether a body makes a text frame; None where `?type=` is neither."""
    if overrides:
        return {"text": True, "binary": False}.get(overrides[-1])
    return is_text_type(content_type)


@lru_cache(MAX_REMEMBERED)
def is_text_type(content_type: str) -> bool:
    """Whether bodies of that type are text."""
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
        # Not of bytes, of which it would guess the encoding (RFC 8259, section 8.1).
        closing = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("The body is not JSON in UTF-8.") from None
    if not isinstance(closing, dict):
        raise ValueError("The body is not a JSON object.")
    code = closing.get("code", CloseCode.NORMAL)
    if isinstance(code, float) and code.is_integer():
        code = int(code)  # 1000.0 is no other number in JSON (RFC 8259, section 6)
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
