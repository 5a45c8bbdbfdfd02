"""The smallest backends work with the real relay, by the commands in their heads."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import websockets
from function_url import FunctionUrl
from ports import free_ports
from programs import leave_out, listens, program
from service import DEADLINE, PROJECT, Service
from workers import worker

pytestmark = pytest.mark.gen_test(timeout=120)

FOLDER = PROJECT / "examples"
MEDIA_TYPE = "application/vnd.socketdock+json"
LAMBDA_URL = "https://abc123.lambda-url.eu-central-1.on.aws"
LAMBDA_LIMIT = 6_000_000  # bytes of an invocation
WORKER_URL = "https://socketdock-backend.example.workers.dev"
MAX_LINES = 15
MAX_LINES_OF_GO = 22
LARGEST = 4 * 1024 * 1024  # bytes; the default of --max_message_size
CLIENTS = 4
MESSAGES = 10  # of each client

SERVERS = (
    "reply.py",
    "reply_flask.py",
    "reply_fastapi.py",
    "reply_django.py",
    "reply.php",
    "express_backend/reply.mjs",
    # Go is large: it is not installed for this test alone.
    *(["reply.go"] if shutil.which("go") else []),
)


def head(name: str) -> str:
    """Return the comment at the beginning of an example."""
    lines = []
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if (comment := re.match(r"(?:#|//) ?(.*)", line)) is not None:
            lines.append(comment[1])
        elif line != "<?php":
            break
    return "\n".join(lines)


def commands(name: str) -> list[str]:
    """Return the commands in the head of an example; the last starts the relay."""
    indented = re.findall(r"^    (\S(?:.*\\\n)*.*)", head(name), flags=re.M)
    return [command.replace("\\\n", "") for command in indented]


def node() -> str:
    """Node.js, with the modules of the examples."""
    path = program("nodejs npm", "node")
    folder = FOLDER / "express_backend"
    if not (folder / "node_modules").exists():
        leave_out(f"run: npm ci --prefix {folder.relative_to(PROJECT)}")
    return path


PROGRAMS: dict[str, Callable[[], str]] = {
    "python3": lambda: sys.executable,
    ".venv/bin/python": lambda: sys.executable,
    "php": lambda: program("php-cli", "php"),
    "node": node,
    "go": lambda: program("golang-go", "go"),
}


@dataclass
class Backend:
    """A running example: its URL, and the relay's flags for it."""

    url: str
    flags: list[str]


@contextlib.contextmanager
def serving(name: str) -> Iterator[Backend]:
    """Run a server during the block, on a free port."""
    port = free_ports(1)
    *_, backend, relay = (line.replace("8000", str(port)) for line in commands(name))
    first, *words = shlex.split(re.sub(r"^PORT=\d+ ", "", backend))
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [PROGRAMS[first](), *words],
            cwd=PROJECT,
            env={**os.environ, "PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # `go run` starts another process
        )
        try:
            limit = time.monotonic() + 2 * DEADLINE
            while not listens(port):
                output.seek(0)
                assert process.poll() is None, output.read()
                assert time.monotonic() < limit, output.read()
                time.sleep(0.05)
            flags = shlex.split(relay)[1:]
            (path,) = re.findall(rf"=http://127\.0\.0\.1:{port}(/\w*)", relay)
            yield Backend(f"http://127.0.0.1:{port}{path}", flags)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE)
        output.seek(0)
        said = output.read()
        assert not re.search("Traceback|Error:|PHP Warning", said), said


@contextlib.contextmanager
def serving_lambda() -> Iterator[Backend]:
    """Run the function during the block, in AWS's runtime."""
    (handler,) = re.findall(r"`(\w+\.\w+)`", head("reply_lambda.py"))
    (relay,) = commands("reply_lambda.py")
    assert LAMBDA_URL in relay
    with FunctionUrl(FOLDER, handler) as function:
        url = f"http://{function.address}"
        yield Backend(f"{url}/", shlex.split(relay.replace(LAMBDA_URL, url))[1:])


