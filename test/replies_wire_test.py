"""Replies in unusual responses, as bytes: those that count, and those that do not."""

import asyncio
import base64
import gzip
import json
import re
import zlib

import pytest
import websockets
from reply_backends import (
    MEDIA_TYPE,
    MIB,
    RawBackend,
    ReplyBackend,
    added,
    commands,
    outcomes,
    received,
    response,
    unusable_reply,
)
from service import DEADLINE, Service

pytestmark = pytest.mark.gen_test(timeout=120)

SECRET = "body of the reply"
REPLY = commands({"send": SECRET})
HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: {MEDIA_TYPE}\r\n".encode()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunked(body: bytes, size: int) -> bytes:
    """Frame `body` in chunks of `size` bytes."""
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


def padded(body: bytes, size: int) -> bytes:
    """Return the same JSON in `size` bytes."""
    return body + b" " * (size - len(body))


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module")
def shared_relay(io_loop, shared):
    async def begin() -> tuple[RawBackend, Service]:
        backend = await shared.enter_async_context(RawBackend())
        service = await shared.enter_async_context(
            Service(*backend.flags(), "--logging=debug")
        )
        return backend, service

    return io_loop.run_sync(begin)


@pytest.fixture
def backend(shared_relay) -> RawBackend:
    backend = shared_relay[0]
    backend.events.clear()
    backend.answers = {"end": [response(commands({"send": "end"}))]}
    return backend


@pytest.fixture
def service(shared_relay) -> Service:
    return shared_relay[1]


USABLE = {
    "plain": [response(REPLY)],
    "in-two-parts": [response(REPLY)[:-5], response(REPLY)[-5:]],
    "chunked": [CHUNKED, chunked(REPLY, 16)],
    "tiny-chunks": [CHUNKED, chunked(padded(REPLY, 20_000), 1)],
    "trailer": [CHUNKED, chunked(REPLY, 7)[:-2] + b"Content-Type: text/plain\r\n\r\n"],
    "until-the-end": [HEAD + b"\r\n" + REPLY, None],
    "http-1.0": [b"HTTP/1.0 200 OK\r\n" + HEAD.partition(b"\n")[2] + b"\r\n" + REPLY,
                 None],
    "closes": [response(REPLY, "Connection: close"), None],
    "no-reason": [response(REPLY, status="200")],
    "interim": [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n"
                b"Link: </x>\r\n\r\n", response(REPLY)],
    "other-2xx": [response(REPLY, status="299 Fine")],
    "media-type": [response(REPLY, media_type=f"{MEDIA_TYPE.upper()} ; charset=UTF-8")],
    "gzip": [response(gzip.compress(REPLY), "Content-Encoding: gzip")],
    "gzip-twice": [response(gzip.compress(gzip.compress(REPLY)),
                            "Content-Encoding: gzip, x-gzip")],
    "deflate": [response(zlib.compress(REPLY), "Content-Encoding: deflate")],
    "identity": [response(REPLY, "Content-Encoding: identity")],
    "utf-16": [response(REPLY.decode().encode("utf-16"))],
    "byte-order-mark": [response(b"\xef\xbb\xbf" + REPLY)],
    "bad-header": [HEAD + b"Bad Header: x\r\nContent-Length: %d\r\n\r\n" % len(REPLY)
                   + REPLY],
    "second-response": [response(REPLY) + response(commands({"send": "unasked"}))],
    "8-mib": [response(padded(REPLY, 8 * MIB))],
}


@pytest.mark.parametrize("answer", USABLE.values(), ids=USABLE)
async def test_reply_is_read_however_it_is_framed(backend, service, answer):
    """It is carried out once, and the next message goes."""
    backend.answers["one"] = answer
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await client.send("end")
        assert await received(client, 2) == [SECRET, "end"]
    assert backend.messages() == ["one", "end"]


BOMB = gzip.compress(padded(REPLY, 8 * MIB + 1))
UNUSABLE = {
    "cut": [response(REPLY)[:-1], None],
    "no-body": [HEAD + b"Content-Length: 10\r\n\r\n", None],
    "cut-in-chunk": [CHUNKED + chunked(REPLY, 100)[:20], None],
    "no-last-chunk": [CHUNKED + chunked(REPLY, 7)[:-5], None],
    "bad-chunk": [CHUNKED + b"x\r\n", None],
    "cut-after-the-head": [HEAD, None],
    "two-lengths": [HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n" + REPLY,
                    None],
    "unknown-coding": [response(REPLY, "Content-Encoding: br")],
    "three-codings": [response(REPLY, "Content-Encoding: gzip, gzip, gzip")],
    "not-gzip": [response(REPLY, "Content-Encoding: gzip")],
    "gzip-cut": [response(gzip.compress(REPLY)[:-3], "Content-Encoding: gzip")],
    "gzip-bomb": [response(BOMB, "Content-Encoding: gzip")],
    "one-byte-more-than-8-mib": [response(padded(REPLY, 8 * MIB + 1)), None],
    "chunks-of-more-than-8-mib": [CHUNKED, chunked(padded(REPLY, 8 * MIB + 1), 65536),
                                  None],
}


