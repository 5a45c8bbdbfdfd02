"""At which paths clients connect.

A path may be that of another route, too, such as that of the console's page:
what asks for a WebSocket there is a client.
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

# Of RFC 3986, section 3.3, what stays as it stands on its way through proxies.
_PATH = re.compile(r"/(?:[\w.~!$&'()*+;=:@/-]|%[\da-fA-F]{2})*", re.ASCII)
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)


class ClientPaths(Matcher):
    """Matches all that is asked for at one of the paths of --ws_path.

    Raises `ValueError` with one sentence where one can't be a path. `first` is
    the one that is shown to people, without a slash at its end.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        named = list(paths)
        for path in named:
            if not _PATH.fullmatch(path):
                raise ValueError(f"{path} is no path, such as /ws")
            if _DOTS.search(path):
                raise ValueError(f"{path} has a segment that clients leave out")
        if not named:
            raise ValueError("there has to be one, such as /ws")
        bare = [path.removesuffix("/") for path in named]
        self.first = bare[0] or "/"
        self._paths = frozenset([*filter(None, bare), *(f"{path}/" for path in bare)])

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        return {} if request.path in self._paths else None


class Handshakes(Matcher):
    """Matches what asks for a WebSocket at one of `paths`."""

    def __init__(self, paths: ClientPaths) -> None:
        self._paths = paths

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        found = self._paths.match(request)
        if found is None or "websocket" not in members(request.headers, "Upgrade"):
            return None
        return found


def make_paths() -> ClientPaths:
    """Where clients connect, from the options."""
    try:
        return ClientPaths(options.ws_path)
    except ValueError as error:
        raise OptionError(f"--ws_path: {error}") from None
