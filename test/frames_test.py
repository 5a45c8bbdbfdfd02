"""Malformed frames, row by row; docs/bad-input.md is the table."""

import asyncio
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from faults import memory, send_raw
from service import RecordingBackend, Service
from tornado.ioloop import IOLoop
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

pytestmark = pytest.mark.gen_test(timeout=60)

LIMIT = 2**20  # bytes of a message
SOON = 15.0  # seconds
RSV1 = 4


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all rows: they share a process, which must survive each row."""
    return module_io_loop


@dataclass
class Relay:
    """A relay that accepts compression, and its backend."""

    service: Service
    backend: RecordingBackend
    visits: int = 0

    async def answer(self, *frames: bytes, compressed: bool = False) -> bytes:
        """All frames that the relay sends until it ends the connection.

        Its disconnect event has come by then, and is the last one.
        """
        self.visits += 1
        received = await send_raw(
            self.service.ws_url,
            handshake(*(DEFLATE if compressed else ())),
            *frames,
            deadline=SOON,
        )
        head, _, answer = received.data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert (b"permessage-deflate" in head) is compressed
        assert received.ended, f"open after {SOON} s, with {answer[:100]!r}"
        await self.backend.wait_for("disconnect", self.visits)
        return answer

    def last_end(self) -> tuple[int, str]:
        """Code and initiator of the last disconnect event; each visit has one."""
        ends = self.backend.of("disconnect")
        assert len({end["connection_id"] for end in ends}) == len(ends) == self.visits
        return ends[-1]["meta"]["code"], ends[-1]["meta"]["initiator"]


@pytest.fixture(scope="module")
def relay(io_loop, shared) -> Relay:
    """One process for all rows."""

    async def begin() -> Relay:
        backend = await shared.enter_async_context(RecordingBackend())
        flags = ("--compression", f"--max_message_size={LIMIT}")
        service = await shared.enter_async_context(
            Service(*backend.flags("message", "disconnect"), *flags)
        )
        return Relay(service, backend)

    return io_loop.run_sync(begin)


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2) + reason)


def fragments(opcode: int, *parts: bytes, rsv: int = 0) -> bytes:
    """A message in as many frames as there are parts."""
    last = len(parts) - 1
    return b"".join(
        frame(
            CONTINUATION if number else opcode,
            part,
            fin=number == last,
            rsv=0 if number else rsv,
        )
        for number, part in enumerate(parts)
    )


BEGINNING = frame(TEXT, b"be", fin=False)

PROTOCOL_ERRORS = {
    **{f"rsv-{rsv}": frame(TEXT, b"x", rsv=rsv) for rsv in range(1, 8)},
    **{f"opcode-{n}": frame(n) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "unmasked-text": frame(TEXT, b"x", mask=None),
    "unmasked-empty": frame(BINARY, mask=None),
    "unmasked-ping": frame(PING, mask=None),
    "unmasked-close": frame(CLOSE, b"\x03\xe8", mask=None),
    "unmasked-continuation": BEGINNING + frame(CONTINUATION, b"x", mask=None),
    "ping-of-126": frame(PING, bytes(126)),
    "pong-of-65536": frame(PONG, bytes(65536)),
    "close-of-126": close(1000, b"x" * 124),
    "ping-with-a-long-length": frame(PING, b"x", length_size=2),
    "fragmented-ping": frame(PING, b"x", fin=False),
    "fragmented-pong": frame(PONG, fin=False),
    "fragmented-close": frame(CLOSE, b"\x03\xe8", fin=False),
    "continues-nothing": frame(CONTINUATION, b"x"),
    "continues-nothing-and-goes-on": frame(CONTINUATION, b"x", fin=False),
    "continues-a-whole-message": frame(BINARY, b"x") + frame(CONTINUATION, b"y"),
    "text-within-text": BEGINNING + frame(TEXT, b"x"),
    "binary-within-text": BEGINNING + frame(BINARY, b"x"),
    "beginning-within-text": BEGINNING + frame(TEXT, b"x", fin=False),
    "text-within-text-behind-a-ping": BEGINNING + frame(PING) + frame(TEXT),
    "close-of-one-byte": frame(CLOSE, b"\x03"),
    **{
        f"close-{code}": close(code, b"why")
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999)
    },
    **{f"close-{code}": close(code) for code in (5000, 65535)},
    "length-0-in-two-bytes": frame(TEXT, length_size=2),
    "length-125-in-two-bytes": frame(BINARY, bytes(125), length_size=2),
    "length-5-in-eight-bytes": frame(TEXT, b"hello", length_size=8),
    "length-65535-in-eight-bytes": frame(BINARY, bytes(65535), length_size=8),
    "length-with-its-top-bit": frame(BINARY, length_size=8, length=2**63 | 5),
    "length-of-64-ones": frame(BINARY, length_size=8, length=2**64 - 1),
}

PROTOCOL_ERRORS_WITH_COMPRESSION = {
    "rsv1-on-ping": frame(PING, rsv=RSV1),
    "rsv1-on-close": frame(CLOSE, b"\x03\xe8", rsv=RSV1),
    "rsv1-on-continuation": BEGINNING + frame(CONTINUATION, b"x", rsv=RSV1),
    "rsv1-on-continuation-of-compressed": (
        frame(TEXT, deflated(b"x"), fin=False, rsv=RSV1)
        + frame(CONTINUATION, b"", rsv=RSV1)
    ),
    "rsv2-beside-rsv1": frame(TEXT, deflated(b"x"), rsv=RSV1 | 2),
}

BAD_UTF_8 = {
    "lone-continuation": b"\x80",
    "no-start": b"ok\xff",
    "overlong": b"\xc0\xaf",
    "surrogate": b"\xed\xa0\x80",
    "above-10ffff": b"\xf4\x90\x80\x80",
    "cut-short": "né".encode()[:-1],
}

INVALID_DATA = {
    **{f"text-{name}": frame(TEXT, bad) for name, bad in BAD_UTF_8.items()},
    **{f"reason-{name}": close(1000, bad) for name, bad in BAD_UTF_8.items()},
    "first-fragment": frame(TEXT, b"\xff", fin=False),
    "last-fragment": fragments(TEXT, b"ok", b"\xff"),
    "code-point-over-two-frames-then-wrong": (
        frame(TEXT, b"\xc3", fin=False) + frame(CONTINUATION, b"x", fin=False)
    ),
    "code-point-that-never-ends": fragments(TEXT, b"\xe2\x82", b""),
    "frame-that-is-not-whole-yet": frame(TEXT, b"ok\xff", length=1000),
    "long-frame-that-is-not-whole-yet": frame(
        TEXT, b"x" * 200_000 + b"\xff", length=LIMIT
    ),
    "continuation-that-is-not-whole-yet": (
        BEGINNING + frame(CONTINUATION, b"\xff", length=1000)
    ),
}

INVALID_DATA_WITH_COMPRESSION = {
    "no-deflate": frame(BINARY, b"\xff\xff\xff\xff", rsv=RSV1),
    "reserved-block-type": frame(BINARY, b"\x07", rsv=RSV1),
    "nothing": frame(BINARY, rsv=RSV1),
    "cut-short": frame(BINARY, deflated(os.urandom(300))[:-20], rsv=RSV1),
    "something-behind-the-last-block": frame(BINARY, b"\x03\x00oops", rsv=RSV1),
    "in-fragments": fragments(BINARY, b"\xff", b"\xff", rsv=RSV1),
    "text-that-is-not-utf-8": frame(TEXT, deflated(b"\xff"), rsv=RSV1),
}

TOO_BIG = {
    "announced": frame(BINARY, length=LIMIT + 1),
    "announced-and-no-mask-yet": frame(BINARY, length=LIMIT + 1)[:-4],
    "announced-2-to-the-62": frame(TEXT, length=2**62),
    "announced-by-a-fragment": frame(TEXT, bytes(10), fin=False)
    + frame(CONTINUATION, length=LIMIT - 9),
    "many-fragments": frame(BINARY, bytes(2**18), fin=False)
    + frame(CONTINUATION, bytes(2**18), fin=False) * 4,
}

TOO_BIG_WITH_COMPRESSION = {
    "bomb": frame(BINARY, bomb(256 * 2**20), rsv=RSV1),
    "bomb-of-text": frame(TEXT, bomb(64 * 2**20), rsv=RSV1),
    "bomb-in-fragments": fragments(BINARY, *[bomb(2**22)] * 8, rsv=RSV1),
    "one-byte-too-many": frame(BINARY, deflated(bytes(LIMIT + 1)), rsv=RSV1),
    "announced-and-compressed": frame(BINARY, rsv=RSV1, length=2 * LIMIT),
    "announced-and-not-compressed": frame(BINARY, length=LIMIT + 1),
}

ROWS = [
    pytest.param(frames, code, compressed, id=f"{code}-{name}")
    for code, compressed, rows in (
        (1002, False, PROTOCOL_ERRORS),
        (1002, True, PROTOCOL_ERRORS_WITH_COMPRESSION),
        (1007, False, INVALID_DATA),
        (1007, True, INVALID_DATA_WITH_COMPRESSION),
        (1009, False, TOO_BIG),
        (1009, True, TOO_BIG_WITH_COMPRESSION),
    )
    for name, frames in rows.items()
]


@pytest.mark.parametrize(("frames", "code", "compressed"), ROWS)
async def test_bad_frame_gets_its_close_code(io_loop, relay, frames, code, compressed):
    """The close frame, then the end, and one disconnect event by the relay."""
    answer = await relay.answer(frames, compressed=compressed)
    while answer[:1] in (b"\x89", b"\x8a"):  # the pong precedes it
        answer = answer[2 + answer[1] :]
    assert answer[:1] == b"\x88", answer[:100]
    assert answer[1] == len(answer) - 2
    assert int.from_bytes(answer[2:4]) == code
    assert answer[4:].decode("ascii")  # it has a reason
    assert relay.last_end() == (code, "relay")
    assert not relay.service.tracebacks


async def test_nothing_is_read_behind_a_bad_frame(io_loop, relay):
    """What follows a violation or a close frame is not delivered."""
    before = len(relay.backend.of("message"))
    bad, late = frame(3), frame(TEXT, b"too late")
    answer_to_bad = b"\x88\x10\x03\xeaunknown opcode"
    answer = await relay.answer(frame(TEXT, b"in time") + bad + late, late, bad)
    assert answer == answer_to_bad
    answer = await relay.answer(close(4000) + late, late, bad, close(4001))
    assert answer == b"\x88\x02\x0f\xa0"
    assert relay.last_end() == (4000, "client")
    # Nor is what follows the relay's own close frame.
    parts = urlsplit(relay.service.ws_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(handshake() + bad)
    assert (await asyncio.wait_for(reader.read(), SOON)).endswith(answer_to_bad)
    writer.write(late)
    writer.close()
    relay.visits += 1
    await relay.backend.wait_for("disconnect", relay.visits)
    assert relay.last_end() == (1002, "relay")
    messages = relay.backend.of("message")[before:]
    assert [event["message"] for event in messages] == ["in time"]


async def test_valid_frames_are_accepted(io_loop, relay):
    """At the limits: the largest messages, empty ones, and many interruptions."""
    before = len(relay.backend.of("message"))
    noise = os.urandom(LIMIT)
    packed = deflated(b"packed")
    frames = [
        frame(TEXT),
        fragments(BINARY, b"", b"", b""),
        fragments(TEXT, *(bytes([byte]) for byte in "€𝄞".encode())),
        frame(PING, bytes(125)) + frame(PONG, b"unasked"),
        frame(BINARY, b"a" * 125) + frame(BINARY, b"b" * 126),
        frame(BINARY, b"c" * 65535) + frame(BINARY, b"d" * 65536),
        frame(BINARY, noise),
        frame(TEXT, packed[:3], fin=False, rsv=RSV1),
        frame(PING, b"in between"),
        frame(CONTINUATION, packed[3:]),
        frame(BINARY, b"\x00", rsv=RSV1),  # RFC 7692, section 7.2.3.6
        frame(TEXT, bytes.fromhex("f348cdc9c9070000"), rsv=RSV1),  # and 7.2.3.4
        frame(BINARY, deflated(noise), rsv=RSV1),  # is larger than the limit
        frame(BINARY, deflated(bytes(LIMIT)), rsv=RSV1),
        close(1000, "tschüß".encode()),
    ]
    assert len(deflated(noise)) > LIMIT
    answer = await relay.answer(*frames, compressed=True)
    pongs = b"\x8a\x7d" + bytes(125) + b"\x8a\x0ain between"
    assert answer == pongs + b"\x88\x02\x03\xe8"
    messages = relay.backend.of("message")[before:]
    assert len(messages) == 13
    assert [event["message"] for event in messages[:3]] == ["", "", "€𝄞"]
    assert [messages[8]["message"], messages[10]["message"]] == ["packed", "Hello"]


@pytest.mark.parametrize(
    "code", [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999]
)
async def test_valid_close_code_is_echoed(io_loop, relay, code):
    """A registered or private code; the event names the client as initiator."""
    assert await relay.answer(close(code)) == b"\x88\x02" + code.to_bytes(2)
    assert relay.last_end() == (code, "client")


async def test_compression_bombs_and_announced_lengths_take_no_memory(io_loop, relay):
    """Of 256 MiB only the allowed part is inflated; no memory is reserved."""
    largest = frame(BINARY, deflated(bytes(LIMIT)), rsv=RSV1)
    await relay.answer(largest, largest, close(1000), compressed=True)
    before = memory(relay.service.process.pid, "VmHWM")
    explosive = frame(BINARY, bomb(256 * 2**20), rsv=RSV1)
    for _ in range(3):
        await relay.answer(explosive, compressed=True)
    await asyncio.gather(
        *(relay.answer(frame(BINARY, length=2**40)) for _ in range(20))
    )
    grown = memory(relay.service.process.pid, "VmHWM") - before
    assert grown < 16 * LIMIT, f"{grown / LIMIT:.0f} messages' worth"