@pytest.mark.parametrize("answer", UNUSABLE.values(), ids=UNUSABLE)
async def test_reply_that_cannot_be_read_changes_nothing(backend, service, answer):
    """One warning without a word of it; the event is accepted and not retried."""
    backend.answers["one"] = answer
    before, logged = await outcomes(service), len(service.log)
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await client.send("end")
        assert await received(client, 1) == ["end"]
    assert added(before, await outcomes(service)) == {
        "none/invalid": 1, "send/done": 1
    }
    assert backend.messages() == ["one", "end"]
    assert "-1 cannot be used" in await unusable_reply(service, logged)
    lines = [line for line in service.log[logged:] if line.startswith(("[W", "[E"))]
    assert len(lines) == 1
    assert SECRET not in "\n".join(service.log)
    connection_id = backend.events[0][1]["meta"]["connection_id"]
    meta = (await backend.disconnect_of(connection_id))["meta"]
    assert meta["undelivered"] == meta["refused"] == 0


async def test_response_that_is_lost_in_its_head_is_retried(backend, service):
    """The reply is carried out once, when it arrives."""
    attempts = iter([[HEAD[:-9], None], [HEAD[:20], None], [response(REPLY)]])
    backend.answers = LaterAnswers(backend.answers, "one", attempts)
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await client.send("end")
        assert await received(client, 2) == [SECRET, "end"]
    assert backend.messages() == ["one"] * 3 + ["end"]


class LaterAnswers(dict):
    """Answers of a `RawBackend` of which one changes with each attempt."""

    def __init__(self, others, message, attempts):
        super().__init__(others)
        self._message, self._attempts = message, attempts

    def get(self, message):
        return next(self._attempts) if message == self._message else self[message]


async def test_frames_of_4_mib_fit(backend, service):
    """Text, and bytes in base64; with one byte more the reply is unusable."""
    text = "x" * (4 * MIB)
    data = bytes(range(256)) * (12 * 1024)  # 3 MiB, 4 MiB in base64
    both = commands(
        {"send": text[:-1000]},
        {"send": base64.b64encode(data).decode(), "type": "binary",
         "encoding": "base64"},
    )
    backend.answers |= {
        "both": [response(both)],
        "most": [response(commands({"send": text}))],
        "more": [response(commands({"send": "a"}, {"send": f"{text}x"}))],
    }
    assert 7.9 * MIB < len(both) <= 8 * MIB
    async with websockets.connect(service.ws_url, max_size=None) as client:
        for message in ("both", "most", "more", "end"):
            await client.send(message)
        got = await received(client, 4)
    assert [len(frame) for frame in got] == [4 * MIB - 1000, 3 * MIB, 4 * MIB, 3]
    assert got[1] == data


@pytest.mark.long
async def test_body_has_five_seconds_after_the_headers(backend, service):
    """One that comes in time is carried out, a later one is unusable."""
    loop = asyncio.get_running_loop()

    async def later() -> None:
        await asyncio.sleep(1)

    never = loop.create_future()
    backend.answers |= {
        "slow": [response(REPLY)[:-9], later(), response(REPLY)[-9:]],
        "late": [response(REPLY)[:-9], never],
    }
    before = await outcomes(service)
    async with websockets.connect(service.ws_url) as client:
        await client.send("slow")
        assert await received(client, 1) == [SECRET]
        began = loop.time()
        await client.send("late")
        await client.send("end")
        assert await received(client, 1) == ["end"]
        assert loop.time() - began > 4.9
    never.cancel()
    assert added(before, await outcomes(service)) == {
        "none/invalid": 1, "send/done": 2
    }


# Plain replies: --reply=body and --reply=off.


@pytest.fixture(scope="module")
def shared_bodies(io_loop, shared):
    async def begin() -> tuple[ReplyBackend, Service]:
        backend = await shared.enter_async_context(ReplyBackend())
        service = await shared.enter_async_context(
            Service(*backend.flags(), "--reply=body", "--logging=debug")
        )
        return backend, service

    return io_loop.run_sync(begin)


