"""A backend in Flask, on Werkzeug's threaded server: it sends each message back.

    python flask_backend.py [HTTP/1.0]

Prints its port, then each disconnect event as one line.
"""

import logging
import sys

from flask import Flask, request
from stdlib_backend import take
from werkzeug.serving import WSGIRequestHandler, make_server

app = Flask(__name__)


@app.post("/<any(message, disconnect):kind>")
def event(kind: str) -> tuple[str, int]:
    """Take an event of SocketDock."""
    take(kind, request.get_json())
    return "", 204


class EventHandler(WSGIRequestHandler):
    """Uses the requested version of HTTP."""

    protocol_version = [*sys.argv, "HTTP/1.1"][1]


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server(
        "127.0.0.1", 0, app, threaded=True, request_handler=EventHandler
    )
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
