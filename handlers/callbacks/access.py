"""Decides who may call back: whoever has a token, or the key of the connection."""

from collections.abc import Callable, Sequence, Set
from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher

from handlers.callbacks.capabilities import Capabilities
from handlers.callbacks.tokens import TOKEN_REQUIRED, CallbackTokens, challenge_of
from handlers.http.body import RefusingHandler

KEY = "key="  # begins the part of a query that has the key

KEY_REQUIRED = (
    "The key in the URLs of the connection's events required, or"
    " Authorization: Bearer with a token of --callback_token."
)


class CallbackAccess:
    """Accepts a request with a token, or with the key of its connection.

    Without tokens and without `capabilities`, it accepts every request; or none if
    callbacks of AWS's SDKs are `signed`, so that these are not guarded in vain.
    """

    def __init__(
        self,
        tokens: CallbackTokens,
        capabilities: Capabilities | None,
        signed: bool = False,
    ) -> None:
        self._tokens = tokens
        self._capabilities = capabilities
        self._signed = signed

    @property
    def required(self) -> bool:
        """Whether requests need a token or a key."""
        return bool(self.schemes)

    @property
    def schemes(self) -> Set[str]:
        """What is accepted: "token", "key", "sigv4"; empty: everybody is."""
        used = {
            "token": self._tokens.required,
            "key": self._capabilities is not None,
            "sigv4": self._signed,  # by `ConnectionsAccess`
        }
        return {scheme for scheme, is_used in used.items() if is_used}

    @property
    def key_of(self) -> Callable[[str], str] | None:
        """Returns the key of a connection by its id; None without keys."""
        return None if self._capabilities is None else self._capabilities.key_of

    @property
    def detail(self) -> str:
        """The sentence of a 401."""
        return TOKEN_REQUIRED if self._capabilities is None else KEY_REQUIRED

    def challenge(
        self, credentials: Sequence[str], connection_id: str, key: str | None
    ) -> str | None:
        """Return None if a request is authorized, else the `WWW-Authenticate` header.

        `credentials` are its `Authorization` headers.
        """
        if self._capabilities is None:
            if self._signed and not self._tokens.required:
                return challenge_of(credentials)
            return self._tokens.challenge(credentials)
        if self._tokens.accept(credentials) or (
            key is not None and self._capabilities.opens(key, connection_id)
        ):
            return None
        return challenge_of(credentials)


def key_in(query: str) -> str | None:
    """Return the key in a query; None if there is none, or several.

    It needs no decoding, since its characters are never escaped.
    """
    keys = [part for part in query.split("&") if part.startswith(KEY)]
    return keys[0].removeprefix(KEY) if len(keys) == 1 else None


class Unauthorized(Matcher):
    """Matches requests below `/socket/` that are not authorized.

    It is the first route, so that no path, method or body is checked before.
    """

    def __init__(self, prefix: str, access: CallbackAccess) -> None:
        self._starts = (f"{prefix}/socket/", "/socket/")
        self._access = access

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        for start in self._starts:
            if request.path.startswith(start):
                return self._match(request, request.path.removeprefix(start))
        return None

    def _match(self, request: HTTPServerRequest, rest: str) -> dict[str, Any] | None:
        challenge = self._access.challenge(
            request.headers.get_list("Authorization"),
            rest.partition("/")[0],
            key_in(request.query),
        )
        if challenge is None:
            return None
        return {
            "target_kwargs": {"challenge": challenge, "detail": self._access.detail}
        }


class UnauthorizedHandler(RefusingHandler):
    """Answers 401 to every request."""

    def initialize(self, challenge: str, detail: str) -> None:
        self._challenge = challenge
        self._detail = detail

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.unauthorized(self._challenge, self._detail)
