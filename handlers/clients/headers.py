"""Headers of a handshake: which of them the backend gets."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tornado.options import define

define("withhold_headers", multiple=True, group=__name__, metavar="NAMES",
       help="more handshake headers that the connect event omits, such as Cookie")

# Headers of one hop (RFC 9110, section 7.6.1, and RFC 7235's for proxies), and
# those of the WebSocket handshake itself (RFC 6455, section 11.3).
HOP_BY_HOP_HEADERS = frozenset({
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "sec-websocket-accept",
    "sec-websocket-extensions",
    "sec-websocket-key",
    "sec-websocket-protocol",
    "sec-websocket-version",
})

# Those that say what a client offers, which some backends want to see.
WEBSOCKET_HEADERS = frozenset({
    "sec-websocket-extensions",
    "sec-websocket-key",
    "sec-websocket-protocol",
    "sec-websocket-version",
})
WEBSOCKET_NAME = re.compile("^sec-websocket-", re.IGNORECASE)

_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # RFC 9110, section 5.6.2


def withheld_names(names: Iterable[str]) -> frozenset[str]:
    """Return the lower-case names of all headers that the connect event omits.

    `names` are those that an operator withholds in addition. Raises `ValueError`
    for a name that is not a valid header name.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a header name")
    return HOP_BY_HOP_HEADERS | {name.lower() for name in names}


def forwarded_headers(
    headers: Mapping[str, Sequence[str]], withheld: frozenset[str]
) -> dict[str, str]:
    """Return the headers for the connect event, by lower-case name.

    Repeated ones are joined by a comma; Cookie by a semicolon, since a comma may be
    part of a cookie (RFC 6265, section 5.4; RFC 9113, section 8.2.3). Omits
    `withheld`, and the headers that Connection lists.
    """
    for_one_hop = members(headers.get("connection", ()))
    return {
        name: ("; " if name == "cookie" else ", ").join(lines)
        for name, lines in headers.items()
        if name not in withheld and name not in for_one_hop
    }


def forwarded_fields(
    fields: Iterable[tuple[str, str]], withheld: frozenset[str]
) -> list[tuple[str, str]]:
    """Return the header fields for a backend that wants each as it was sent.

    Unlike `forwarded_headers` it includes those of the WebSocket handshake.
    """
    listed = list(fields)
    for_one_hop = {
        member.strip().lower()
        for name, value in listed
        if name.lower() == "connection"
        for member in value.split(",")
    }
    omitted = (withheld - WEBSOCKET_HEADERS) | for_one_hop
    return [(name, value) for name, value in listed if name.lower() not in omitted]


def written_as_usual(fields: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield header fields with the names that most clients write.

    For a server that does not keep names as they were written.
    """
    for name, value in fields:
        yield WEBSOCKET_NAME.sub("Sec-WebSocket-", name), value


def members(lines: Iterable[str]) -> list[str]:
    """Return the members of a list header, in lower case."""
    listed = ",".join(lines).split(",")
    return [member.strip().lower() for member in listed if member.strip()]
