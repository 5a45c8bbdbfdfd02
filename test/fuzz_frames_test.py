"""For any frames, the parser and the relay work, in bounded memory.

Hypothesis makes the frames: valid messages, split into fragments and pieces at any
place, and mutations of them. `make fuzz` tries many more.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
import websockets
from faults import memory
from fuzzing import GROWTH, examples, in_pieces
from hypothesis import example, given
from hypothesis import strategies as st
from service import DEADLINE, Service
from wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    DEFLATE,
    PING,
    PONG,
    TEXT,
    bomb,
    deflated,
    frame,
    handshake,
)

from handlers.websocket.deflate import Contexts, Inflater
from handlers.websocket.frames import (
    Close,
    FrameError,
    FrameParser,
    Ping,
    Pong,
    Received,
    deflate_bound,
)

LIMIT = 1000  # bytes of a message
HEADER = 14  # bytes, at most
CONTROL = 125  # bytes of a control frame, at most


# Frames.

masks = st.binary(min_size=4, max_size=4)
payloads = st.binary(max_size=40) | st.sampled_from([126, 300, LIMIT]).map(bytes)
texts = st.text(max_size=20) | st.just("🦆" * 200)


@st.composite
def controls(draw: st.DrawFn) -> tuple[bytes, Received]:
    """A ping or a pong, and its parsed form."""
    payload = draw(st.binary(max_size=CONTROL))
    if draw(st.booleans()):
        return frame(PING, payload, mask=draw(masks)), Ping(payload)
    return frame(PONG, payload, mask=draw(masks)), Pong(payload)


@st.composite
def messages(draw: st.DrawFn, compressed: bool) -> tuple[bytes, list[Received]]:
    """A message in fragments with control frames between, and its parsed form."""
    message = draw(payloads | texts)
    opcode, payload = (
        (TEXT, message.encode()) if isinstance(message, str) else (BINARY, message)
    )
    rsv = 4 if compressed and draw(st.booleans()) else 0
    parts = draw(in_pieces(st.just(deflated(payload) if rsv else payload), cuts=3))
    wire, received = b"", []
    for number, part in enumerate(parts):
        wire += frame(
            CONTINUATION if number else opcode,
            part,
            fin=number == len(parts) - 1,
            rsv=0 if number else rsv,
            mask=draw(masks),
        )
        if number < len(parts) - 1 and draw(st.booleans()):
            control, meaning = draw(controls())
            wire += control
            received.append(meaning)
    return wire, [*received, message]


@st.composite
def conversations(draw: st.DrawFn, compressed: bool) -> tuple[bytes, list[Received]]:
    """Some messages and control frames; a close frame at the end, or none."""
    wire, received = b"", []
    for _ in range(draw(st.integers(0, 4))):
        data, meaning = draw(messages(compressed))
        wire += data
        received += meaning
        for data, control in draw(st.lists(controls(), max_size=2)):
            wire += data
            received.append(control)
    if draw(st.booleans()):
        code = draw(st.sampled_from([1000, 1001, 3000, 4999]))
        reason = draw(st.text(max_size=20))
        wire += frame(CLOSE, code.to_bytes(2) + reason.encode(), mask=draw(masks))
        received.append(Close(code, reason))
    return wire, received


wrong_frames = st.builds(
    frame,
    st.integers(0, 15),
    st.binary(max_size=200),
    fin=st.booleans(),
    rsv=st.sampled_from([0, 0, 0, 4, 4, 1, 2, 7]),
    mask=masks | st.none(),
) | st.builds(
    frame,
    st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING]),
    st.binary(max_size=20),
    length_size=st.just(8),
    length=st.integers(0, 2**64 - 1) | st.integers(0, 2 * LIMIT),
)


@st.composite
def mutated(draw: st.DrawFn, compressed: bool) -> bytes:
    """A mutated conversation."""
    data, _ = draw(conversations(compressed))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 10)))
        middle = draw(
            wrong_frames | st.binary(max_size=8) | st.just(data[start:end] * 2)
        )
        data = data[:start] + middle + data[end:]
    return data


# The parser alone.


def parse(
    pieces: list[bytes], compressed: bool
) -> tuple[list[Received], tuple[int, str] | None]:
    """Parse; return everything received, and the violation that ended it."""
    parser = FrameParser(LIMIT, Inflater(Contexts()) if compressed else None)
    received: list[Received] = []
    try:
        for piece in pieces:
            received.extend(parser.feed(piece))
            assert len(parser._buffer) < HEADER + CONTROL
            assert parser._size <= deflate_bound(LIMIT)
    except FrameError as error:
        return received, (error.code, error.reason)
    return received, None


@given(data=st.data(), compressed=st.booleans())
@examples(200)
def test_valid_frames_are_parsed_for_every_split(data, compressed):
    """Each message and control frame is returned, in order."""
    wire, received = data.draw(conversations(compressed))
    pieces = data.draw(in_pieces(st.just(wire)))
    assert parse(pieces, compressed) == (received, None)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@given(data=st.data(), compressed=st.booleans())
@examples(400)
def test_fragmentation_of_reads_changes_nothing(data, compressed):
    """Any bytes give the same result in one piece, in some, and one by one."""
    wire = data.draw(mutated(compressed) | st.binary(max_size=300))
    meaning = parse([wire], compressed)
    assert parse(data.draw(in_pieces(st.just(wire))), compressed) == meaning
    assert parse(bytewise(wire), compressed) == meaning
    for received in meaning[0]:
        if isinstance(received, (str, bytes)):
            assert len(received) <= LIMIT
    if meaning[1] is not None:
        assert meaning[1][0] in (1002, 1007, 1009)


@given(payload=st.binary(max_size=100))
@example(payload=b"\x03\x00")
@example(payload=bomb(2**20))
@examples(200)
def test_any_compressed_bytes_are_a_message_or_a_violation(payload):
    """Inflating is bounded, and never raises zlib's error."""
    wire = frame(BINARY, payload, rsv=4)
    received, violation = parse([wire], compressed=True)
    if violation is None:
        (message,) = received
        assert len(message) <= LIMIT
    else:
        assert received == []
        assert violation[0] in (1007, 1009)


