"""Errors in the form from which AWS's SDKs make their exceptions."""

import json
import uuid
from collections.abc import Mapping
from http import HTTPStatus

from handlers.http.problem import ProblemHandler

# The names of AWS's errors, by which the SDKs choose their exceptions.
ERROR_TYPES: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: "BadRequestException",
    HTTPStatus.FORBIDDEN: "ForbiddenException",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedException",
    HTTPStatus.GONE: "GoneException",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "PayloadTooLargeException",
    HTTPStatus.TOO_MANY_REQUESTS: "LimitExceededException",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerErrorException",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableException",
    HTTPStatus.GATEWAY_TIMEOUT: "GatewayTimeoutException",
}


class Refusal(Exception):
    """Why a request is refused: status, type of the error, and a sentence.

    `challenge` is the `WWW-Authenticate` header of a 401.
    """

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str | None = None,
        challenge: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type or ERROR_TYPES.get(status, "UnknownException")
        self.challenge = challenge


class AWSErrorHandler(ProblemHandler):
    """A handler whose errors are AWS's, also those of the classes beside it."""

    connection_id = ""  # in errors; Tornado may refuse a method before it is known

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("x-amzn-RequestId", str(uuid.uuid4()))

    def problem(self, status: int, detail: str) -> None:
        """Answer with the error of a status."""
        self.refuse(Refusal(status, detail))

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error."""
        self.set_status(refusal.status)
        self.set_header("Content-Type", "application/json")
        self.set_header("x-amzn-ErrorType", refusal.error_type)
        if refusal.challenge is not None:
            self.set_header("WWW-Authenticate", refusal.challenge)
        self.finish(json.dumps({
            "message": str(refusal),
            "connectionId": self.connection_id,
            "requestId": self._headers["x-amzn-RequestId"],
        }))
