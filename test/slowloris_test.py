"""Slow connections do not keep others from being served."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
import websockets
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.web import RequestHandler

pytestmark = pytest.mark.gen_test(timeout=90)

SLOW_CONNECTIONS = 500
HEADER_TIMEOUT = 1.5  # seconds
PAUSE = 0.5  # seconds between two bytes
EXCHANGES = 30
PATIENCE = 15.0  # seconds for one exchange, on a loaded machine

HEADERS = b"GET /ws HTTP/1.1\r\nHost: relay\r\nX-Slow: "
BODY = b"POST /socket/" + b"0" * 32 + b"/send HTTP/1.1\r\nContent-Length: 9999\r\n"


class SlowConnection:
    """Says `quickly` at once, then byte after byte; again, when it is ended.

    `ended` counts how often the relay has.
    """

    def __init__(self, quickly: bytes, slowly: Iterator[bytes]) -> None:
        self._quickly = quickly
        self._slowly = slowly
        self.has_asked = quickly.endswith(b"\r\n\r\n")
        self.is_open = False
        self.ended = 0

    async def stay(self, url: str) -> None:
        """Until it is cancelled."""
        parts = urlsplit(url)
        while True:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            self.is_open = True
            writer.write(self._quickly)
            trickling = asyncio.create_task(self._trickle(writer))
            try:
                await reader.read()  # until the end of the connection
            except ConnectionError:
                pass
            finally:
                self.is_open = False
                trickling.cancel()
                writer.transport.abort()
            self.ended += 1

    async def _trickle(self, writer: asyncio.StreamWriter) -> None:
        for byte in self._slowly:
            await asyncio.sleep(PAUSE)
            writer.write(byte)


def silent() -> SlowConnection:
    return SlowConnection(b"", iter(()))


def slow_in_its_line() -> SlowConnection:
    return SlowConnection(b"", (HEADERS[i : i + 1] for i in itertools.count()))


def slow_in_its_headers() -> SlowConnection:
    return SlowConnection(HEADERS, itertools.repeat(b"x"))


def slow_in_its_body() -> SlowConnection:
    head = BODY.replace(b"\r\n", b"\r\nHost: relay\r\n", 1) + b"\r\n"
    return SlowConnection(head, itertools.repeat(b"x"))


@contextlib.asynccontextmanager
async def attacked(url: str, slow: list[SlowConnection]) -> AsyncIterator[None]:
    """Keep all of these connections during the block."""
    tasks = [asyncio.create_task(one.stay(url)) for one in slow]
    try:
        await eventually(lambda: all(one.is_open for one in slow))
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def exchange(service: Service, times: int) -> None:
    """A new client, and messages that come back by callback."""
    async with asyncio.timeout(PATIENCE):
        client = await websockets.connect(service.ws_url, ping_interval=None)
    for number in range(times):
        await client.send(str(number))
        assert await asyncio.wait_for(client.recv(), PATIENCE) == str(number)
    await client.close()


@pytest.mark.parametrize("listener", ["clients", "callbacks", "both-in-one"])
async def test_slow_connections_do_not_block_others(io_loop, listener):
    """Each connection without a complete request in time is closed."""
    async with RecordingBackend() as backend:

        async def send_back(handler: RequestHandler, event: dict) -> None:
            url = f"{event['meta']['send']}?type=text"
            answer = await backend.call(url, body=event["message"].encode())
            assert answer.code == 200

        backend.answers["message"] = send_back
        flags = [*backend.flags(), f"--header_timeout={HEADER_TIMEOUT}"]
        if listener != "both-in-one":
            flags.append("--callbackport=0")
        async with Service(*flags) as service:
            kinds = [silent, slow_in_its_line, slow_in_its_headers]
            url = service.ws_url
            if listener != "clients":
                kinds.append(slow_in_its_body)
                url = service.callback_url
            slow = [
                kind()
                for kind, _ in zip(
                    itertools.cycle(kinds), range(SLOW_CONNECTIONS), strict=False
                )
            ]
            # A body has a separate, longer time limit.
            expiring = [one for one in slow if not one.has_asked]
            async with attacked(url, slow):
                began = time.monotonic()
                while time.monotonic() < began + 2 * HEADER_TIMEOUT:
                    await exchange(service, EXCHANGES)
                await eventually(lambda: all(one.ended for one in expiring), DEADLINE)
            await exchange(service, 1)


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_body_has_its_own_deadline(io_loop, server):
    """A slow one is cut off at its deadline; a quick one is accepted."""
    async with RecordingBackend() as backend:
        flags = ("--body_timeout=3", f"--http_server={server}")
        async with Service(*backend.flags("message"), *flags) as service:
            slow = slow_in_its_body()
            async with attacked(service.callback_url, [slow]):
                await eventually(lambda: slow.ended > 0, DEADLINE)
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                (event,) = await backend.wait_for("message", 1)
                answer = await backend.call(event["meta"]["send"], body=b"x" * 10**6)
                assert answer.code == 200
                assert await asyncio.wait_for(client.recv(), DEADLINE) == b"x" * 10**6
