"""A chat in Flask, behind SocketDock: all clients get what one of them sends.

    .venv/bin/python -m pip install flask standardwebhooks
    WEBHOOK_SECRET=whsec_... CALLBACK_TOKEN=... \\
        .venv/bin/python examples/flask_backend.py

and in another terminal, with the same values in SOCKETDOCK_WEBHOOK_SECRET and
SOCKETDOCK_CALLBACK_TOKEN:

    .venv/bin/socketdock --backend=http \\
        --connecturi=http://127.0.0.1:8000/connect \\
        --messageuri=http://127.0.0.1:8000/message \\
        --disconnecturi=http://127.0.0.1:8000/disconnect

A production backend would store in a database what this one keeps in memory.
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

CALLBACK_TIMEOUT = 15.0  # seconds; the relay closes a slow client after 10 by default
MAX_SEEN = 100_000  # ids of events; the relay retries one for 5 minutes at most
MAX_DEAD = 1_000  # instances

# Callbacks go directly to the relay, without a proxy that the environment names.
RELAY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

app = Flask(__name__)


class Connections:
    """The callback URL of each client, by the relay's run that has its connection.

    An instance is `<name>/<boot id>`: an event with a new boot id shows that the
    earlier run of that name is dead, with all its connections. So each relay needs its
    own --instance_name.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._urls: dict[str, dict[str, str]] = {}  # by instance and connection
        self._dead: OrderedDict[str, None] = OrderedDict()

    def add(self, meta: dict[str, Any]) -> None:
        """Record a connection, for which an event has arrived."""
        instance = meta["instance"]
        name = instance.rpartition("/")[0]
        with self._lock:
            if instance in self._dead:
                return  # a late event of a dead run
            for other in list(self._urls):
                if other != instance and other.rpartition("/")[0] == name:
                    self._remove_dead(other)
            self._urls.setdefault(instance, {})[meta["connection_id"]] = meta["send"]

    def remove(self, meta: dict[str, Any]) -> None:
        """Remove a connection that has ended; its run may have ended, too."""
        with self._lock:
            self._urls.get(meta["instance"], {}).pop(meta["connection_id"], None)

    def urls(self) -> list[str]:
        """Return the URLs of all open connections."""
        with self._lock:
            return [url for urls in self._urls.values() for url in urls.values()]

    def _remove_dead(self, instance: str) -> None:
        dropped = self._urls.pop(instance)
        self._dead[instance] = None
        if len(self._dead) > MAX_DEAD:
            self._dead.popitem(last=False)
        show(f"dropped {len(dropped)} connections of {instance}")


class Seen:
    """Ids of processed events, so that none is processed twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, event_id: str) -> bool:
        """Add an event's id; return whether it is new."""
        with self._lock:
            if event_id in self._ids:
                return False
            self._ids[event_id] = None
            if len(self._ids) > MAX_SEEN:
                self._ids.popitem(last=False)
            return True

    def forget(self, event_id: str) -> None:
        """Remove an event's id: it was not processed."""
        with self._lock:
            self._ids.pop(event_id, None)


connections = Connections()
seen = Seen()


@app.before_request
def verify() -> tuple[str, int] | None:
    """Accept events from the relay only, and each of them once."""
    try:
        g.event = verified(request)
    except (WebhookVerificationError, ValueError) as error:  # no signature at all
        show(f"refused: {error}")
        return "", 401
    if g.event["meta"].get("test"):  # of `socketdock check --send`
        return "", 204
    if not seen.add(request.headers["webhook-id"]):
        show(f"again: {request.headers['webhook-id']}")
        return "", 204  # processed already, but the relay did not get the response
    return None


def verified(request: Request) -> dict[str, Any]:
    """Verify and parse an event. Its signature is over the bytes as received."""
    event: dict[str, Any] = Webhook(app.config["WEBHOOK_SECRET"]).verify(
        request.get_data(), dict(request.headers)
    )
    return event


@app.teardown_request
def allow_again(error: BaseException | None) -> None:
    """Accept a failed event again: the response was 500, so the relay retries it."""
    if error is not None and "event" in g:
        seen.forget(request.headers["webhook-id"])


@app.post("/connect")
def connect() -> tuple[str, int]:
    """Accept every client; `meta.headers` has its cookies and tokens."""
    connections.add(g.event["meta"])
    return "", 204


@app.post("/message")
def message() -> tuple[str, int]:
    """Send a message to all clients."""
    connections.add(g.event["meta"])
    for url in connections.urls():
        send(url, g.event["message"])
    return "", 204


@app.post("/disconnect")
def disconnect() -> tuple[str, int]:
    """Remove a client. For the clients of a dead run, the next run sends this event."""
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
        if error.code != 410:  # 410: it has left, and its disconnect event follows
            show(f"callback answered {error.code}")
    except (OSError, http.client.HTTPException) as error:
        show(f"callback failed: {error}")


def show(line: str) -> None:
    """Print a line in one write, since several threads print."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class KeepingHandler(WSGIRequestHandler):
    """Keeps connections open, as the relay does."""

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
