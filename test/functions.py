"""A Lambda function as an HTTP service, which records its events."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Self

from service import DEADLINE
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
