"""The page itself: a handful of files, and what a browser may do with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

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
    """The files of the page, by name."""
    return {
        path.name: path.read_bytes()
        for path in FOLDER.iterdir()
        if path.suffix in MEDIA_TYPES
    }


@dataclass(frozen=True, slots=True)
class Clients:
    """Where clients connect, as a browser reaches it that has the console's page.

    `path` is that of a WebSocket. `port` is None where the page is on the same
    listener, `address` is None where the clients' listener is bound to every
    address, that of the page among them.
    """

    path: str
    has_tls: bool = False
    address: str | None = None
    port: int | None = None

    def origin(self, request: HTTPServerRequest) -> str | None:
        """`ws://host:port`; None for the page's own origin, or an unknown one."""
        if self.port is None:
            return None
        scheme = "wss" if self.has_tls else "ws"
        if self.address is not None:
            host = f"[{self.address}]" if ":" in self.address else self.address
            return f"{scheme}://{host}:{self.port}"
        match = HOST.fullmatch(request.host)
        return f"{scheme}://{match[1]}:{self.port}" if match else None

    def sources(self, request: HTTPServerRequest) -> str:
        """What a Content-Security-Policy has to name for it, beside 'self'."""
        if (origin := self.origin(request)) is not None:
            return origin
        # Not all browsers take 'self' for WebSockets, too; by which of the two the
        # page came, a proxy before us may know alone.
        if HOST.fullmatch(request.host):
            return f"ws://{request.host} wss://{request.host}"
        return ""


class PageHandler(GuardedHandler):
    """`GET /` and the page's other files.

    They hold no data. So where a token is required they come without: a browser
    sends none when it opens a page. The page then asks for one.
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
            # Not the console's own check: other sites may have links to this page.
            await super(GuardedHandler, self).prepare()

    def get(self, name: str) -> None:
        name = name or INDEX
        content = self.files.get(name)
        if content is None:
            self.problem(HTTPStatus.NOT_FOUND, "There is nothing at this path.")
            return
        self.set_header("Content-Type", MEDIA_TYPES[Path(name).suffix])
        self.set_header("Cache-Control", "no-cache")  # asked again, by its ETag
        self.set_header("Content-Security-Policy", self._policy())
        self.finish(content)

    head = get

    def _policy(self) -> str:
        """Nothing but our own files, and the two ends of this relay."""
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
    """Where the console's page finds the clients' listener."""
    if to_clients is to_backend:
        return Clients(path)
    address = None if to_clients.is_wildcard else to_clients.address
    return Clients(path, to_clients.has_tls, address, to_clients.port)
