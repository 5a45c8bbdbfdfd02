"""Clients and backends of other authors communicate through the relay.

What runs outside this process is in `interop/`: two clients in JavaScript, and
three backends. What a machine lacks is left out with a word on how to get it;
with TEST_ALL in the environment its test fails instead.
"""

import asyncio
import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from programs import INTEROP, by_node, kill, leave_out, program
from service import DEADLINE, Service
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, StaticFileHandler

pytestmark = pytest.mark.gen_test(timeout=60)

EXCHANGE_DEADLINE = 30.0  # seconds for all that one client does
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root, and most containers, cannot have a sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)

# The fragments of a message; one that is sent whole has one.
Message = tuple[str, ...] | tuple[bytes, ...]
Close = tuple[int, str]  # code and reason

LARGEST = 4 * 1024 * 1024  # bytes; the default of --max_message_size

WHOLE: Sequence[Message] = (
    ('grüße 🦆 "quoted" \\ and \0',),
    (b"\x00\x01\xfe\xff, which is not UTF-8",),
    ("binary that is UTF-8: 🦆".encode(),),
    ("🦆" * (LARGEST // 4),),
    (bytes(range(256)) * (LARGEST // 256),),
)
FRAGMENTED: Sequence[Message] = (
    ("a te", "", "xt in fragments 🦆"),
    (b"\xff binary", b" in ", b"fragments"),
    (b"cut within a character: \xf0\x9f", b"\xa6\x86"),
)
CLIENTS_CLOSE: Close = (4001, "until we meet again: até logo")
BACKENDS_CLOSE: Close = (4002, "as you asked: adiós")


@dataclass(frozen=True, slots=True)
class Task:
    """What a client is to do: to send each message, reading its echo, and close.

    Where `close` is None, it asks the backend to close instead.
    """

    url: str
    page: "Page"  # for clients that are browsers
    messages: Sequence[Message]
    close: Close | None


@dataclass(frozen=True, slots=True)
class Result:
    """What a client received: complete messages, and the close."""

    received: list[str | bytes]
    close: Close


def whole(message: Message) -> str | bytes:
    """A message as the other side receives it."""
    return message[0][:0].join(message)  # type: ignore[arg-type] # all str, or bytes


# Programs and modules that may be missing.


def python_module(name: str, distribution: str) -> Any:
    """Import a module that only these tests need, or skip the test."""
    try:
        return importlib.import_module(name)
    except ImportError:
        leave_out(f"{distribution} is missing: pip install {distribution}")


# The clients.


async def websockets_client(task: Task) -> Result:
    """Python's `websockets`."""
    websockets = python_module("websockets", "websockets")
    received = []
    async with websockets.connect(
        task.url, proxy=None, max_size=LARGEST, compression=None
    ) as client:
        for message in task.messages:
            # An iterable is sent as one message, a frame for each item.
            await client.send(message[0] if len(message) == 1 else message)
            received.append(await client.recv())
        if task.close is not None:
            await client.close(*task.close)
        else:
            await client.send("please close")
            await client.wait_closed()
    return Result(received, (client.close_code, client.close_reason))


async def websocket_client(task: Task) -> Result:
    """Python's `websocket-client`, which blocks its thread."""
    websocket = python_module("websocket", "websocket-client")
    ABNF = websocket.ABNF

    def run() -> Result:
        client = websocket.create_connection(
            task.url, timeout=DEADLINE, http_no_proxy=["127.0.0.1"]
        )
        received = []
        for message in task.messages:
            is_text = isinstance(message[0], str)
            opcode = ABNF.OPCODE_TEXT if is_text else ABNF.OPCODE_BINARY
            for number, fragment in enumerate(message, 1):
                data = fragment.encode() if isinstance(fragment, str) else fragment
                fin = int(number == len(message))
                client.send_frame(ABNF.create_frame(data, opcode, fin))
                opcode = ABNF.OPCODE_CONT
            received.append(client.recv())
        if task.close is not None:
            code, reason = task.close
            client.send_close(code, reason.encode())
        else:
            client.send("please close")
        # Its close() does not return what it received.
        frame = client.recv_frame()
        assert frame.opcode == ABNF.OPCODE_CLOSE
        if task.close is None:
            client.send_close(int.from_bytes(frame.data[:2]))
        client.shutdown()
        return Result(
            received, (int.from_bytes(frame.data[:2]), frame.data[2:].decode())
        )

    return await asyncio.to_thread(run)


async def aiohttp_client(task: Task) -> Result:
    """`aiohttp`'s client, which can't send fragments: it sets FIN on each frame."""
    aiohttp = python_module("aiohttp", "aiohttp")
    received = []
    async with (
        aiohttp.ClientSession() as session,
        # Its limit is the first size that is too large.
        session.ws_connect(task.url, max_msg_size=LARGEST + 1) as client,
    ):
        for message in map(whole, task.messages):
            if isinstance(message, str):
                await client.send_str(message)
            else:
                await client.send_bytes(message)
            received.append((await client.receive()).data)
        if task.close is not None:
            code, reason = task.close
            await client.close(code=code, message=reason.encode())
            # It keeps the code that it received, but no reason.
            return Result(received, (client.close_code, ""))
        await client.send_str("please close")
        closed = await client.receive()
        assert closed.type == aiohttp.WSMsgType.CLOSE
        return Result(received, (closed.data, closed.extra))


async def ws_client(task: Task) -> Result:
    """npm's `ws`."""
    return from_json(
        await by_node("ws_client.mjs", "ws", to_json(task), EXCHANGE_DEADLINE)
    )


async def chromium_client(task: Task) -> Result:
    """Headless Chromium, on the task's page."""
    chromium = program("chromium", "chromium", "chromium-browser", "google-chrome")
    task.page.task = task
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        tempfile.TemporaryFile() as log,
    ):
        process = await asyncio.create_subprocess_exec(
            chromium,
            *CHROMIUM_FLAGS,
            f"--user-data-dir={profile}",
            f"{task.page.origin}/browser_client.html",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        exited = asyncio.create_task(process.wait())
        try:
            await asyncio.wait(
                (exited, task.page.result), return_when=asyncio.FIRST_COMPLETED
            )
            if not task.page.result.done():
                log.seek(0)
                pytest.fail(f"Chromium exited: {log.read().decode(errors='replace')}")
            return from_json(task.page.result.result())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its children
            await exited


class Page:
    """A web server with a page that executes a task in a browser."""

    task: Task

    async def __aenter__(self) -> Self:
        self.result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        page = self

        class TaskHandler(RequestHandler):
            def get(self) -> None:
                self.finish(to_json(page.task))

        class ResultHandler(RequestHandler):
            def post(self) -> None:
                if not page.result.done():
                    page.result.set_result(self.request.body)

        application = Application(
            [
                (r"/task", TaskHandler),
                (r"/result", ResultHandler),
                (r"/(.*\.(?:html|mjs))", StaticFileHandler, {"path": str(INTEROP)}),
            ],
            log_function=lambda handler: None,
        )
        sockets = bind_sockets(0, "127.0.0.1")
        self.origin = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        self.server = HTTPServer(application)
        self.server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.stop()
        await self.server.close_all_connections()


def to_json(task: Task) -> bytes:
    """A task for a client in JavaScript; in binary fragments a character is a byte."""
    messages = [
        {"type": "text", "fragments": message}
        if isinstance(message[0], str)
        else {"type": "binary", "fragments": [str(f, "latin-1") for f in message]}
        for message in task.messages
    ]
    return json.dumps(
        {"url": task.url, "messages": messages, "close": task.close}
    ).encode()


def from_json(data: bytes) -> Result:
    """Parse the result of a client in JavaScript."""
    result = json.loads(data)
    assert "error" not in result, result["error"]
    received = [
        message["fragments"][0]
        if message["type"] == "text"
        else message["fragments"][0].encode("latin-1")
        for message in result["received"]
    ]
    code, reason = result["close"]
    return Result(received, (code, reason))


CLIENTS: dict[str, Callable[[Task], Awaitable[Result]]] = {
    "websockets": websockets_client,
    "websocket-client": websocket_client,
    "aiohttp": aiohttp_client,
    "ws": ws_client,
    "chromium": chromium_client,
}
# Those whose API sends a message in fragments.
FRAGMENTING = ("websockets", "websocket-client", "ws")


async def exchange(
    client: str, messages: Sequence[Message], close: Close | None, *flags: str
) -> Result:
    """Start a relay, and let a client execute its task there, in time."""
    async with Page() as page:
        # Of the others one sends the relay's own origin, which needs no flag.
        origins = [f"--allowed_origins={page.origin}"] if client == "chromium" else []
        async with Service(*flags, *origins) as service:
            task = Task(service.ws_url, page, messages, close)
            async with asyncio.timeout(EXCHANGE_DEADLINE):
                return await CLIENTS[client](task)


# The backends.


class BackendProcess:
    """A backend of `interop/`, for as long as the block runs."""

    def __init__(self, *command: str | Path) -> None:
        self.command = command

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            self.url = f"http://127.0.0.1:{int(await self.read_line())}"
        except BaseException:
            await kill(self.process)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await kill(self.process)

    async def read_line(self) -> bytes:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        return await asyncio.wait_for(self.process.stdout.readline(), DEADLINE)

    async def disconnect_event(self) -> tuple[str, Close]:
        """Who closed, and how, by the next disconnect event that it is sent."""
        meta = json.loads(await self.read_line())["meta"]
        return meta["initiator"], (meta["code"], meta["reason"])

    def flags(self) -> tuple[str, ...]:
        """The relay's flags for this backend."""
        return (
            "--backend=http",
            f"--messageuri={self.url}/message",
            f"--disconnecturi={self.url}/disconnect",
        )


def stdlib_backend(version: str) -> BackendProcess:
    """Python's `http.server`."""
    return BackendProcess(sys.executable, INTEROP / "stdlib_backend.py", version)


def flask_backend(version: str) -> BackendProcess:
    """Flask, on Werkzeug's server."""
    python_module("flask", "flask")
    return BackendProcess(sys.executable, INTEROP / "flask_backend.py", version)


def node_backend(version: str) -> BackendProcess:
    """Node's `http`, which speaks nothing but HTTP/1.1."""
    return BackendProcess(program("nodejs npm", "node"), INTEROP / "node_backend.mjs")


# The tests.


@pytest.mark.parametrize("client", CLIENTS)
async def test_client_through_loopback(io_loop, client):
    """Each client gets its messages unchanged, and its close code."""
    messages = messages_for(client)
    result = await exchange(client, messages, CLIENTS_CLOSE)
    check_echo(result, messages)
    assert result.close == (4001, "")  # the code alone is sent back


@pytest.mark.parametrize("client", CLIENTS)
async def test_client_through_http(io_loop, client):
    """Each client's messages and close reach a backend in another process."""
    async with stdlib_backend("HTTP/1.1") as backend:
        messages = messages_for(client)
        result = await exchange(client, messages, CLIENTS_CLOSE, *backend.flags())
        check_echo(result, messages)
        assert await backend.disconnect_event() == ("client", CLIENTS_CLOSE)


@pytest.mark.parametrize("client", CLIENTS)
async def test_client_that_the_backend_closes(io_loop, client):
    """Each client gets the code and the reason of the backend."""
    async with stdlib_backend("HTTP/1.1") as backend:
        result = await exchange(client, (), None, *backend.flags())
        assert result.close == BACKENDS_CLOSE
        assert await backend.disconnect_event() == ("backend", BACKENDS_CLOSE)


@pytest.mark.parametrize(
    ("start", "version"),
    [
        (stdlib_backend, "HTTP/1.1"),
        (stdlib_backend, "HTTP/1.0"),
        (flask_backend, "HTTP/1.1"),
        (flask_backend, "HTTP/1.0"),
        (node_backend, "HTTP/1.1"),
    ],
)
async def test_backend_on_any_http_server_works(io_loop, start, version):
    """It gets messages, calls back, and gets the disconnect event."""
    async with start(version) as backend:
        result = await exchange("websockets", WHOLE, CLIENTS_CLOSE, *backend.flags())
        check_echo(result, WHOLE)
        assert await backend.disconnect_event() == ("client", CLIENTS_CLOSE)


def messages_for(client: str) -> Sequence[Message]:
    """The messages that a client's API can send."""
    return [*WHOLE, *FRAGMENTED] if client in FRAGMENTING else WHOLE


def check_echo(result: Result, messages: Sequence[Message]) -> None:
    """Assert that each message came back in order, with its type."""
    assert len(result.received) == len(messages)
    for received, message in zip(result.received, messages, strict=True):
        sent = whole(message)
        # No assert on the two themselves: pytest would print megabytes.
        same = type(received) is type(sent) and received == sent
        assert same, f"{sent[:40]!r} came back as {received[:40]!r}"
