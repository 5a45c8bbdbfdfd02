"""The examples for backend authors work with the real relay."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Self

import pytest
import websockets
from check_test import check
from programs import leave_out, program
from service import DEADLINE, PROJECT, Service, eventually
from standardwebhooks import Webhook
from tornado.httpclient import AsyncHTTPClient

pytestmark = pytest.mark.gen_test(timeout=60)

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TOKEN = "0123456789abcdef"
EXPRESS = PROJECT / "examples" / "express_backend"


def flask_command() -> list[str]:
    """The chat in Flask."""
    return [sys.executable, "examples/flask_backend.py"]


def express_command() -> list[str]:
    """The chat in Express, with the modules that `npm ci` installs."""
    node = program("nodejs npm", "node")
    if not (EXPRESS / "node_modules").exists():
        leave_out(f"run: npm ci --prefix {EXPRESS.relative_to(PROJECT)}")
    return [node, str(EXPRESS / "backend.mjs")]


def least_command() -> list[str]:
    """The backend in the standard library."""
    return [sys.executable, "examples/backend.py"]


def batch_command() -> list[str]:
    """The backend that takes batches."""
    return [sys.executable, "examples/batch_backend.py"]


CHATS = {"flask": flask_command, "express": express_command}
COMMANDS = {**CHATS, "least": least_command, "batch": batch_command}


class Example:
    """Run an example as a process during the block; `said` are its lines."""

    def __init__(self, name: str, *flags: str) -> None:
        self.command = [*COMMANDS[name](), *flags]
        self.said: list[str] = []

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            "--port=0",
            cwd=PROJECT,
            env={**os.environ, "WEBHOOK_SECRET": SECRET, "CALLBACK_TOKEN": TOKEN},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read())
        await eventually(lambda: bool(self.said) or self._reader.done())
        assert self.said and self.said[0].startswith("backend at "), self.said
        self.url = self.said[0].removeprefix("backend at ")
        return self

    async def __aexit__(self, *error: object) -> None:
        self.process.terminate()
        await asyncio.wait_for(self.process.wait(), DEADLINE)
        await self._reader
        assert not any("Traceback" in line or "Error:" in line for line in self.said)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.said.append(line.decode().rstrip())

    def has_said(self, start: str) -> bool:
        """Whether one of its lines has this beginning."""
        return any(line.startswith(start) for line in self.said)

    def all_said(self, start: str) -> list[str]:
        """Return its lines with this beginning, without it."""
        return [
            line.removeprefix(start) for line in self.said if line.startswith(start)
        ]

    def relay(self, *flags: str) -> Service:
        """A relay with this backend."""
        kinds = ("connect", "message", "disconnect")
        return Service(
            "--backend=http",
            *(f"--{kind}uri={self.url}/{kind}" for kind in kinds),
            *flags,
            environment={
                "SOCKETDOCK_WEBHOOK_SECRET": SECRET,
                "SOCKETDOCK_CALLBACK_TOKEN": TOKEN,
            },
        )

    async def post(
        self, event_id: str, event: object, sign_with: str = SECRET, age: float = 0.0
    ) -> int:
        """The status for a message event that this test has signed."""
        body = json.dumps(event)
        at = datetime.now(UTC) - timedelta(seconds=age)
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "webhook-id": event_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": Webhook(sign_with).sign(event_id, at, body),
        }
        answer = await AsyncHTTPClient().fetch(
            f"{self.url}/message",
            method="POST",
            headers=headers,
            body=body,
            raise_error=False,
        )
        return answer.code


def message(service: Service, connection_id: str, text: str) -> dict[str, object]:
    """The event of a message, with the members that the examples read."""
    meta = {
        "connection_id": connection_id,
        "instance": "relay-1/0000000000000000",
        "send": f"{service.callback_url}/socket/{connection_id}/send",
    }
    return {"meta": meta, "message": text}


async def text_of(client: websockets.ClientConnection) -> str | bytes:
    """Receive the next message, in time."""
    return await asyncio.wait_for(client.recv(), DEADLINE)


each_example = pytest.mark.parametrize("name", CHATS)


@each_example
async def test_everybody_gets_what_one_client_sends(io_loop, name):
    """Events are signed, and callbacks have the token."""
    async with Example(name) as example, example.relay() as service:
        async with (
            websockets.connect(service.ws_url) as one,
            websockets.connect(service.ws_url) as other,
        ):
            await one.send("grüße 🦆")
            assert await text_of(one) == await text_of(other) == "grüße 🦆"
            await other.close()
            await one.send("alone")
            assert await text_of(one) == "alone"
    assert len(example.said) == 1  # there was no error


@each_example
async def test_test_event_reaches_no_client(io_loop, name):
    """`socketdock check --send` sees that it is accepted, with its signature."""
    async with Example(name) as example, example.relay() as service:
        async with websockets.connect(service.ws_url) as client:
            lines = await check(
                "--send", *service.flags, status=0, env=service.environment
            )
            sent = [line for line in lines if " POST " in line]
            assert len(sent) == 3
            assert all(re.search(r"^ok: .* answered 204 in", line) for line in sent)
            await client.send("first")
            assert await text_of(client) == "first"


@each_example
async def test_event_with_a_wrong_signature_is_refused(io_loop, name):
    """As are an old event, and one without a signature."""
    async with Example(name) as example, example.relay() as service:
        async with websockets.connect(service.ws_url) as client:
            event = message(service, "0" * 32, "forged")
            wrong = SECRET.replace("M", "N")
            assert await example.post("forged-1", event, sign_with=wrong) == 401
            assert await example.post("forged-2", event, age=3600) == 401
            answer = await AsyncHTTPClient().fetch(
                f"{example.url}/message",
                method="POST",
                body=json.dumps(event),
                headers={"webhook-signature": "v1"},
                raise_error=False,
            )
            assert answer.code == 401
            await client.send("true")
            assert await text_of(client) == "true"


@each_example
async def test_repeated_event_is_processed_once(io_loop, name):
    """It gets a success status, so that the relay stops retrying."""
    async with Example(name) as example, example.relay() as service:
        async with websockets.connect(service.ws_url) as client:
            event = message(service, "0" * 32, "once")
            assert await example.post("again-1", event) == 204
            assert await example.post("again-1", event) == 204
            assert await text_of(client) == "once"
            await client.send("the next")
            assert await text_of(client) == "the next"
    assert example.has_said("again: again-1")


@each_example
async def test_connections_of_a_dead_instance_are_dropped(io_loop, name):
    """An event of the next run with the same name shows that the old one is dead."""
    async with Example(name) as example:
        async with example.relay("--instance_name=relay-1") as dead:
            async with contextlib.AsyncExitStack() as clients:
                for _ in range(2):
                    await clients.enter_async_context(websockets.connect(dead.ws_url))
                dead.process.send_signal(signal.SIGKILL)
                await dead.process.wait()
        async with example.relay("--instance_name=relay-1") as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody?")
                assert await text_of(client) == "anybody?"
    assert example.has_said("dropped 2 connections of relay-1/")
    assert not example.has_said("callback failed")


async def test_least_backend_listens_on_its_options(io_loop):
    """At `--bindip`, and at no other address."""
    async with Example("least", "--bindip=127.0.0.2") as example:
        assert example.url.startswith("http://127.0.0.2:")
        flags = ("--backend=http", f"--messageuri={example.url}/message")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("grüße 🦆")
                assert await text_of(client) == "you said: grüße 🦆"
        with socket.socket() as elsewhere:  # it would listen there by default
            elsewhere.bind(("127.0.0.1", int(example.url.rpartition(":")[2])))
            elsewhere.listen()


@pytest.mark.parametrize("bindip", ["127.0.0.1", "192.0.2.1"])
def test_least_backend_that_cannot_listen_says_why(bindip):
    """In one line: the port is in use, or the address is not of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [*least_command(), f"--bindip={bindip}", f"--port={port}"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"backend: can't listen at port {port} of {bindip}: ")


