"""Slow clients: which stay, which are idle, and which are closed."""

import asyncio
import contextlib
import fcntl
import random
import signal
import socket
import ssl
import struct
import termios
import time

import pytest
import websockets
from certificates import Authority
from service import DEADLINE, RecordingBackend, Service, withhold
from slow import SlowClient
from tornado.web import RequestHandler
from wire import BINARY, CLOSE, CONTINUATION, PING, TEXT, frame

from handlers.websocket.uptake import Outgoing, outgoing

pytestmark = pytest.mark.gen_test(timeout=90)

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
LARGE = 4 * 2**20
NORMAL = frame(CLOSE, b"\x03\xe8")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def whole(size: int):
    """Whether that many bytes of messages were read."""
    return lambda data: len(data) >= size


def under_way(client: SlowClient) -> int:
    """Bytes that it has sent, and that the relay's kernel has not taken."""
    (size,) = struct.unpack("i", fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4)))
    return size


@contextlib.asynccontextmanager
async def connected(authority: Authority, tls: bool, *flags: str):
    """A backend, a slow client of its relay, and the URL for sends to the client."""
    listener = ["--callbackport=0"]
    context = None
    if tls:
        listener.append(f"--tls_cert={authority.server().both}")
        context = ssl.create_default_context(cafile=str(authority.path))
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *listener, *flags) as service:
            with await SlowClient.connect(service.ws_url, tls=context) as client:
                (event,) = await backend.wait_for("connect", 1)
                yield backend, client, event["meta"]["send"]


# Clients that read nothing, or slowly.


@LOOPS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_steady_slow_reader_is_not_closed(io_loop, authority, loop, tls):
    """In --send_timeout it reads less than makes its socket writable."""
    flags = ("--send_timeout=2", f"--event_loop={loop}")
    async with connected(authority, tls, *flags) as (backend, client, send):
        large = asyncio.create_task(backend.call(send, body=bytes(LARGE)))
        await client.read(rate=120_000, seconds=8)
        await client.read(until=whole(LARGE + 10))
        assert (await large).code in (200, 410)  # 410: answered at --send_timeout
        await client.send(NORMAL)
        await client.read()
        (event,) = await backend.wait_for("disconnect", 1)
        assert client.frames() == [(BINARY, bytes(LARGE)), (CLOSE, b"\x03\xe8")]
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1000, "client")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_reader_that_stops_is_closed_with_1008(io_loop, authority, tls):
    """--send_timeout after its kernel took the last bytes."""
    async with connected(authority, tls, "--send_timeout=1.5") as connection:
        backend, client, send = connection
        large = asyncio.create_task(backend.call(send, body=bytes(LARGE)))
        await client.read(rate=200_000, seconds=3)
        stopped = time.monotonic()
        (event,) = await backend.wait_for("disconnect", 1)
        took = time.monotonic() - stopped
        assert (await large).code == 410
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1008, "relay")
    assert 1 < took < 10


@LOOPS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_messages_of_a_stopped_reader_are_delivered(
    io_loop, authority, loop, tls
):
    """It is closed with 1008 while its messages wait for the backend, unread."""
    flags = ("--send_timeout=1", "--connection_queue_messages=1", "--order_wait=inf",
             "--backend_timeout=60", f"--event_loop={loop}")
    # More than the relay reads ahead, and than its kernel takes.
    sent = [frame(TEXT, b"%04d" % n + b"x" * 2000) for n in range(400)]
    async with connected(authority, tls, *flags) as (backend, client, send):
        release = withhold(backend, "message")
        sending = asyncio.create_task(client.send(b"".join(sent)))
        await backend.wait_for("message", 1)
        # The client reads nothing of it.
        assert (await backend.call(send, body=bytes(LARGE))).code == 410
        await sending
        taken = sum(map(len, sent)) - under_way(client)
        release.set()
        (event,) = await backend.wait_for("disconnect", 1)
    numbers = [event["message"][:4] for event in backend.of("message")]
    assert numbers == [f"{n:04}" for n in range(len(numbers))]
    # TLS adds bytes, and only a part of its last record may have arrived.
    assert len(numbers) >= (taken - (20_000 if tls else 0)) // len(sent[0])
    assert (event["meta"]["code"], event["meta"]["undelivered"]) == (1008, 0)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_stopped_reader_that_sends_is_closed(io_loop, authority, tls):
    """The relay does not read what it sends after the close: it might never end."""
    chunk = frame(TEXT, b"x" * 60_000) * 16

    async def push(client: SlowClient) -> None:
        with contextlib.suppress(OSError):
            while True:
                await client.send(chunk)

    async with connected(authority, tls, "--send_timeout=1") as connection:
        backend, client, send = connection
        pushing = asyncio.create_task(push(client))
        assert (await backend.call(send, body=bytes(LARGE))).code == 410
        (event,) = await backend.wait_for("disconnect", 1)
        await pushing
    assert event["meta"]["code"] == 1008


