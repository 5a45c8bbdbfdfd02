# An inbound transport of ACA-Py: SocketDock has the WebSockets of its clients.
#
#     aca-py start --inbound-transport examples.acapy_transport 127.0.0.1 8000 …
#     .venv/bin/socketdock --backend=http --max_message_size=2097152 \
#         --messageuri=http://127.0.0.1:8000/message \
#         --disconnecturi=http://127.0.0.1:8000/disconnect
import asyncio
import base64
from typing import Any
from uuid import uuid4

from acapy_agent.messaging.error import MessageParseError
from acapy_agent.transport.error import WireFormatParseError
from acapy_agent.transport.inbound.base import BaseInboundTransport
from aiohttp import ClientError, ClientSession, ClientTimeout, web

ATTEMPTS = 10  # to send one frame, a second apart
LATER = (429, 502, 503, 504)


class SocketDockTransport(BaseInboundTransport):  # type: ignore[misc]
    def __init__(self, host: str, port: int, create_session: Any, **rest: Any) -> None:
        super().__init__("ws", create_session, **rest)
        self.host, self.port = host, int(port)
        self.sessions: dict[str, Any] = {}  # by the connection's id
        self.tasks: set[asyncio.Task[None]] = set()  # one for each session
        self.lock = asyncio.Lock()

    async def start(self) -> None:
        # A byte of a message takes at most six in JSON.
        app = web.Application(client_max_size=6 * self.max_message_size)
        app.add_routes([web.post("/message", self.message)])
        app.add_routes([web.post("/disconnect", self.disconnect)])
        self.http = ClientSession(timeout=ClientTimeout(30))
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.host, self.port).start()

    async def stop(self) -> None:
        await self.runner.cleanup()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.http.close()

    async def message(self, request: web.Request) -> web.Response:
        event = await request.json()
        meta, text = event["meta"], event["message"]
        async with self.lock:
            session = await self.session(meta["connection_id"], meta["send"])
        encoded = meta.get("encoding") == "base64"
        try:
            await session.receive(base64.b64decode(text) if encoded else text)
        except (MessageParseError, WireFormatParseError):
            return web.Response(status=422)  # refused: it does not come again
        return web.Response()

    async def disconnect(self, request: web.Request) -> web.Response:
        session = self.sessions.get((await request.json())["connection_id"])
        if session is not None and not session.closed:
            session.close()
        return web.Response()

    async def session(self, connection_id: str, url: str) -> Any:
        session = self.sessions.get(connection_id)
        if session is None:
            session = await self.create_session(
                accept_undelivered=True, can_respond=True
            )
            self.sessions[connection_id] = session
            task = asyncio.create_task(self.respond(connection_id, session, url))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return session

    async def respond(self, connection_id: str, session: Any, url: str) -> None:
        try:
            while (frame := await session.wait_response()) is not None:
                if not await self.send(url, frame):
                    break
                session.clear_response()
        finally:
            del self.sessions[connection_id]
            if not session.closed:
                session.close()  # ACA-Py queues the frame that was not sent

    async def send(self, url: str, frame: str | bytes) -> bool:
        kind = "text/plain" if isinstance(frame, str) else "application/octet-stream"
        headers = {"Content-Type": kind, "Idempotency-Key": uuid4().hex}
        for _ in range(ATTEMPTS):
            try:
                async with self.http.post(url, data=frame, headers=headers) as answer:
                    if answer.status not in LATER:
                        return answer.ok
            except (ClientError, TimeoutError):
                pass  # the relay cannot be reached
            await asyncio.sleep(1)
        return False
