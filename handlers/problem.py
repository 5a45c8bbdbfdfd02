"""Errors of a route as problem documents (RFC 9457)."""

import json
import logging
from http import HTTPStatus
from types import TracebackType
from typing import Any

from tornado.web import HTTPError, RequestHandler

logger = logging.getLogger(__name__)


class ProblemHandler(RequestHandler):
    """A handler whose errors are `application/problem+json`.

    As the default handler it answers 404 for every path that is no route's.
    """

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    async def prepare(self) -> None:
        if type(self) is ProblemHandler:
            self.problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")

    def problem(self, status: int, detail: str) -> None:
        """Finish with `status` and a document with `title`, `status`, `detail`."""
        status = HTTPStatus(status)
        self.set_status(status)
        self.set_header("Content-Type", "application/problem+json")
        self.finish(
            json.dumps({"title": status.phrase, "status": status, "detail": detail})
        )

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado answers by itself: 405, and 500 for a bug of ours."""
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
        """Log a bug, without the query and the headers that Tornado would show."""
        if value is not None and not isinstance(value, HTTPError):
            logger.error(
                "bug in %s %s",
                self.request.method,
                self.request.path,
                exc_info=value,
            )

    def _has(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(RequestHandler, method)
