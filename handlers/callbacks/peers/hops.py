"""Signs callbacks that are forwarded to another instance, and verifies them there.

`SocketDock-Hop: <instance>;t=<unix seconds>;v1=<hex>`: an HMAC of all that has an
effect. `forward` signs, `received_hops` verifies.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

from handlers.owners import Mac

HEADER = "SocketDock-Hop"
MAX_DIFFERENCE = 60  # seconds between the clocks of two instances, and of a replay
MAX_DIGITS = 12  # of a time

# The parts of a forwarded callback that are signed: method, target, Content-Type,
# Idempotency-Key, and the digest of its body.
Signed = tuple[bytes, bytes, bytes, bytes, bytes]


def digest_of_body(body: bytes) -> bytes:
    """Return the SHA-256 of a body, in hex."""
    return hashlib.sha256(body).hexdigest().encode()


class Hops:
    """Signs and verifies with `keys`: the first one signs, each verifies.

    `clock` returns Unix seconds.
    """

    def __init__(
        self,
        instance: str,
        keys: Sequence[bytes],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._instance = quote(instance, safe="/").encode()[:512]
        self._clock = clock
        self.use(keys)

    def use(self, keys: Sequence[bytes]) -> None:
        """Sign and verify with other keys from now on."""
        self._macs = [Mac(key) for key in keys]

    def sign(self, request: Signed) -> bytes:
        """Return the value of the header."""
        seconds = b"%d" % self._clock()
        signature = self._macs[0].hex(_text(request, seconds))
        return b"%b;t=%b;v1=%b" % (self._instance, seconds, signature.encode())

    def accepts(self, value: bytes, request: Signed) -> bool:
        """Return whether another instance has signed `request`, within the minute."""
        rest, _, given = value.rpartition(b";v1=")
        seconds = rest.rpartition(b";t=")[2]
        if not seconds.isdigit() or len(seconds) > MAX_DIGITS:
            return False
        if abs(self._clock() - int(seconds)) > MAX_DIFFERENCE:
            return False
        text = _text(request, seconds)
        for mac in self._macs:  # usually one
            if hmac.compare_digest(mac.hex(text).encode(), given):
                return True
        return False


def _text(request: Signed, seconds: bytes) -> bytes:
    method, target, content_type, key, digest = request
    return b"\n".join((b"hop", method, target, seconds, content_type, key, digest))
