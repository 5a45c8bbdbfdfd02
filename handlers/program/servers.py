"""Makes the HTTP servers of the listeners from the options."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tornado.options import options

from backends import Observer
from handlers.callbacks.bulk import PATH as BULK_PATH
from handlers.callbacks.bulk import BulkHandler
from handlers.callbacks.routes import is_send
from handlers.http.access_log import log_access, log_request
from handlers.http.application import RelayApplication, Routes
from handlers.http.body import NotFoundHandler
from handlers.http.body_budget import BodyBudget
from handlers.http.bounds import RequestBounds
from handlers.http.listener import Server
from handlers.http.problem import ProblemHandler
from handlers.http.request import FastHandler, Request
from handlers.http.server import RequestServer, Upgrade

if TYPE_CHECKING:
    from handlers.telemetry.spans import Tracing

# Returns what can answer a request without a handler, or None.
Fast = Callable[[Request], FastHandler | None]


def make_server(
    routes: Routes,
    bounds: RequestBounds,
    observer: Observer,
    fast: Fast = lambda request: None,
    upgrade: Upgrade | None = None,
    tracing: "Tracing | None" = None,
    keep_names: bool = False,
) -> Server:
    """Create the server for `routes`; all other paths get 404.

    `fast` may answer a send or a bulk callback without creating a handler, `upgrade` a
    handshake. If `keep_names`, the names of headers are kept as they were written.
    """

    def on_answered(handler: ProblemHandler) -> None:
        log_request(handler)
        if handler.peer_left:
            return
        sends = is_send(handler)
        if sends:
            observer.send_answered(handler.get_status())
        if tracing is not None and (sends or isinstance(handler, BulkHandler)):
            tracing.answered(handler.request, handler.get_status())

    def on_fast_answered(method: str, target: str, status: int) -> None:
        log_access(method, target, status)
        if not target.endswith(BULK_PATH):
            observer.send_answered(status)

    application = RelayApplication(
        routes, default_handler_class=NotFoundHandler, log_function=on_answered
    )
    if options.http_server == "tornado":
        from handlers.http.tornado_server import TornadoServer

        return TornadoServer(application, bounds)
    return RequestServer(
        application, bounds, fast, on_fast_answered, upgrade, keep_names
    )


def either(first: Fast, second: Fast) -> Fast:
    """Return what answers requests by `first`, or else by `second`."""
    return lambda request: first(request) or second(request)


def bounds(body_budget: BodyBudget, max_body_size: int) -> RequestBounds:
    """Return the limits of one listener's requests; `max_body_size` in bytes."""
    return RequestBounds(
        options.header_timeout,
        options.body_timeout,
        options.max_header_size,
        max_body_size,
        body_budget,
    )
