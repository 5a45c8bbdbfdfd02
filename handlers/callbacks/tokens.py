"""Who may call back: with `--callback_token` whoever knows a token, else everybody."""

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.options import Error as OptionError
from tornado.options import define
from tornado.routing import Matcher

from backends.files import read_lines
from handlers.http.body import RefusingHandler

define("callback_token", multiple=True, metavar="TOKENS",
       help="accepted tokens; each callback needs one (Authorization: Bearer); list "
            "several to rotate them; none: callbacks need no token")
define("callback_token_file", type=str, metavar="PATH",
       help="file of accepted callback tokens, one per line; re-read on SIGHUP")

MIN_TOKEN_LENGTH = 16  # characters; 96 bits where they are random base64
MAX_TOKEN_FILE = 64 * 1024  # bytes

# RFC 6750, section 2.1. The scheme's case does not matter (RFC 9110, section 11.1).
TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)
CREDENTIALS = re.compile(rf"bearer +({TOKEN.pattern})", re.ASCII | re.IGNORECASE)

# RFC 6750, section 3: no error code where no token was tried.
NO_TOKEN = 'Bearer realm="SocketDock"'
WRONG_TOKEN = f'{NO_TOKEN}, error="invalid_token"'


class CallbackTokens:
    """The tokens that are accepted, of the option and of its file.

    Without any, everybody is. Raises `OptionError` where one is no token.
    """

    def __init__(self, tokens: Sequence[str] = (), path: str | None = None) -> None:
        self._given = [
            _digest(token, f"--callback_token, number {number}")
            for number, token in enumerate(tokens, start=1)
        ]
        self._path = path
        self._accepted: Sequence[bytes] = ()
        self.reload()

    @property
    def required(self) -> bool:
        """Whether a token is needed at all."""
        return bool(self._accepted)

    def reload(self) -> None:
        """Read the file again.

        Raises `OptionError` where it can't be read or has a line that is no
        token, or none at all, which would open the door; the old ones stay.
        """
        from_file = [] if self._path is None else list(_read_tokens(self._path))
        self._accepted = [*self._given, *from_file]

    def challenge(self, credentials: Sequence[str]) -> str | None:
        """None where a request may pass, else the `WWW-Authenticate` of its 401.

        `credentials` are its `Authorization` headers. Of several, none is
        believed: it is one field (RFC 9110, section 11.6.2), and what came
        before us may have looked at another.
        """
        if not self._accepted:
            return None
        if len(credentials) == 1 and (match := CREDENTIALS.fullmatch(credentials[0])):
            digest = hashlib.sha256(match[1].encode()).digest()
            # All of them, always, so that time tells nothing.
            if sum(hmac.compare_digest(digest, other) for other in self._accepted):
                return None
        tried = any(value.split(" ")[0].lower() == "bearer" for value in credentials)
        return WRONG_TOKEN if tried else NO_TOKEN


def _read_tokens(path: str) -> Iterator[bytes]:
    where = f"--callback_token_file={path}"
    for number, token in read_lines(path, where, MAX_TOKEN_FILE):
        yield _digest(token, f"{where}, line {number}")


def _digest(token: str, where: str) -> bytes:
    """What is kept of a token. Raises `OptionError`, which does not show it."""
    if len(token) < MIN_TOKEN_LENGTH or not TOKEN.fullmatch(token):
        raise OptionError(
            f"{where}: a token is {MIN_TOKEN_LENGTH} or more of A-Z a-z 0-9 - . _ ~ +"
            " /, and then any number of ="
        )
    return hashlib.sha256(token.encode()).digest()


class Unauthorized(Matcher):
    """Matches what is asked below `/socket/` without a token that is accepted.

    As the first of the routes: so no path, method or body is looked at before.
    """

    def __init__(self, prefix: str, tokens: CallbackTokens) -> None:
        self._starts = (f"{prefix}/socket/", "/socket/")
        self._tokens = tokens

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        if not request.path.startswith(self._starts):
            return None
        challenge = self._tokens.challenge(request.headers.get_list("Authorization"))
        if challenge is None:
            return None
        return {"target_kwargs": {"challenge": challenge}}


class UnauthorizedHandler(RefusingHandler):
    """401, whatever was asked."""

    def initialize(self, challenge: str) -> None:
        self._challenge = challenge

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.unauthorized(self._challenge)
