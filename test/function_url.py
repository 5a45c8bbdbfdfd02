"""AWS Lambda on this machine: a function URL, and the API of the function's runtime.

AWS's own runtime client, `awslambdaric`, fetches each invocation here and posts its
result, as on AWS. Events and results have payload format 2.0.
"""

import base64
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from service import DEADLINE

RUNTIME = "/2018-06-01/runtime/"
ARN = "arn:aws:lambda:eu-central-1:123456789012:function:socketdock"
# Bodies of these types are text, all others are base64.
TEXT_TYPES = ("text/", "application/json", "application/javascript", "application/xml")


class Invocation:
    """A request to the function URL, and the future result of the handler."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.id = str(uuid.uuid4())
        self.event = event
        self.result: Future[Any] = Future()


class FunctionUrl:
    """A Python function with a URL during the block; one invocation at a time."""

    def __init__(self, folder: Path, handler: str) -> None:
        self._folder = folder
        self._handler = handler
        self._waiting: queue.Queue[Invocation] = queue.Queue()
        self._running: dict[str, Invocation] = {}
        function = self

        class Handler(_Handler):
            url = function

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # the client waits for an invocation

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "awslambdaric", self._handler],
            cwd=self._folder,
            env={
                **os.environ,
                "AWS_LAMBDA_RUNTIME_API": self.address,
                "AWS_LAMBDA_FUNCTION_NAME": "socketdock",
                "LAMBDA_TASK_ROOT": str(self._folder),
            },
            stdin=subprocess.DEVNULL,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait(DEADLINE)
        self._server.shutdown()
        self._server.server_close()

    def invoke(self, event: dict[str, Any]) -> Any:
        """Return what the handler returns. Raises if it does not."""
        invocation = Invocation(event)
        self._waiting.put(invocation)
        return invocation.result.result(3 * DEADLINE)

    def next(self) -> Invocation:
        """Wait for an invocation."""
        invocation = self._waiting.get()
        self._running[invocation.id] = invocation
        return invocation

    def ended(self, invocation_id: str) -> Future[Any]:
        """Return the future result of a running invocation."""
        return self._running.pop(invocation_id).result


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    url: FunctionUrl

    def do_GET(self) -> None:
        assert self.path == f"{RUNTIME}invocation/next", self.path
        invocation = self.url.next()
        headers = {
            "Content-Type": "application/json",
            "Lambda-Runtime-Aws-Request-Id": invocation.id,
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + DEADLINE) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": ARN,
        }
        self._answer(HTTPStatus.OK, headers, json.dumps(invocation.event).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.startswith(RUNTIME):
            self._answer_request(body)
            return
        *_, invocation_id, outcome = self.path.split("/")
        if outcome == "response":
            self.url.ended(invocation_id).set_result(json.loads(body))
        else:
            error = RuntimeError(body.decode())
            self.url.ended(invocation_id).set_exception(error)
        self._answer(HTTPStatus.ACCEPTED, {}, b"")

    def _answer_request(self, body: bytes) -> None:
        """Answer a request to the function URL as AWS does."""
        try:
            result = self.url.invoke(self._event(body))
        except Exception as error:
            print(f"function failed: {error!r}", file=sys.stderr)
            self._answer(HTTPStatus.BAD_GATEWAY, {}, b"Internal Server Error")
            return
        answer = result["body"].encode()
        if result.get("isBase64Encoded"):
            answer = base64.b64decode(answer)
        self._answer(result["statusCode"], result["headers"], answer)

    def _event(self, body: bytes) -> dict[str, Any]:
        """A request in payload format 2.0."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        is_text = headers.get("content-type", "").startswith(TEXT_TYPES)
        path, _, query = self.path.partition("?")
        now = time.time()
        return {
            "version": "2.0",
            "routeKey": "$default",
            "rawPath": path,
            "rawQueryString": query,
            "headers": headers,
            "requestContext": {
                "accountId": "anonymous",
                "apiId": "abc123",
                "domainName": headers["host"],
                "domainPrefix": "abc123",
                "http": {
                    "method": self.command,
                    "path": path,
                    "protocol": self.request_version,
                    "sourceIp": self.client_address[0],
                    "userAgent": headers.get("user-agent"),
                },
                "requestId": str(uuid.uuid4()),
                "routeKey": "$default",
                "stage": "$default",
                "time": time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now)),
                "timeEpoch": int(now * 1000),
            },
            "body": body.decode() if is_text else base64.b64encode(body).decode(),
            "isBase64Encoded": not is_text,
        }

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing."""