async def test_batches_are_answered_although_events_fail(io_loop):
    """Each message is answered once, in order; each event is processed once."""
    texts = [str(number) for number in range(20)]
    async with Example("batch", "--failing=0.2") as example:
        flags = ("--backend=http", f"--batchuri={example.url}/batch")
        async with Service(*flags) as service, contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(websockets.connect(service.ws_url))
                for _ in range(5)
            ]
            for text in texts:
                for client in clients:
                    await client.send(text)
            for client in clients:
                for text in texts:
                    assert await text_of(client) == f"you said: {text}"
                await client.close()
            await eventually(lambda: len(example.all_said("disconnect: ")) == 5)
        processed = example.all_said("message: ")
    assert len(processed) == len(set(processed)) == 100


def batch(*ids: str) -> str:
    """A batch of message events with these ids: `<connection>-<number>`."""
    events = [
        {
            "event": "message",
            "id": event_id,
            "meta": {"connection_id": event_id.partition("-")[0]},
            "message": f"hello from {event_id}",
        }
        for event_id in ids
    ]
    return json.dumps({"events": events})


async def test_batch_names_the_first_failed_event_of_each_connection(io_loop):
    """The later ones of the connection are not processed."""
    async with Example("batch", "--failing=1") as example:
        answer = await AsyncHTTPClient().fetch(
            f"{example.url}/batch", method="POST", body=batch("a-1", "b-7", "a-2")
        )
        assert json.loads(answer.body) == {"commands": [], "failed": ["a-1", "b-7"]}
    assert len(example.said) == 1  # nothing was processed


async def test_repeated_event_of_a_batch_is_answered_again(io_loop):
    """But it is processed once; it may come in another batch."""
    async with Example("batch") as example:
        url = f"{example.url}/batch"
        http = AsyncHTTPClient()
        await http.fetch(url, method="POST", body=batch("a-1", "b-7"))
        answer = await http.fetch(url, method="POST", body=batch("b-7", "b-8"))
        assert answer.headers["Content-Type"] == "application/vnd.socketdock+json"
        assert json.loads(answer.body) == {
            "commands": [
                {"connection_id": "b", "send": "you said: hello from b-7"},
                {"connection_id": "b", "send": "you said: hello from b-8"},
            ],
            "failed": [],
        }
        await eventually(lambda: example.has_said("message: b-8"))
    assert example.all_said("message: ") == ["a-1", "b-7", "b-8"]
    assert example.all_said("again: ") == ["b-7"]


def test_demo_shows_one_exchange_and_ends():
    """Each step in order, then it exits by itself."""
    ended = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    shown = ended.stdout
    steps = ("text frame  Hello, backend!", "you said: Hello, backend!", "answered 200",
             "text frame  you said: Hello, backend!", '"code": 1000', "That is all")
    places = [shown.index(step) for step in steps]
    assert places == sorted(places), shown