@pytest.fixture
def bodies(shared_bodies) -> ReplyBackend:
    shared_bodies[0].reset()
    return shared_bodies[0]


@pytest.fixture
def body_service(shared_bodies) -> Service:
    return shared_bodies[1]


PLAIN = [
    ("text/plain", "été".encode(), "été"),
    ("text/html; charset=UTF-8", b"<p>", "<p>"),
    ("TEXT/CSV; charset=us-ascii", b"a,b", "a,b"),
    ("application/json", b'{"commands": [{"send": 1}]}',
     '{"commands": [{"send": 1}]}'),
    ("application/problem+json", b"{}", "{}"),
    ("application/octet-stream", b"x", b"x"),
    ("image/png", bytes(range(256)), bytes(range(256))),
    (None, b"OK", b"OK"),
    (MEDIA_TYPE, b'{"commands": [{"send": "a command"}]}', "a command"),
]


@pytest.mark.parametrize(("content_type", "body", "frame"), PLAIN)
async def test_body_is_one_frame(bodies, body_service, content_type, body, frame):
    """Text or binary by its type, as in a callback; commands are still read."""
    bodies.content_type = content_type
    bodies.reply = lambda event: body
    async with websockets.connect(body_service.ws_url) as client:
        for _ in range(2):
            await client.send("x")
            assert await received(client, 1) == [frame]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain; charset=latin-1", b"x"),
        ("application/json; charset=utf-16", b"{}"),
        ("text/plain", b"\xff"),
        ("text/plain", b"x" * (4 * MIB + 1)),
        (None, b"x" * (8 * MIB + 1)),
        (MEDIA_TYPE, b"OK"),
    ],
    ids=["charset", "charset-of-json", "not-utf8", "frame", "body", "commands"],
)
async def test_unusable_body_is_no_frame(bodies, body_service, content_type, body):
    """It is logged and counted, and the next message goes."""
    bodies.content_type = content_type
    bodies.reply = lambda event: body
    before, logged = await outcomes(body_service), len(body_service.log)
    async with websockets.connect(body_service.ws_url) as client:
        await client.send("one")
        await bodies.wait_for("message", 1)
        bodies.reply, bodies.content_type = (lambda event: "end"), "text/plain"
        await client.send("two")
        assert await received(client, 1) == ["end"]
    assert added(before, await outcomes(body_service)) == {
        "none/invalid": 1, "send/done": 1
    }
    assert not re.search("x{9}", await unusable_reply(body_service, logged))


async def test_empty_bodies_are_no_frames(bodies, body_service):
    """Nor are those of other responses than 2xx, and of other events."""
    async def answer(handler, event):
        handler.write("accepted")

    bodies.answers["connect"] = bodies.answers["disconnect"] = answer
    answers = iter(
        [(200, ""), (204, ""), (404, "not found"), (500, "again"), (201, "end")]
    )

    def reply(event):
        bodies.status, body = next(answers)
        return body

    bodies.content_type, bodies.reply = "text/plain", reply
    async with websockets.connect(body_service.ws_url) as client:
        for number in range(4):
            await client.send(str(number))
        assert await received(client, 1) == ["end"]
    assert [e["message"] for e in bodies.of("message")] == ["0", "1", "2", "3", "3"]


async def test_replies_may_be_off(io_loop):
    """Neither message nor connect events; `subprotocol` is read nevertheless."""
    async def decide(handler, event):
        handler.set_header("Content-Type", MEDIA_TYPE)
        handler.write({"subprotocol": "b", **json.loads(commands({"send": "x"}))})
        handler.set_header("Content-Type", MEDIA_TYPE)

    async with ReplyBackend() as backend:
        backend.answers["connect"] = decide
        backend.commands({"send": "y"}, {"state": 1})
        async with Service(*backend.flags(), "--reply=off") as service:
            async with websockets.connect(
                service.ws_url, subprotocols=["a", "b"]
            ) as client:
                assert client.subprotocol == "b"
                await client.send("one")
                await client.send("two")
                url = (await backend.wait_for("message", 2))[-1]["meta"]["send"]
                answer = await backend.call(
                    url, body="end", headers={"Content-Type": "text/plain"}
                )
                assert answer.code == 200
                got = await asyncio.wait_for(client.recv(), DEADLINE)
                assert got == "end"
            assert await outcomes(service) == {}
    assert all("state" not in event["meta"] for event in backend.of("message"))
