"""Replies: what a backend says in the response to an event."""

import asyncio
import base64
import gzip
import json
import logging
import re

import pytest
import websockets
from reply_backends import (
    MEDIA_TYPE,
    ReplyBackend,
    added,
    commands,
    outcomes,
    received,
    unusable_reply,
)
from service import DEADLINE, Service
from wire import TEXT, handshake

from backends import Observer
from backends.client import Response
from backends.http.replies import READ_AT_ONCE, Replies
from backends.loopback import LoopbackBackend
from handlers.callbacks.executor import CommandExecutor
from handlers.connections import ConnectionMap

pytestmark = pytest.mark.gen_test(timeout=60)


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module")
def shared_relay(io_loop, shared):
    async def begin() -> tuple[ReplyBackend, Service]:
        backend = await shared.enter_async_context(ReplyBackend())
        service = await shared.enter_async_context(
            Service(*backend.flags(), "--max_state_size=100", "--logging=debug")
        )
        return backend, service

    return io_loop.run_sync(begin)


@pytest.fixture
def backend(shared_relay) -> ReplyBackend:
    backend = shared_relay[0]
    backend.reset()
    return backend


@pytest.fixture
def service(shared_relay) -> Service:
    return shared_relay[1]


@pytest.mark.parametrize("size", [0, READ_AT_ONCE])
async def test_frames_of_a_reply_arrive_in_order(backend, service, size):
    """Text, binary and base64, each as the client would have got it by callback."""
    binary = bytes(range(256))
    backend.commands(
        {"state": None, "unknown": "x" * size},
        {"send": "été"},
        {"send": "été", "type": "binary"},
        {"send": base64.b64encode(binary).decode(), "type": "binary",
         "encoding": "base64"},
        {"send": "", "unknown": 1},
    )
    async with websockets.connect(service.ws_url) as client:
        await client.send("hello")
        got = await received(client, 4)
    assert got == ["été", "été".encode(), binary, ""]


async def test_close_follows_the_frames(backend, service):
    """With code and reason, or 1000."""
    backend.commands(
        {"send": "bye"}, {"close": {"code": 4001, "reason": "done"}}, {"send": "late"}
    )
    async with websockets.connect(service.ws_url) as client:
        await client.send("hello")
        assert await received(client, 1) == ["bye"]
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), DEADLINE)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "done")


async def test_state_returns_in_later_events(backend, service):
    """Until it is removed; the disconnect event has it, too."""
    states = iter([{"n": [1, "é"]}, None, "last"])
    backend.reply = lambda event: {"commands": [{"state": next(states)}, {"send": "x"}]}
    async with websockets.connect(service.ws_url) as client:
        for _ in range(3):
            await client.send("hello")
            await received(client, 1)
    (event, *_) = backend.of("message")
    disconnect = await backend.disconnect_of(event["meta"]["connection_id"])
    got = [event["meta"].get("state", "absent") for event in backend.of("message")]
    assert got == ["absent", {"n": [1, "é"]}, "absent"]
    assert disconnect["meta"]["state"] == "last"


async def test_other_connections_are_reached(backend, service):
    """One, several, and one that is not open."""
    async with (
        websockets.connect(service.ws_url) as first,
        websockets.connect(service.ws_url) as second,
    ):
        ids = []
        for client in (first, second):
            await client.send("id")
            ids.append((await backend.wait_for("message", len(ids) + 1))[-1]["meta"]
                       ["connection_id"])
        backend.commands(
            {"send": "to all", "connection_ids": [*ids, "0" * 32]},
            {"send": "to the other", "connection_id": ids[1]},
        )
        await first.send("go")
        assert await received(second, 2) == ["to all", "to the other"]
        assert await received(first, 1) == ["to all"]


