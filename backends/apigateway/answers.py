"""Reads what functions return: integration responses, and errors.

An error comes from Lambda's Invoke API (`X-Amz-Function-Error`), from the runtime
interface emulator (200, and a body with `errorMessage`), or from an HTTP service (a
status that is not 2xx).
"""

import asyncio
import binascii
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from backends import AttemptOutcome, BackendError, Connection
from backends.apigateway.documents import parsed
from backends.client import Response
from backends.client.response import MalformedResponse
from backends.commands import Command, CommandError, Executor, Send
from backends.events import Event
from backends.http.content import decoded
from backends.http.retries import (
    GATEWAY_FAILURES,
    AnswerRules,
    answered,
    attempt_outcome,
    is_success,
)

MAX_ANSWER_SIZE = 6 * 1024 * 1024  # bytes; of Lambda for what a function returns
STATUS = re.compile(r"([0-9]{3})(?:\.0)?")
FUNCTION_ERROR = "x-amz-function-error"
ERROR_MESSAGE = "errorMessage"

# What API Gateway says to clients.
SERVER_ERROR, FORBIDDEN = "Internal server error", "Forbidden"


class BadAnswer(Exception):
    """What a function returned is an error, or malformed; the message says how."""


class FunctionFailed(BadAnswer):
    """The function has failed; `error` is its `errorMessage`, or empty."""

    def __init__(self, why: str, error: str = "") -> None:
        super().__init__(why)
        self.error = error


class Answer(NamedTuple):
    """An integration response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: str | bytes

    @property
    def accepts(self) -> bool:
        """Whether the status is a success."""
        return is_success(self.status)


def keep_answer(status: int, headers: Mapping[str, str]) -> int:
    """Keep the whole body of each response (`client.response.Keep`)."""
    return MAX_ANSWER_SIZE


def read_result(response: Response, limit: int = MAX_ANSWER_SIZE) -> Any:
    """Return what a function returned, parsed. Raises `BadAnswer`.

    None if it is no JSON. `limit` is the most bytes that it may have.
    """
    if not is_success(response.status):
        raise FunctionFailed(answered(response))
    body = response.body or b""
    if not response.complete or len(body) > limit:
        raise BadAnswer(f"the response was cut off, or is larger than {limit} bytes")
    try:
        body = decoded(response.headers, body, limit)
    except MalformedResponse as error:
        raise BadAnswer(str(error)) from None
    try:
        result = parsed(body)
    except (ValueError, RecursionError):
        result = None
    is_object = isinstance(result, dict)
    message = result.get(ERROR_MESSAGE) if is_object else None
    if FUNCTION_ERROR in response.headers or (
        is_object and ERROR_MESSAGE in result and "statusCode" not in result
    ):
        raise FunctionFailed(
            "the function has failed", message if isinstance(message, str) else ""
        )
    return result


def read_answer(response: Response) -> Answer:
    """Return an integration response. Raises `BadAnswer`."""
    result = read_result(response)
    if not isinstance(result, dict):
        raise BadAnswer("the function returned no JSON object with statusCode")
    status, body = result.get("statusCode"), result.get("body")
    # Some runtimes write it as "200" or 200.0.
    match = STATUS.fullmatch(str(status))
    if match is None:
        raise BadAnswer("the function returned no statusCode")
    status = int(match[1])
    if body is not None and not isinstance(body, str):
        raise BadAnswer("the function returned a body that is not a string")
    if body and result.get("isBase64Encoded") is True:
        try:
            return Answer(
                status, _headers_of(result), binascii.a2b_base64(body, strict_mode=True)
            )
        except ValueError:
            raise BadAnswer("the function returned a body that is not base64") from None
    return Answer(status, _headers_of(result), body or "")


def _headers_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers of an integration response, by lower-case name.

    Of several values in `multiValueHeaders` the last one counts.
    """
    headers: dict[str, str] = {}
    for member in ("multiValueHeaders", "headers"):
        named = result.get(member)
        for name, value in named.items() if isinstance(named, dict) else ():
            last = value[-1] if isinstance(value, list) and value else value
            if isinstance(last, str | int | float):
                headers[name.lower()] = str(last)
    return headers


def invocation_outcome(outcome: Response | BackendError) -> AttemptOutcome:
    """Classify an invocation: whether the function has run without an error."""
    if isinstance(outcome, BackendError):
        return attempt_outcome(outcome)
    try:
        read_result(outcome)
    except BadAnswer:
        return "unreachable" if outcome.status in GATEWAY_FAILURES else "error"
    return "delivered"


def why_failed(response: Response) -> str:
    """Say for the log why a response is a failure, without what the function said."""
    try:
        read_answer(response)
    except BadAnswer as error:
        return str(error)
    return "the function returned a body that is larger than --max_message_size"


# What the response to an invocation means if its result does not matter.
INVOCATION_RULES = AnswerRules(invocation_outcome, why_failed)


def error_frame(message: str, connection_id: str, event: Event) -> str:
    """Return the frame that tells a client that its message has failed."""
    request_id = orjson.loads(bytes(event.body))["requestContext"]["requestId"]
    return orjson.dumps(
        {"message": message, "connectionId": connection_id, "requestId": request_id}
    ).decode()


class Answers:
    """Sends the answers to messages: a `MessageReplies`.

    Without a route response (`sends` is False) bodies of answers are not sent.
    """

    def __init__(self, executor: Executor, sends: bool) -> None:
        self._executor = executor
        self._sends = sends

    @property
    def rules(self) -> AnswerRules:
        """What the response to an invocation for a message means."""
        return AnswerRules(self._outcome_of, why_failed)

    def _outcome_of(self, outcome: Response | BackendError) -> AttemptOutcome:
        """Classify the invocation for a message: it must return a valid answer."""
        became = invocation_outcome(outcome)
        if became == "delivered":
            assert isinstance(outcome, Response)
            try:
                body = self._frame_of(outcome)
                if body and self._sends:
                    self._executor.check([Command(Send(body), None)])
            except (BadAnswer, CommandError):
                return "error"
        return became

    def of_message(self, status: int, headers: Mapping[str, str]) -> int:
        """Keep the whole body, which may be an error."""
        return keep_answer(status, headers)

    def carry_out(
        self, connection: Connection, event_id: str, response: Response
    ) -> "asyncio.Future[None] | None":
        """Send the body of an answer, if there is one."""
        if not self._sends:
            return None
        body = self._frame_of(response)
        if not body:
            return None
        return self.send(connection, body)

    def _frame_of(self, response: Response) -> str | bytes:
        """Return the body of an answer, maybe empty. Raises `BadAnswer`.

        An HTTP service may have no answer at all; a function returns `null` then, which
        is an error on AWS.
        """
        return read_answer(response).body if response.body else ""

    def send(
        self, connection: Connection, frame: str | bytes
    ) -> "asyncio.Future[None] | None":
        """Send a frame, unless the connection has ended.

        Returns None if the kernel has taken it, or a future that is done when it has,
        or when the connection ends.
        """
        command = Command(Send(frame), None)
        return self._executor.carry_out([command], "response", (connection.id,))