async def test_kernel_without_tcp_info_counts_taken_bytes(io_loop):
    """On a socket other than TCP: what the kernel took counts as acknowledged."""
    ours, its = socket.socketpair()
    with ours, its:
        assert outgoing(ours, 10, 5) == Outgoing(10, True, 0.0)
        assert outgoing(ours, 15, 0) == Outgoing(15, False, 0.0)


# Who lives.


@LOOPS
async def test_client_with_constant_sends_is_not_closed(io_loop, loop):
    """No ping was sent, since frames waited; acknowledged bytes show it is alive."""
    flags = ("--ping_interval=1", "--ping_timeout=1", f"--event_loop={loop}")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                feeding = asyncio.create_task(
                    backend.call(event["meta"]["send"], body=bytes(LARGE))
                )
                await client.read(rate=300_000, seconds=5)
                assert client.end is None
                # All the rest, in less than a ping and its answer may take.
                await client.read(until=whole(LARGE + 10))
                await client.send(NORMAL)
                await client.read()
                assert (await feeding).code == 200
            (event,) = await backend.wait_for("disconnect", 1)
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1000, "client")


@LOOPS
@pytest.mark.parametrize("buffer", [65536, 4 * 2**20], ids=["ours", "its own"])
async def test_ping_behind_bytes_in_the_kernel_has_no_deadline(io_loop, loop, buffer):
    """The message is in a kernel, ours or the client's: it must first be read."""
    flags = ("--ping_interval=1", "--ping_timeout=1", f"--event_loop={loop}")
    size = 1_500_000
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url, buffer) as client:
                (event,) = await backend.wait_for("connect", 1)
                answer = await backend.call(event["meta"]["send"], body=bytes(size))
                assert answer.code == 200
                await client.read(rate=250_000, seconds=5)
                assert client.end is None
                await client.send(NORMAL)
                await client.read()
            (event,) = await backend.wait_for("disconnect", 1)
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1000, "client")
    assert client.frames()[0] == (BINARY, bytes(size))


@LOOPS
async def test_client_that_sends_amid_a_download_may_read_on(io_loop, loop):
    """Its message does not show that it has read the ping behind the download."""
    flags = ("--ping_interval=1", "--ping_timeout=1", f"--event_loop={loop}")
    size = 1_500_000
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url, 4 * 2**20) as client:
                (event,) = await backend.wait_for("connect", 1)
                answer = await backend.call(event["meta"]["send"], body=bytes(size))
                assert answer.code == 200
                await client.read(rate=200_000, seconds=0.5)
                await client.send(frame(TEXT, b"hello"))
                await client.read(rate=200_000, seconds=5)
                await client.send(NORMAL)
                await client.read()
            (event,) = await backend.wait_for("disconnect", 1)
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1000, "client")
    assert client.frames()[0] == (BINARY, bytes(size))


async def test_client_that_stopped_with_unread_bytes_is_closed(io_loop):
    """It reads and sends nothing: the unread message does not keep it."""
    flags = ("--ping_interval=0.5", "--ping_timeout=1", "--send_timeout=2")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                answer = await backend.call(event["meta"]["send"], body=bytes(10**6))
                assert answer.code == 200
                (event,) = await backend.wait_for("disconnect", 1)
                assert client.end is None
    meta = event["meta"]
    assert (meta["code"], meta["reason"]) == (1006, "ping timeout")
    assert 2 <= meta["duration"] < 10


async def test_client_is_pinged_while_reading_is_paused(io_loop):
    """If its kernel takes the pings, it stays: no pong can be read."""
    flags = ("--ping_interval=0.3", "--ping_timeout=0.3", "--messages_per_second=0.05",
             "--rate_patience=60")
    async with Service(*flags) as service:
        with await SlowClient.connect(service.ws_url) as client:
            await client.send(frame(TEXT, b"x") * 4)
            pings = b"\x89\0" * 6
            await client.read(until=lambda data: data.endswith(pings), seconds=DEADLINE)
            assert client.data.endswith(pings)


@LOOPS
async def test_pings_of_clients_are_answered_while_the_backend_is_slow(io_loop, loop):
    """Messages wait; a ping behind them is answered."""
    flags = ("--connection_queue_messages=4", "--order_wait=inf",
             "--backend_timeout=60", f"--event_loop={loop}")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            release = withhold(backend, "message")
            async with websockets.connect(service.ws_url) as client:
                for number in range(50):
                    await client.send(str(number))
                for _ in range(3):
                    await asyncio.wait_for(await client.ping(), DEADLINE)
                assert len(backend.of("message")) == 1
                release.set()
                await backend.wait_for("message", 50)
    messages = [event["message"] for event in backend.of("message")]
    assert messages == [str(number) for number in range(50)]


