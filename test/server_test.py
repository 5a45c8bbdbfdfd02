"""The HTTP servers: both send the same responses, and read no more than needed.

Every test runs over both of them, at one listener for all.
"""

import asyncio
import contextlib
import random
import re
import signal
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import websockets
from certificates import Authority
from faults import Received, memory, send_raw
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.ioloop import IOLoop
from wire import KEY, TEXT, frame, handshake

from handlers.http.body_budget import BodyBudget

pytestmark = pytest.mark.gen_test(timeout=60)

SERVERS = ("fast", "tornado")


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests: they share processes."""
    return module_io_loop


@pytest.fixture(scope="module")
def relays(io_loop, shared) -> dict[str, Service]:
    """A relay of each server, whose backend echoes."""

    async def begin() -> dict[str, Service]:
        return {
            server: await shared.enter_async_context(
                Service(f"--http_server={server}", "--logging=debug")
            )
            for server in SERVERS
        }

    return io_loop.run_sync(begin)


@pytest.fixture(params=SERVERS)
def relay(relays, request) -> Service:
    """One of them."""
    return relays[request.param]


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n"
STATUS = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
SEND = b"POST /socket/" + b"0" * 32 + b"/send HTTP/1.1\r\nHost: relay\r\n"
UPGRADE = "Upgrade: websocket"


def asking(line: str, *headers: str) -> bytes:
    """A request for another protocol."""
    return handshake(*headers, line=line)


# Unless these get 101, a tunneling proxy still passes on all that follows.
REFUSED_UPGRADES = {
    "wrong-version": handshake(
        "Sec-WebSocket-Version: 12", without="Sec-WebSocket-Version"
    ),
    "no-key": handshake(without="Sec-WebSocket-Key"),
    "no-connection-header": handshake(without="Connection"),
    "another-protocol": handshake("Upgrade: h2c", without="Upgrade"),
    "origin-not-allowed": handshake("Origin: https://other.example"),
    "two-hosts": handshake("Host: other.example"),
    "http-1.0": asking("GET /ws HTTP/1.0", "Connection: keep-alive"),
    "livez": asking("GET /livez HTTP/1.1"),
    "no-such-path": asking("GET /nothing HTTP/1.1"),
    "operators": asking("GET /status HTTP/1.1"),
    "callbacks": asking("GET /socket/" + "0" * 32 + " HTTP/1.1"),
    "send": asking("POST /socket/" + "0" * 32 + "/send HTTP/1.1", "Content-Length: 0"),
    "send-with-body": asking(
        "POST /socket/" + "0" * 32 + "/send HTTP/1.1", "Content-Length: 2"
    )
    + b"hi",
    "head": asking("HEAD /ws HTTP/1.1"),
    "connect": b"CONNECT relay:80 HTTP/1.1\r\nHost: relay:80\r\n\r\n",
}


@pytest.mark.parametrize("row", REFUSED_UPGRADES)
async def test_response_to_a_rejected_upgrade_ends_the_connection(relay, row):
    """Nothing behind it is read: a proxy may tunnel bytes of a client."""
    received = await send_raw(relay.ws_url, REFUSED_UPGRADES[row] + STATUS + LIVEZ)
    assert received.ended
    assert b'"uptime"' not in received.data
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", received.data)) == 1, received
    head = received.data.partition(b"\r\n\r\n")[0].decode().lower()
    if " 400 " not in head.partition("\r\n")[0]:
        options = [x for x in head.split("\r\n") if x.startswith("connection:")]
        assert len(options) == 1 and "close" in options[0], head


async def test_nothing_is_read_after_the_response_either(relay):
    """When the peer has read the response already."""
    parts = urlsplit(relay.ws_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(REFUSED_UPGRADES["wrong-version"])
    async with asyncio.timeout(DEADLINE):
        assert b" 426 " in await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            writer.write(STATUS)
            assert b"uptime" not in await reader.read()
    writer.close()


async def test_frame_in_the_packet_of_a_request_and_a_handshake_is_kept(relay):
    """With any number of requests before, and for every split."""
    hello = frame(TEXT, b"hello")
    for data in (
        LIVEZ + handshake() + hello,
        LIVEZ * 3 + handshake() + hello + hello[:3],
        SEND + b"Content-Length: 2\r\n\r\nhi" + handshake() + hello,
    ):
        for cut in (0, 40, len(data) - 8, len(data) - 2):
            received = await send_raw(
                relay.ws_url, data[:cut], data[cut:], ending=b"\x81\x05hello"
            )
            assert received.data.endswith(b"\x81\x05hello"), (cut, received)


EXPECT = ("100-continue", "100-Continue", "100-CONTINUE")


@pytest.mark.parametrize("spelling", EXPECT)
async def test_expect_header_is_case_insensitive(relay, spelling):
    """The peer sends the body after the 100 (RFC 9110, section 10.1.1)."""
    parts = urlsplit(relay.ws_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(SEND + f"Expect: {spelling}\r\nContent-Length: 2\r\n\r\n".encode())
    async with asyncio.timeout(DEADLINE):
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"hi")
        assert b" 410 " in await reader.readuntil(b"\r\n\r\n")
    writer.close()


@pytest.mark.parametrize("target", ["/ws?name=\xfc", "/ws?name=\u00fc", "/l\u00efvez"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
async def test_bytes_outside_of_urls_are_400(relay, target, encoding):
    """In the query too: the client must escape them (RFC 3986, section 2)."""
    line = b"GET " + target.encode(encoding) + b" HTTP/1.1"
    request = handshake().replace(b"GET /ws HTTP/1.1", line)
    received = await send_raw(relay.ws_url, request)
    assert received.ended and received.statuses == [400]


MALFORMED = {
    "no-http": b"garbage\r\n\r\n",
    "no-host": b"GET /livez HTTP/1.1\r\n\r\n",
    "bad-chunk": SEND + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
}


@pytest.mark.parametrize("row", MALFORMED)
async def test_malformed_request_is_logged_at_debug_alone(relay, row):
    """Else anybody could fill the log."""
    start = len(relay.log)
    request = MALFORMED[row]
    assert (await send_raw(relay.ws_url, request, half_close=True)).statuses == [400]
    await eventually(lambda: any("alformed" in line for line in relay.log[start:]))
    (line,) = (line for line in relay.log[start:] if "alformed" in line)
    assert line.startswith("[D ")
    assert line.endswith("malformed request: 400 Bad Request")


# Random requests, which both servers must accept or both must reject.

LINES = [
    b"GET /livez HTTP/1.1", b"HEAD /livez HTTP/1.1", b"GET /livez HTTP/1.0",
    b"GET /livez?a=%FF&b HTTP/1.1", b"GET http://relay/livez HTTP/1.1",
    b"POST /socket/" + b"0" * 32 + b"/send HTTP/1.1",
    b"POST /socket/" + b"0" * 32 + b"/send?type=none HTTP/1.1",
    b"DELETE /socket/" + b"0" * 32 + b" HTTP/1.1", b"GET /nothing HTTP/1.1",
    b"PUT /livez HTTP/1.1", b"OPTIONS * HTTP/1.1", b"PATCH /status HTTP/1.1",
    b"GET /ws HTTP/1.1", b"GET /livez HTTP/1.2", b"GET /livez HTTP/2.0",
    b"GET /livez?\xff HTTP/1.1", b"GET /livez?a|b^c HTTP/1.1", b"GET livez HTTP/1.1",
    b'GET /livez?"<>`{}\\ HTTP/1.1', b"GET /livez# HTTP/1.1", b"GET /\x7f HTTP/1.1",
]
HEADERS = [
    b"Host: relay", b"Host: relay", b"host:relay", b"Host: relay:80", b"Host:",
    b"Host: a b", b"Connection: close", b"Connection: keep-alive",
    b"Connection: Close, X", b"Connection: x, close", b"Content-Length: 0",
    b"Content-Length: 3", b"Content-Length: 03", b"Content-Length: 3, 3",
    b"Content-Length: +3", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip",
    b"Expect: 100-continue", b"Expect: 100-Continue", b"Expect: x",
    b"X: a\tb", b"X: \xfc", b"X:", b"X: a\x01b", b"X : y", b"Content-Type: text/plain",
    b"X: a\x00b", b"Upgrade: websocket", b"Upgrade: h2c", b"Connection: Upgrade",
    b"Authorization: Bearer x", b"Accept-Encoding: gzip", b"Content-Encoding: gzip",
    b"X: " + b"y" * 3000,
]
BODIES = [
    b"", b"abc", b"abcdef", b"3\r\nabc\r\n0\r\n\r\n", b"0\r\nX: y\r\n\r\n",
    b"3;x=y\r\nabc\r\n0\r\n\r\n", b"3\r\nabcX\r\n0\r\n\r\n",
]


def anything(dice: random.Random) -> bytes:
    """A request that some servers accept, and others reject."""
    headers = dice.choices(HEADERS, k=dice.randint(0, 3))
    if dice.random() < 0.8:
        headers.insert(dice.randint(0, len(headers)), b"Host: relay")
    head = b"\r\n".join([dice.choice(LINES), *headers])
    return head + b"\r\n\r\n" + dice.choice(BODIES)


def outcome(received: Received) -> tuple[bytes, bool]:
    """What must be equal: the status of the first final response, and the end."""
    head, _, rest = received.data.partition(b"\r\n\r\n")
    return (rest if head.startswith(b"HTTP/1.1 100 ") else head)[:12], received.ended


async def test_both_servers_send_the_same_responses(relays):
    """To random requests, each followed by a valid one."""
    dice = random.Random(11)
    requests = [anything(dice) for _ in range(600)]
    differing = []

    async def ask(request: bytes) -> None:
        received = [
            await send_raw(
                relays[server].ws_url,
                request + LIVEZ,
                # A client that disconnects after an upgrade request has left.
                half_close=b"Upgrade: " not in request,
                deadline=DEADLINE,
            )
            for server in SERVERS
        ]
        if outcome(received[0]) != outcome(received[1]):
            differing.append((request, *(h.data[:200] for h in received)))

    for start in range(0, len(requests), 10):
        await asyncio.gather(*map(ask, requests[start : start + 10]))
    assert not differing, f"{len(differing)}: {differing[:12]}"


# Sizes.


@pytest.mark.parametrize("pieces", [1, 2, 35, 350])
async def test_head_is_measured_once_for_every_split(relay, pieces):
    """35 kB are within a limit of 64 KiB."""
    head = LIVEZ[:-2] + b"".join(b"X-%05d: %b\r\n" % (n, b"y" * 89) for n in range(350))
    request = head + b"\r\n"
    size = -(-len(request) // pieces)
    parts = urlsplit(relay.ws_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.transport.get_extra_info("socket").setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )
    async with asyncio.timeout(DEADLINE):
        for start in range(0, len(request), size):
            writer.write(request[start : start + size])
            await asyncio.sleep(0.001)  # so that it arrives in a separate segment
        assert b" 200 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("pieces", [1, 2, 70])
async def test_head_above_the_limit_is_rejected_for_every_split(relay, pieces):
    """With 431, then the end."""
    head = LIVEZ[:-2] + b"".join(b"X-%05d: %b\r\n" % (n, b"y" * 89) for n in range(700))
    request = head + b"\r\n"
    size = -(-len(request) // pieces)
    received = await send_raw(
        relay.ws_url, *(request[at : at + size] for at in range(0, len(request), size))
    )
    assert received.ended and received.statuses == [431]


async def test_too_many_headers_are_rejected(relay):
    """With 431, even if they are short."""
    head = LIVEZ[:-2] + b"".join(b"X-%d: y\r\n" % number for number in range(1100))
    received = await send_raw(relay.ws_url, head + b"\r\n")
    assert received.ended and received.statuses == [431]


async def test_chunk_extension_above_the_limit_is_rejected(relay):
    """With 431, like a head, if a line has 64 KiB."""
    request = SEND + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 200_000
    received = await send_raw(relay.callback_url, request)
    assert received.ended and received.statuses == [431]


# Bodies of all requests together.

BIG = 32 * 2**20  # bytes; a process keeps at most two of these


async def begin_body(url: str, more: bytes, size: int, coming: int):
    """A send of `size` bytes, of which so many come now; its two streams."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(SEND + more + b"Content-Length: %d\r\n\r\n" % size)
    writer.write(bytes(coming))
    return reader, writer


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("more", [b"", b"Content-Encoding: identity\r\n"])
async def test_bodies_of_all_requests_together_are_bounded(io_loop, server, more):
    """The one under way longest is refused; later ones, and small ones, are not.

    Whether a handler reads it, or it is read for a send without one.
    """
    flags = (f"--max_message_size={BIG}", f"--http_server={server}")
    async with Service(*flags) as service, asyncio.timeout(3 * DEADLINE):
        first = await begin_body(service.ws_url, more, BIG, 25 * 2**20)
        # The relay has read some of it before this answer.
        assert (await send_raw(service.ws_url, LIVEZ, answers=1)).statuses == [200]
        streams = [
            await begin_body(service.ws_url, more, BIG, 25 * 2**20) for _ in range(2)
        ]
        head = await first[0].readuntil(b"\r\n\r\n")
        assert b" 503 " in head and b"\r\nRetry-After: " in head
        assert b"\r\nConnection: close\r\n" in head
        small = SEND + b"Content-Length: 100000\r\n\r\n" + bytes(100_000)
        for _ in range(3):
            received = await send_raw(service.ws_url, small, answers=1)
            assert received.statuses == [410]
        for reader, writer in streams:
            writer.write(bytes(BIG - 25 * 2**20))
            assert b" 410 " in await reader.readline()
        for _, writer in (first, *streams):
            writer.close()


