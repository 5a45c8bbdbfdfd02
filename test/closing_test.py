"""The end of a connection: what is still delivered, and how it closes."""

import asyncio
import contextlib
import signal
import ssl

import pytest
from certificates import Authority
from faults import upgraded
from service import DEADLINE, RecordingBackend, Service, withhold
from slow import SlowClient
from tornado.web import RequestHandler
from wire import CLOSE, TEXT, frame

pytestmark = pytest.mark.gen_test(timeout=90)

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
NORMAL = frame(CLOSE, b"\x03\xe8")
LARGE = 4 * 2**20  # more than both kernels take for a peer that does not read


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def client_context(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.path))


async def called(backend: RecordingBackend, event: dict) -> dict[str, int]:
    """The statuses of the callbacks for the connection of `event`."""
    send = event["meta"]["send"]
    url = send.removesuffix("/send")
    requests = {
        "send": (send, "POST", b"late"),
        "disconnect": (url + "/disconnect", "POST", b""),
        "info": (url, "GET", None),
        "delete": (url, "DELETE", None),
    }
    return {
        name: (await backend.call(target, method, body=body)).code
        for name, (target, method, body) in requests.items()
    }


@LOOPS
async def test_callbacks_behind_the_client_s_close_frame_are_410(io_loop, loop):
    """Also while frames wait for the client; none follows the close frame."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), f"--event_loop={loop}")
        async with Service(*flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                large = asyncio.create_task(
                    backend.call(event["meta"]["send"], body=bytes(LARGE))
                )
                # Its first bytes show that the rest waits.
                await client.read(until=lambda data: len(data) > 0)
                await client.send(frame(TEXT, b"last words") + NORMAL)
                await backend.wait_for("message", 1)
                statuses = await called(backend, event)
                await client.read()
                assert (await large).code == 200
                (event,) = await backend.wait_for("disconnect", 1)
    assert set(statuses.values()) == {410}, statuses
    assert client.frames() == [(2, bytes(LARGE)), (CLOSE, b"\x03\xe8")]
    assert client.end == "end"
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1000, "client")


@LOOPS
async def test_nothing_behind_a_close_frame_is_delivered(io_loop, loop):
    """Neither from the same packet nor from a later one, after paused reading."""
    async with RecordingBackend() as backend:
        flags = ("--connection_queue_messages=1", "--order_wait=inf",
                 "--backend_timeout=60", f"--event_loop={loop}")
        async with Service(*backend.flags(), *flags) as service:
            release = withhold(backend, "message")
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                large = asyncio.create_task(
                    backend.call(event["meta"]["send"], body=bytes(LARGE))
                )
                await client.read(until=lambda data: len(data) > 0)
                before = [frame(TEXT, b"%d" % number) for number in range(5)]
                await client.send(b"".join(before) + NORMAL + frame(TEXT, b"behind"))
                await backend.wait_for("message", 1)
                await client.send(frame(TEXT, b"far behind") * 1000)
                release.set()
                await backend.wait_for("message", 5)
                await client.read()
                await large
            (event,) = await backend.wait_for("disconnect", 1)
    assert [m["message"] for m in backend.of("message")] == list("01234")
    assert event["meta"]["code"] == 1000
    assert client.frames()[-1] == (CLOSE, b"\x03\xe8")


@LOOPS
async def test_failed_write_loses_nothing_that_the_client_sent(io_loop, loop):
    """A client sends 200 messages and a close frame, and disconnects: all count."""
    number = 200
    async with RecordingBackend() as backend:

        async def push(handler: RequestHandler, event: dict) -> None:
            answer = await backend.call(event["meta"]["send"], body=b"x" * 1000)
            assert answer.code in (200, 410)

        async with Service(*backend.flags(), f"--event_loop={loop}") as service:
            backend.answers["message"] = push
            _, writer = await upgraded(service.ws_url)
            said = [frame(TEXT, b"%d" % n) for n in range(number)]
            writer.write(b"".join(said) + NORMAL)
            await writer.drain()
            writer.transport.abort()  # the kernel answers further data with a reset
            (event,) = await backend.wait_for("disconnect", 1)
    assert [m["message"] for m in backend.of("message")] == [
        str(n) for n in range(number)
    ]
    meta = event["meta"]
    assert (meta["code"], meta["initiator"], meta["undelivered"]) == (1000, "client", 0)


SLOWLY = 500_000  # bytes per second


@pytest.mark.parametrize(
    ("how", "loop", "tls"),
    [
        ("disconnect", "uvloop", False),
        ("disconnect", "asyncio", True),
        ("SIGTERM", "uvloop", False),
        ("SIGTERM", "uvloop", True),
        ("1002", "asyncio", False),
        ("paused", "uvloop", False),
    ],
)
async def test_large_message_and_close_reach_a_slow_client(
    io_loop, authority, how, loop, tls
):
    """It reads for longer than CLOSE_TIMEOUT, and sends meanwhile."""
    message = bytes(2_500_000)
    flags = [f"--event_loop={loop}", "--drain_timeout=40"]
    context = client_context(authority) if tls else None
    if tls:
        flags += ["--callbackport=0", f"--tls_cert={authority.server().both}"]
    if how == "paused":
        flags += ["--connection_queue_messages=1", "--order_wait=inf",
                  "--backend_timeout=60"]
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            release = withhold(backend, "message") if how == "paused" else None
            with await SlowClient.connect(service.ws_url, tls=context) as client:
                (event,) = await backend.wait_for("connect", 1)
                send = event["meta"]["send"]
                sent = await backend.call(send, body=message)
                assert sent.code == 200
                code = b"\x03\xe8"
                if how == "SIGTERM":
                    service.process.send_signal(signal.SIGTERM)
                    code = b"\x03\xe9going away"
                elif how == "1002":
                    await client.send(frame(3, b"no such opcode"))
                    code = b"\x03\xeaunknown opcode"
                else:
                    url = event["meta"]["disconnect"]
                    assert (await backend.call(url)).code == 200
                reading = asyncio.create_task(client.read(rate=SLOWLY))
                while not reading.done():
                    await client.send(frame(TEXT, b"still here" * 1000))
                    await asyncio.wait({reading}, timeout=0.5)
                    if client.frames() and client.frames()[-1][0] == CLOSE:
                        break
                if how != "1002":
                    await client.send(frame(CLOSE, code[:2]))
                await reading
                if release is not None:
                    release.set()
            (event,) = await backend.wait_for("disconnect", 1)
            if how == "SIGTERM":
                assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
    assert client.frames() == [(2, message), (CLOSE, code)]
    assert client.end == "end"
    assert event["meta"]["code"] == int.from_bytes(code[:2])


@LOOPS
@pytest.mark.parametrize("how", ["client", "backend", "relay", "end"])
async def test_tls_ends_with_close_notify(io_loop, authority, loop, how):
    """So the client can distinguish the end from a cut (RFC 8446, section 6.1)."""
    flags = (
        f"--event_loop={loop}",
        "--callbackport=0",
        f"--tls_cert={authority.server().both}",
    )
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(
                service.ws_url, tls=client_context(authority)
            ) as client:
                (event,) = await backend.wait_for("connect", 1)
                if how == "client":
                    await client.send(NORMAL)
                elif how == "backend":
                    await backend.call(event["meta"]["disconnect"])
                    await client.read(until=lambda data: len(data) >= 4)
                    await client.send(NORMAL)
                elif how == "relay":
                    await client.send(frame(3))
                else:
                    # Its close_notify. The relay's may be there by the next line: then
                    # `unwrap` has seen it; else `read` is to see it.
                    client.sock.setblocking(False)
                    with contextlib.suppress(ssl.SSLWantReadError):
                        client.sock.unwrap()
                    client.sock.settimeout(DEADLINE)
                await client.read()
            await backend.wait_for("disconnect", 1)
    assert client.end == "end"


@LOOPS
async def test_client_that_reads_nothing_is_closed(io_loop, loop):
    """An undeliverable close frame gets no more time than other frames."""
    async with RecordingBackend() as backend:
        flags = ("--send_timeout=2", f"--event_loop={loop}")
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                large = asyncio.create_task(
                    backend.call(event["meta"]["send"], body=bytes(LARGE))
                )
                await client.read(until=lambda data: len(data) > 0)
                await backend.call(event["meta"]["disconnect"])
                (event,) = await backend.wait_for("disconnect", 1)
                assert (await large).code == 410
    assert (event["meta"]["code"], event["meta"]["initiator"]) == (1000, "backend")
