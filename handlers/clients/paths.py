"""The paths where clients connect.

A path may also be that of another route, such as the console page: WebSocket requests
to it are clients.
"""

import re
from collections.abc import Iterable
from typing import Any

from tornado.httputil import HTTPServerRequest
from tornado.options import Error as OptionError
from tornado.options import define, options
from tornado.routing import Matcher

from handlers.clients.headers import members

define("ws_path", default=["/ws"], multiple=True, metavar="PATHS",
       help="paths where clients connect, with or without a trailing slash")

# The part of RFC 3986, section 3.3, that proxies do not rewrite.
_PATH = re.compile(r"/(?:[\w.~!$&'()*+;=:@/-]|%[\da-fA-F]{2})*", re.ASCII)
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)


class ClientPaths(Matcher):
    """Matches all requests to a path of --ws_path.

    Raises `ValueError` for an invalid path. `all` are these paths, `first` is the one
    that is shown to users, without a trailing slash.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        named = list(paths)
        for path in named:
            if not _PATH.fullmatch(path):
                raise ValueError(f"{path} is not a path, such as /ws")
            if _DOTS.search(path):
                raise ValueError(f"{path} has a dot segment, which clients remove")
        if not named:
            raise ValueError("at least one path is required, such as /ws")
        bare = [path.removesuffix("/") for path in named]
        self.first = bare[0] or "/"
        self.all = frozenset([*filter(None, bare), *(f"{path}/" for path in bare)])

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        return {} if request.path in self.all else None


class Handshakes(Matcher):
    """Matches WebSocket requests to one of `paths`."""

    def __init__(self, paths: ClientPaths) -> None:
        self._paths = paths

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        found = self._paths.match(request)
        return found if found is not None and asks_for_websocket(request) else None


class AnyHandshake(Matcher):
    """Matches WebSocket requests to any path."""

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        is_handshake = request.method == "GET" and asks_for_websocket(request)
        return {} if is_handshake else None


def asks_for_websocket(request: HTTPServerRequest) -> bool:
    """Whether WebSocket is among the protocols that a request asks for."""
    return "websocket" in members(request.headers.get_list("Upgrade"))


def make_paths(others: Iterable[str] = ()) -> ClientPaths:
    """Create the paths from the options, and `others`."""
    try:
        return ClientPaths([*options.ws_path, *others])
    except ValueError as error:
        raise OptionError(f"--ws_path: {error}") from None
