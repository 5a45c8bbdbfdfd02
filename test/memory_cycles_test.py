"""Objects that end are freed immediately, without the garbage collector."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import websockets
from service import DEADLINE, RecordingBackend, Service, eventually, withhold
from tornado.web import RequestHandler
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)

# The relay, without a collector but at SIGUSR2, when it tells what that has found,
# and what there still is of clients.
COUNTING = """
import collections, gc, runpy, signal, sys

OF_CLIENTS = "ClientSocketHandler", "ClientConnection", "RequestConnection", "Delivery"

def count(*_):
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    found = collections.Counter(type(each).__name__ for each in gc.garbage)
    gc.set_debug(0)
    gc.garbage.clear()
    left = sum(type(each).__name__ in OF_CLIENTS for each in gc.get_objects())
    print(f"garbage: {dict(found)} left: {left}", file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR2, count)
gc.disable()
sys.argv[0] = "socketdock.py"
runpy.run_path("socketdock.py", run_name="__main__")
"""

TIMES = 5


class Visitors:
    """Clients of a relay that counts its garbage, and their backend."""

    def __init__(self, service: Service, backend: RecordingBackend) -> None:
        self.service = service
        self.backend = backend

    async def visits(self) -> None:
        """Send a message, receive one, and close with a handshake."""
        for _ in range(TIMES):
            async with websockets.connect(self.service.ws_url) as client:
                await client.send("hello")
                event = (await self.backend.wait_for("message", 1))[-1]
                meta = event["meta"]
                assert (await self.backend.call(meta["send"], body="x")).code == 200
                info = meta["send"].removesuffix("/send")
                assert (await self.backend.call(info, "GET")).code == 200
            await self.backend.wait_for("disconnect", 1)
            self.backend.events.clear()

    async def cut(self) -> None:
        """Disconnect without a close frame."""
        for _ in range(TIMES):
            client = await websockets.connect(self.service.ws_url)
            client.transport.abort()
        await self.backend.wait_for("disconnect", TIMES)

    async def failures(self) -> None:
        """Messages that are retried."""
        answered = 0

        async def every_other(handler: RequestHandler, event: Any) -> None:
            nonlocal answered
            answered += 1
            handler.set_status(503 if answered % 2 else 200)

        self.backend.answers["message"] = every_other
        async with websockets.connect(self.service.ws_url) as client:
            for number in range(TIMES):
                await client.send(f"{number}")
            await self.backend.wait_for("message", 2 * TIMES)
        await self.backend.wait_for("disconnect", 1)

    async def bad_frames(self) -> None:
        """Send invalid frames."""
        for _ in range(TIMES):
            await self.raw(handshake(), b"101", b"\xff\xff\xff", b"\x88")
        await self.backend.wait_for("disconnect", TIMES)

    async def refused(self) -> None:
        """Handshakes rejected by the backend, without a decision, and by the relay."""
        for status in (403, 500):

            async def refuse(
                handler: RequestHandler, event: Any, status: int = status
            ) -> None:
                handler.set_status(status)

            self.backend.answers["connect"] = refuse
            for _ in range(TIMES):
                with contextlib.suppress(websockets.InvalidStatus):
                    await websockets.connect(self.service.ws_url)
        for _ in range(TIMES):
            await self.raw(b"GET /ws HTTP/1.1\r\nHost: here\r\n\r\n", b"426")
            await self.raw(b"GET /no HTTP/1.1\r\nHost: here\r\n\r\n", b"404")
            await self.raw(b"no HTTP\r\n\r\n", b"400")

    async def left_before_the_decision(self) -> None:
        """Disconnect before the backend's decision."""
        decided = withhold(self.backend, "connect")
        for number in range(TIMES):
            async with asyncio.timeout(DEADLINE):
                loop = asyncio.get_running_loop()
                with socket.socket() as client:
                    client.setblocking(False)
                    await loop.sock_connect(client, self.address)
                    await loop.sock_sendall(client, handshake())
                    await self.backend.wait_for("connect", number + 1)
        decided.set()
        await self.backend.wait_for("disconnect", TIMES)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.service.ws_url.split("/")[2].split(":")
        return host, int(port)

    async def raw(self, *exchange: bytes) -> None:
        """Send bytes in turn, and wait for what each response must contain."""
        reader, writer = await asyncio.open_connection(*self.address)
        async with asyncio.timeout(DEADLINE):
            for said, wanted in zip(exchange[::2], exchange[1::2], strict=True):
                writer.write(said)
                received = b""
                while wanted not in received:
                    part = await reader.read(4096)
                    assert part, (said, received)
                    received += part
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    "doing",
    [
        Visitors.visits,
        Visitors.cut,
        Visitors.failures,
        Visitors.bad_frames,
        Visitors.refused,
        Visitors.left_before_the_decision,
    ],
)
async def test_closed_connections_leave_no_cycles(
    io_loop, doing: Callable[[Visitors], Awaitable[None]]
):
    """Otherwise the garbage collector would have to traverse all clients."""
    async with RecordingBackend() as backend:
        counting = [sys.executable, "-c", COUNTING]
        async with Service(*backend.flags(), command=counting) as service:
            await doing(Visitors(service, backend))
            async with asyncio.timeout(DEADLINE):
                while not (line := await counted(service)).endswith("left: 0"):
                    assert line.startswith("garbage: {} ")
            assert line == "garbage: {} left: 0"


async def counted(service: Service) -> str:
    """What has been found, and what there is."""
    before = len(service.log)

    def new_lines() -> list[str]:
        return [line for line in service.log[before:] if line.startswith("garbage: ")]

    service.process.send_signal(signal.SIGUSR2)
    await eventually(lambda: bool(new_lines()))
    return new_lines()[0]
