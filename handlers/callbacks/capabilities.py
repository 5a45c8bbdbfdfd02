"""Capability URLs: the callback URLs of a connection have a key that opens it.

`backends.events` appends the key to the URLs in events, `handlers.callbacks.access`
checks it.
"""

import base64
import hmac
import secrets

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
    """Makes and verifies the keys of connections.

    Whoever knows `secret` can make the key of each connection.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key_of(self, connection_id: str) -> str:
        """Return the key of a connection: `KEY_LENGTH` characters of base64url."""
        digest = hmac.digest(self._secret, connection_id.encode(), "sha256")
        return base64.urlsafe_b64encode(digest[:KEPT])[:KEY_LENGTH].decode()

    def opens(self, key: str, connection_id: str) -> bool:
        """Return whether `key` is that of the connection, in constant time."""
        return hmac.compare_digest(key.encode(), self.key_of(connection_id).encode())
