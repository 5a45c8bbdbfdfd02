"""Checks the bearer tokens of callbacks (`--callback_token`)."""

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence

from tornado.options import Error as OptionError
from tornado.options import define

from backends.files import read_lines

define("callback_token", multiple=True, metavar="TOKENS",
       help="accepted tokens; each callback needs one (Authorization: Bearer); list "
            "several to rotate them; none: callbacks need no token")
define("callback_token_file", type=str, metavar="PATH",
       help="file of accepted callback tokens, one per line; re-read on SIGHUP")

MIN_TOKEN_LENGTH = 16  # characters; 96 bits of random base64
MAX_TOKEN_FILE = 64 * 1024  # bytes

# RFC 6750, section 2.1. The scheme's case does not matter (RFC 9110, section 11.1).
TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)
CREDENTIALS = re.compile(rf"bearer +({TOKEN.pattern})", re.ASCII | re.IGNORECASE)

# RFC 6750, section 3: no error code without a token.
NO_TOKEN = 'Bearer realm="SocketDock"'
WRONG_TOKEN = f'{NO_TOKEN}, error="invalid_token"'
TOKEN_REQUIRED = "Authorization: Bearer with a token of --callback_token required."


class CallbackTokens:
    """The accepted tokens, from the option and from its file.

    Without tokens, every request is accepted. Raises `OptionError` for an invalid
    token.
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
        """Whether requests need a token."""
        return bool(self._accepted)

    def reload(self) -> None:
        """Re-read the file.

        Raises `OptionError` if it is unreadable, invalid or empty, and keeps the old
        tokens: an empty list would accept every request.
        """
        from_file = [] if self._path is None else list(_read_tokens(self._path))
        self._accepted = [*self._given, *from_file]

    def challenge(self, credentials: Sequence[str]) -> str | None:
        """Return None if a request is authorized, else the `WWW-Authenticate` header.

        `credentials` are its `Authorization` headers. Several are rejected: the
        field is single (RFC 9110, section 11.6.2), and a proxy may have checked
        another one.
        """
        if not self._accepted or self.accept(credentials):
            return None
        return challenge_of(credentials)

    def accept(self, credentials: Sequence[str]) -> bool:
        """Return whether `Authorization` headers have an accepted token."""
        if len(credentials) != 1:
            return False
        match = CREDENTIALS.fullmatch(credentials[0])
        if match is None:
            return False
        digest = hashlib.sha256(match[1].encode()).digest()
        # Compare with all, so that the time reveals nothing.
        return sum(hmac.compare_digest(digest, other) for other in self._accepted) > 0


def challenge_of(credentials: Sequence[str]) -> str:
    """Return `WWW-Authenticate` for `Authorization` headers that are not accepted."""
    tried = any(value.split(" ")[0].lower() == "bearer" for value in credentials)
    return WRONG_TOKEN if tried else NO_TOKEN


def _read_tokens(path: str) -> Iterator[bytes]:
    where = f"--callback_token_file={path}"
    for number, token in read_lines(path, where, MAX_TOKEN_FILE):
        yield _digest(token, f"{where}, line {number}")


def _digest(token: str, where: str) -> bytes:
    """Return the digest of a token. Raises `OptionError`, which does not show it."""
    if len(token) < MIN_TOKEN_LENGTH or not TOKEN.fullmatch(token):
        raise OptionError(
            f"{where}: a token is {MIN_TOKEN_LENGTH} or more of A-Z a-z 0-9 - . _ ~ +"
            " /, and then any number of ="
        )
    return hashlib.sha256(token.encode()).digest()
