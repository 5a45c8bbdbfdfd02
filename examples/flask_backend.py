"""A chat in Flask, behind SocketDock: what one client sends, all of them get.

    .venv/bin/python -m pip install flask standardwebhooks
    WEBHOOK_SECRET=whsec_... CALLBACK_TOKEN=... \\
        .venv/bin/python examples/flask_backend.py

and beside it, with the same two in SOCKETDOCK_WEBHOOK_SECRET and
SOCKETDOCK_CALLBACK_TOKEN:

    .venv/bin/socketdock --backend=http \\
        --connecturi=http://127.0.0.1:8000/connect \\
        --messageuri=http://127.0.0.1:8000/message \\
        --disconnecturi=http://127.0.0.1:8000/disconnect

What a real one would keep in a database is in memory here.
"""

import argparse
import http.client
import logging
import os
import sys
import threading
import urllib.error
import urllib.request
from collections import OrderedDict
from typing import Any

from flask import Flask, Request, g, request
from standardwebhooks import Webhook, WebhookVerificationError
from werkzeug.serving import WSGIRequestHandler, make_server

CALLBACK_TIMEOUT = 15.0  # seconds; a slow client is given up after 10 by default
MAX_SEEN = 100_000  # ids of events; the relay repeats one for 5 minutes at most
MAX_DEAD = 1_000  # instances

# Callbacks go to the relay itself, whatever proxy the environment names.
RELAY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

app = Flask(__name__)


class Connections:
    """Where each client is reached, by the run of the relay that holds it.

    An instance is `<name>/<boot id>`: an event from another boot of the same
    name tells that the one before is dead, with all its connections. So each
    relay needs an --instance_name of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._urls: dict[str, dict[str, str]] = {}  # by instance and connection
        self._dead: OrderedDict[str, None] = OrderedDict()

    def add(self, meta: dict[str, Any]) -> None:
        """Take note of a connection, of which an event has come."""
        instance = meta["instance"]
        name = instance.rpartition("/")[0]
        with self._lock:
            if instance in self._dead:
                return  # its last words came late
            for other in list(self._urls):
                if other != instance and other.rpartition("/")[0] == name:
                    self._bury(other)
            self._urls.setdefault(instance, {})[meta["connection_id"]] = meta["send"]

    def remove(self, meta: dict[str, Any]) -> None:
        """A connection has ended; its instance may have, too."""
        with self._lock:
            self._urls.get(meta["instance"], {}).pop(meta["connection_id"], None)

    def urls(self) -> list[str]:
        """Of all that are open."""
        with self._lock:
            return [url for urls in self._urls.values() for url in urls.values()]

    def _bury(self, instance: str) -> None:
        dropped = self._urls.pop(instance)
        self._dead[instance] = None
        if len(self._dead) > MAX_DEAD:
            self._dead.popitem(last=False)
        show(f"dropped {len(dropped)} connections of {instance}")


class Seen:
    """Ids of events that were acted on, so that none is twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, event_id: str) -> bool:
        """Whether it is new."""
        with self._lock:
            if event_id in self._ids:
                return False
            self._ids[event_id] = None
            if len(self._ids) > MAX_SEEN:
                self._ids.popitem(last=False)
            return True

    def forget(self, event_id: str) -> None:
        """It was not acted on after all."""
        with self._lock:
            self._ids.pop(event_id, None)


connections = Connections()
seen = Seen()


@app.before_request
def verify() -> tuple[str, int] | None:
    """Let only the relay in, and each of its events once."""
    try:
        g.event = verified(request)
    except (WebhookVerificationError, ValueError) as error:  # no signature at all
        show(f"refused: {error}")
        return "", 401
    if not seen.add(request.headers["webhook-id"]):
        show(f"again: {request.headers['webhook-id']}")
        return "", 204  # it was taken, though the relay did not hear of it
    return None


def verified(request: Request) -> dict[str, Any]:
    """The event. Its signature is over the bytes as they came, not over JSON."""
    event: dict[str, Any] = Webhook(app.config["WEBHOOK_SECRET"]).verify(
        request.get_data(), dict(request.headers)
    )
    return event


@app.teardown_request
def allow_again(error: BaseException | None) -> None:
    """What has failed was answered with 500, so that the relay sends it again."""
    if error is not None and "event" in g:
        seen.forget(request.headers["webhook-id"])


@app.post("/connect")
def connect() -> tuple[str, int]:
    """Accept every client; `meta.headers` would tell who it is."""
    connections.add(g.event["meta"])
    return "", 204


@app.post("/message")
def message() -> tuple[str, int]:
    """Pass a message on to everybody."""
    connections.add(g.event["meta"])
    for url in connections.urls():
        send(url, g.event["message"])
    return "", 204


@app.post("/disconnect")
def disconnect() -> tuple[str, int]:
    """Forget a client. A run that is dead speaks here through the next one."""
    connections.remove(g.event["meta"])
    return "", 204


def send(url: str, text: str) -> None:
    """Send one client a text frame."""
    headers = {
        "Authorization": f"Bearer {app.config['CALLBACK_TOKEN']}",
        "Content-Type": "text/plain; charset=utf-8",
    }
    callback = urllib.request.Request(url, text.encode(), headers, method="POST")
    try:
        with RELAY.open(callback, timeout=CALLBACK_TIMEOUT):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 410:  # it has left; its disconnect event is on the way
            show(f"callback answered {error.code}")
    except (OSError, http.client.HTTPException) as error:
        show(f"callback failed: {error}")


def show(line: str) -> None:
    """Print a line in one write: threads do."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class KeepingHandler(WSGIRequestHandler):
    """Keeps connections, as the relay does."""

    protocol_version = "HTTP/1.1"


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat behind SocketDock.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    port = parser.parse_args().port
    for name in ("WEBHOOK_SECRET", "CALLBACK_TOKEN"):
        if not os.environ.get(name):
            sys.exit(f"{name} is not set: the relay has it, too")
        app.config[name] = os.environ[name]
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server(
        "127.0.0.1", port, app, threaded=True, request_handler=KeepingHandler
    )
    show(f"backend at http://127.0.0.1:{server.port}")
    server.serve_forever()


if __name__ == "__main__":
    main()
