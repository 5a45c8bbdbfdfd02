"""Signatures of events, by which the backend knows that the relay sent them.

Standard Webhooks, symmetric (`v1`): https://www.standardwebhooks.com. Ours is
these few lines, since every event passes here; public libraries verify them in
the tests (docs/decisions/007-own-signing.md).
"""

import binascii
import hmac
from collections.abc import Sequence

PREFIX = "whsec_"
MIN_KEY, MAX_KEY = 24, 64  # bytes; Standard Webhooks, "Signature scheme"


def key_of(secret: str) -> bytes:
    """The key in `whsec_` and base64, or base64 alone.

    Raises `ValueError` with what is wrong, in words that don't tell the secret.
    """
    try:
        key = binascii.a2b_base64(secret.removeprefix(PREFIX), strict_mode=True)
    except ValueError:  # binascii's, or for what is not even ASCII
        raise ValueError(f"not base64, with or without {PREFIX}") from None
    if not MIN_KEY <= len(key) <= MAX_KEY:
        raise ValueError(f"{len(key)} bytes long, not {MIN_KEY} to {MAX_KEY}")
    return key


class Signer:
    """Signs with each of some keys, so that a backend may know any one of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        # With the key in them already: a copy of it is half the work of a new one.
        self._prepared = [hmac.new(key, digestmod="sha256") for key in keys]

    def signatures(self, event_id: bytes, timestamp: int, body: bytes) -> bytes:
        """The value of `webhook-signature`."""
        start = b"%b.%d." % (event_id, timestamp)
        signatures = []
        for prepared in self._prepared:
            mac = prepared.copy()
            mac.update(start)
            mac.update(body)
            signatures.append(
                b"v1," + binascii.b2a_base64(mac.digest(), newline=False)
            )
        return b" ".join(signatures)
