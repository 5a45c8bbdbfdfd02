"""Lists the routes of the console's files and data."""

from tornado.routing import Matcher
from tornado.web import RequestHandler

from handlers.clients.connection import Connections
from handlers.clients.tickets import Tickets
from handlers.operators.console.assets import Clients, PageHandler, read_files
from handlers.operators.console.connections import (
    CloseHandler,
    ConnectionsHandler,
    SendHandler,
)
from handlers.operators.console.live import LiveHandler, ViewerHandler
from handlers.operators.console.playground import PlaygroundHandler
from handlers.operators.console.tail import Tail
from handlers.operators.guard import OperatorGuard
from handlers.owners import SHARED_ID


def console_routes(
    guard: OperatorGuard,
    connections: Connections,
    tail: Tail,
    tickets: Tickets,
    clients: Clients,
    max_message_size: int,
) -> list[tuple[str | Matcher, type[RequestHandler], dict[str, object]]]:
    """Return the routes of the page's files and data."""
    guarded = {"guard": guard}
    one = f"/console/connections/({SHARED_ID})"
    reached = {**guarded, "connections": connections}
    page = {**guarded, "files": read_files(), "clients": clients}
    return [
        (r"/()", PageHandler, page),
        (r"/console/([a-z]+\.(?:js|css|svg))", PageHandler, page),
        (
            r"/console/live",
            LiveHandler,
            {**guarded, "tail": tail, "clients": clients},
        ),
        (r"/console/viewers/([0-9a-f]{32})", ViewerHandler, {**guarded, "tail": tail}),
        (
            r"/console/connections",
            ConnectionsHandler,
            {**reached, "may_show_state": tail.may_show_bodies},
        ),
        (rf"{one}/send", SendHandler, {**reached, "max_body_size": max_message_size}),
        (rf"{one}/close", CloseHandler, {**reached, "tail": tail}),
        (
            r"/console/playground",
            PlaygroundHandler,
            {**guarded, "tickets": tickets, "clients": clients},
        ),
    ]
