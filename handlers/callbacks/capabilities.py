"""Capability URLs: the callback URLs of a connection have a key that opens it.

`backends.events` appends the key to the URLs in events, `handlers.callbacks.access`
checks it.
"""

import base64
import hmac
import secrets
from collections.abc import Sequence

from tornado.options import define, options

define("callback_capability", default=False,
       help="add a key to the callback URLs in events; a callback then needs the key "
            "of its connection, or a token")

SECRET_SIZE = 32  # bytes
KEPT = 16  # bytes of the HMAC: 128 bits
KEY_LENGTH = 22  # characters of base64url, without padding


def make_capabilities() -> "Capabilities | None":
    """Return those of this run, with a new secret; None without the option."""
    if not options.callback_capability:
        return None
    return Capabilities(secrets.token_bytes(SECRET_SIZE))


class Capabilities:
    """Makes the keys of connections with the first secret, and verifies with each.

    Whoever knows a secret can make the key of each connection.
    """

    def __init__(self, *secrets_: bytes) -> None:
        self._secrets = secrets_

    @classmethod
    def derived(cls, peer_secrets: Sequence[bytes]) -> "Capabilities":
        """Return those that all instances with the same secrets have."""
        return cls(*map(_derived, peer_secrets))

    def derive(self, peer_secrets: Sequence[bytes]) -> None:
        """Replace the secrets."""
        self._secrets = tuple(map(_derived, peer_secrets))

    def key_of(self, connection_id: str) -> str:
        """Return the key of a connection: `KEY_LENGTH` characters of base64url."""
        return _key(self._secrets[0], connection_id)

    def opens(self, key: str, connection_id: str) -> bool:
        """Return whether `key` is that of the connection, in constant time."""
        given = key.encode()
        return any(
            hmac.compare_digest(given, _key(secret, connection_id).encode())
            for secret in self._secrets
        )


def _key(secret: bytes, connection_id: str) -> str:
    digest = hmac.digest(secret, connection_id.encode(), "sha256")
    return base64.urlsafe_b64encode(digest[:KEPT])[:KEY_LENGTH].decode()


def _derived(peer_secret: bytes) -> bytes:
    return hmac.digest(peer_secret, b"capability", "sha256")
