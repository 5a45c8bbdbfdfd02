"""Tornado's Application, but it parses a query only when a handler asks for it.

Tornado parses every query when it makes the request, and rejects one with many
fields before any route is called. The backend alone reads a handshake's query.
"""

from collections.abc import Awaitable
from functools import cached_property
from typing import Any

from tornado.escape import parse_qs_bytes
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.routing import Matcher
from tornado.web import Application, RequestHandler

# Path or matcher, handler, and the keywords of its `initialize`.
Routes = list[tuple[str | Matcher, type[RequestHandler], Any]]


class RelayApplication(Application):
    """Routes requests with any query, valid or not."""

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        return _Routing(self, server_conn, request_conn)


class RequestWithQuery(HTTPServerRequest):
    """A request that parses its `query_arguments` at the first access."""

    def __init__(
        self,
        start_line: RequestStartLine,
        headers: HTTPHeaders,
        connection: HTTPConnection,
        server_connection: object,
    ) -> None:
        path, _, query = start_line.path.partition("?")
        super().__init__(
            start_line=start_line._replace(path=path),
            headers=headers,
            connection=connection,
            server_connection=server_connection,
        )
        self.uri = start_line.path
        self.query = query
        del self.query_arguments  # Tornado's, parsed from an empty query

    @cached_property
    def query_arguments(self) -> dict[str, list[bytes]]:  # type: ignore[override]
        """All values by name, empty ones included."""
        return parse_qs_bytes(self.query, keep_blank_values=True)


class _Routing(HTTPMessageDelegate):
    """Finds the handler of one request, and passes the request on to it."""

    def __init__(
        self,
        application: Application,
        server_connection: object,
        connection: HTTPConnection,
    ) -> None:
        self._application = application
        self._server_connection = server_connection
        self._connection = connection
        self._handler = HTTPMessageDelegate()  # does nothing, until a handler is found

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        assert isinstance(start_line, RequestStartLine)
        kind = RequestWithQuery if "?" in start_line.path else HTTPServerRequest
        request = kind(
            start_line=start_line,
            headers=headers,
            connection=self._connection,
            server_connection=self._server_connection,
        )
        self._handler = self._application.find_handler(request)
        return self._handler.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        if not getattr(self._handler, "stream_request_body", False):
            return None  # Tornado would store it, and no handler here uses it
        return self._handler.data_received(chunk)

    def finish(self) -> None:
        self._handler.finish()

    def on_connection_close(self) -> None:
        self._handler.on_connection_close()
