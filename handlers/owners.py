"""Makes the ids of connections, and reads from an id which instance owns it.

Without `--peer_address` an id is random, and only this instance can know it. With it,
an id has the owner's address and a MAC, so that each instance can find the owner of
each connection without asking anybody (docs/decisions/019-any-instance.md).
"""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tornado.options import Error as OptionError
from tornado.options import define

from backends.files import read_lines

define("peer_address", type=str, metavar="IP:PORT",
       help="how other instances reach the callback listener of this one; then each "
            "instance takes the callbacks of all; none: only its own")
define("peer_secret_file", type=str, metavar="PATH",
       help="file of secrets that all instances share, one per line: the first signs, "
            "each verifies; re-read on SIGHUP")

RANDOM = 32  # hex digits of an id that are random
MAC = 16  # hex digits
OWNERS = {12: 4, 36: 16}  # hex digits of an owner: bytes of its IP address
OWNER_PART = slice(RANDOM, -MAC)  # of an id
LENGTHS = {RANDOM + digits + MAC for digits in OWNERS}  # of ids with an owner

ID = r"[0-9a-f]{32}"  # an id without an owner
# Without an owner, or with one: an IPv4 or an IPv6 address, and a port.
SHARED_ID = r"[0-9a-f]{32}(?:[0-9a-f]{28}|[0-9a-f]{52})?"

MIN_SECRET = 16  # characters; 96 bits of random base64
MAX_SECRETS = 16
MAX_FILE_SIZE = 16 * 1024  # bytes

BLOCK = 64  # bytes of a block of SHA-256

MAX_VERIFIED = 10_000  # ids whose owner is remembered; each takes about 250 bytes
MAX_ADDRESSES = 1024  # of owners that are kept as objects


@dataclass(frozen=True, eq=False)
class Address:
    """IP address and port of an instance's callback listener.

    There is one object for each address in use, so that it may have more properties.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse `10.0.0.3:8765`, `[fd00::3]:8765` or `fd00::3:8765`.

        Raises `ValueError` if it is not an address that a peer could connect to.
        """
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        if mapped is not None:
            address = mapped
        number = int(port) if re.fullmatch("[0-9]{1,5}", port) else 0
        if (
            not 0 < number < 65536
            or address.is_unspecified
            or address.is_multicast
            or getattr(address, "scope_id", None)
        ):
            raise ValueError(text)
        return cls(str(address), number)

    @cached_property
    def digits(self) -> str:
        """As in an id: the bytes of the address and of the port, in hex."""
        packed = ipaddress.ip_address(self.host).packed
        return (packed + self.port.to_bytes(2)).hex()

    @cached_property
    def text(self) -> str:
        """`10.0.0.3:8765` or `[fd00::3]:8765`, always the same for one address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return self.text


@lru_cache(MAX_ADDRESSES)
def address_of(digits: str) -> Address:
    """Return the address of an owner in an id."""
    packed = bytes.fromhex(digits)
    host = str(ipaddress.ip_address(packed[:-2]))
    return Address(host, int.from_bytes(packed[-2:]))


class Mac:
    """HMAC-SHA256 (RFC 2104) with one key, which is processed only once.

    `hmac.digest` takes three times as long for a short text.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) > BLOCK:
            key = hashlib.sha256(key).digest()
        block = key.ljust(BLOCK, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def hex(self, text: bytes) -> str:
        """Return the MAC of `text` in hex."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(text)
        outer.update(inner.digest())
        return outer.hexdigest()


class Owners:
    """Ids of an instance that knows no other: random, and owned by nobody else."""

    pattern = ID  # of the ids of connections
    own_digits = ""  # of this instance in its ids

    def new_id(self) -> str:
        """Return the id of a new connection of this instance."""
        return os.urandom(RANDOM // 2).hex()

    def elsewhere(self, connection_id: str) -> Address | None:
        """Return the owner of a connection that is not here.

        None: it is gone. It was here, or its id is not one that an instance has made.
        """
        return None


class SharedOwners(Owners):
    """Ids with an owner, which all instances with the same secrets understand."""

    pattern = SHARED_ID

    def __init__(self, own: Address, keys: Sequence[bytes]) -> None:
        self.own_digits = own.digits
        self.use(keys)

    def use(self, keys: Sequence[bytes]) -> None:
        """Sign with the first key from now on, and verify with each."""
        self._macs = [Mac(key) for key in keys]
        # Owners by id: a backend often calls back to the same connections.
        self._verified: dict[str, Address] = {}

    def new_id(self) -> str:
        digits = super().new_id() + self.own_digits
        return digits + _mac(self._macs[0], digits)

    def elsewhere(self, connection_id: str) -> Address | None:
        owner = self._verified.get(connection_id)
        if owner is None and (owner := self._verify(connection_id)) is not None:
            if len(self._verified) >= MAX_VERIFIED:
                self._verified.clear()
            self._verified[connection_id] = owner
        return owner

    def _verify(self, connection_id: str) -> Address | None:
        if len(connection_id) not in LENGTHS or not connection_id.isascii():
            return None
        owner = connection_id[OWNER_PART]
        if owner == self.own_digits:
            return None
        digits, mac = connection_id[:-MAC], connection_id[-MAC:]
        if any(hmac.compare_digest(_mac(key, digits), mac) for key in self._macs):
            return address_of(owner)
        return None


def _mac(key: Mac, digits: str) -> str:
    return key.hex(b"id\n" + digits.encode())[:MAC]


def read_secrets(path: str) -> list[bytes]:
    """Return the secrets of `--peer_secret_file`. Raises `OptionError`."""
    where = f"--peer_secret_file={path}"
    keys = []
    for number, line in read_lines(path, where, MAX_FILE_SIZE):
        if len(line) < MIN_SECRET:
            raise OptionError(
                f"{where}, line {number}: a secret has {MIN_SECRET} or more characters"
            )
        keys.append(line.encode())
    if len(keys) > MAX_SECRETS:
        raise OptionError(f"{where}: it has more than {MAX_SECRETS} secrets")
    return keys