MALFORMED = {
    "not-json": b"{",
    "not-utf8": b'{"commands": [{"send": "\xff"}]}',
    "list": b"[]",
    "commands-object": b'{"commands": {}}',
    "command-string": b'{"commands": ["x"]}',
    "nothing": b'{"commands": [{}]}',
    "two": b'{"commands": [{"send": "x", "close": true}]}',
    "send-number": b'{"commands": [{"send": 1}]}',
    "lone-surrogate": b'{"commands": [{"send": "\\ud800"}]}',
    "type": b'{"commands": [{"send": "x", "type": "ping"}]}',
    "encoding": b'{"commands": [{"send": "eA==", "encoding": "base64"}]}',
    "base64": b'{"commands": [{"send": "e", "type": "binary", "encoding": "base64"}]}',
    "close-false": b'{"commands": [{"close": false}]}',
    "close-code": b'{"commands": [{"close": {"code": 1005}}]}',
    "state-too-large": b'{"commands": [{"send": "x"}, {"state": "%b"}]}' % (b"x" * 99),
    "state-too-deep": b'{"commands": [{"send": "x"}, {"state": %b}]}'
    % (b"[" * 300 + b"]" * 300),
    "frame-too-large": b'{"commands": [{"send": "x"}, {"send": "%b"}]}'
    % (b"x" * (4 * 2**20 + 1)),
    "empty": b"",
    "id": b'{"commands": [{"send": "x", "connection_id": 1}]}',
    "both-ids": b'{"commands": [{"send": "x", "connection_id": "a",'
    b' "connection_ids": ["a"]}]}',
    "too-many": b'{"commands": [{"send": "x", "connection_ids": [%b]}]}'
    % b",".join([b'"a"'] * 10_001),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_reply_changes_nothing(backend, service, body):
    """One warning; the event is accepted, and the next message goes."""
    replies = iter([body, b'{"commands": [{"send": "ok"}]}'])
    backend.reply = lambda event: next(replies)
    before, counts = len(service.log), await outcomes(service)
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await client.send("two")
        assert await received(client, 1) == ["ok"]
    counts = added(counts, await outcomes(service))
    assert counts == {"none/invalid": 1, "send/done": 1}
    (event, _) = backend.of("message")
    disconnect = await backend.disconnect_of(event["meta"]["connection_id"])
    assert disconnect["meta"]["refused"] == disconnect["meta"]["undelivered"] == 0
    warning = await unusable_reply(service, before)
    assert re.search(r"^\[W .* connection \w{32}: the reply to \w{32}-1 ", warning)
    assert "xxx" not in warning
    assert not service.tracebacks


async def test_other_media_types_are_not_read(backend, service):
    """A backend that answers OK, or JSON, sends nothing."""
    backend.content_type = "application/json"
    backend.commands({"send": "x"})
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await backend.wait_for("message", 1)
        backend.content_type = f"{MEDIA_TYPE.upper()}; charset=utf-8"
        backend.commands({"send": "y"})
        await client.send("two")
        assert await received(client, 1) == ["y"]


async def test_reply_and_callbacks_are_counted_by_outcome(backend, service):
    """What is for a connection that is not open is dropped."""
    before = await outcomes(service)
    nobody = "0" * 32
    backend.commands(
        {"send": "x"}, {"state": 1}, {"send": "y", "connection_ids": [nobody] * 3},
        {"state": 1, "connection_id": nobody}, {"close": True}, {"send": "z"},
        {"close": True, "connection_id": nobody}, {"state": 1},
    )
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        with pytest.raises(websockets.ConnectionClosedOK):
            await received(client, 2)
    expected = {
        "send/done": 1, "state/done": 1, "close/done": 1,
        "send/gone": 4, "state/gone": 2, "close/gone": 1,
    }
    async with asyncio.timeout(DEADLINE):
        while added(before, await outcomes(service)) != expected:
            await asyncio.sleep(0.01)


async def test_no_commands_are_no_reply(backend, service):
    """An empty list, no list, or 204 with the media type of commands."""
    before, logged = await outcomes(service), len(service.log)
    async with websockets.connect(service.ws_url) as client:
        for reply, status in (({"commands": []}, 200), ({}, 201), ("", 204)):
            backend.reply, backend.status = (lambda event, r=reply: r), status
            await client.send("x")
            await backend.wait_for("message", len(backend.of("message")) + 1)
        backend.commands({"send": "end"})
        backend.status = 202
        await client.send("last")
        assert await received(client, 1) == ["end"]
    assert added(before, await outcomes(service)) == {"send/done": 1}
    assert not [line for line in service.log[logged:] if "cannot be used" in line]


@pytest.mark.parametrize("status", [400, 500])
async def test_only_a_2xx_is_read(backend, service, status):
    """Other responses say whether the event is refused or retried, nothing else."""
    def reply(event):
        backend.status = status if len(backend.of("message")) == 1 else 200
        return {"commands": [{"send": str(backend.status)}]}

    backend.reply = reply
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await client.send("two")
        assert await received(client, 1) == ["200"]


async def test_disconnect_responses_are_not_read(backend, service):
    """Even if they have commands for an open connection."""
    async def answer(handler, event):
        handler.set_header("Content-Type", MEDIA_TYPE)
        handler.write(commands({"send": "from disconnect", "connection_id": other}))

    async with websockets.connect(service.ws_url) as client:
        await client.send("id")
        other = (await backend.wait_for("message", 1))[0]["meta"]["connection_id"]
        backend.answers["disconnect"] = answer
        try:
            async with websockets.connect(service.ws_url) as second:
                await second.send("id")
                event = (await backend.wait_for("message", 2))[-1]
            await backend.disconnect_of(event["meta"]["connection_id"])
        finally:
            del backend.answers["disconnect"]
        backend.commands({"send": "from message"})
        await client.send("x")
        assert await received(client, 1) == ["from message"]


# Verdicts.


@pytest.fixture
def decide(backend):
    """Let a test answer connect events: `decide(body, media_type, status)`."""
    def decide(body, media_type=MEDIA_TYPE, status=200, before=None):
        async def answer(handler, event):
            if before is not None:
                await before(event)
            handler.set_status(status)
            handler.set_header("Content-Type", media_type)
            handler.write(body)

        backend.answers["connect"] = answer

    yield decide
    backend.answers.pop("connect", None)


async def test_frames_of_a_verdict_follow_the_101(backend, service, decide):
    """After those of earlier callbacks, before those of later ones."""
    async def call(event):
        sent = await backend.call(
            event["meta"]["send"], body="early", headers={"Content-Type": "text/plain"}
        )
        assert sent.code == 202

    decide(commands({"send": "a"}, {"send": "b", "type": "binary"}, {"send": "c"}),
           before=call)
    reader, writer = await asyncio.open_connection(
        *service.ws_url.removeprefix("ws://").removesuffix("/ws").split(":")
    )
    writer.write(handshake())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)
    assert head.startswith(b"HTTP/1.1 101 ")
    (event,) = backend.of("connect")
    sent = await backend.call(
        event["meta"]["send"], body="late", headers={"Content-Type": "text/plain"}
    )
    assert sent.code == 200
    expected = b"\x81\x05early\x81\x01a\x82\x01b\x81\x01c\x81\x04late"
    got = await asyncio.wait_for(reader.readexactly(len(expected)), DEADLINE)
    assert got == expected and TEXT == 1
    writer.close()


