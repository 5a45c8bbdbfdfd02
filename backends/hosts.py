"""Encodes international host names of URLs as in DNS, and knows default ports.

Backends and handlers use it; it imports nothing of the project.
"""

DEFAULT_PORTS = {"http": 80, "https": 443}  # by scheme; RFC 9110, section 4.2

# IDNA 2003 (Python) and IDNA 2008 (browsers) encode these as different hosts.
AMBIGUOUS_IN_IDNA = "\u00df\u03c2\u200c\u200d"


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
