"""Error responses as problem documents (RFC 9457).

Each handler of the relay inherits `ProblemHandler`.
"""

import json
import logging
from collections.abc import Iterable
from http import HTTPStatus
from types import TracebackType
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.web import HTTPError, RequestHandler

logger = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"

# Header names as their standards spell them. Names are not case-sensitive, but some
# clients compare them as if they were.
SPELLINGS = {
    "-".join(map(str.capitalize, name.split("-"))): name
    for name in (
        "ETag",
        "Sec-WebSocket-Accept",
        "Sec-WebSocket-Extensions",
        "Sec-WebSocket-Protocol",
        "Sec-WebSocket-Version",
        "WWW-Authenticate",
        "x-amzn-ErrorType",
        "x-amzn-RequestId",
    )
}


def problem_document(status: int, detail: str, kind: str | None = None) -> bytes:
    """Return the body of an error response; its media type is `PROBLEM_TYPE`.

    `kind` is the problem's type; None: there is no more to know than the status.
    """
    title = HTTPStatus(status).phrase
    document = {"title": title, "status": status, "detail": detail}
    if kind is not None:
        document = {"type": kind, **document}
    return json.dumps(document).encode()


class SpeltHeaders(HTTPHeaders):
    """Headers of a response, sent with the names that their standards spell."""

    def get_all(self) -> Iterable[tuple[str, str]]:
        return [
            (SPELLINGS.get(name, name), value) for name, value in super().get_all()
        ]


class ProblemHandler(RequestHandler):
    """A handler whose errors are `application/problem+json`.

    `peer_left` says that the peer closed the connection before the response began.
    """

    peer_left = False

    def on_connection_close(self) -> None:
        """The peer has left. Tornado's own method has nothing to do here."""
        self.peer_left = not self._headers_written

    def finish(self, chunk: str | bytes | dict[Any, Any] | None = None) -> Any:
        """Answer, unless the peer has left, even if that was not reported yet."""
        connection = self.request.connection
        is_over = connection is None or getattr(connection, "is_over", False)
        if is_over and not self._headers_written:
            self.peer_left = True
        return super().finish(chunk)

    def set_default_headers(self) -> None:
        headers = SpeltHeaders()
        for name in ("Content-Type", "Date"):  # Tornado's defaults, without Server
            headers[name] = self._headers[name]
        self._headers = headers

    def problem(self, status: int, detail: str) -> None:
        """Finish with `status` and a document with `title`, `status`, `detail`."""
        self.set_status(status)
        self.set_header("Content-Type", PROBLEM_TYPE)
        self.finish(problem_document(status, detail))

    def unauthorized(self, challenge: str, detail: str) -> None:
        """Answer 401 with its `WWW-Authenticate` (RFC 9110, section 15.5.2)."""
        self.set_header("WWW-Authenticate", challenge)
        self.problem(HTTPStatus.UNAUTHORIZED, detail)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Write the errors that Tornado raises: 405, and 500 for a bug in a handler."""
        status = HTTPStatus(status_code)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = [m for m in self.SUPPORTED_METHODS if self._has(m.lower())]
            self.set_header("Allow", ", ".join(allowed))
        self.problem(status, status.description or status.phrase)

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Log a bug, without the query and the headers that Tornado would log."""
        if value is not None and not isinstance(value, HTTPError):
            logger.error(
                "bug in %s %s",
                self.request.method,
                self.request.path,
                exc_info=value,
            )

    def _has(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(RequestHandler, method)
