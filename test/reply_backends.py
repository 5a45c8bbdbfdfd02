"""Backends that say in their responses what the relay shall do."""

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

import websockets
from faults import flags_for
from metrics_test import scrape
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.web import RequestHandler

MEDIA_TYPE = "application/vnd.socketdock+json"
MIB = 2**20

Event = dict[str, Any]


class ReplyBackend(RecordingBackend):
    """A backend whose responses to messages are made by `reply`.

    `content_type` None: the response has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self.answers["message"] = self._answer

    def reset(self) -> None:
        """Forget the events, and reply nothing."""
        self.events.clear()
        self.content_type: str | None = MEDIA_TYPE
        self.status = 200
        self.reply: Callable[[Event], object] = lambda event: {}

    async def _answer(self, handler: RequestHandler, event: Event) -> None:
        reply = self.reply(event)
        if not isinstance(reply, (str, bytes)):
            reply = json.dumps(reply)
        handler.set_status(self.status)
        if self.content_type is None:
            handler.clear_header("Content-Type")
        else:
            handler.set_header("Content-Type", self.content_type)
        if self.status != 204:
            handler.write(reply)

    async def disconnect_of(self, connection_id: str) -> Event:
        """Wait for the disconnect event of one connection.

        Those of other tests' clients may arrive at any time.
        """
        return await found(
            lambda: [
                event
                for event in self.of("disconnect")
                if event["connection_id"] == connection_id
            ]
        )

    def commands(self, *commands: dict[str, Any]) -> None:
        """Answer each message with these."""
        self.reply = lambda event: {"commands": list(commands)}


class RawBackend:
    """An HTTP server that answers a message with the bytes that `answers` returns.

    The keys are messages; None closes the connection, and a future is awaited first.
    Other events get 204.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.events: list[tuple[str, Event]] = []
        self.answers: dict[str, list[Any]] = {}
        self._tls = tls
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._on_connection, "127.0.0.1", 0, ssl=self._tls, limit=2**26
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def flags(self, *kinds: str) -> list[str]:
        scheme = "http" if self._tls is None else "https"
        return flags_for(lambda kind: f"{scheme}://127.0.0.1:{self.port}/{kind}", kinds)

    def messages(self) -> list[str]:
        """Return the messages of all attempts, in the order of their arrival."""
        return [event["message"] for kind, event in self.events if kind == "message"]

    async def disconnect_of(self, connection_id: str) -> Event:
        return await found(
            lambda: [
                event
                for kind, event in self.events
                if kind == "disconnect" and event["connection_id"] == connection_id
            ]
        )

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with contextlib.suppress(
                asyncio.IncompleteReadError, OSError, asyncio.CancelledError
            ):
                while await self._serve(reader, writer):
                    pass
        finally:
            self._serving.discard(task)
            writer.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Serve one request; return whether another may follow."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        kind = head.split(b" ", 2)[1].decode().strip("/")
        assert length is not None
        event = json.loads(await reader.readexactly(int(length[1])))
        self.events.append((kind, event))
        parts = self.answers.get(event.get("message", ""))
        if parts is None:
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        for part in parts or ():
            if part is None:
                return False
            if isinstance(part, Awaitable):
                await asyncio.shield(part)
            else:
                writer.write(part)
                await writer.drain()
        return True


async def found(search: Callable[[], list[Event]]) -> Event:
    """Wait until `search` returns something, and return the first of it."""
    await eventually(lambda: bool(search()))
    return search()[0]


def response(
    body: bytes, *headers: str, status: str = "200 OK", media_type: str = MEDIA_TYPE
) -> bytes:
    """Make a whole response, with a Content-Length unless `headers` frame the body."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {media_type}", *headers]
    if not re.search("(?i)^(content-length|transfer-encoding)", "\n".join(headers),
                     re.MULTILINE):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def commands(*commands: dict[str, Any]) -> bytes:
    """Return the body of a reply."""
    return json.dumps({"commands": commands}).encode()


async def received(client: websockets.ClientConnection, number: int) -> list[Any]:
    return [await asyncio.wait_for(client.recv(), DEADLINE) for _ in range(number)]


async def outcomes(service: Service) -> dict[str, float]:
    """Return the counts of commands, such as `send/done`, that are not 0."""
    counts = {}
    for name, value in (await scrape(service)).items():
        labels = dict(re.findall(r'(\w+)="(\w+)"', name))
        if name.startswith("commands_total") and value:
            assert labels["source"] == "response"
            counts[f"{labels['command']}/{labels['outcome']}"] = value
    return counts


def added(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, float]:
    """Return what was counted in between."""
    return {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if value != before.get(name, 0)
    }


async def unusable_reply(service: Service, since: int) -> str:
    """Return the only line about a reply after number `since` of the log.

    The relay logs at level debug, at which no line is only counted.
    """
    def lines() -> list[str]:
        return [line for line in service.log[since:] if "cannot be used" in line]

    await eventually(lines)
    (line,) = lines()
    return line
