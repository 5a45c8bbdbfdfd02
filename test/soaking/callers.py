"""The soak's callers: sends of a backend, and peers that read no responses."""

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from faults import drop

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
PATIENCE = 60.0  # seconds for an answer, on a busy machine
PIPELINED = 64 * 1024  # bytes of requests that are written at a time


@dataclass(slots=True)
class Push:
    """One send to a client; times are of `time.monotonic()`."""

    number: int
    posted: float
    answered: float = float("inf")
    status: int = 0  # none came


class Caller:
    """One kept connection to a callback listener; one request at a time."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._writer is not None:
            drop(self._writer.transport)

    async def request(self, method: str, body: bytes = b"") -> int:
        """Return the status; 0 if the listener closed, -1 if there was no response."""
        parts = self._parts
        head = (
            f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(
                    parts.hostname, parts.port
                )
            self._writer.write(head.encode() + body)
            async with asyncio.timeout(PATIENCE):
                answer = await self._reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", answer)
                if length is not None:  # else the listener ends the connection
                    await self._reader.readexactly(int(length[1]))
        except TimeoutError:
            return -1
        except (OSError, asyncio.IncompleteReadError):
            self._writer = None
            return 0
        return int(STATUS.match(answer)[1])


class Pusher:
    """Sends numbers to one client, and records the responses."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self.size = size  # bytes of each
        self.pushes: list[Push] = []

    async def push(self, caller: Caller) -> int:
        """Send the next number; return the status."""
        push = Push(len(self.pushes), time.monotonic())
        self.pushes.append(push)
        push.status = await caller.request(
            "POST", b"push %d " % push.number + b"." * self.size
        )
        push.answered = time.monotonic()
        return push.status

    async def feed(self, over: asyncio.Event, pause: float) -> None:
        """Send numbers until the connection has closed."""
        async with Caller(self._url) as caller:
            while not over.is_set():
                status = await self.push(caller)
                if status not in (200, 429):
                    return
                await asyncio.sleep(0.1 if status == 429 else pause)


async def read_no_answers(url: str, over: asyncio.Event) -> None:
    """Pipeline requests and read nothing, repeatedly."""
    parts = urlsplit(url)
    path = "/socket/" + "0" * 32 + "/send"
    body = b"x" * 4000
    request = (
        f"GET /livez HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n"
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    requests = request * (PIPELINED // len(request))
    while not over.is_set():
        with contextlib.suppress(OSError, TimeoutError):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port, limit=1024
            )
            try:
                while not over.is_set():
                    writer.write(requests)
                    await asyncio.wait_for(writer.drain(), 1)
            finally:
                drop(writer.transport)
        await asyncio.sleep(0.2)
