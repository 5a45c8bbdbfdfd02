"""What a handshake says: its key, its offers, and the headers that backends see."""

import base64
import binascii
import re
from collections.abc import Iterable

from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.options import define

from handlers.clients.origins import is_host
from handlers.websocket.negotiation import extensions, subprotocols

define("withhold_headers", multiple=True, metavar="NAMES",
       help="more headers of a handshake that the connect event leaves out, as "
            "Cookie")

# Those of one hop, not of the client (RFC 9110, section 7.6.1, and RFC 7235's
# for proxies), and those by which a WebSocket is agreed on (RFC 6455, 11.3).
NOT_TOLD = frozenset({
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

_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # RFC 9110, section 5.6.2


def withheld_names(names: Iterable[str]) -> frozenset[str]:
    """Lower-case names of all headers that the connect event leaves out.

    Raises `ValueError` with one sentence for a name that no header can have.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no header's name")
    return NOT_TOLD | {name.lower() for name in names}


def told_headers(headers: HTTPHeaders, withheld: frozenset[str]) -> dict[str, str]:
    """The headers for the connect event, by lower-case name, repeated ones joined.

    Joined by a comma; Cookie by a semicolon, since a comma may be part of a cookie
    (RFC 6265, section 5.4; RFC 9113, section 8.2.3). Without `withheld`, and without
    those that Connection says are for one hop.
    """
    for_one_hop = set(members(headers, "Connection"))
    return {
        name.lower(): ("; " if name == "Cookie" else ", ").join(headers.get_list(name))
        for name in headers
        if name.lower() not in withheld and name.lower() not in for_one_hop
    }


def members(headers: HTTPHeaders, name: str) -> list[str]:
    """The members of a header that is a list, in lower case."""
    listed = ",".join(headers.get_list(name)).split(",")
    return [member.strip().lower() for member in listed if member.strip()]


def is_key(key: str) -> bool:
    """Whether a Sec-WebSocket-Key is 16 bytes in base64 (RFC 6455, section 4.1)."""
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except (ValueError, binascii.Error):
        return False


def flaw(request: HTTPServerRequest, extensible: bool) -> str | None:
    """What makes a handshake malformed, as one sentence; None where nothing does.

    Its key is not looked at here, nor are extensions where it is not `extensible`:
    where none is agreed on, it is of no matter what was offered.
    """
    headers = request.headers
    if request.body or "Transfer-Encoding" in headers:
        return "A handshake has no body."
    if not is_host(request.host):
        return "Host is no host and port."
    try:
        subprotocols(headers.get_list("Sec-WebSocket-Protocol"))
    except ValueError:
        return "Sec-WebSocket-Protocol is no list of tokens."
    try:
        if extensible:
            extensions(headers.get_list("Sec-WebSocket-Extensions"))
    except ValueError:
        return "Sec-WebSocket-Extensions is no list of extensions."
    return None
