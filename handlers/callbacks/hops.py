"""Signs callbacks that are forwarded to another instance, and verifies them there.

`SocketDock-Hop: <instance>;t=<unix seconds>;v1=<hex>`: an HMAC of all that has an
effect. `forward` signs, `received_hops` verifies.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import quote

from handlers.owners import Mac

HEADER = "SocketDock-Hop"
MAX_DIFFERENCE = 60  # seconds between the clocks of two instances, and of a replay
VALUE = re.compile(rb"[!-:<-~]{0,512};t=([0-9]{1,12});v1=([0-9a-f]{64})")


class Signed(NamedTuple):
    """The parts of a forwarded callback that are signed.

    `key` is its Idempotency-Key, `digest` that of its body.
    """

    method: bytes
    target: bytes
    content_type: bytes
    key: bytes
    digest: bytes


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
        parts = VALUE.fullmatch(value)
        if parts is None:
            return False
        if abs(self._clock() - int(parts[1])) > MAX_DIFFERENCE:
            return False
        text, given = _text(request, parts[1]), parts[2].decode()
        return any(hmac.compare_digest(mac.hex(text), given) for mac in self._macs)


def _text(request: Signed, seconds: bytes) -> bytes:
    method, target, content_type, key, digest = request
    return b"\n".join((b"hop", method, target, seconds, content_type, key, digest))
