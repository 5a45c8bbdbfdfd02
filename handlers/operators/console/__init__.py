"""The console: a page for operators, at `/` of the callbacks' listener.

`assets` serves the files of `page/`, which run in the browser as they are. `tail`
observes while the page is open, `live` streams what it saw, `connections` lists,
sends and closes, `playground` lets the page connect as a client. They are imported only
with `--console`.
"""

from typing import TYPE_CHECKING

from tornado.options import define, options

from backends import Backend
from handlers.clients.connection import Connections
from handlers.telemetry.observers import Observers

if TYPE_CHECKING:
    from handlers.operators.console.tail import Tail

define("console", default=True,
       help="serve the console, a page for operators, at / of the callback listener; "
            "the access rules are those of /status")
define("console_bodies", default=True,
       help="let operators view the message bodies and the backend's state of one "
            "connection in the console")


def make_tail(
    observers: Observers,
    connections: Connections,
    backend: Backend,
    named: dict[str, str],
) -> "Tail | None":
    """Return what observes for the page; None with --console=off.

    `named` is what the page shows of this process.
    """
    if not options.console:
        return None
    from handlers.operators.console.tail import Tail

    return Tail(observers, connections, backend, options.console_bodies, named)
