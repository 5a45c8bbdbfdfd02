"""The clients' routes."""

from typing import Any

from handlers.clients.handshake import ClientSocketHandler
from handlers.clients.paths import ClientPaths, Handshakes
from handlers.http.application import Routes
from handlers.probes import LiveHandler


def client_routes(
    paths: ClientPaths, others: Routes, **shared: Any
) -> Routes:
    """Return the client routes of a listener that also serves `others`.

    A route of `others` may share a path with clients: WebSocket requests to it are
    clients.
    """
    return [
        (Handshakes(paths), ClientSocketHandler, shared),
        *(others or [(r"/livez", LiveHandler, {})]),
        (paths, ClientSocketHandler, shared),
    ]
