"""Outcomes as HTTP responses: text, or a problem document."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from http import HTTPStatus

from handlers.callbacks.actions import OK, Outcome
from handlers.http.fast import FastResponse
from handlers.http.problem import PROBLEM_TYPE, problem_document

START = b"HTTP/1.1 200 OK\r\n"
JSON_HEADERS = {"Content-Type": "application/json; charset=utf-8"}


@dataclass(frozen=True, eq=False)
class Response(FastResponse):
    """The HTTP response for an outcome; for 2xx its sentence is the body.

    Its parts are computed once, because most outcomes are constants.
    """

    outcome: Outcome
    more_headers: Mapping[str, str] = field(default_factory=dict)

    def with_header(self, name: str, value: str) -> "Response":
        """Return the same response with one more header."""
        other = copy(self)
        vars(other).pop("rest", None)
        vars(other)["headers"] = {**self.headers, name: value}
        return other

    @cached_property
    def status(self) -> int:  # type: ignore[override] # read-only here
        """As a number."""
        return int(self.outcome.status)

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """Headers, except those of the exchange itself."""
        good = self.status < HTTPStatus.BAD_REQUEST
        headers = {
            "Content-Type": "text/plain; charset=utf-8" if good else PROBLEM_TYPE
        }
        if self.outcome.retry_after is not None:
            headers["Retry-After"] = str(self.outcome.retry_after)
        return {**headers, **self.more_headers}

    @cached_property
    def body(self) -> bytes:
        """Text, or a problem document."""
        if self.status < HTTPStatus.BAD_REQUEST:
            return self.outcome.detail.encode()
        outcome = self.outcome
        return problem_document(outcome.status, outcome.detail, outcome.problem)

    @cached_property
    def start(self) -> bytes:
        """The status line."""
        phrase = self.outcome.status.phrase
        return f"HTTP/1.1 {self.status} {phrase}\r\n".encode()

    @cached_property
    def rest(self) -> bytes:
        """The headers without `Date`, the empty line and the body."""
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join((*lines, "", "")).encode() + self.body


class JSONResponse(Response):
    """A response that is OK and has a JSON document."""

    def __init__(self, document: bytes) -> None:
        super().__init__(OK)
        # Instead of what would be computed.
        vars(self).update(
            status=200, start=START, headers=JSON_HEADERS, body=document
        )


@lru_cache
def response_of(outcome: Outcome) -> Response:
    """Return the response for `outcome`."""
    return Response(outcome)
