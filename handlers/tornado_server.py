"""Tornado's own HTTP server, held to our bounds.

It serves WebSockets by TLS, which `handlers.server` can't hand over, and all the
rest where `--http_server=tornado` says so.
"""

import copy
import re
import socket
import ssl
from typing import Any

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
)
from tornado.iostream import IOStream, SSLIOStream
from tornado.web import Application

from handlers.server import IDLE_TIMEOUT, RequestBounds

BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")


class TornadoServer(HTTPServer):
    """Tornado's server, with one limit for the first request and one for idling."""

    def initialize(  # type: ignore[override] # of what HTTPServer offers, this
        self, application: Application, bounds: RequestBounds
    ) -> None:
        super().initialize(
            application,
            max_header_size=bounds.max_header_size,
            idle_connection_timeout=IDLE_TIMEOUT,
            body_timeout=bounds.body_timeout,
            max_body_size=bounds.max_body_size,
            max_buffer_size=2 * bounds.max_header_size,
        )
        self._served: set[object] = set()
        self._first = copy.copy(self.conn_params)
        self._first.header_timeout = bounds.header_timeout

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve a connection that was accepted."""
        if tls is None:
            stream = IOStream(accepted, max_buffer_size=self.max_buffer_size)
        else:
            try:
                wrapped = tls.wrap_socket(
                    accepted, server_side=True, do_handshake_on_connect=False
                )
            except OSError:  # it has gone already
                accepted.close()
                return
            stream = SSLIOStream(wrapped, max_buffer_size=self.max_buffer_size)
        self.handle_stream(stream, address)

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        if request_conn.stream.closed():
            return _Nobody(request_conn)
        parse = request_conn._parse_headers

        def parse_strictly(data: bytes) -> tuple[str, HTTPHeaders]:
            # As handlers.server: what a proxy takes for one header must not be two.
            if BARE_LINE_FEED.search(data.lstrip(b"\r\n")):
                raise HTTPInputError("a line feed alone")
            return parse(data)

        request_conn._parse_headers = parse_strictly  # type: ignore[method-assign]
        if server_conn not in self._served:
            self._served.add(server_conn)
            request_conn.params = self._first
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        self._served.discard(server_conn)
        super().on_close(server_conn)


class _Nobody(HTTPMessageDelegate):
    """Whom a request reaches that was read before its connection was closed.

    Tornado would serve it, unanswered. "The server [...] MUST NOT process any
    further requests received on that connection" (RFC 9112, section 9.6).
    """

    def __init__(self, connection: HTTP1Connection) -> None:
        self._connection = connection

    def headers_received(self, start_line: object, headers: object) -> None:
        self._connection.detach()  # so that nothing more is read
