"""What waits to be forwarded to other instances is limited."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from service import eventually

from backends import Observer
from backends.commands import Send
from handlers.callbacks.peers import outgoing
from handlers.callbacks.peers.outgoing import Outgoing
from handlers.owners import Address

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

OWNER = Address.parse("127.0.0.1:8765")


class Outcomes(Observer):
    """Counts the commands that are dropped, by their outcome."""

    def __init__(self) -> None:
        self.dropped: list[tuple[str, str]] = []

    def commanded(self, source, command, outcome, connection_id):
        self.dropped.append((outcome, connection_id))


class SilentPeer:
    """Answers nothing until `release` is set; `got` has the frames, in order."""

    send_timeout = 1.0

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.status = 200
        self.got: list[str] = []

    async def forward(self, owner, callback):
        await self.release.wait()
        for command in json.loads(callback.body)["commands"]:
            self.got.append(command["send"])
        return SimpleNamespace(status=self.status)


@pytest.mark.parametrize(
    ("limit", "value", "size"),
    [("MAX_WAITING", 20, 1), ("MAX_WAITING_BYTES", 2000, 100)],
)
async def test_queue_is_limited(io_loop, monkeypatch, caplog, limit, value, size):
    """What is too much is dropped, with one line in the log; the rest is in order."""
    monkeypatch.setattr(outgoing, limit, value)
    monkeypatch.setattr(outgoing, "MAX_REQUEST", 2 * size)  # two in one request
    peer, outcomes = SilentPeer(), Outcomes()
    queue = Outgoing(peer, outcomes)
    texts = [f"{number:02}".ljust(size, "x") for number in range(40)]

    def add(text: str) -> None:
        queue.add(OWNER, "response", Send(text), text[:2])

    kept = value // len(texts[0]) if limit.endswith("BYTES") else value
    for text in texts:
        add(text)
    assert outcomes.dropped == [("full", text[:2]) for text in texts[kept:]]
    await eventually(lambda: queue._pairs < kept)  # the first ones are under way
    for _ in range(5):
        add(texts[0])  # some have room, others do not
    assert caplog.text.count("are dropped") == 1
    peer.release.set()
    await eventually(lambda: not queue._waiting)
    assert peer.got[:kept] == texts[:kept]
    assert (queue._pairs, queue._bytes) == (0, 0)
    add(texts[0])
    await eventually(lambda: not queue._waiting)
    assert peer.got[-1] == texts[0]
    await queue.close()


async def test_commands_for_a_dead_instance_are_counted(io_loop):
    """Each of them once, also those that were not sent before the stop."""
    peer, outcomes = SilentPeer(), Outcomes()
    queue = Outgoing(peer, outcomes)
    peer.status = 410
    peer.release.set()
    queue.add(OWNER, "response", Send("a"), "one")
    await eventually(lambda: bool(outcomes.dropped))
    peer.release.clear()
    queue.add(OWNER, "response", Send("b"), "two")
    await asyncio.sleep(0)  # it is under way
    queue.add(OWNER, "response", Send("c"), "three")
    await queue.close()
    assert outcomes.dropped[0] == ("gone", "one")
    assert ("gone", "three") in outcomes.dropped