async def test_verdict_of_many_frames_is_not_overtaken(backend, service, decide):
    """A callback after the 101 is behind all of them."""
    decide(commands(*({"send": str(number)} for number in range(5000))))
    async with websockets.connect(service.ws_url) as client:
        url = backend.of("connect")[-1]["meta"]["send"]
        sent = await backend.call(url, body="x", headers={"Content-Type": "text/plain"})
        assert sent.code == 200
        assert await received(client, 5001) == [*map(str, range(5000)), "x"]


async def test_verdict_with_state_and_subprotocol(backend, service, decide):
    """`subprotocol` stands beside the commands."""
    decide(json.dumps({"subprotocol": "b", "commands": [{"state": {"user": 7}}]}))
    async with websockets.connect(service.ws_url, subprotocols=["a", "b"]) as client:
        assert client.subprotocol == "b"
        await client.send("x")
        (event,) = await backend.wait_for("message", 1)
    assert event["meta"]["state"] == {"user": 7}


async def test_verdict_may_close(backend, service, decide):
    """Right after the 101 and its frames; the disconnect event has the state."""
    decide(commands({"state": 5}, {"send": "full"}, {"close": {"code": 4009}}))
    async with websockets.connect(service.ws_url) as client:
        with pytest.raises(websockets.ConnectionClosed) as closed:
            assert await received(client, 1) == ["full"]
            await received(client, 1)
    assert closed.value.rcvd.code == 4009
    (event,) = backend.of("connect")
    meta = (await backend.disconnect_of(event["meta"]["connection_id"]))["meta"]
    assert (meta["code"], meta["initiator"], meta["state"]) == (4009, "backend", 5)


