"""Replies: what a backend says in the response to an event."""

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import websockets
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.web import RequestHandler

pytestmark = pytest.mark.gen_test(timeout=60)

MEDIA_TYPE = "application/vnd.socketdock+json"


class ReplyBackend(RecordingBackend):
    """A backend whose responses to messages are made by `reply`."""

    def __init__(self) -> None:
        super().__init__()
        self.reply: Callable[[dict[str, Any]], object] = lambda event: {}
        self.content_type = MEDIA_TYPE
        self.answers["message"] = self._answer

    async def _answer(self, handler: RequestHandler, event: dict[str, Any]) -> None:
        reply = self.reply(event)
        if not isinstance(reply, (str, bytes)):
            reply = json.dumps(reply)
        handler.set_header("Content-Type", self.content_type)
        handler.write(reply)

    async def disconnect_of(self, connection_id: str) -> dict[str, Any]:
        """Wait for the disconnect event of one connection.

        Those of other tests' clients may arrive at any time.
        """
        found: list[dict[str, Any]] = []

        def is_found() -> bool:
            found[:] = [
                event
                for event in self.of("disconnect")
                if event["connection_id"] == connection_id
            ]
            return bool(found)

        await eventually(is_found)
        return found[0]

    def commands(self, *commands: dict[str, Any]) -> None:
        """Answer each message with these."""
        self.reply = lambda event: {"commands": list(commands)}


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module")
def shared_relay(io_loop, shared):
    async def begin() -> tuple[ReplyBackend, Service]:
        backend = await shared.enter_async_context(ReplyBackend())
        service = await shared.enter_async_context(
            Service(*backend.flags("message", "disconnect"), "--max_state_size=100")
        )
        return backend, service

    return io_loop.run_sync(begin)


@pytest.fixture
def backend(shared_relay) -> ReplyBackend:
    backend = shared_relay[0]
    backend.events.clear()
    backend.content_type = MEDIA_TYPE
    backend.reply = lambda event: {}
    return backend


@pytest.fixture
def service(shared_relay) -> Service:
    return shared_relay[1]


async def received(client: websockets.ClientConnection, number: int) -> list[Any]:
    return [await asyncio.wait_for(client.recv(), DEADLINE) for _ in range(number)]


async def test_frames_of_a_reply_arrive_in_order(backend, service):
    """Text, binary and base64, each as the client would have got it by callback."""
    binary = bytes(range(256))
    backend.commands(
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
    before = len(service.log)
    async with websockets.connect(service.ws_url) as client:
        await client.send("one")
        await client.send("two")
        assert await received(client, 1) == ["ok"]
    (event, _) = backend.of("message")
    disconnect = await backend.disconnect_of(event["meta"]["connection_id"])
    assert disconnect["meta"]["refused"] == disconnect["meta"]["undelivered"] == 0
    warnings = [line for line in service.log[before:] if "cannot be used" in line]
    assert len(warnings) == 1
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
