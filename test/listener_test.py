"""Accepting connections: descriptors, and several processes on one port."""

import asyncio
import contextlib
import itertools
import logging
import shlex
import signal
import socket
import sys
from pathlib import Path

import pytest
import websockets
from faults import send_raw
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.web import Application, RequestHandler
from websockets.protocol import State
from wire import handshake

from handlers.http.bounds import RequestBounds
from handlers.http.server import RequestServer

RELAY = f'exec {shlex.quote(sys.executable)} socketdock.py "$@"'
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n"


def limited(files, *flags):
    """A service with this limit of open files."""
    return Service(*flags, command=["bash", "-c", f"ulimit -n {files}; {RELAY}", "-"])


def processor_time(service):
    """Clock ticks of processor time that its process has used."""
    stat = Path(f"/proc/{service.process.pid}/stat").read_text()
    return sum(map(int, stat.rpartition(")")[2].split()[11:13]))


def open_files(service):
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


async def echo(service):
    async with websockets.connect(service.ws_url) as client:
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"


async def echo_when_there_is_room(service):
    """Connect like a client that retries after a 503."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await echo(service)
            except websockets.exceptions.InvalidStatus as refusal:
                assert refusal.response.status_code == 503
                assert "Retry-After" in refusal.response.headers


@pytest.mark.gen_test
async def test_running_out_of_descriptors_pauses_accepting(io_loop):
    """The process does not end or spin, and continues when some are free again."""
    async with limited(64, "--max_connections=50") as service:
        host, _, port = service.ws_url.split("/")[2].rpartition(":")
        with contextlib.ExitStack() as many:
            for _ in range(100):
                many.enter_context(socket.create_connection((host, int(port))))
            await eventually(lambda: any("accepting pauses" in x for x in service.log))
            assert open_files(service) <= 64 - 15  # some are reserved
            before = processor_time(service)
            await asyncio.sleep(1)  # the time over which processor time is measured
            assert processor_time(service) - before < 50  # of 100
        # The relay may not have noticed yet that they have disconnected.
        await echo_when_there_is_room(service)
        assert sum("accepting pauses" in line for line in service.log) == 1


async def answered(host, port, stack):
    """The reader of a connection that asked for a WebSocket, at once.

    One that is silent for as long as 400 others take to connect may be closed.
    """
    sock = socket.create_connection((host, int(port)))
    sock.sendall(handshake())
    reader, writer = await asyncio.open_connection(sock=sock)
    stack.callback(writer.close)
    return reader


@pytest.mark.long
@pytest.mark.parametrize("server", ["fast", "tornado"])
@pytest.mark.gen_test(timeout=60)
async def test_burst_of_handshakes_is_answered(io_loop, server):
    """Each gets its 101, or 503 and then 101 when others have left; none is cut."""
    flags = ("--max_connections=1000", f"--http_server={server}")
    async with limited(256, *flags) as service, contextlib.AsyncExitStack() as stack:
        host, _, port = service.ws_url.split("/")[2].rpartition(":")
        stacks = [stack.enter_context(contextlib.ExitStack()) for _ in range(400)]
        readers = await asyncio.gather(
            *(answered(host, port, each) for each in stacks)
        )
        heads = await asyncio.gather(
            *(r.readuntil(b"\r\n\r\n") for r in readers)
        )
        statuses = [head[9:12] for head in heads]
        assert set(statuses) == {b"101", b"503"}
        assert statuses.count(b"101") > 150
        assert all(b"\r\nRetry-After: " in x for x in heads if x[9:12] == b"503")
        for each in stacks:
            each.close()
        await eventually(lambda: open_files(service) < 100)
        await echo(service)


async def hold(url, kind, stack):
    """One of 400 connections that a peer holds open."""
    host, _, port = url.split("/")[2].rpartition(":")
    # Closed before its bytes came: the relay makes room by those that wait for a peer.
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection(host, int(port))
        stack.callback(writer.close)
        writer.write(HELD[kind])
        if kind == "websockets":
            return (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return False


HELD = {
    "websockets": handshake(),
    "silence": b"",
    "half a request": b"GET /livez HTTP/1.1\r\n",
    "idle": LIVEZ,
    "bodies": b"POST /socket/" + b"0" * 32 + b"/send HTTP/1.1\r\nHost: relay\r\n"
    b"Content-Length: 9\r\n\r\nx",
}


@pytest.mark.parametrize("server", ["fast", "tornado"])
@pytest.mark.parametrize("listeners", ["one", "two"])
@pytest.mark.parametrize("kind", HELD)
@pytest.mark.gen_test(timeout=90)
async def test_clients_leave_descriptors_to_callbacks_and_probes(
    io_loop, kind, listeners, server
):
    """Any number of idle connections; callbacks and probes are still served."""
    flags = ["--max_connections=1000", f"--http_server={server}"]
    flags += ["--callbackport=0"] * (listeners == "two")
    async with RecordingBackend() as backend, contextlib.AsyncExitStack() as stack:
        flags += backend.flags("message", "disconnect")
        service = await stack.enter_async_context(limited(256, *flags))
        client = await stack.enter_async_context(websockets.connect(service.ws_url))
        await client.send("one")
        (event,) = await backend.wait_for("message", 1)
        held = await asyncio.gather(
            *(hold(service.ws_url, kind, stack) for _ in range(400))
        )
        assert sum(held) > 40 or kind != "websockets"
        for number in range(2, 12):  # by a new connection each
            urls = {service.ws_url, service.callback_url}
            for url, path in itertools.product(urls, (b"/livez", b"/readyz")):
                if path == b"/livez" or url == service.callback_url:
                    request = LIVEZ.replace(b"/livez", path)
                    received = await send_raw(
                        url, request, answers=1, deadline=DEADLINE
                    )
                    assert received.statuses == [200]
            answer = await backend.call(event["meta"]["send"], body=b"two")
            assert answer.code == 200
            assert await asyncio.wait_for(client.recv(), DEADLINE) == b"two"
            await client.send("three")
            await backend.wait_for("message", number)


@pytest.mark.gen_test
async def test_start_warns_of_a_file_limit_below_the_connections(io_loop):
    """The warning has both numbers."""
    async with limited(400, "--max_connections=1000") as service:
        await echo(service)
    (warning,) = [line for line in service.log if "ulimit" in line]
    assert "400" in warning and "--max_connections=1000" in warning


@pytest.mark.gen_test
async def test_soft_limit_on_files_is_raised(io_loop):
    """Up to the hard limit, if that many are needed."""
    soft = ["bash", "-c", f"ulimit -Sn 64; {RELAY}", "-"]
    async with Service("--max_connections=300", command=soft) as service:
        limits = Path(f"/proc/{service.process.pid}/limits")
        await eventually(lambda: soft_limit(limits.read_text()) >= 300)
        assert not any("ulimit" in line for line in service.log)


def soft_limit(limits):
    (line,) = [x for x in limits.splitlines() if x.startswith("Max open files")]
    return int(line.split()[3])


@pytest.mark.gen_test
async def test_processes_share_a_port(io_loop):
    """With --reuse_port; without it the second one does not start."""
    async with Service("--reuse_port", "--callbackport=0") as first:
        port = first.ws_url.split("/")[2].rpartition(":")[2]
        same = f"--bindport={port}"
        async with Service("--reuse_port", same, "--callbackport=0") as second:
            reached = set()
            async with asyncio.timeout(DEADLINE):
                while len(reached) < 2:
                    await echo(first)
                    reached = {
                        service.callback_url
                        for service in (first, second)
                        if await total(service)
                    }


async def total(service):
    """The number of connections that its process has accepted."""
    host, _, port = service.callback_url.split("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /status HTTP/1.1\r\nHost: localhost\r\n")
    writer.write(b"Connection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), DEADLINE)
    writer.close()
    return b'"total": 0' not in answer


@pytest.mark.long
@pytest.mark.gen_test
async def test_process_that_drains_leaves_a_shared_port_to_the_others(io_loop):
    """Once it drains, no handshake at the shared port is rejected."""
    shared = ("--reuse_port", "--callbackport=0", "--drain_spread=3600")
    async with Service(*shared) as leaving:
        port = leaving.ws_url.split("/")[2].rpartition(":")[2]
        held = [await websockets.connect(leaving.ws_url) for _ in range(2)]
        async with Service(*shared, f"--bindport={port}") as staying:
            leaving.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(held[0].wait_closed(), DEADLINE)
            for _ in range(20):
                await echo(staying)
            assert not any("rejected" in line for line in leaving.log)
            assert held[1].state is State.OPEN  # it was draining during all of this
            await held[1].close()
            assert await asyncio.wait_for(leaving.process.wait(), DEADLINE) == 0


class Hello(RequestHandler):
    """Answers after a moment, when the peer may have disconnected."""

    def get(self):
        self.finish("hello")


@pytest.mark.parametrize("event_loop_name", ["asyncio", "uvloop"])
@pytest.mark.parametrize("iterations", range(8))
@pytest.mark.gen_test
async def test_request_that_comes_while_it_stops_is_no_bug(
    io_loop, caplog, iterations
):
    """At any stage of the request: its connection ends, without an error."""
    server = RequestServer(Application([("/", Hello)]), RequestBounds(10, 10, 99, 99))
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        accepted, address = listening.accept()
        accepted.setblocking(False)
        server.begin(accepted, address, None)
        for _ in range(iterations):
            await asyncio.sleep(0)
        await server.close_all_connections()
        client.setblocking(False)
        del accepted
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(ConnectionResetError):
                while await asyncio.get_running_loop().sock_recv(client, 1024):
                    pass
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
