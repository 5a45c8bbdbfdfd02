"""A backend for SocketDock that needs only the standard library.

    python3 examples/backend.py --port=8000

It prints every event, and answers each message by a callback to its client.
`examples/demo.py` starts it. To use it with your own relay:

    .venv/bin/socketdock --backend=http \\
        --connecturi=http://127.0.0.1:8000/connect \\
        --messageuri=http://127.0.0.1:8000/message \\
        --disconnecturi=http://127.0.0.1:8000/disconnect
"""

import argparse
import contextlib
import json
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CALLBACK_TIMEOUT = 15.0  # seconds; the relay closes a slow client after 10 by default

# Callbacks go directly to the relay, without a proxy that the environment names.
RELAY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EventHandler(BaseHTTPRequestHandler):
    """Handles the three events of SocketDock."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        kind = self.path.removeprefix("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind not in ("connect", "message", "disconnect"):
            self.answer(HTTPStatus.NOT_FOUND)
            return
        event = json.loads(body)
        show("POST", self.path, {"headers": dict(self.headers), "body": event})
        if kind == "message":
            reply(event)
        self.answer(HTTPStatus.OK)

    def answer(self, status: HTTPStatus) -> None:
        """Answer without a body; for a message, 2xx means that it was accepted."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing: `show` prints the events."""


def reply(event: dict[str, Any]) -> None:
    """Send a message's client a text frame: POST to its `meta.send`."""
    url = event["meta"]["send"]
    text = f"you said: {event['message']}"
    headers = {"Content-Type": "text/plain; charset=utf-8"}  # a text frame
    request = urllib.request.Request(url, text.encode(), headers, method="POST")
    try:
        with RELAY.open(request, timeout=CALLBACK_TIMEOUT) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code  # for example 410 if the client has disconnected
    except OSError as error:  # no response
        print(f"callback to {url} failed: {error}", file=sys.stderr)
        return
    show("CALLBACK", url, {"headers": headers, "body": text, "status": status})


def show(what: str, where: str, details: Any) -> None:
    """Print one line that people and programs can read."""
    # In one write, since each connection of the relay has its own thread here.
    sys.stdout.write(f"{what} {where} {json.dumps(details)}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="A small backend for SocketDock.")
    parser.add_argument("--bindip", default="127.0.0.1", help="0.0.0.0: every address")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    chosen = parser.parse_args()
    try:
        server = ThreadingHTTPServer((chosen.bindip, chosen.port), EventHandler)
    except (OSError, OverflowError) as error:
        sys.exit(
            f"backend: can't listen at port {chosen.port} of {chosen.bindip}: {error}"
        )
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"backend at http://{chosen.bindip}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
