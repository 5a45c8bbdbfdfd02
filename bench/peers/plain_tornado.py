"""The relay that a Tornado developer would write first: no tuning, pooled aiohttp.

python plain_tornado.py PORT BACKEND_URL [events]
"""

import asyncio
import socket
import sys
import uuid

import aiohttp
import uvloop
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler


class Relay:
    """The state that both handlers share."""

    def __init__(
        self, port: int, backend: str, events: bool, http: aiohttp.ClientSession
    ) -> None:
        self.callbacks = f"http://127.0.0.1:{port}/socket"
        self.backend = backend
        self.events = events
        self.instance = f"{socket.gethostname()}/{uuid.uuid4().hex}"
        self.http = http
        self.sockets: dict[str, ClientSocketHandler] = {}
        self.disconnects: set[asyncio.Task[None]] = set()

    async def post(self, kind: str, event: object) -> None:
        async with self.http.post(f"{self.backend}/{kind}", json=event) as answer:
            answer.raise_for_status()


class ClientSocketHandler(WebSocketHandler):
    def initialize(self, relay: Relay) -> None:
        self.relay = relay
        self.id = uuid.uuid4().hex
        self.meta = {
            "connection_id": self.id,
            "send": f"{relay.callbacks}/{self.id}/send",
            "disconnect": f"{relay.callbacks}/{self.id}/disconnect",
            "instance": relay.instance,
        }
        self.number = 0
        self.in_order = asyncio.Lock()

    async def prepare(self) -> None:
        if self.relay.events:
            headers = dict(self.request.headers)
            meta = {**self.meta, "headers": headers, "path": self.request.path}
            await self.relay.post("connect", {"meta": meta})

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)
        self.relay.sockets[self.id] = self

    async def on_message(self, message: str | bytes) -> None:
        text = message if isinstance(message, str) else message.decode()
        self.number += 1
        message_id = f"{self.id}-{self.number}"
        async with self.in_order:
            meta = {**self.meta, "message_id": message_id, "type": "text"}
            await self.relay.post("message", {"meta": meta, "message": text})

    def on_close(self) -> None:
        self.relay.sockets.pop(self.id, None)
        if self.relay.events:
            task = asyncio.create_task(self.send_disconnect())
            self.relay.disconnects.add(task)
            task.add_done_callback(self.relay.disconnects.discard)

    async def send_disconnect(self) -> None:
        async with self.in_order:
            meta = {
                "connection_id": self.id,
                "instance": self.relay.instance,
                "code": self.close_code,
            }
            event = {"connection_id": self.id, "meta": meta}
            await self.relay.post("disconnect", event)


class SendHandler(RequestHandler):
    def initialize(self, relay: Relay) -> None:
        self.relay = relay

    async def post(self, connection_id: str) -> None:
        content_type = self.request.headers.get("Content-Type", "")
        text = content_type.startswith("text/") or "json" in content_type
        try:
            await self.relay.sockets[connection_id].write_message(
                self.request.body, binary=not text
            )
        except (KeyError, WebSocketClosedError):
            self.set_status(410)
        self.write("OK")


async def main() -> None:
    port, backend, *events = sys.argv[1:]
    async with aiohttp.ClientSession() as http:
        relay = Relay(int(port), backend, bool(events), http)
        routes = [
            (r"/ws", ClientSocketHandler, {"relay": relay}),
            (r"/socket/([0-9a-f]+)/send", SendHandler, {"relay": relay}),
        ]
        application = Application(routes, log_function=lambda handler: None)
        application.listen(int(port), "127.0.0.1", backlog=4096)
        await asyncio.Event().wait()


uvloop.run(main())
