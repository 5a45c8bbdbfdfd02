"""Through a proxy that tunnels upgrades: what follows a rejected one."""

import asyncio
import contextlib
import signal
import ssl
from urllib.parse import urlsplit

import pytest
import websockets
from certificates import Authority
from faults import send_raw
from service import DEADLINE, Service, tcp_server
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)

STATUS = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
REFUSED = {
    "wrong-version": handshake(
        "Sec-WebSocket-Version: 12", without="Sec-WebSocket-Version"
    ),
    "origin-not-allowed": handshake("Origin: https://other.example"),
    "no-such-path": handshake(line="GET /nothing HTTP/1.1"),
}


def tunnel(url, context):
    """A proxy that passes on all bytes behind a request, as Varnish's pipe does."""
    parts = urlsplit(url)

    async def passing(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        with contextlib.suppress(OSError, NotImplementedError):
            writer.write_eof()

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"\r\nUpgrade: websocket\r\n" in head
        to_relay = await asyncio.open_connection(
            parts.hostname, parts.port, ssl=context
        )
        to_relay[1].write(head)
        up = asyncio.create_task(passing(reader, to_relay[1]))
        with contextlib.suppress(ConnectionError):
            await passing(to_relay[0], writer)
        up.cancel()
        to_relay[1].close()

    return tcp_server(serve)


async def assert_only_one_answer(url, context, request, statuses):
    """To `request`, and nothing to what follows it."""
    async with tunnel(url, context) as port:
        for pieces in ((request + STATUS,), (request, STATUS)):
            received = await send_raw(
                f"http://127.0.0.1:{port}", *pieces, deadline=DEADLINE
            )
            assert received.ended and b'"uptime"' not in received.data
            assert received.data.count(b"HTTP/1.1 ") == 1, received
            assert int(received.data[9:12]) in statuses, received


@pytest.mark.parametrize("server", ["fast", "tornado"])
@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_tunnel_of_a_refused_handshake_reaches_nothing(
    io_loop, tmp_path, server, scheme
):
    """An invalid handshake, a full relay, and a draining one."""
    flags = [f"--http_server={server}", "--max_connections=2", "--drain_spread=3600"]
    context = None
    if scheme == "wss":
        authority = Authority(tmp_path)
        flags.append(f"--tls_cert={authority.server().both}")
        context = ssl.create_default_context(cafile=str(authority.path))
    async with Service(*flags) as service:
        url = service.ws_url
        for request in REFUSED.values():
            await assert_only_one_answer(url, context, request, {403, 404, 426})
        held = [await websockets.connect(url, ssl=context) for _ in range(2)]
        await assert_only_one_answer(url, context, handshake(), {503})
        service.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(held[0].wait_closed(), DEADLINE)
        await assert_only_one_answer(url, context, handshake(), {503})
        await held[1].close()
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