@LOOPS
async def test_messages_that_are_read_ahead_are_bounded(io_loop, loop):
    """A client that sends more must wait, and nothing is lost."""
    flags = ("--connection_queue_messages=1", "--order_wait=inf",
             "--backend_timeout=60", f"--event_loop={loop}")
    text, number = b"x" * 100_000, 80
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            release = withhold(backend, "message")
            with await SlowClient.connect(service.ws_url) as client:
                sending = asyncio.create_task(
                    client.send(frame(TEXT, text) * number + NORMAL)
                )
                await backend.wait_for("message", 1)
                done, _ = await asyncio.wait({sending}, timeout=1)
                assert not done  # 8 MB would be in the relay
                release.set()
                (event,) = await backend.wait_for("disconnect", 1)
                await sending
    assert len(backend.of("message")) == number
    assert (event["meta"]["code"], event["meta"]["undelivered"]) == (1000, 0)


# After a stall.


@LOOPS
async def test_clients_that_answered_during_a_stall_stay(io_loop, loop):
    """SIGSTOP for longer than the times of pings and of idle clients."""
    flags = ("--ping_interval=1", "--ping_timeout=1", "--idle_timeout=2.5",
             f"--event_loop={loop}")
    async with Service(*flags) as service, contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                websockets.connect(service.ws_url, ping_interval=None)
            )
            for _ in range(20)
        ]
        # One ping at least is on its way when the process stops.
        began = time.monotonic()
        while time.monotonic() - began < 1.2:
            await asyncio.gather(*(client.send("before") for client in clients))
            await asyncio.gather(*(client.recv() for client in clients))
        service.process.send_signal(signal.SIGSTOP)
        for _ in range(5):
            await asyncio.sleep(0.8)  # the stall
            await asyncio.gather(*(client.send("meanwhile") for client in clients))
        service.process.send_signal(signal.SIGCONT)
        for client in clients:
            for _ in range(5):
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "meanwhile"
            await client.send("after")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "after"


@LOOPS
async def test_stall_ends_no_send_that_waits(io_loop, loop):
    """SIGSTOP for longer than --send_timeout; then the client reads the rest."""
    size = 4 * LARGE  # what a kernel takes at once is less
    flags = ("--send_timeout=3", f"--max_message_size={size}", f"--event_loop={loop}")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                large = asyncio.create_task(
                    backend.call(event["meta"]["send"], body=bytes(size))
                )
                await client.read(until=whole(1))
                # The relay can answer: its kernel has some, and the rest waits.
                about = event["meta"]["send"].removesuffix("/send")
                assert (await backend.call(about, "GET")).code == 200
                async with service.stalled(1):
                    await client.read(rate=40_000, seconds=3)
                await client.read(until=whole(size + 10))
                assert (await large).code == 200
    assert client.frames()[0] == (BINARY, bytes(size))


# Who is idle.


async def test_partial_message_counts_as_activity(io_loop):
    """One byte is sufficient; without more, the idle time runs."""
    async with Service("--idle_timeout=2", "--ping_interval=0") as service:
        with await SlowClient.connect(service.ws_url) as client:
            await client.send(frame(TEXT, b"a", fin=False))
            for _ in range(8):
                await asyncio.sleep(0.6)  # between two bytes
                await client.send(frame(CONTINUATION, b"a", fin=False))
            await client.send(frame(CONTINUATION, b"a"))
            await client.read()
    assert client.frames() == [(TEXT, b"a" * 10), (CLOSE, b"\x03\xe9idle")]


async def test_slow_download_counts_as_activity(io_loop):
    """The kernel has all of the message, and the client reads it slowly."""
    size, rate = 2_000_000, 300_000
    flags = ("--idle_timeout=1", "--ping_interval=0")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                await backend.call(event["meta"]["send"], body=bytes(size))
                reading = asyncio.create_task(client.read(rate=rate))
                (event,) = await backend.wait_for("disconnect", 1)
                await reading
    assert client.frames() == [(BINARY, bytes(size)), (CLOSE, b"\x03\xe9idle")]
    assert client.end == "end"
    # What is in the kernels at the end has yet to be read.
    assert event["meta"]["duration"] > 0.8 * size / rate


