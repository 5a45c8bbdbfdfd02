"""The clients' routes."""

from typing import Any

from handlers.clients.handshake import ClientSocketHandler
from handlers.clients.paths import ClientPaths, Handshakes
from handlers.http.application import Routes
from handlers.probes import LiveHandler


def client_routes(
    paths: ClientPaths, others: Routes, **shared: Any
) -> Routes:
    """What clients may ask for, on a listener that has `others`, too.

    These may have the path of a WebSocket, but for what asks for one.
    """
    return [
        (Handshakes(paths), ClientSocketHandler, shared),
        *(others or [(r"/livez", LiveHandler, {})]),
        (paths, ClientSocketHandler, shared),
    ]
