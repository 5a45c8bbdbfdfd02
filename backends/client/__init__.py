"""The HTTP client: POSTs over pooled keep-alive connections.

The relay has its own because delivery must know when a whole request was sent, and
abandon single requests; no library offers that (docs/decisions/003-own-http-client.md).
`pool` chooses or opens a connection for each request, `connection` sends it, and
`response` reads the response.
"""

from tornado.options import define, options

from backends.client.exchange import Exchange, NoConnection, Refused, Terms
from backends.client.pool import Client
from backends.client.response import Response

__all__ = [
    "Client",
    "Exchange",
    "NoConnection",
    "Refused",
    "Response",
    "Terms",
    "make_client",
]

define("backend_connect_timeout", default=5.0, metavar="SECONDS",
       help="longest wait for a connection to the backend: DNS, TCP and TLS")
define("backend_dead_after", default=60.0, metavar="SECONDS",
       help="seconds until a dead backend host is detected")
define("backend_connection_age", default=300.0, metavar="SECONDS",
       help="age at which a connection to the backend takes no more requests, so that "
            "DNS changes and new servers are found; 0: no limit")
define("max_backend_connections", default=4096, metavar="COUNT",
       help="most connections to the backend, including those with held answers")


def make_client(max_connections: int | None = None) -> Client:
    """Make a client for a backend, from the options.

    It may have `max_connections`; None: those of `--max_backend_connections`.
    """
    return Client(
        max_connections or options.max_backend_connections,
        options.backend_connect_timeout,
        options.backend_dead_after,
        options.backend_connection_age or float("inf"),
    )
