"""A backend in Python's `http.server`: it sends each message back.

The text `please close` it answers by closing the connection.

    python stdlib_backend.py [HTTP/1.0]

Prints its port, then each disconnect event as one line.
"""

import base64
import json
import sys
import urllib.request
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CALLBACK_TIMEOUT = 15.0  # seconds

# Callbacks stay on this machine, whatever proxy the environment names.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EventHandler(BaseHTTPRequestHandler):
    """Takes the events of SocketDock."""

    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        take(self.path.removeprefix("/"), event)
        self.send_response(HTTPStatus.NO_CONTENT)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test reads what is printed."""


def take(kind: str, event: dict[str, Any]) -> None:
    """Answer a message by a callback, print a disconnect event."""
    if kind == "disconnect":
        # In one write, since each connection of the relay has a thread here.
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    elif event["message"] == "please close":
        close = {"code": 4002, "reason": "as you asked: adiós"}
        call(
            event["meta"]["disconnect"], "application/json", json.dumps(close).encode()
        )
    else:
        send_back(event["meta"], event["message"])


def send_back(meta: dict[str, Any], message: str) -> None:
    """Send a message to its sender, as what it came: text or binary."""
    if meta["type"] == "text":
        call(meta["send"], "text/plain; charset=utf-8", message.encode())
    elif meta.get("encoding") == "base64":
        call(meta["send"], "application/octet-stream", base64.b64decode(message))
    else:
        call(meta["send"], "application/octet-stream", message.encode())


def call(url: str, content_type: str, body: bytes) -> None:
    """POST to a callback URL. Raises `URLError` unless it is answered 2xx."""
    request = urllib.request.Request(
        url, data=body, headers={"Content-Type": content_type}, method="POST"
    )
    with opener.open(request, timeout=CALLBACK_TIMEOUT):
        pass


def main() -> None:
    EventHandler.protocol_version = [*sys.argv, "HTTP/1.1"][1]
    with ThreadingHTTPServer(("127.0.0.1", 0), EventHandler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
