"""Parses what a client offers in its handshake: subprotocols and extensions.

`handlers.clients.headers` rejects malformed offers; `handlers.websocket.deflate`
chooses among the extensions.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # RFC 9110, section 5.6.2
_QUOTED_PAIR = re.compile(r"\\(.)")  # RFC 9110, section 5.6.4


class Extension(NamedTuple):
    """One offered extension.

    A parameter without a value has None. The same parameter may occur twice.
    """

    name: str
    parameters: Sequence[tuple[str, str | None]]


def subprotocols(lines: Sequence[str]) -> list[str]:
    """Return the subprotocols of Sec-WebSocket-Protocol headers, without duplicates.

    In the client's order. Raises `ValueError` if one is not a token (RFC 6455,
    section 4.1).
    """
    if not lines:  # as most clients offer none
        return []
    offered = dict.fromkeys(_members(lines))
    for name in offered:
        check_token(name)
    return list(offered)


def extensions(lines: Iterable[str]) -> list[Extension]:
    """Return the extensions of Sec-WebSocket-Extensions headers.

    In the client's order. Raises `ValueError` if the list is malformed (RFC 6455,
    section 9.1).
    """
    return [_extension(member) for member in _members(lines)]


def _members(lines: Iterable[str]) -> Iterable[str]:
    """Members of a list header; empty ones are skipped (RFC 9110, section 5.6.1)."""
    return filter(None, (member.strip(" \t") for member in ",".join(lines).split(",")))


def _extension(member: str) -> Extension:
    name, *pairs = (part.strip(" \t") for part in member.split(";"))
    check_token(name)
    parameters: list[tuple[str, str | None]] = []
    for pair in pairs:
        key, equals, value = (part.strip(" \t") for part in pair.partition("="))
        check_token(key)
        if equals:
            if len(value) > 1 and value[0] == value[-1] == '"':
                # Unquoted, it must be a token as well (RFC 6455, section 9.1).
                value = _QUOTED_PAIR.sub(r"\1", value[1:-1])
            check_token(value)
        parameters.append((key, value if equals else None))
    return Extension(name, parameters)


def check_token(text: str) -> None:
    """Raise `ValueError` if `text` is not a token (RFC 9110, section 5.6.2)."""
    if _TOKEN.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no token")
