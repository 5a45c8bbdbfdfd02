"""Serves the console's files, with a Content-Security-Policy for the page."""

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from tornado.httputil import HTTPServerRequest

from handlers.http.body import BodyHandler
from handlers.http.listener import Listener
from handlers.operators.console.guarded import GuardedHandler
from handlers.operators.guard import HOST, OperatorGuard

FOLDER = Path(__file__).resolve().parent / "page"
INDEX = "index.html"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def read_files() -> dict[str, bytes]:
    """Read the page's files; returns their contents by name."""
    return {
        path.name: path.read_bytes()
        for path in FOLDER.iterdir()
        if path.suffix in MEDIA_TYPES
    }


class Clients(NamedTuple):
    """Where a browser that shows the console's page can connect as a client.

    `path` is the path of WebSockets. `port` is None if the page is on the same
    listener. `address` is None if the clients' listener is bound to every address,
    including the page's.
    """

    path: str
    has_tls: bool = False
    address: str | None = None
    port: int | None = None

    def origin(self, request: HTTPServerRequest) -> str | None:
        """Return `ws://host:port`; None for the page's own origin, or if unknown."""
        if self.port is None:
            return None
        scheme = "wss" if self.has_tls else "ws"
        if self.address is not None:
            host = f"[{self.address}]" if ":" in self.address else self.address
            return f"{scheme}://{host}:{self.port}"
        match = HOST.fullmatch(request.host)
        return f"{scheme}://{match[1]}:{self.port}" if match else None

    def sources(self, request: HTTPServerRequest) -> str:
        """Return its sources for a Content-Security-Policy, in addition to 'self'."""
        if (origin := self.origin(request)) is not None:
            return origin
        # Not every browser applies 'self' to WebSockets. Both schemes, since a proxy in
        # front of the relay may have terminated TLS.
        if HOST.fullmatch(request.host):
            return f"ws://{request.host} wss://{request.host}"
        return ""


class PageHandler(GuardedHandler):
    """`GET /` and the page's other files.

    They hold no data. A browser sends no token when it opens a page, so these files
    need none, even if tokens are configured. The page then asks for one.
    """

    max_body_size = 0

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, files: Mapping[str, bytes], clients: Clients
    ) -> None:
        super().initialize(guard)
        self.files = files
        self.clients = clients

    async def prepare(self) -> None:
        if self.guard.tokens.required:
            await BodyHandler.prepare(self)
        else:
            # Skips the check of GuardedHandler: other sites may link to this page.
            await super(GuardedHandler, self).prepare()

    def get(self, name: str) -> None:
        name = name or INDEX
        content = self.files.get(name)
        if content is None:
            self.problem(HTTPStatus.NOT_FOUND, "No resource at this path.")
            return
        self.set_header("Content-Type", MEDIA_TYPES[Path(name).suffix])
        self.set_header("Cache-Control", "no-cache")  # revalidated by its ETag
        self.set_header("Content-Security-Policy", self._policy())
        self.finish(content)

    head = get

    def _policy(self) -> str:
        """Allow only the relay's own files, and connections to its two listeners."""
        return "; ".join((
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            f"connect-src 'self' {self.clients.sources(self.request)}".rstrip(),
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ))


def clients_of(
    to_clients: Listener, to_backend: Listener, path: str
) -> Clients:
    """Return where the console's page can reach the clients' listener."""
    if to_clients is to_backend:
        return Clients(path)
    address = None if to_clients.is_wildcard else to_clients.address
    return Clients(path, to_clients.has_tls, address, to_clients.port)
