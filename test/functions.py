"""A Lambda function as an HTTP service, and `socketdock dev` in front of functions."""

import asyncio
import contextlib
import json
import re
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import websockets
from programs import program
from service import DEADLINE, Service, eventually
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

Event = dict[str, Any]


async def own_id(event: Event) -> Event:
    """Accept each connection, and answer each message with the connection's id."""
    return {"statusCode": 200, "body": event["requestContext"]["connectionId"]}


class RecordingFunction:
    """A real HTTP server that is invoked with events during the block.

    `answer` returns the answer to an event.
    """

    def __init__(
        self, answer: Callable[[Event], Awaitable[Event]] = own_id
    ) -> None:
        self.answer = answer
        self.events: list[Event] = []
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        function = self

        class Invocation(RequestHandler):
            async def post(self) -> None:
                event = json.loads(self.request.body)
                function.events.append(event)
                async with function._changed:
                    function._changed.notify_all()
                self.finish(await function.answer(event))

        sockets = bind_sockets(0, "127.0.0.1")
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/function"
        application = Application(
            [(r"/function", Invocation)], log_function=lambda handler: None
        )
        self._server = HTTPServer(application)
        self._server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.stop()
        await self._server.close_all_connections()

    async def event(self, kind: str, connection_id: str | None = None) -> Event:
        """Wait for an event, such as CONNECT, of a connection or of any."""

        def found() -> list[Event]:
            return [
                event
                for event in self.events
                if event["requestContext"]["eventType"] == kind
                and connection_id in (None, event["requestContext"]["connectionId"])
            ]

        async with asyncio.timeout(DEADLINE), self._changed:
            await self._changed.wait_for(found)
        return found()[0]


class Development(NamedTuple):
    """`socketdock dev`: the environment and the address that it has printed."""

    service: Service
    variables: Mapping[str, str]
    url: str

    def connect(self, query: str = "") -> websockets.connect:
        """Connect a client that trusts the relay."""
        trusted = self.variables["NODE_EXTRA_CA_CERTS"]
        context = ssl.create_default_context(cafile=trusted)
        # The function may have to start first.
        deadline = 2 * DEADLINE
        return websockets.connect(self.url + query, ssl=context, open_timeout=deadline)


@contextlib.asynccontextmanager
async def developing(folder: Path, *flags: str) -> AsyncIterator[Development]:
    """Run `socketdock dev` with its state and its output in a folder."""
    program("openssl", "openssl")
    printed, last = folder / "printed", "clients connect to "
    relay = f'exec "{sys.executable}" socketdock.py dev "$@" >"{printed}"'
    service = Service(
        *flags,
        command=["/bin/sh", "-c", relay, "sh"],
        environment={"XDG_STATE_HOME": str(folder)},
    )
    async with service:
        await eventually(lambda: re.search(f"{last}.+\n", printed.read_text()))
        *variables, address = printed.read_text().splitlines()
        yield Development(
            service,
            dict(line.split("=", 1) for line in variables),
            address.removeprefix(last),
        )
