"""Which pages may connect, by the Origin header of browsers (RFC 6454).

Not only web pages have an origin: the web view of an app sends
`capacitor://localhost` or `file://`, a browser extension
`chrome-extension://<id>`, and a page with an opaque origin `null`.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from tornado.options import define

from backends.hosts import DEFAULT_PORTS

define("allowed_origins", multiple=True, group=__name__, metavar="ORIGINS",
       help="origins whose pages may connect, such as https://app.example.com, "
            "https://*.example.com, capacitor://localhost, file:// or null; *: all "
            "origins; none: the same origin only")
define("require_origin", default=False, group=__name__,
       help="reject clients that send no Origin header; browsers always send one")

MAX_HOSTS = 64  # Host headers that are remembered; most clients send the same one

# Some clients send the scheme of the WebSocket URL.
_SAME_AS = {"ws": "http", "wss": "https"}

# A serialized origin (RFC 6454, section 6.1), and a Host header (RFC 9110, 7.2).
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z\d+.-]*)://(?P<authority>.*)", re.ASCII)
_AUTHORITY = re.compile(
    r"(?P<host>\[[\da-f:.]+(?:%[\w.~-]+)?\]|[^\s\x00-\x1f\x7f/?#@:,\\\[\]]*)"
    r"(?::(?P<port>\d{0,5}))?",
    re.ASCII,
)
# Any host, any subdomain of a domain, or one host.
_HOST_PATTERN = re.compile(r"\*|(?:\*\.(?=.))?[^*]*")


class Origin(NamedTuple):
    """An origin in lower case; `port` is None if its scheme has no default port.

    `null` has neither scheme nor host.
    """

    scheme: str
    host: str
    port: int | None


NULL = Origin("", "", None)


class AllowedOrigins:
    """The values of --allowed_origins: origins, patterns of hosts, or all.

    If there are none, a page must have the origin that it connects to. Raises
    `ValueError` for a value that no Origin header can equal.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        named = list(allowed)
        self._all = "*" in named
        self._named: list[Origin] = [_named(text) for text in named if text != "*"]

    def allow(self, origin: str, host: str, scheme: str | None = None) -> bool:
        """Return whether a page of `origin` may connect (RFC 6454, section 4).

        `host` is the host that the client requested, with its port if present.
        `scheme` is None if unknown: then both schemes match.
        """
        if self._all:
            return True
        given = split_origin(origin)
        if given is None:
            return False
        if not self._named:
            scheme = scheme or given.scheme
            return scheme in DEFAULT_PORTS and (
                given == split_origin(f"{scheme}://{host}")
            )
        return any(_matches(given, named) for named in self._named)


def split_origin(text: str) -> Origin | None:
    """Return the parts of a serialized origin; None if it is not one."""
    if text == "null":
        return NULL
    parts = _ORIGIN.fullmatch(text.lower())
    if parts is None:
        return None
    authority = _split_authority(parts["authority"])
    if authority is None:
        return None
    host, port = authority
    scheme = _SAME_AS.get(parts["scheme"], parts["scheme"])
    if not host and (scheme in DEFAULT_PORTS or port is not None):
        return None
    return Origin(scheme, host, DEFAULT_PORTS.get(scheme) if port is None else port)


@lru_cache(MAX_HOSTS)
def is_host_header(text: str) -> bool:
    """Return whether a Host header is a host with an optional port."""
    authority = _split_authority(text.lower())
    return authority is not None and bool(authority[0])


def _split_authority(text: str) -> tuple[str, int | None] | None:
    parts = _AUTHORITY.fullmatch(text)
    if parts is None:
        return None
    port = int(parts["port"]) if parts["port"] else None
    return (parts["host"], port) if (port or 0) < 2**16 else None


def _named(text: str) -> Origin:
    origin = split_origin(text)
    if origin is None or not _HOST_PATTERN.fullmatch(origin.host):
        raise ValueError(
            f"{text} is not an origin, such as https://app.example.com,"
            " https://*.example.com, capacitor://localhost, file:// or null, nor *"
        )
    if not text.isascii():
        raise ValueError(
            f"{text} is not ASCII; name it as browsers do, by the host's A-label"
            " (xn--...)"
        )
    return origin


def _matches(given: Origin, named: Origin) -> bool:
    """Return whether an origin is the configured one, or matches its pattern."""
    if (given.scheme, given.port) != (named.scheme, named.port):
        return False
    if named.host == "*":
        return bool(given.host)
    if named.host.startswith("*."):
        return given.host.endswith(named.host[1:])
    return given.host == named.host
