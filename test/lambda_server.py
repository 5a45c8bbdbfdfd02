"""A real HTTP server that is invoked as Lambda functions are.

By the path of Lambda's Invoke API, as `sam local start-lambda` and the runtime
interface emulator serve it.
"""

import asyncio
import contextlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from service import DEADLINE, Service
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

Event = dict[str, Any]
OK = {"statusCode": 200}


class Result(NamedTuple):
    """A response of the server that is not simply what a function returned."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


class Invoked(NamedTuple):
    """One invocation: the function's name, the event, and the request's headers."""

    name: str
    event: Event
    headers: dict[str, str]


class FunctionServer:
    """Records invocations, and answers with what `function` returns.

    `function(event)` returns a dict, a `Result`, an awaitable of one of these, or None:
    the connection is closed without an answer. It may be set per function name.
    """

    def __init__(self) -> None:
        self.invoked: list[Invoked] = []
        self.functions: dict[str, Callable[[Event], Any]] = {}
        self.running = self.most_running = 0
        self.records_all = False  # also events of connections without $connect
        self._changed = asyncio.Condition()
        # The connections since `reset`: late events of others are not recorded.
        self._ids: set[str] = set()

    async def __aenter__(self) -> Self:
        server = self

        class Handler(RequestHandler):
            async def post(self, name: str) -> None:
                await server.invoke(self, name)

        application = Application(
            [(r"/2015-03-31/functions/(\w+)/invocations", Handler)],
            log_function=lambda handler: None,
        )
        sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
        self.port = sockets[0].getsockname()[1]
        self._server = HTTPServer(application, max_buffer_size=64 * 2**20)
        self._server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.stop()
        await self._server.close_all_connections()

    def url(self, name: str = "chat") -> str:
        return (
            f"http://127.0.0.1:{self.port}/2015-03-31/functions/{name}/invocations"
        )

    def reset(self) -> None:
        """Forget what was invoked; functions answer 200 until they are set again."""
        self.functions.clear()
        self.invoked.clear()
        self._ids.clear()
        self.most_running = 0

    async def invoke(self, handler: RequestHandler, name: str) -> None:
        event = json.loads(handler.request.body)
        if kind(event) in ("REQUEST", "CONNECT"):
            self._ids.add(connection_of(event))
        elif not self.records_all and connection_of(event) not in self._ids:
            await handler.finish(OK)
            return
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.invoked.append(Invoked(name, event, dict(handler.request.headers)))
        async with self._changed:
            self._changed.notify_all()
        try:
            result = self.functions.get(name, lambda event: OK)(event)
            if inspect.isawaitable(result):
                result = await result
        finally:
            self.running -= 1
        if result is None:
            handler.detach().close()
        elif isinstance(result, Result):
            handler.set_status(result.status)
            for field, value in result.headers.items():
                handler.set_header(field, value)
            await handler.finish(result.body or None)
        else:
            await handler.finish(json.dumps(result))

    def of(self, connection_id: str) -> list[Event]:
        """Return the events of a connection, in the order of arrival."""
        return [
            event
            for _, event, _ in self.invoked
            if event["requestContext"]["connectionId"] == connection_id
        ]

    def of_kind(self, name: str) -> list[Event]:
        """Return all events of a kind, in the order of arrival."""
        return [event for _, event, _ in self.invoked if kind(event) == name]

    async def wait_for(
        self, count: int, matches: Callable[[Event], bool], deadline: float = DEADLINE
    ) -> list[Event]:
        """Wait for `count` events that match, and return them."""

        def found() -> list[Event]:
            return [event for _, event, _ in self.invoked if matches(event)]

        async with asyncio.timeout(deadline), self._changed:
            await self._changed.wait_for(lambda: len(found()) >= count)
        return found()


def kind(event: Event) -> str:
    """Return REQUEST (the authorizer's), CONNECT, MESSAGE or DISCONNECT."""
    return event.get("type") or event["requestContext"]["eventType"]


def connection_of(event: Event) -> str:
    return event["requestContext"]["connectionId"]


@dataclass
class Gateway:
    """A relay, and the server of its functions."""

    service: Service
    functions: FunctionServer

    @property
    def url(self) -> str:
        """Where clients connect: the stage."""
        return self.service.ws_url.removesuffix("/ws") + "/local"

    def reset(self) -> Self:
        """Begin a test; see `FunctionServer.reset`."""
        self.functions.reset()
        return self


async def begin(
    stack: contextlib.AsyncExitStack, *flags: str, name: str = "chat"
) -> Gateway:
    """Start a relay whose function is `name`; `{url}` in flags is the server's URL."""
    functions = await stack.enter_async_context(FunctionServer())
    prefix = functions.url("").removesuffix("/invocations")
    service = await stack.enter_async_context(
        Service(
            "--backend=apigateway",
            f"--functionuri={functions.url(name)}",
            *(flag.replace("{url}", prefix) for flag in flags),
        )
    )
    return Gateway(service, functions)
