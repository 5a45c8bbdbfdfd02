"""Frames with a largest size, in both directions: --max_frame_size."""

import asyncio
import os

import pytest
import websockets
from service import DEADLINE, Service
from wire import BINARY, CONTINUATION, PING, TEXT, deflated, frame

from handlers.websocket.deflate import Contexts, Inflater
from handlers.websocket.fragments import fragments
from handlers.websocket.frames import FrameError, FrameParser, Ping

LIMIT = 100


def parser(compressed=False):
    made = FrameParser(1000, Inflater(Contexts()) if compressed else None)
    made.limit_frames(LIMIT)
    return made


@pytest.mark.once
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 199, 200, 201, 1000])
@pytest.mark.parametrize("compressed", [False, True])
def test_fragments_make_up_the_message(size, compressed):
    """Only the first has the opcode and RSV1, and only the last has FIN."""
    payload = os.urandom(size)
    built = list(fragments(BINARY, payload, LIMIT, compressed))
    assert len(built) == max(1, -(-size // LIMIT))
    bodies = []
    for number, each in enumerate(built):
        is_first, is_last = number == 0, number == len(built) - 1
        assert each[0] & 0x0F == (BINARY if is_first else CONTINUATION)
        assert bool(each[0] & 0x40) == (compressed and is_first)
        assert bool(each[0] & 0x80) == is_last
        body = each[2:] if each[1] < 126 else each[4:]
        assert len(body) <= LIMIT
        bodies.append(body)
    assert b"".join(bodies) == payload


@pytest.mark.once
@pytest.mark.parametrize(
    "data, messages",
    [
        (frame(TEXT, b"x" * 100), ["x" * 100]),
        (
            frame(TEXT, b"x" * 100, fin=False)
            + frame(PING, b"y" * 100)
            + frame(CONTINUATION, b"x" * 100),
            [Ping(b"y" * 100), "x" * 200],
        ),
    ],
)
def test_frames_within_the_limit_are_accepted(data, messages):
    """A message may be larger, and so may a ping."""
    assert list(parser().feed(data)) == messages


@pytest.mark.once
@pytest.mark.parametrize(
    "data, reason",
    [
        (frame(TEXT, b"x" * 101), "frame too big"),
        (frame(TEXT, b"x" * 101)[:4], "frame too big"),  # its length is sufficient
        (
            frame(TEXT, b"x", fin=False) + frame(CONTINUATION, b"x" * 101),
            "frame too big",
        ),
        (
            frame(TEXT, b"x" * 100, fin=False)
            + frame(CONTINUATION, b"x" * 100, fin=False) * 9
            + frame(CONTINUATION, b"x"),
            "message too big",
        ),
    ],
)
def test_larger_frames_are_1009(data, reason):
    """And so are larger messages."""
    with pytest.raises(FrameError) as caught:
        list(parser().feed(data))
    assert (caught.value.code, caught.value.reason) == (1009, reason)


@pytest.mark.once
def test_size_of_a_compressed_frame_is_that_on_the_wire():
    """What cannot be compressed becomes a little larger."""
    text = b"x" * 1000
    data = frame(TEXT, deflated(text), rsv=4)
    assert list(parser(compressed=True).feed(data)) == [text.decode()]
    payload = os.urandom(100)
    data = frame(BINARY, deflated(payload), rsv=4)
    assert list(parser(compressed=True).feed(data)) == [payload]
    with pytest.raises(FrameError):
        data = frame(BINARY, deflated(os.urandom(200)), rsv=4)
        list(parser(compressed=True).feed(data))


@pytest.mark.gen_test(timeout=60)
@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_messages_are_relayed_in_small_frames(io_loop, compression):
    """Compressed or not, each is whole at the other end."""
    async with Service(
        f"--max_frame_size={LIMIT}", "--max_message_size=1000", "--compression"
    ) as service:
        async with websockets.connect(
            service.ws_url, compression=compression
        ) as client:
            for message in ("", "x" * 100, "\u00e4" * 500, os.urandom(500)):
                parts = [message[at : at + 50] for at in range(0, len(message), 50)]
                await client.send(parts or message)
                received = await asyncio.wait_for(client.recv(), DEADLINE)
                assert received == message
            await client.send(os.urandom(101 if compression is None else 300))
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert client.close_code == 1009