async def test_more_of_a_rejected_body_affects_no_other(io_loop):
    """More of it may be read in the turn in which it is rejected."""
    budget = BodyBudget(max_size=100)
    refused: list[str] = []
    received = asyncio.Event()

    class Holder:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_over_budget(self) -> None:
            budget.release(self)
            refused.append(self.name)
            received.set()

    first, second = Holder("first"), Holder("second")
    budget.hold(first, 60)
    budget.hold(second, 60)
    budget.hold(first, 61)
    await asyncio.wait_for(received.wait(), DEADLINE)
    budget.hold(second, 100)  # the first one does not count any more
    assert refused == ["first"]


@pytest.mark.parametrize("server", SERVERS)
async def test_body_in_tiny_chunks_takes_no_more_than_its_bytes(io_loop, server):
    """Two bytes each, which as separate objects would take fifty more."""
    size = 2**19
    async with Service(f"--http_server={server}") as service:
        begun = SEND + b"Transfer-Encoding: chunked\r\n\r\n"
        assert (await send_raw(service.ws_url, LIVEZ, answers=1)).statuses == [200]
        before = memory(service.process.pid, "VmHWM")
        parts = urlsplit(service.ws_url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(begun + b"2\r\nab\r\n" * (size // 2) + b"0\r\n\r\n")
        async with asyncio.timeout(3.5 * DEADLINE):
            assert b" 410 " in await reader.readline()
        writer.close()
        found = memory(service.process.pid, "VmHWM") - before
        assert found < 10 * size, f"{found / size:.1f} times as much"


@pytest.mark.parametrize("server", SERVERS)
async def test_body_that_no_route_uses_is_discarded(io_loop, server):
    """At a probe, and where clients connect."""
    size = 4 * 2**20 - 1
    lines = (b"POST /livez HTTP/1.1", b"GET /ws HTTP/1.1")
    async with Service(f"--http_server={server}") as service:
        assert (await send_raw(service.ws_url, LIVEZ, answers=1)).statuses == [200]
        before = memory(service.process.pid)
        parts = urlsplit(service.ws_url)
        writers = []
        async with asyncio.timeout(3 * DEADLINE):
            for line in lines * 6:
                _, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writers.append(writer)
                head = b"\r\nHost: relay\r\nContent-Length: %d\r\n\r\n" % size
                writer.write(line + head + bytes(size - 1))
                await writer.drain()
            assert (await send_raw(service.ws_url, LIVEZ, answers=1)).statuses == [200]
        assert memory(service.process.pid) - before < 3 * size
        for writer in writers:
            writer.close()


# A process that is stopped.


@contextlib.asynccontextmanager
async def stopped(service: Service):
    """Its process, until the block ends; longer than any deadline it has."""
    pid = service.process.pid
    service.process.send_signal(signal.SIGSTOP)
    await eventually(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
    try:
        yield
        await asyncio.sleep(3)  # the time in which its deadlines pass
    finally:
        service.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("server", SERVERS)
async def test_requests_completed_during_a_stall_are_served(
    io_loop, server
):
    """Heads and bodies, also over TLS."""
    flags = ("--header_timeout=2.5", "--body_timeout=2.5", f"--http_server={server}")
    body = b"x" * 4_000_000  # as much as is accepted: many reads
    halves = {
        "head": (LIVEZ[:20], LIVEZ[20:], b" 200 "),
        "body": (SEND + b"Content-Length: 4000000\r\n\r\nx", body[1:], b" 410 "),
        "nothing": (b"", LIVEZ, b" 200 "),
    }
    async with Service(*flags) as service:
        parts = urlsplit(service.ws_url)
        streams = []
        for first, rest, expected in halves.values():
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(first)
            await writer.drain()
            streams.append((reader, writer, rest, expected))
        # The relay has read what came before this answer.
        assert (await send_raw(service.ws_url, LIVEZ, answers=1)).statuses == [200]
        async with stopped(service):
            for _, writer, rest, _ in streams:
                writer.write(rest)
        for reader, writer, _, expected in streams:
            line = await asyncio.wait_for(reader.readline(), DEADLINE)
            assert expected in line, line
            writer.close()


@pytest.mark.parametrize("server", SERVERS)
async def test_tls_handshakes_continue_after_a_stall(io_loop, server, tmp_path):
    """The client's hello arrived in time; its next step needs the relay's answer."""
    authority = Authority(tmp_path)
    certificate = authority.server()
    context = ssl.create_default_context(cafile=str(authority.path))
    flags = (f"--tls_cert={certificate.both}", "--header_timeout=2.5")
    async with Service(*flags, f"--http_server={server}") as service:
        parts = urlsplit(service.ws_url)
        sock = socket.create_connection((parts.hostname, parts.port))
        async with stopped(service):
            opening = asyncio.create_task(
                asyncio.open_connection(sock=sock, ssl=context,
                                        server_hostname="127.0.0.1")
            )
        reader, writer = await asyncio.wait_for(opening, DEADLINE)
        writer.write(LIVEZ)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), DEADLINE)
        writer.close()


async def test_single_bytes_do_not_extend_the_deadline(io_loop):
    """Nor do more requests of a peer that reads no response."""
    async with Service("--header_timeout=1.5", "--body_timeout=1.5") as service:
        parts = urlsplit(service.ws_url)
        for first in (b"GET /livez HTTP/1.1\r\n", SEND + b"Content-Length: 99\r\n\r\n"):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(first)
            ended = asyncio.create_task(reader.read())
            async with asyncio.timeout(DEADLINE):
                while not ended.done():
                    writer.write(b"x")
                    await asyncio.sleep(0.2)  # between two bytes
            writer.close()


async def test_half_closed_connection_gets_every_response(relays):
    """In the order of the requests, for any number."""
    url = relays["fast"].ws_url
    received = await send_raw(url, LIVEZ * 40, half_close=True, deadline=DEADLINE)
    assert received.ended and received.statuses == [200] * 40


async def test_https_and_wss_on_one_connection(io_loop, tmp_path):
    """A handshake follows a request; the socket keeps its TLS state."""
    authority = Authority(tmp_path)
    certificate = authority.server()
    context = ssl.create_default_context(cafile=str(authority.path))
    async with Service(f"--tls_cert={certificate.both}") as service:
        parts = urlsplit(service.ws_url)
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port, ssl=context
        )
        writer.write(LIVEZ + handshake() + frame(TEXT, b"hello"))
        async with asyncio.timeout(DEADLINE):
            assert b" 200 " in await reader.readuntil(b"ok\n")
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(7) == b"\x81\x05hello"
        writer.close()
        async with RecordingBackend():
            async with websockets.connect(service.ws_url, ssl=context) as client:
                await client.send(KEY)
                assert await client.recv() == KEY