@contextlib.contextmanager
def serving_worker() -> Iterator[Backend]:
    """Run the Worker during the block, in Cloudflare's runtime."""
    *_, relay = commands("reply_worker.mjs")
    assert WORKER_URL in relay
    with worker(FOLDER / "reply_worker.mjs") as url:
        yield Backend(f"{url}/", shlex.split(relay.replace(WORKER_URL, url))[1:])


ELSEWHERE = {"reply_lambda.py": serving_lambda, "reply_worker.mjs": serving_worker}
ALL = (*SERVERS, *ELSEWHERE)


@pytest.fixture(scope="module", params=ALL)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each of the examples."""
    elsewhere = ELSEWHERE.get(request.param)
    with elsewhere() if elsewhere else serving(request.param) as backend:
        yield backend


async def answer(client: websockets.ClientConnection, message: str | bytes) -> str:
    """Send a message, and return its answer."""
    await client.send(message)
    received = await asyncio.wait_for(client.recv(), DEADLINE)
    assert isinstance(received, str)
    return received


async def test_message_is_answered_in_the_response(io_loop, backend):
    """Whatever its length and characters are."""
    async with Service(*backend.flags) as service:
        async with websockets.connect(service.ws_url, max_size=None) as client:
            for text in ("Hello", "", 'grüße 🦆 "quoted" \\ and \0', "</\n\u2028"):
                assert await answer(client, text) == f"you said: {text}"
            assert await answer(client, b"bytes") == "you said: bytes"
            for long in ('"' * 2**19, "🦆" * 2**17):
                assert await answer(client, long) == f"you said: {long}"
    assert not any(" reply " in line for line in service.log)


async def test_each_client_gets_the_answers_to_its_messages(io_loop, backend):
    """Several talk at the same time."""

    async def talk(url: str, name: int) -> None:
        async with websockets.connect(url) as client:
            for number in range(MESSAGES):
                text = f"{number} of {name}"
                assert await answer(client, text) == f"you said: {text}"

    async with Service(*backend.flags) as service:
        await asyncio.gather(*(talk(service.ws_url, name) for name in range(CLIENTS)))


def said_to(
    url: str, message: str, content_type: str = "application/json; charset=utf-8"
) -> str:
    """POST a message event, and return the text of the only command in the response."""
    event = {"meta": {"type": "text"}, "message": message}
    request = urllib.request.Request(
        url, json.dumps(event).encode(), {"Content-Type": content_type}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=4 * DEADLINE) as response:
        assert response.status == 200
        assert response.headers.get_content_type() == MEDIA_TYPE
        ((command,),) = json.load(response).values()
    return command["send"]


def test_largest_event_is_taken(backend, request):
    """Each character of its message is six in JSON. Lambda takes at most 6 MB."""
    is_lambda = "lambda" in request.node.name
    message = "\x01" * (LAMBDA_LIMIT // 8 if is_lambda else LARGEST)
    assert said_to(backend.url, message) == f"you said: {message}"


def test_function_takes_a_body_in_base64():
    """A function URL encodes bodies of types that it does not know as text."""
    with serving_lambda() as backend:
        said = said_to(backend.url, "grüße 🦆", "application/octet-stream")
    assert said == "you said: grüße 🦆"


def test_readme_has_the_first_backend():
    """All of it except the comment."""
    readme = (PROJECT / "README.md").read_text("utf-8")
    code = (FOLDER / "reply.py").read_text("utf-8")
    assert f"```python\n{code[code.index('import') :]}```\n" in readme


@pytest.mark.parametrize("name", ALL)
def test_example_is_short(name):
    """Without empty lines and comments."""
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    code = [line for line in lines if not re.match(r"\s*(#|//|$)", line)]
    assert len(code) <= (MAX_LINES_OF_GO if name.endswith(".go") else MAX_LINES)
    assert commands(name)[-1].startswith(".venv/bin/socketdock --backend=http ")