async def test_verdict_reaches_other_connections(backend, service, decide):
    async with websockets.connect(service.ws_url) as first:
        await first.send("id")
        (event,) = await backend.wait_for("message", 1)
        decide(commands({"send": "somebody has come",
                         "connection_id": event["meta"]["connection_id"]}))
        async with websockets.connect(service.ws_url):
            assert await received(first, 1) == ["somebody has come"]


async def test_plain_json_of_a_verdict_has_no_commands(backend, service, decide):
    """Only `subprotocol` is read."""
    body = {"subprotocol": "b", "commands": [{"send": "x"}, {"state": 1}]}
    decide(json.dumps(body), "application/json")
    backend.commands({"send": "end"})
    async with websockets.connect(service.ws_url, subprotocols=["a", "b"]) as client:
        assert client.subprotocol == "b"
        await client.send("x")
        assert await received(client, 1) == ["end"]
    assert "state" not in backend.of("message")[0]["meta"]


UNUSABLE_VERDICTS = {
    "not-json": b"{",
    "wrong-member": b'{"subprotocol": "b", "commands": [{"send": 1}]}',
    "empty": b"",
    "state": b'{"commands": [{"state": "%b"}]}' % (b"x" * 99),
    "large": b'{"commands": []}' + b" " * (8 * 2**20),
}


@pytest.mark.parametrize("body", UNUSABLE_VERDICTS.values(), ids=UNUSABLE_VERDICTS)
async def test_unusable_verdict_accepts(backend, service, decide, body):
    """The status alone decides; one warning, without a subprotocol."""
    decide(body)
    logged, before = len(service.log), await outcomes(service)
    backend.commands({"send": "end"})
    async with websockets.connect(service.ws_url, subprotocols=["b"]) as client:
        assert client.subprotocol is None
        await client.send("x")
        assert await received(client, 1) == ["end"]
    assert added(before, await outcomes(service)) == {
        "none/invalid": 1, "send/done": 1
    }
    warning = await unusable_reply(service, logged)
    assert "-connect cannot" in warning


@pytest.mark.parametrize(
    ("status", "body", "answered"),
    [
        (403, {}, 403),
        (500, {}, 503),
        (200, {"subprotocol": "not offered"}, 503),
    ],
)
async def test_rejected_handshake_carries_out_nothing(
    backend, service, decide, status, body, answered
):
    """Refused by the backend, or without a decision that can be used."""
    async with websockets.connect(service.ws_url) as first:
        await first.send("id")
        (event,) = await backend.wait_for("message", 1)
        other = {"send": "x", "connection_id": event["meta"]["connection_id"]}
        decide(json.dumps({**body, "commands": [other, {"send": "y"}]}), status=status)
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(service.ws_url)
        assert refused.value.response.status_code == answered
        backend.commands({"send": "end"})
        await first.send("x")
        assert await received(first, 1) == ["end"]


@pytest.mark.once
@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_large_reply_is_read_in_turns(io_loop, coding):
    """The loop serves others while ten thousand commands are parsed."""
    seen: list[tuple[str, ...]] = []

    class Commanded(Observer):
        def commanded(self, *arguments: str) -> None:
            seen.append(arguments)

    class Connection:
        id = "0" * 32

    executor = CommandExecutor(1000, 1000, Observer())
    executor.begin(ConnectionMap(), LoopbackBackend())
    replies = Replies("commands", 2**23, executor, Commanded())
    body = commands(*[{"send": "x", "unknown": "y" * 100}] * 9999, {"send": 1})
    headers = {"content-type": MEDIA_TYPE, "content-encoding": coding}
    if coding == "gzip":
        body = gzip.compress(body)
    done = replies.carry_out(Connection(), "event", Response(200, headers, body))
    assert done is not None
    turns = 0
    while not done.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 5
    assert seen == [("response", "none", "invalid", Connection.id)]


class BrokenExecutor:
    """An executor with a bug."""

    def check(self, commands):
        raise RuntimeError("bug")

    carry_out = check


def test_bug_in_a_reply_ends_it(caplog):
    """It is logged; the delivery of the connection's messages goes on."""
    class Connection:
        id = "0" * 32

    replies = Replies("commands", 1000, BrokenExecutor(), Observer())
    reply = Response(200, {"content-type": MEDIA_TYPE}, commands({"send": "x"}))
    with caplog.at_level(logging.ERROR):
        assert replies.carry_out(Connection(), "event", reply) is None
    assert "bug in the reply to event" in caplog.text
