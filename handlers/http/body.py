"""Handlers that limit the size of a request's body themselves.

Tornado's own limit would answer 400 without a body.
"""

from http import HTTPStatus
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.web import stream_request_body

from handlers.http.body_budget import RETRY_AFTER, BodyBudget, joined
from handlers.http.problem import ProblemHandler

# A rejected body is read to its end and discarded, so that the peer gets the answer
# and not a reset. Beyond these limits the connection is closed instead.
MAX_DISCARDED_BODY = 64 * 1024 * 1024  # bytes
DISCARD_TIMEOUT = 5.0  # seconds


@stream_request_body
class BodyHandler(ProblemHandler):
    """A handler that accepts a body of up to `max_body_size` bytes."""

    max_body_size = 0
    _body: bytes | bytearray = b""
    _length = 0

    @property
    def _budget(self) -> BodyBudget:
        connection: Any = self.request.connection
        budget: BodyBudget = connection.body_budget
        return budget

    async def prepare(self) -> None:
        connection: Any = self.request.connection
        connection.set_max_body_size(max(MAX_DISCARDED_BODY, self.max_body_size))
        headers = self.request.headers
        length = _declared_length(headers)
        if length > self.max_body_size:
            if length > MAX_DISCARDED_BODY or "Expect" in headers:
                self._refuse_early()
            connection.set_body_timeout(DISCARD_TIMEOUT)

    def data_received(self, chunk: bytes) -> None:
        self._length += len(chunk)
        if self._finished:
            return
        if self._length <= self.max_body_size:
            self._body = joined(self._body, chunk)
            self._budget.hold(self, self._length)
        else:
            self._drop_body()
            if self._length > MAX_DISCARDED_BODY - len(chunk):
                self._refuse_early()

    def on_finish(self) -> None:
        self._drop_body()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self._drop_body()

    def on_over_budget(self) -> None:
        """Answer 503: the process has no memory for the body."""
        self._drop_body()
        if not self._finished:
            self.set_header("Connection", "close")
            self.set_header("Retry-After", str(RETRY_AFTER))
            self.problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "Memory limit for request bodies reached.",
            )

    def _drop_body(self) -> None:
        self._body = b""
        self._budget.release(self)

    def _refuse_early(self) -> None:
        """Answer without reading the rest of the body, then close the connection."""
        self.set_header("Connection", "close")
        if self._has(str(self.request.method).lower()):
            self._refuse_body()
        else:
            self.write_error(HTTPStatus.METHOD_NOT_ALLOWED)

    def _refuse_body(self) -> None:
        self.problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than {self.max_body_size} bytes.",
        )

    def take_body(self) -> bytes | None:
        """Return the whole body; None if it was rejected, which has been answered."""
        if self._finished:
            return None
        if self._length > self.max_body_size:
            self._refuse_body()
            return None
        body = bytes(self._body)
        self._drop_body()
        return body


class RefusingHandler(BodyHandler):
    """Rejects every method in the same way, and discards the body.

    It defines no method, so Tornado answers 405 to each; subclasses replace that in
    `write_error`.
    """

    async def prepare(self) -> None:
        connection: Any = self.request.connection
        connection.set_body_timeout(DISCARD_TIMEOUT)
        await super().prepare()


class NotFoundHandler(RefusingHandler):
    """Answers 404 to every path without a route."""

    detail = "No resource at this path."

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.problem(HTTPStatus.NOT_FOUND, self.detail)


def _declared_length(headers: HTTPHeaders) -> float:
    """Return `Content-Length`; 0 if it is absent, or invalid, which Tornado rejects."""
    digits = headers.get("Content-Length", "0")
    if not (digits.isascii() and digits.isdigit()):
        return 0
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 20 else float("inf")
