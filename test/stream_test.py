"""The relay reads and writes a client's socket itself, on both loops."""

import asyncio
import ssl

import pytest
from certificates import Authority
from service import DEADLINE, Service
from wire import BINARY, PING, TEXT, frame, handshake

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


async def begin(url, *more, tls=None):
    """A connection on which the handshake and more bytes are sent in one write."""
    host, _, port = url.split("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
    writer.write(b"".join((handshake(), *more)))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)
    assert answer.startswith(b"HTTP/1.1 101 ")
    return reader, writer


async def read(reader, size):
    return await asyncio.wait_for(reader.readexactly(size), DEADLINE)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@LOOPS
@pytest.mark.gen_test
async def test_frames_in_one_segment_with_the_handshake_are_read(io_loop, loop):
    """Tornado read them before the relay took over the socket."""
    async with Service(f"--event_loop={loop}") as service:
        reader, writer = await begin(
            service.ws_url, frame(TEXT, b"one"), frame(TEXT, b"two")
        )
        assert await read(reader, 10) == b"\x81\x03one\x81\x03two"
        writer.close()


@LOOPS
@pytest.mark.gen_test
async def test_bytes_decrypted_by_tls_are_read(io_loop, loop, authority):
    """A record is read in two parts: the kernel has no more bytes."""
    tls = ssl.create_default_context(cafile=str(authority.path))
    server = authority.server()
    async with Service(
        f"--event_loop={loop}",
        f"--tls_cert={server.both}",
        "--bytes_per_second=8000",
    ) as service:
        reader, writer = await begin(service.ws_url, tls=tls)
        for size in (9000, 15000):
            message = bytes(size)
            writer.write(frame(BINARY, message))
            assert (await read(reader, 4 + size))[4:] == message
        writer.close()


@LOOPS
@pytest.mark.gen_test
async def test_peer_that_only_sends_gets_all_when_it_reads(io_loop, loop):
    """Echoes wait for the kernel, reading waits for them; no byte is lost."""
    async with Service(f"--event_loop={loop}") as service:
        reader, writer = await begin(service.ws_url)
        message, number = bytes(range(256)) * 256, 200
        sending = asyncio.create_task(send_all(writer, message, number))
        await asyncio.wait({sending}, timeout=0.5)
        for _ in range(number):
            assert await read(reader, 10 + len(message)) == (
                b"\x82\x7f" + len(message).to_bytes(8) + message
            )
        await sending
        writer.close()


async def send_all(writer, message, number):
    for _ in range(number):
        writer.write(frame(BINARY, message))
        await writer.drain()


@pytest.mark.long
@LOOPS
@pytest.mark.gen_test
async def test_pings_of_a_peer_that_reads_nothing_do_not_pile_up(io_loop, loop):
    """The latest one is answered when it reads (RFC 6455, section 5.5.3)."""
    number = 80_000
    pings = frame(PING, bytes(125)) * (number // 100)
    async with Service(f"--event_loop={loop}") as service:
        reader, writer = await begin(service.ws_url)
        writer.transport.pause_reading()
        for _ in range(100):
            writer.write(pings)
            await writer.drain()
        writer.write(frame(PING, b"last"))
        writer.transport.resume_reading()
        answered = 0
        while (await read(reader, 2))[1] != len(b"last"):
            await read(reader, 125)
            answered += 1
        assert answered < number
        writer.close()
