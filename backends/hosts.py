"""The form of hosts in options: names and addresses, their encoding, default ports.

Backends and handlers use it; it imports nothing of the project. What clients may send
in a Host header is in `handlers.clients.origins`.
"""

import ipaddress
import re

DEFAULT_PORTS = {"http": 80, "https": 443}  # by scheme; RFC 9110, section 4.2

# IDNA 2003 (Python) and IDNA 2008 (browsers) encode these as different hosts.
AMBIGUOUS_IN_IDNA = "\u00df\u03c2\u200c\u200d"


_NAME = re.compile(r"[\w.-]+")


def is_host(host: str) -> bool:
    """Whether `host` has the form of one IP address or name, without brackets or port.

    Names may be international, and an IPv6 address may have a zone (`%eth0`).
    """
    if ":" not in host:
        return _NAME.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def encoded_host(host: str) -> str:
    """Return an international host name in its ASCII form (`xn--…`).

    Raises `ValueError`, with what to write instead, if the name has no such form or
    more than one.
    """
    if host.isascii():
        return host
    if not set(AMBIGUOUS_IN_IDNA).isdisjoint(host):
        raise ValueError("its host has several encodings; give the one with xn--")
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError("its host cannot be encoded; give it with xn--") from None
