"""Shows one exchange through the relay, from a client to a backend and back.

    .venv/bin/python examples/demo.py

Starts `examples/backend.py`, `socketdock.py --backend=http` and a WebSocket client, on
free ports of 127.0.0.1, prints what they sent, and stops them.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketError, websocket_connect

PROJECT = Path(__file__).resolve().parent.parent
DEADLINE = 15.0  # seconds for each step
GREETING = "Hello, backend!"

BACKEND_STARTED = re.compile(r"backend at (http://\S+)")
RELAY_STARTED = re.compile(r"clients at (ws://\S+), callbacks at (http://[^\s,]+)")


class DemoError(Exception):
    """The demo cannot continue; the message is the reason."""


async def demo() -> None:
    """Start all three, exchange one message each way, and show it."""
    async with (
        started("the backend", BACKEND_STARTED, "examples/backend.py", "--port=0") as (
            events,
            (backend,),
        ),
        started(
            "the relay",
            RELAY_STARTED,
            "socketdock.py",
            "--backend=http",
            "--bindport=0",
            f"--connecturi={backend}/connect",
            f"--messageuri={backend}/message",
            f"--disconnecturi={backend}/disconnect",
            f"--config={os.devnull}",  # ignore conf/
            "--logging=info",
        ) as (_, (relay, callbacks)),
    ):
        print(f"The backend listens at {backend},")
        print(f"the relay for clients at {relay}, for callbacks at {callbacks}.")
        print("What follows is what they sent, with the JSON indented.")

        async with deadline("the client was not connected"):
            client = await websocket_connect(relay)
        step("A client connects, and the relay asks the backend", "relay", "backend")
        show_post(backend, await next_event(events, "POST /connect"))

        await client.write_message(GREETING)
        step("The client sends a frame", "client", "relay")
        print(f"text frame  {GREETING}")

        step("The relay makes it a POST", "relay", "backend")
        show_post(backend, await next_event(events, "POST /message"))

        step("The backend answers by a callback, a POST too", "backend", "relay")
        url, call = await next_event(events, "CALLBACK")
        print(f"POST {url}")
        show_headers(call["headers"])
        print(f"{call['body']}\n\nanswered {call['status']}")
        if call["status"] != 200:
            raise DemoError("the relay did not take the callback")

        async with deadline("the client got no frame"):
            reply = await client.read_message()
        step("The relay makes it a frame", "relay", "client")
        print(f"text frame  {reply!s}")
        if reply != call["body"]:
            raise DemoError("the client did not get what the backend sent")

        client.close(1000, "bye")
        step("The client closes, and the backend gets an event", "relay", "backend")
        show_post(backend, await next_event(events, "POST /disconnect"))
    print("\nThat is all: the relay and the backend have been stopped.")


def step(what: str, sender: str, receiver: str) -> None:
    """Print the heading of one step."""
    print(f"\n--- {what} ({sender} -> {receiver})\n")


def show_post(backend: str, event: tuple[str, Any]) -> None:
    """Print an event as an HTTP request, with indented JSON."""
    path, request = event
    print(f"POST {backend}{path}")
    show_headers(request["headers"])
    print(json.dumps(request["body"], indent=2))


def show_headers(headers: Mapping[str, str]) -> None:
    """Print a request's headers, and the empty line after them."""
    for name, value in headers.items():
        print(f"{name}: {value}")
    print()


async def next_event(lines: "asyncio.Queue[str]", start: str) -> tuple[str, Any]:
    """Wait for the backend's next line, which must begin with `start`.

    Returns the request's path, and the details that the backend prints.
    """
    async with deadline(f"the backend did not print {start!r}"):
        line = await lines.get()
    if not line:
        raise DemoError("the backend has ended")
    if not line.startswith(start):
        raise DemoError(f"the backend printed {line!r} where {start!r} was due")
    _, where, details = line.split(" ", 2)
    return where, json.loads(details)


@asynccontextmanager
async def deadline(failure: str) -> AsyncIterator[None]:
    """Cancel the block after `DEADLINE` seconds: raise `DemoError` with `failure`."""
    try:
        async with asyncio.timeout(DEADLINE):
            yield
    except TimeoutError:
        raise DemoError(f"{failure} in {DEADLINE:g} seconds") from None


@asynccontextmanager
async def started(
    name: str, announcement: re.Pattern[str], script: str, *flags: str
) -> AsyncIterator[tuple["asyncio.Queue[str]", tuple[str, ...]]]:
    """Run a program of this project during the block.

    Yields a queue of the lines that it prints, and the groups of the match with
    `announcement`.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROJECT / script),
        *flags,
        # Ignore options that are set in the environment.
        env={k: v for k, v in os.environ.items() if not k.startswith("SOCKETDOCK_")},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    lines: asyncio.Queue[str] = asyncio.Queue()
    reader = asyncio.create_task(read_lines(process, lines))  # ends with the process
    try:
        yield lines, await announced(name, announcement, lines)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), DEADLINE)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader


async def read_lines(
    process: asyncio.subprocess.Process, lines: "asyncio.Queue[str]"
) -> None:
    """Queue the lines that a process prints, and an empty one at its end."""
    assert process.stdout is not None
    async for line in process.stdout:
        if text := line.decode(errors="replace").rstrip():
            lines.put_nowait(text)
    lines.put_nowait("")


async def announced(
    name: str, announcement: re.Pattern[str], lines: "asyncio.Queue[str]"
) -> tuple[str, ...]:
    """Wait for the line in which a program prints where it listens."""
    seen = []
    async with deadline(f"{name} did not start"):
        while line := await lines.get():
            if (match := announcement.search(line)) is not None:
                return match.groups()
            seen.append(line)
    raise DemoError(f"{name} did not start: {' '.join(seen) or 'it said nothing'}")


def main() -> int:
    try:
        asyncio.run(demo())
    except (DemoError, OSError, HTTPClientError, WebSocketError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as in shells
    return 0


if __name__ == "__main__":
    sys.exit(main())
