"""examples/acapy_transport.py, with the real relay.

ACA-Py itself is a large package: where it is not installed, `STAND_IN` has the names
that the example imports, with the signatures of ACA-Py 1.7.0.
"""

import asyncio
import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

import pytest
import websockets
from ports import free_ports
from service import DEADLINE, PROJECT, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]



class MessageParseError(Exception):
    pass


class WireFormatParseError(Exception):
    pass


class BaseInboundTransport:
    """The constructor, and how it creates sessions."""

    def __init__(
        self, scheme, create_session, *, max_message_size=0, is_external=False,
        wire_format=None, root_profile=None,
    ):
        self.scheme = scheme
        self.max_message_size = max_message_size
        self._create_session = create_session

    def create_session(
        self, *, accept_undelivered=False, can_respond=False, client_info=None,
        wire_format=None,
    ):
        return self._create_session(
            accept_undelivered=accept_undelivered,
            can_respond=can_respond,
            client_info=client_info,
            wire_format=wire_format,
            transport_type=self.scheme,
        )


STAND_IN = {
    "acapy_agent.messaging.error": MessageParseError,
    "acapy_agent.transport.error": WireFormatParseError,
    "acapy_agent.transport.inbound.base": BaseInboundTransport,
}


class Session:
    """What ACA-Py knows of a client: it answers `ping`, and rejects `{`."""

    def __init__(self, parse_error: type[Exception]) -> None:
        self.parse_error = parse_error
        self.received: list[str | bytes] = []
        self.frame: str | bytes | None = None
        self.returned: str | bytes | None = None
        self.closed = False
        self._changed = asyncio.Event()

    async def receive(self, payload: str | bytes) -> None:
        if payload == "{":
            raise self.parse_error("not a message")
        self.received.append(payload)
        if payload == "ping":
            self.answer("pong")

    def answer(self, frame: str | bytes) -> None:
        """Let `frame` be the response; ACA-Py has at most one."""
        self.frame = frame
        self._changed.set()

    async def wait_response(self) -> str | bytes | None:
        while not self.closed:
            if self.frame is not None:
                return self.frame
            self._changed.clear()
            await self._changed.wait()
        return None

    def clear_response(self) -> None:
        self.frame = None

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.returned = self.frame
        self._changed.set()


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example's module, with ACA-Py or the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            importlib.import_module("acapy_agent.transport.inbound.base")
        except ImportError:
            for path, member in STAND_IN.items():
                module = ModuleType(path)
                setattr(module, member.__name__, member)
                patch.setitem(sys.modules, path, module)
                for end in [i for i, letter in enumerate(path) if letter == "."]:
                    package = path[:end]
                    patch.setitem(sys.modules, package, ModuleType(package))
        patch.syspath_prepend(str(PROJECT))
        # As ACA-Py imports it.
        yield importlib.import_module("examples.acapy_transport")
        del sys.modules["examples.acapy_transport"]


class Agent:
    """ACA-Py with the transport, and the sessions that it has created."""

    def __init__(self, example: ModuleType) -> None:
        self.port = free_ports(1)
        self.sessions: list[Session] = []
        self.asked: list[dict[str, Any]] = []
        self.parse_error = example.WireFormatParseError
        self.transport = example.SocketDockTransport(
            "127.0.0.1",
            str(self.port),
            self.create_session,
            max_message_size=2_097_152,
            root_profile=None,
        )

    async def create_session(self, **asked: Any) -> Session:
        self.asked.append(asked)
        self.sessions.append(Session(self.parse_error))
        return self.sessions[-1]


@contextlib.asynccontextmanager
async def mediator(
    example: ModuleType, *flags: str
) -> AsyncIterator[tuple[Agent, Service]]:
    """ACA-Py behind a relay."""
    agent = Agent(example)
    await agent.transport.start()
    try:
        async with Service(
            "--backend=http",
            f"--messageuri=http://127.0.0.1:{agent.port}/message",
            f"--disconnecturi=http://127.0.0.1:{agent.port}/disconnect",
            *flags,
        ) as relay:
            yield agent, relay
    finally:
        await agent.transport.stop()


async def receive(client: Any) -> str | bytes:
    return await asyncio.wait_for(client.recv(), DEADLINE)


async def test_session_lives_as_long_as_the_connection(io_loop, example):
    """One session for all messages; it can answer at any time; it ends with both."""
    async with mediator(example, "--callback_capability") as (agent, relay):
        async with websockets.connect(relay.ws_url) as client:
            await client.send("ping")
            assert await receive(client) == "pong"
            await client.send(b"\xff\x00")
            await eventually(lambda: len(agent.sessions[0].received) == 2)
            (session,) = agent.sessions
            assert session.received == ["ping", b"\xff\x00"]
            for frame in ("later", b"packed"):
                await eventually(lambda: session.frame is None)
                session.answer(frame)
                assert await receive(client) == frame
            await eventually(lambda: session.frame is None)
        await eventually(lambda: session.closed and not agent.transport.sessions)
        assert session.returned is None
    assert agent.asked == [
        {
            "accept_undelivered": True,
            "can_respond": True,
            "client_info": None,
            "wire_format": None,
            "transport_type": "ws",
        }
    ]


async def test_message_that_is_none_is_refused_once(io_loop, example):
    """The connection stays open, and the next message is taken."""
    async with mediator(example) as (agent, relay):
        async with websockets.connect(relay.ws_url) as client:
            await client.send("{")
            await client.send("ping")
            assert await receive(client) == "pong"
        (session,) = agent.sessions
        assert session.received == ["ping"]


async def test_frame_for_a_client_that_is_gone_is_returned(io_loop, example):
    """ACA-Py gets it back, and may queue it."""
    agent = Agent(example)
    await agent.transport.start()
    try:
        async with Service(
            "--backend=http", f"--messageuri=http://127.0.0.1:{agent.port}/message"
        ) as relay:
            async with websockets.connect(relay.ws_url) as client:
                await client.send("hello")
                await eventually(lambda: bool(agent.sessions))
            (session,) = agent.sessions
            assert not session.closed  # without --disconnecturi nobody says it
            session.answer("late")
            await eventually(lambda: session.closed)
            assert session.returned == "late"
            assert not agent.transport.sessions
    finally:
        await agent.transport.stop()


async def test_stop_closes_the_sessions(io_loop, example):
    """The clients stay connected to the relay, and the next start has new sessions."""
    async with mediator(example) as (agent, relay):
        async with websockets.connect(relay.ws_url) as client:
            await client.send("ping")
            assert await receive(client) == "pong"
            await agent.transport.stop()
            assert agent.sessions[0].closed and not agent.transport.sessions
            await agent.transport.start()
            await client.send("ping")
            assert await receive(client) == "pong"
            assert len(agent.sessions) == 2
