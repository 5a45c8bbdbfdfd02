"""Signs events, so that the backend can verify that the relay sent them.

Standard Webhooks, symmetric (`v1`): https://www.standardwebhooks.com. The relay does
not use a library, since each event is signed; in the tests public libraries verify the
signatures (docs/decisions/007-own-signing.md).
"""

import binascii
import hmac
from collections.abc import Sequence

PREFIX = "whsec_"
MIN_KEY, MAX_KEY = 24, 64  # bytes; Standard Webhooks, "Signature scheme"


def key_of(secret: str) -> bytes:
    """Return the key in `secret`: base64, with or without the prefix `whsec_`.

    Raises `ValueError`, with a reason that does not contain the secret.
    """
    try:
        key = binascii.a2b_base64(secret.removeprefix(PREFIX), strict_mode=True)
    except ValueError:  # binascii.Error, or not ASCII
        raise ValueError(f"not base64, with or without {PREFIX}") from None
    if not MIN_KEY <= len(key) <= MAX_KEY:
        raise ValueError(f"{len(key)} bytes long, not {MIN_KEY} to {MAX_KEY}")
    return key


class Signer:
    """Signs with each of `keys`, so that a backend can verify with any one of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        # HMACs with the key already processed: to copy one takes half the time.
        self._prepared = [hmac.new(key, digestmod="sha256") for key in keys]

    def signatures(self, event_id: bytes, timestamp: int, body: bytes) -> bytes:
        """Return the value of `webhook-signature`."""
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
