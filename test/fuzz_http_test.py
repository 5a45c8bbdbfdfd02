"""For any bytes over HTTP, the relay works, and other clients are not affected.

Hypothesis makes callback requests and backend's responses: valid ones, split at any
place, and mutations of them. `make fuzz` tries many more.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import websockets
from faults import Received, ScriptedBackend, memory, send_raw
from fuzzing import GROWTH, examples, in_pieces
from hypothesis import given
from hypothesis import strategies as st
from service import DEADLINE, Service, eventually

ID = b"{id-of-an-open-connection-here}}"  # as long as an id
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
UNKNOWN = b"0" * len(ID)
SEND = b"POST /socket/" + ID + b"/send HTTP/1.1\r\nHost: relay\r\n"


# Bytes.

# Where parsers disagree with each other.
TOKENS = (
    st.sampled_from([b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b"\x0b", b"\x85"])
    | st.sampled_from([b":", b";", b",", b"-", b"+", b"_", b'"', b"0x", b"%0d%0a"])
    | st.sampled_from([b"9" * 30, b"f" * 17, b"x" * 70_000, b"100 ", b"204 ", b"304 "])
    | st.sampled_from([b"\r\n\r\n", b"0\r\n\r\n", b"HTTP/1.1", b"HTTP/1.0"])
    | st.sampled_from(
        [
            b"Content-Length: 3\r\n",
            b"Content-Length: 0\r\n",
            b"Content-Length:\r\n 1",
            b"Transfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: x\r\n",
            b"Connection: close\r\n",
            b"Connection: keep-alive\r\n",
            b"Upgrade: websocket\r\nConnection: upgrade\r\n",
            b"Expect: 100-continue\r\n",
            b"Host: x\r\n",
        ]
    )
    | st.binary(max_size=20)
)


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """A mutation of one of `valid`."""
    data = draw(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 30)))
        middle = draw(
            TOKENS | st.just(b"") | st.just(data[start:end] * 2) | st.just(data)
        )
        data = data[:start] + middle + data[end:]
    return data


@st.composite
def framed(draw: st.DrawFn, body: bytes) -> bytes:
    """The end of a head, and a body: with its length, or in chunks."""
    if draw(st.booleans()):
        return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    chunks, rest = b"", body
    while rest:
        size = draw(st.integers(1, len(rest)))
        chunks += b"%x\r\n%b\r\n" % (size, rest[:size])
        rest = rest[size:]
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@st.composite
def requests(draw: st.DrawFn, bodies: st.SearchStrategy[bytes]) -> bytes:
    """Callback requests, some of which reach the client."""
    method, path = draw(
        st.sampled_from(
            [
                (b"POST", b"/socket/" + ID + b"/send?type=binary"),
                (b"POST", b"/socket/" + ID + b"/send"),
                (b"POST", b"/socket/" + UNKNOWN + b"/send?type=text"),
                (b"POST", b"/socket/" + UNKNOWN + b"/disconnect"),
                (b"DELETE", b"/socket/" + UNKNOWN),
                (b"GET", b"/socket/" + ID),
                (b"GET", b"/livez"),
                (b"GET", b"/readyz"),
                (b"GET", b"/ws"),
                (b"PUT", b"/%00/../"),
            ]
        )
    )
    extra = draw(
        st.sampled_from([b"", b"Content-Type: text/plain; charset=x\r\n", b"X: y\r\n"])
    )
    head = b"%b %b HTTP/1.1\r\nHost: relay\r\n%b" % (method, path, extra)
    return head + draw(framed(draw(bodies)))


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Responses of a backend to an event."""
    status = draw(
        st.sampled_from([200, 201, 204, 302, 400, 401, 403, 404, 429, 500, 503, 999])
    )
    head = b"HTTP/1.1 %d Scripted\r\n" % status
    for name in draw(
        st.lists(
            st.sampled_from(
                [b"Content-Type", b"WWW-Authenticate", b"Retry-After", b"Set-Cookie"]
            ),
            max_size=3,
        )
    ):
        head += name + b": " + draw(TOKENS | st.sampled_from([b"1", b"x"])) + b"\r\n"
    body = draw(
        st.binary(max_size=50)
        | st.sampled_from(
            [b'{"subprotocol": "a"}', b'{"subprotocol": "\\r\\n"}', b"[" * 9999]
        )
    )
    if draw(st.booleans()):
        return head + draw(framed(body))
    return head + b"\r\n" + body


# The relay.


@dataclass
class Relay:
    """A relay, a client that must not be affected, and their runner."""

    run: Callable[..., object]
    service: Service
    backend: ScriptedBackend
    client: websockets.ClientConnection
    id: bytes

    async def send_raw(self, pieces: list[bytes], **options: object) -> Received:
        """Speak on a bare connection to the callbacks; `ID` is the client's."""
        whole = b"".join(pieces).replace(ID, self.id)
        start, cut = 0, []
        for piece in pieces:
            cut.append(whole[start : start + len(piece)])
            start += len(piece)
        url = self.service.callback_url
        return await send_raw(url, *cut, deadline=DEADLINE, **options)

    async def frames(self) -> list[str | bytes]:
        """Return the frames received so far; a valid callback marks the end."""
        mark = b"mark of this test"
        length = b"Content-Length: %d\r\n\r\n" % len(mark)
        received = await self.send_raw([SEND + length + mark], answers=1)
        assert received.statuses == [200]
        frames = []
        while (frame := await asyncio.wait_for(self.client.recv(), DEADLINE)) != mark:
            frames.append(frame)
        assert not self.service.tracebacks, "\n".join(self.service.log)
        return frames


