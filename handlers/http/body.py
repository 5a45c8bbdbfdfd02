"""A request's body, bounded here and not by Tornado, which would answer a bare 400."""

from http import HTTPStatus
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.web import stream_request_body

from handlers.http.kept import RETRY_AFTER, KeptBodies, joined
from handlers.http.problem import ProblemHandler

# A body that is not wanted is read to its end and dropped, so that the peer sees
# the answer and no reset; beyond these bounds the connection ends instead.
MAX_DISCARDED_BODY = 64 * 1024 * 1024  # bytes
DISCARD_TIMEOUT = 5.0  # seconds


@stream_request_body
class BodyHandler(ProblemHandler):
    """A handler that keeps a body of up to `max_body_size` bytes."""

    max_body_size = 0
    _body: bytes | bytearray = b""
    _length = 0

    @property
    def _kept(self) -> KeptBodies:
        connection: Any = self.request.connection
        kept: KeptBodies = connection.kept_bodies
        return kept

    async def prepare(self) -> None:
        connection: Any = self.request.connection
        connection.set_max_body_size(MAX_DISCARDED_BODY)
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
            self._kept.keep(self, self._length)
        else:
            self._drop_body()
            if self._length > MAX_DISCARDED_BODY - len(chunk):
                self._refuse_early()

    def on_finish(self) -> None:
        self._drop_body()

    def on_connection_close(self) -> None:
        self._drop_body()

    def refuse_to_keep(self) -> None:
        """503: the process has no room for the body."""
        self._drop_body()
        if not self._finished:
            self.set_header("Connection", "close")
            self.set_header("Retry-After", str(RETRY_AFTER))
            self.problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "This instance keeps as many bytes of bodies as it may.",
            )

    def _drop_body(self) -> None:
        self._body = b""
        self._kept.discard(self)

    def _refuse_early(self) -> None:
        """Answer without the rest of the body, after which the connection ends."""
        self.set_header("Connection", "close")
        if self._has(str(self.request.method).lower()):
            self._refuse_body()
        else:
            self.write_error(HTTPStatus.METHOD_NOT_ALLOWED)

    def _refuse_body(self) -> None:
        self.problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"A body may have {self.max_body_size} bytes.",
        )

    def take_body(self) -> bytes | None:
        """The whole body; None where it was not taken, which has been answered."""
        if self._finished:
            return None
        if self._length > self.max_body_size:
            self._refuse_body()
            return None
        body = bytes(self._body)
        self._drop_body()
        return body


class RefusingHandler(BodyHandler):
    """Refuses all methods alike, and keeps no byte of a body.

    It has no method itself, so that Tornado thinks 405 of each; `write_error`
    says what it is instead.
    """

    async def prepare(self) -> None:
        connection: Any = self.request.connection
        connection.set_body_timeout(DISCARD_TIMEOUT)
        await super().prepare()


class NotFoundHandler(RefusingHandler):
    """404, for every path that is no route's."""

    detail = "There is nothing at this path."

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.problem(HTTPStatus.NOT_FOUND, self.detail)


def _declared_length(headers: HTTPHeaders) -> float:
    """What `Content-Length` says; 0 where Tornado will refuse it, or it is absent."""
    digits = headers.get("Content-Length", "0")
    if not (digits.isascii() and digits.isdigit()):
        return 0
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 20 else float("inf")
