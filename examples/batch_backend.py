"""A backend that takes events in batches, in Python's standard library.

    python3 examples/batch_backend.py --failing=0.1
    .venv/bin/socketdock --backend=http --batchuri=http://127.0.0.1:8000/batch

It answers each message in the response, and prints each event once. With `--failing`
this share of the attempts fails: the relay sends these events again, in order. A
production backend would store in a database what this one keeps in memory, and verify
the signature as `flask_backend.py` does.
"""

import argparse
import contextlib
import json
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_SEEN = 100_000  # ids of events; the relay repeats one for 5 minutes at most

Event = dict[str, Any]
Command = dict[str, Any]


class ProcessingError(Exception):
    """An event cannot be processed now, but later: perhaps a database is away."""


class Processor:
    """Processes each event once, and those of a connection in order."""

    def __init__(self, failing: float) -> None:
        self._failing = failing
        self._seen: OrderedDict[str, None] = OrderedDict()
        # The batches of several lanes arrive at the same time, each in a thread.
        self._lock = threading.Lock()

    def answer(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the response to a batch.

        After a connection's first failure its later events wait, and come again with
        it. Other connections are not affected.
        """
        commands: list[Command] = []
        failed: list[str] = []
        stopped: set[str] = set()
        for event in events:
            connection_id = event["meta"]["connection_id"]
            if connection_id in stopped:
                continue
            try:
                self._process_once(event)
            except ProcessingError:
                failed.append(event["id"])
                stopped.add(connection_id)
            else:
                commands += replies(event)
        return {"commands": commands, "failed": failed}

    def _process_once(self, event: Event) -> None:
        """Process an event, unless it is a repetition. Raises `ProcessingError`."""
        with self._lock:
            if event["id"] in self._seen:  # the relay did not get the response
                show(f"again: {event['id']}")
                return
            if random.random() < self._failing:
                raise ProcessingError
            show(f"{event['event']}: {event['id']}")  # here the work would be done
            self._seen[event["id"]] = None
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)


def replies(event: Event) -> list[Command]:
    """Return what the client gets. A repeated event needs it again: it was lost."""
    if event["event"] != "message":
        return []  # disconnect: nobody is left to answer
    return [
        {
            "connection_id": event["meta"]["connection_id"],
            "send": f"you said: {event['message']}",
        }
    ]


def show(line: str) -> None:
    """Print a line in one write, since several threads print."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class BatchHandler(BaseHTTPRequestHandler):
    """Answers batches."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True
    processor: Processor

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/batch":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        reply = json.dumps(self.processor.answer(json.loads(body)["events"])).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/vnd.socketdock+json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing: `show` prints the events."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A backend for batches.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--failing", type=float, default=0, metavar="SHARE",
                        help="share of the attempts that fail, from 0 to 1")
    chosen = parser.parse_args()
    BatchHandler.processor = Processor(chosen.failing)
    with ThreadingHTTPServer(("127.0.0.1", chosen.port), BatchHandler) as server:
        show(f"backend at http://127.0.0.1:{server.server_port}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