@pytest.fixture(scope="module")
def relay(request) -> Iterator[Relay]:
    """One process for all examples, which must not grow."""
    with asyncio.Runner() as runner:

        async def begin() -> Relay:
            backend = await ScriptedBackend(lambda kind: OK).__aenter__()
            service = await Service(
                *backend.flags(),
                *getattr(request, "param", ()),
                "--breaker_attempts=1000000000",
                "--delivery_timeout=5",
            ).__aenter__()
            client = await websockets.connect(service.ws_url, ping_interval=None)
            (event,) = await backend.wait_for("connect", 1)
            id_ = event["meta"]["connection_id"].encode()
            return Relay(runner.run, service, backend, client, id_)

        async def end() -> None:
            for context in (relay.client, relay.service, relay.backend):
                await context.__aexit__(None, None, None)

        relay = runner.run(begin())
        yield relay
        runner.run(end())


@pytest.fixture
def no_growth(relay) -> Iterator[None]:
    """Memory does not grow after a warm-up."""
    relay.run(relay.frames())
    before = memory(relay.service.process.pid)
    yield
    assert memory(relay.service.process.pid) < before + GROWTH


# Callbacks.

on_each_listener = pytest.mark.parametrize(
    "relay",
    [(), ("--callbackport=0",)],
    ids=["one-listener", "two-listeners"],
    indirect=True,
)


@on_each_listener
@given(
    bodies=st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    data=st.data(),
)
@examples(40)
def test_valid_requests_are_executed_for_every_split(
    relay, no_growth, bodies, data
):
    """Each becomes one frame, in order, and gets its response."""
    whole = [SEND + data.draw(framed(body)) for body in bodies]
    pieces = data.draw(in_pieces(st.just(b"".join(whole))))

    async def check() -> None:
        received = await relay.send_raw(pieces, answers=len(bodies))
        assert received.statuses == [200] * len(bodies)
        assert await relay.frames() == bodies

    relay.run(check())


@on_each_listener
@given(
    pieces=in_pieces(
        mutated(
            st.lists(requests(st.binary(max_size=100)), min_size=1, max_size=3).map(
                b"".join
            )
        )
    )
)
@examples(120)
def test_mutated_requests_are_answered_or_ended(relay, no_growth, pieces):
    """Each response is complete, none is a 500, and no frame is sent without one."""

    async def check() -> None:
        received = await relay.send_raw(pieces, half_close=True)
        assert received.ended
        assert not {500, 502, 503}.intersection(received.statuses)
        assert len(await relay.frames()) <= b"".join(pieces).count(b"send")

    relay.run(check())


def test_garbage_behind_a_rejected_request_delays_nothing(relay):
    """A request without Host, then other bytes: one response, and the end."""

    async def check() -> None:
        request = b"GET /livez HTTP/1.1\r\nX: y\r\n\r\n"
        received = await relay.send_raw([request + b"\xfcA\x8a"])
        assert received.ended
        assert received.statuses == [400]

    relay.run(check())


# The backend's answers.

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
    b"Sec-WebSocket-Protocol: a, b\r\n\r\n"
)
PASSED_ON = {"content-type", "www-authenticate", "retry-after"}
OURS = {"date", "content-length", "upgrade", "connection", "sec-websocket-accept",
        "sec-websocket-protocol"}


@given(answer=answers() | mutated(answers()))
@examples(100)
def test_any_response_to_a_connect_event_is_a_decision_or_none(
    relay, no_growth, answer
):
    """The client gets one complete response, with permitted headers only."""

    async def check() -> None:
        todo = [answer + ScriptedBackend.CUT]
        relay.backend.script = lambda kind: (
            todo.pop() if kind == "connect" and todo else OK
        )
        received = await send_raw(
            relay.service.ws_url, HANDSHAKE, answers=1, deadline=DEADLINE
        )
        ((status, headers, body),) = received.answers()
        assert status in (101, 401, 403, 404, 429, 503)
        assert headers.keys() <= PASSED_ON | OURS
        assert len(body) <= 4096
        if status == 101:
            assert headers.get("sec-websocket-protocol", "a") in ("a", "b")
        assert await relay.frames() == []

    relay.run(check())


@given(
    todo=st.lists(answers() | mutated(answers()), min_size=8, max_size=8),
)
@examples(8)
def test_any_responses_to_messages_keep_their_order(relay, no_growth, todo):
    """Each message is retried until accepted or refused, then the next is sent."""

    rest = list(todo)

    async def talk() -> None:
        async with websockets.connect(relay.service.ws_url) as client:
            await client.send("one")
            await client.send("two")

    def of(kind: str, connection_id: str) -> list[dict[str, Any]]:
        return [
            event
            for event in relay.backend.of(kind)
            if event["meta"]["connection_id"] == connection_id
        ]

    async def check() -> None:
        relay.backend.events.clear()
        relay.backend.script = lambda kind: (
            rest.pop() + ScriptedBackend.CUT if kind == "message" and rest else OK
        )
        await asyncio.gather(*(talk() for _ in range(4)))
        # Disconnect events of clients of other tests may still arrive.
        connects = relay.backend.of("connect")
        assert len(connects) == 4
        for connect in connects:
            id_ = connect["meta"]["connection_id"]
            await eventually(lambda id_=id_: of("disconnect", id_))
            came = [event["message"] for event in of("message", id_)]
            assert came == sorted(came) and set(came) == {"one", "two"}
            assert of("disconnect", id_)[0]["meta"]["undelivered"] == 0
        assert await relay.frames() == []

    relay.run(check())