async def test_silence_begins_when_the_last_byte_is_taken(io_loop):
    """The kernel took all of the message at once, and the client slowly."""
    size, rate, idle = 40_000, 10_000, 5
    flags = (f"--idle_timeout={idle}", "--ping_interval=0")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url, 8192) as client:
                (event,) = await backend.wait_for("connect", 1)
                began = time.monotonic()
                await backend.call(event["meta"]["send"], body=bytes(size))
                assert time.monotonic() - began < size / rate / 2
                reading = asyncio.create_task(client.read(rate=rate))
                await backend.wait_for("disconnect", 1)
                took = time.monotonic() - began
                await reading
    assert client.frames() == [(BINARY, bytes(size)), (CLOSE, b"\x03\xe9idle")]
    assert took > idle + 3  # seconds, of more than four that it reads


@pytest.mark.parametrize("pinged_by", ["relay", "client"])
async def test_pings_and_pongs_are_no_activity(io_loop, pinged_by):
    """Nor are their acknowledgments, which the client's kernel delays."""
    interval = 0.03 if pinged_by == "relay" else 0
    flags = ("--idle_timeout=0.5", f"--ping_interval={interval}", "--ping_timeout=0")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                await backend.call(event["meta"]["send"], body=b"a")
                reading = asyncio.create_task(client.read())
                while not reading.done():
                    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
                    if pinged_by == "client":
                        with contextlib.suppress(OSError):  # it has been closed
                            await client.send(frame(PING, b""))
                    await asyncio.sleep(0.1)  # longer than an acknowledgment takes
            (event,) = await backend.wait_for("disconnect", 1)
    assert client.frames()[-1] == (CLOSE, b"\x03\xe9idle")
    assert event["meta"]["duration"] < 10


# All of them.


@pytest.mark.parametrize(("loop", "seed"), [("asyncio", 1), ("uvloop", 2)])
async def test_all_kinds_of_clients_at_once(io_loop, loop, seed):
    """Each message that was sent before a close frame arrives once and in order.

    Clients read slowly, never or quickly; get frames all the time or not; and close
    with a handshake, disconnect, or stay until the relay stops.
    """
    chance = random.Random(seed)
    flags = ("--ping_interval=1", "--ping_timeout=2", "--send_timeout=2",
             "--connection_queue_messages=8", "--order_wait=10",
             f"--event_loop={loop}")
    orderly: set[str] = set()  # those that left with a closing handshake
    over = asyncio.Event()

    async def feed(backend: RecordingBackend, url: str, pause: float) -> None:
        while not over.is_set():
            answer = await backend.call(url, body=bytes(chance.randrange(200_000)))
            if answer.code == 410:
                return
            assert answer.code in (200, 429)
            await asyncio.sleep(pause)  # between two frames

    async def visit(service: Service, name: str) -> None:
        client = await SlowClient.connect(service.ws_url, chance.choice([8192, 65536]))
        rate = chance.choice([0, 200_000, 2_000_000])
        reading = asyncio.create_task(
            client.read(rate=rate) if rate else asyncio.sleep(0)
        )
        with contextlib.suppress(OSError):
            for number in range(chance.randrange(1, 60)):
                await client.send(frame(TEXT, f"{name} {number}".encode()))
                if chance.random() < 0.2:
                    await asyncio.sleep(chance.random() / 5)  # its own pace
            leaving = chance.choice(["close", "close and go", "go", "stay"])
            if leaving.startswith("close"):
                await client.send(NORMAL)
            if leaving == "close" and rate:
                await reading
                orderly.add(name)
            elif leaving == "stay":
                await over.wait()
        client.stop()
        await reading
        client.sock.close()

    async with RecordingBackend() as backend:
        feeding: list[asyncio.Task[None]] = []

        async def answer(handler: RequestHandler, event: dict) -> None:
            if event["meta"]["message_id"].endswith("-1") and chance.random() < 0.5:
                url = event["meta"]["send"]
                pause = chance.choice([0.01, 0.05])
                feeding.append(asyncio.create_task(feed(backend, url, pause)))
            await asyncio.sleep(chance.random() / 50)  # the backend's work

        async with Service(*backend.flags(), *flags) as service:
            backend.answers["message"] = answer
            visits = [
                asyncio.create_task(visit(service, f"client-{n}")) for n in range(40)
            ]
            await asyncio.wait(visits, timeout=8)
            over.set()
            await asyncio.gather(*visits)
            events = await backend.wait_for("disconnect", len(visits), 40)
            await asyncio.gather(*feeding)
    said: dict[str, list[int]] = {}
    names: dict[str, str] = {}
    for event in backend.of("message"):
        name, number = event["message"].split()
        said.setdefault(name, []).append(int(number))
        names[event["meta"]["connection_id"]] = name
    assert len(events) == len(visits)
    for numbers in said.values():
        assert numbers == list(range(len(numbers)))
    for event in events:
        assert event["meta"]["undelivered"] == 0
        if names.get(event["connection_id"]) in orderly:
            assert event["meta"]["initiator"] == "client" or (
                event["meta"]["code"] in (1006, 1008)
            ), event
