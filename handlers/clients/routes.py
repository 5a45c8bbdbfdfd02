"""The clients' routes."""

from handlers.clients.handshake import ClientSocketHandler, UnknownPathHandler
from handlers.clients.opening import Openings
from handlers.clients.paths import AnyHandshake, ClientPaths, Handshakes
from handlers.http.application import Routes
from handlers.probes import LiveHandler


def client_routes(
    paths: ClientPaths, others: Routes, openings: Openings, forbid: bool = False
) -> Routes:
    """Return the client routes of a listener that also serves `others`.

    A route of `others` may share a path with clients: WebSocket requests to it are
    clients. Those to other paths get 403 if `forbid`.
    """
    shared = {"openings": openings}
    forbidden: Routes = [(AnyHandshake(), UnknownPathHandler, shared)]
    return [
        (Handshakes(paths), ClientSocketHandler, shared),
        *(forbidden if forbid else ()),
        *(others or [(r"/livez", LiveHandler, {})]),
        (paths, ClientSocketHandler, shared),
    ]
