"""What a client offers in its handshake: subprotocols and extensions.

`handlers.clients.connection` refuses what is malformed; `handlers.websocket.protocol`
agrees on compression.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # RFC 9110, section 5.6.2
_QUOTED_PAIR = re.compile(r"\\(.)")  # RFC 9110, section 5.6.4
_WINDOW_BITS = re.compile(r"8|9|1[0-5]")  # RFC 7692, section 7.1.2
# zlib makes no raw stream with a window of 8 bits.
_SERVER_WINDOW_BITS = re.compile(r"9|1[0-5]")


class Extension(NamedTuple):
    """One offer; a parameter without a value has None. It may be there twice."""

    name: str
    parameters: Sequence[tuple[str, str | None]]


class Deflate(NamedTuple):
    """What was agreed on: the answer's header, and the window for what is sent."""

    answer: str
    window_bits: int


def subprotocols(lines: Iterable[str]) -> list[str]:
    """Those of Sec-WebSocket-Protocol, in the client's order, each once.

    Raises `ValueError` for one that is no token (RFC 6455, section 4.1).
    """
    offered = dict.fromkeys(_members(lines))
    for name in offered:
        _check_token(name)
    return list(offered)


def extensions(lines: Iterable[str]) -> list[Extension]:
    """Those of Sec-WebSocket-Extensions, in the client's order.

    Raises `ValueError` for what is no list of them (RFC 6455, section 9.1).
    """
    return [_extension(member) for member in _members(lines)]


def agree_on_deflate(offered: Iterable[Extension]) -> Deflate | None:
    """The answer to the first acceptable offer of permessage-deflate, or None.

    An offer with a parameter that is unknown, wrong or there twice is declined, as
    if it had not been made (RFC 7692, section 7). Both directions go without context
    takeover (section 7.1.1), so that an idle connection holds no window of 32 KiB
    and more.
    """
    for name, listed in offered:
        parameters = dict(listed)
        if (
            name == "permessage-deflate"
            and len(parameters) == len(listed)
            and all(_is_acceptable(*parameter) for parameter in listed)
        ):
            answer = (
                "permessage-deflate; server_no_context_takeover;"
                " client_no_context_takeover"
            )
            bits = parameters.get("server_max_window_bits")
            if bits is not None:
                answer += f"; server_max_window_bits={bits}"
            return Deflate(answer, int(bits or zlib.MAX_WBITS))
    return None


def _is_acceptable(name: str, value: str | None) -> bool:
    if name in ("server_no_context_takeover", "client_no_context_takeover"):
        return value is None
    if name == "client_max_window_bits":
        return value is None or _WINDOW_BITS.fullmatch(value) is not None
    if name == "server_max_window_bits":
        return value is not None and _SERVER_WINDOW_BITS.fullmatch(value) is not None
    return False


def _members(lines: Iterable[str]) -> Iterable[str]:
    """Of a header that is a list, which may have empty ones (RFC 9110, 5.6.1)."""
    return filter(None, (member.strip(" \t") for member in ",".join(lines).split(",")))


def _extension(member: str) -> Extension:
    name, *pairs = (part.strip(" \t") for part in member.split(";"))
    _check_token(name)
    parameters: list[tuple[str, str | None]] = []
    for pair in pairs:
        key, equals, value = (part.strip(" \t") for part in pair.partition("="))
        _check_token(key)
        if equals:
            if len(value) > 1 and value[0] == value[-1] == '"':
                value = _QUOTED_PAIR.sub(r"\1", value[1:-1])  # a token, too
            _check_token(value)
        parameters.append((key, value if equals else None))
    return Extension(name, parameters)


def _check_token(text: str) -> None:
    if _TOKEN.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no token")
