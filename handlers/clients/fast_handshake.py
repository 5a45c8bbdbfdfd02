"""Answers usual handshakes without a handler of Tornado.

`handlers.clients.opening` checks and decides them, as it does for
`ClientSocketHandler`. To create that handler costs more than all the rest.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from http import HTTPStatus
from http.client import responses
from typing import Any

from tornado.httputil import HTTPHeaders

from handlers.clients.opening import Opening, Openings
from handlers.clients.paths import ClientPaths
from handlers.clients.request import HandshakeRequest
from handlers.http.access_log import PEER_LEFT, log_access
from handlers.http.plain import is_plain_host
from handlers.http.request import Request
from handlers.http.response import Connection, add_option
from handlers.http.sockets import TakenSocket


class FastHandshakes:
    """Answers each handshake that is plain; a `RequestServer` calls it.

    Others, such as those to other paths, or without a valid Host, are left to the
    handlers.
    """

    __slots__ = ("_openings", "_paths", "_wants_fields")

    def __init__(self, paths: ClientPaths, openings: Openings) -> None:
        self._paths = frozenset(path.encode() for path in paths.all)
        self._openings = openings
        self._wants_fields = openings.context.backend.wants_fields

    def __call__(self, connection: Connection, request: Request) -> bool:
        """Answer a complete request, now or later; False if it is not plain."""
        asked = self._asked(connection, request)
        if asked is None:
            return False
        answer = FastAnswer(connection, request, asked.path)
        deciding = Opening(self._openings, asked, answer).begin()
        if deciding is not None:
            answer.wait(deciding)
        return True

    def _asked(
        self, connection: Connection, request: Request
    ) -> HandshakeRequest | None:
        if (
            request.method != "GET"
            or request.version != "1.1"
            or request.target.partition(b"?")[0] not in self._paths
        ):
            return None
        headers: dict[str, list[str]] = {}
        for name, value in request.headers:
            if name == b"host" and ("host" in headers or not is_plain_host(value)):
                return None
            key, text = name.decode("latin-1"), value.decode("latin-1")
            if key in headers:
                headers[key].append(text)
            else:
                headers[key] = [text]
        if "host" not in headers or "websocket" not in headers.get("upgrade", ()):
            return None
        asked = HandshakeRequest(
            request.target.decode("latin-1"),
            headers,
            connection.remote_ip,
            connection.has_tls,
            connection.descriptor,
        )
        if self._wants_fields:
            asked.fields = request.fields()
        return asked


class FastAnswer:
    """Answers one handshake; the `Response` to its request while it is decided."""

    __slots__ = ("_connection", "_path", "_request", "_task", "answered", "gone")

    prepared = True

    def __init__(self, connection: Connection, request: Request, path: str) -> None:
        self._connection = connection
        self._request = request
        self._path = path
        self._task: asyncio.Task[None] | None = None  # while the backend decides
        self.answered = False
        self.gone = False

    def wait(self, deciding: Coroutine[Any, Any, None]) -> None:
        """Answer when the backend has decided."""
        self._request.response = self
        self._task = self._connection.loop.create_task(deciding)

    # What the connection calls meanwhile.

    def on_body(self) -> None:
        """Nothing: there is no body."""

    def on_close(self) -> None:
        """If this is before the answer, the backend decides nevertheless."""
        if not self.answered:
            self.gone = True
            log_access("GET", self._path, PEER_LEFT)

    # What `Opening` calls.

    def respond(self, status: int, headers: HTTPHeaders, body: bytes) -> None:
        """Answer with another status than 101, and close the connection."""
        if self._is_over:
            return
        if status >= 200 and status not in (204, 304):
            headers["Content-Length"] = str(len(body))
        add_option(headers, "close")
        reason = responses.get(status, "Unknown")
        self._send(f"{status} {reason}", headers.get_all(), body)
        log_access("GET", self._path, status)
        self._connection.on_answered(keep_alive=False)

    def switch(self, fields: list[tuple[str, str]]) -> TakenSocket | None:
        """Answer 101 with these headers, and return the socket."""
        if self._is_over:
            return None
        self._send("101 Switching Protocols", fields)
        log_access("GET", self._path, HTTPStatus.SWITCHING_PROTOCOLS)
        return self._connection.hand_over()

    @property
    def _is_over(self) -> bool:
        return self._connection.request is not self._request

    def _send(
        self, status: str, fields: Iterable[tuple[str, str]], body: bytes = b""
    ) -> None:
        self.answered = True
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
        self._connection.send_dated(
            f"HTTP/1.1 {status}\r\n".encode(),
            f"{lines}\r\n".encode("latin-1") + body,
        )