# The relay.


@dataclass
class Relay:
    """An echo relay, a client that must not be affected, and their runner."""

    run: Callable[..., object]
    service: Service
    client: websockets.ClientConnection


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    """One process for all examples, which must not grow."""
    with asyncio.Runner() as runner:

        async def begin() -> Relay:
            service = await Service(
                "--compression", f"--max_message_size={LIMIT}"
            ).__aenter__()
            client = await websockets.connect(service.ws_url, ping_interval=None)
            return Relay(runner.run, service, client)

        async def end() -> None:
            await relay.client.__aexit__(None, None, None)
            await relay.service.__aexit__(None, None, None)

        relay = runner.run(begin())
        yield relay
        runner.run(end())


@pytest.fixture
def no_growth(relay) -> Iterator[None]:
    """Memory does not grow."""
    before = memory(relay.service.process.pid)
    yield
    assert memory(relay.service.process.pid) < before + GROWTH


async def converse(url: str, opening: bytes, pieces: list[bytes]) -> bytes:
    """All that the relay says after its 101; the client only hangs up on its part.

    The relay may have closed before the last piece: what it said is read all the same,
    which a plain socket does and a stream of asyncio does not.
    """
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.setblocking(False)
        answer = bytearray()
        async with asyncio.timeout(DEADLINE):
            await loop.sock_sendall(sock, opening)
            while b"\r\n\r\n" not in answer:
                answer += (data := await loop.sock_recv(sock, 4096))
                assert data, answer
            head, _, rest = bytes(answer).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            with contextlib.suppress(OSError):
                for piece in pieces:
                    await loop.sock_sendall(sock, piece)
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while data := await loop.sock_recv(sock, 4096):
                    rest += data
            return rest


def close_code_of(answer: bytes) -> int | None:
    """The close code of the relay's frames; None where there is no close frame.

    Raises `ValueError` where they are no frames of a server.
    """
    while answer:
        opcode, length = answer[0] & 0x0F, answer[1]
        if answer[0] & 0xB0 not in (0x80,) or length > 126:
            raise ValueError(answer[:20])
        start = 2
        if length == 126:
            start, length = 4, int.from_bytes(answer[2:4])
        if len(answer) < start + length:
            raise ValueError("a frame that was cut")
        payload, answer = answer[start : start + length], answer[start + length :]
        if opcode == CLOSE:
            if answer:
                raise ValueError("something behind the close frame")
            return int.from_bytes(payload[:2]) or 1005
    return None


@given(data=st.data(), compressed=st.booleans())
@examples(150)
def test_any_frames_are_echoed_or_rejected(relay, no_growth, data, compressed):
    """The response is the parser's result; other clients are not affected."""
    wire = data.draw(mutated(compressed) | st.binary(max_size=300))
    pieces = data.draw(in_pieces(st.just(wire)))
    received, violation = parse([wire], compressed)
    close = next((item for item in received if isinstance(item, Close)), None)

    async def check() -> None:
        offers = DEFLATE if compressed else ()
        answer = await converse(relay.service.ws_url, handshake(*offers), pieces)
        code = close_code_of(answer)
        if close is not None:
            assert code == close.code
        elif violation is not None:
            assert code == violation[0]
        else:
            assert code is None

        await relay.client.send("still here")
        assert await asyncio.wait_for(relay.client.recv(), DEADLINE) == "still here"
        assert not relay.service.tracebacks, "\n".join(relay.service.log)

    relay.run(check())
