"""Decides who may use `/@connections`: whoever signs, or has a token."""

import hashlib
from datetime import UTC, datetime
from http import HTTPStatus

from tornado.httputil import HTTPServerRequest

from handlers.callbacks.access import CallbackAccess, key_in
from handlers.callbacks.apigateway.errors import Refusal
from handlers.callbacks.apigateway.sigv4 import SignatureError, SignedRequest
from handlers.callbacks.apigateway.sigv4_keys import SigningKeys


class ConnectionsAccess:
    """Accepts a request that is signed with one of `keys`, or that `access` accepts.

    Without `keys`, only `access` decides. With them, what it accepts is sufficient only
    if it requires anything. `prefix` is the path prefix of callbacks.
    """

    def __init__(
        self, keys: SigningKeys | None, access: CallbackAccess, prefix: str
    ) -> None:
        self._keys = keys
        self._access = access
        self._prefix = prefix

    def check(
        self, request: HTTPServerRequest, connection_id: str
    ) -> "UnverifiedSignature | None":
        """Return the signature that decides, or None if the request is accepted.

        Raises `Refusal`.
        """
        access, keys = self._access, self._keys
        if keys is None or access.required:
            challenge = access.challenge(
                request.headers.get_list("Authorization"),
                connection_id,
                key_in(request.query),
            )
            if challenge is None:
                return None
            if keys is None:
                # The status of each callback without a token; SDKs read the type.
                raise Refusal(
                    HTTPStatus.UNAUTHORIZED,
                    access.detail,
                    "ForbiddenException",
                    challenge,
                )
        return UnverifiedSignature(request, keys, self._prefix)


class UnverifiedSignature:
    """The signature of a request whose body is being read.

    Raises `Refusal` if it need not be read.
    """

    def __init__(
        self, request: HTTPServerRequest, keys: SigningKeys, prefix: str
    ) -> None:
        self._keys = keys
        self._digest = hashlib.sha256()
        try:
            self._request = SignedRequest(
                request.method or "",
                request.path,
                request.query,
                request.headers,
                prefix,
            )
        except SignatureError as error:
            raise _forbidden(error) from None

    def update(self, chunk: bytes) -> None:
        """Add a part of the body."""
        self._digest.update(chunk)

    def verify(self) -> None:
        """Raise `Refusal` unless the signature is right, and valid now."""
        try:
            self._request.verify(
                self._keys, self._digest.hexdigest(), datetime.now(UTC)
            )
        except SignatureError as error:
            raise _forbidden(error) from None


def _forbidden(error: SignatureError) -> Refusal:
    return Refusal(HTTPStatus.FORBIDDEN, str(error), error.error_type)
