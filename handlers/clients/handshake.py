"""Reads and answers handshakes by a handler of Tornado.

`handlers.clients.opening` checks and decides them. Most handshakes need no handler:
see `handlers.clients.fast_handshake`.
"""

from http import HTTPStatus
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.websocket import WebSocketHandler

from handlers.clients.checks import Rejection
from handlers.clients.headers import written_as_usual
from handlers.clients.opening import Opening, Openings
from handlers.clients.request import HandshakeRequest
from handlers.http.problem import ProblemHandler
from handlers.http.sockets import TakenSocket


class ClientSocketHandler(ProblemHandler, WebSocketHandler):
    """Handles a handshake until it is answered; an `Answer` of its `Opening`."""

    def initialize(self, openings: Openings) -> None:
        self._openings = openings

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Not in `prepare()`, which runs before the checks."""
        deciding = Opening(self._openings, self._asked(), self).begin()
        if deciding is not None:
            await deciding

    def _asked(self) -> HandshakeRequest:
        request = self.request
        connection: Any = request.connection
        asked = HandshakeRequest(
            str(request.uri),
            {name.lower(): request.headers.get_list(name) for name in request.headers},
            request.remote_ip or "",
            request.protocol == "https",
            connection.descriptor,
        )
        asked.version = request.version.removeprefix("HTTP/")
        asked.has_body = bool(request.body) or "Transfer-Encoding" in request.headers
        if self._openings.context.backend.wants_fields:
            fields = getattr(connection, "fields", None)
            # Tornado's server does not keep the case of names.
            asked.fields = fields or list(written_as_usual(request.headers.get_all()))
        return asked

    # What `Opening` calls.

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self.peer_left or self.request.connection is None

    def respond(self, status: int, headers: HTTPHeaders, body: bytes) -> None:
        """Answer with another status than 101."""
        self.set_status(status)
        self.clear_header("Content-Type")
        for name, value in headers.items():
            self.set_header(name, value)
        self.finish(body or None)  # some statuses have no body

    def switch(self, fields: list[tuple[str, str]]) -> TakenSocket | None:
        """Answer 101 with these headers, and return the socket."""
        self.clear_header("Content-Type")
        self.set_status(HTTPStatus.SWITCHING_PROTOCOLS)
        for name, value in fields:
            self.set_header(name, value)
        self.finish()
        connection: Any = self.request.connection
        taken: TakenSocket | None = connection.take_socket()
        return taken

    # What Tornado calls.

    def on_finish(self) -> None:
        """Break a reference cycle once the handshake is answered.

        Tornado keeps the template namespace of a `WebSocketHandler`, which refers to
        the handler. Without this each handler would wait for the garbage collector.
        """
        self.ui.clear()


class UnknownPathHandler(ClientSocketHandler):
    """Rejects a handshake to a path where no clients connect."""

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Answer 403."""
        detail = "No clients connect at this path."
        Opening(self._openings, self._asked(), self).reject(
            Rejection(HTTPStatus.FORBIDDEN, detail)
        )
