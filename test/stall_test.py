"""After a stall longer than its deadlines, the relay reads before it checks them."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import websockets
from certificates import Authority
from faults import (
    Attempt,
    FaultyBackend,
    Reply,
    ScriptedBackend,
    leave,
    talkers,
)
from service import DEADLINE, RecordingBackend, Service, eventually, tcp_server

pytestmark = pytest.mark.gen_test(timeout=60)

LOOPS = pytest.mark.parametrize("loop_name", ["uvloop", "asyncio"])


class Stopped:
    """A relay that is stopped while the block runs, and then until `seconds` passed."""

    def __init__(self, service: Service, seconds: float) -> None:
        self.process = service.process
        self.seconds = seconds

    async def __aenter__(self) -> None:
        self.due = asyncio.get_running_loop().time() + self.seconds
        self.process.send_signal(signal.SIGSTOP)
        state = f"/proc/{self.process.pid}/stat"

        def is_stopped() -> bool:
            with open(state) as file:
                return file.read().rpartition(") ")[2].startswith("T")

        await eventually(is_stopped)

    async def __aexit__(self, *error: object) -> None:
        loop = asyncio.get_running_loop()
        await eventually(lambda: loop.time() > self.due)  # longer than the deadline
        os.kill(self.process.pid, signal.SIGCONT)


@LOOPS
async def test_decision_during_a_stall_counts(io_loop, loop_name):
    """Although --handshake_timeout has passed."""
    asked, go_on, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def decide(handler, event) -> None:
        asked.set()
        await go_on.wait()
        asyncio.get_running_loop().call_soon(answered.set)

    async with RecordingBackend() as backend:
        backend.answers["connect"] = decide
        flags = ("--handshake_timeout=3", f"--event_loop={loop_name}")
        async with Service(*backend.flags(), *flags) as service:
            connecting = asyncio.ensure_future(websockets.connect(service.ws_url))
            await asyncio.wait_for(asked.wait(), DEADLINE)
            async with Stopped(service, 4):
                go_on.set()
                await asyncio.wait_for(answered.wait(), DEADLINE)
            async with await connecting:
                pass


class Held:
    """A point where a test's peer waits until the test lets it continue."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self.passed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def here(self) -> AsyncIterator[None]:
        """Wait before the block, and report when it has ended."""
        self.reached.set()
        await self.go_on.wait()
        yield
        self.passed.set()

    async def passes_while(self, service: Service, seconds: float) -> None:
        """Stop the relay for `seconds`; the peer continues meanwhile."""
        await asyncio.wait_for(self.reached.wait(), DEADLINE)
        async with Stopped(service, seconds):
            self.go_on.set()
            await asyncio.wait_for(self.passed.wait(), DEADLINE)


@LOOPS
async def test_rest_of_a_body_during_a_stall_counts(io_loop, loop_name):
    """Although its 5 s have passed."""
    held = Held()
    body = b'{"subprotocol": "b"}'

    async def on_client(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body[:9])
        await asyncio.sleep(0.5)  # for the relay to read it: that sets its deadline
        async with held.here():
            writer.write(body[9:])
            await writer.drain()
        await reader.read()

    async with tcp_server(on_client) as port:
        flags = (
            "--backend=http",
            f"--messageuri=http://127.0.0.1:{port}/message",
            f"--connecturi=http://127.0.0.1:{port}/connect",
            "--handshake_timeout=30",
            f"--event_loop={loop_name}",
        )
        async with Service(*flags) as service:
            connecting = asyncio.ensure_future(
                websockets.connect(service.ws_url, subprotocols=["a", "b"])
            )
            await held.passes_while(service, 6)
            async with await connecting as client:
                assert client.subprotocol == "b"


@LOOPS
async def test_tls_handshake_continues_after_a_stall(io_loop, loop_name, tmp_path):
    """--backend_connect_timeout has passed, but the next step waits unread."""
    held = Held()
    authority = Authority(tmp_path)

    async def on_client(reader, writer) -> None:
        hello = await reader.read(65536)
        async with held.here():
            from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
            to_server.write(hello)
            writer.write(await from_server.read(65536))
            await writer.drain()
        await asyncio.wait(
            [
                asyncio.ensure_future(pipe(reader, to_server)),
                asyncio.ensure_future(pipe(from_server, writer)),
            ]
        )

    async def pipe(reader, writer) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def answer(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    context = authority.server().server_context()
    async with (
        tcp_server(answer, ssl=context) as port,
        tcp_server(on_client) as held_at,
    ):
        flags = (
            "--backend=http",
            f"--messageuri=https://localhost:{held_at}/message",
            f"--connecturi=https://localhost:{held_at}/connect",
            f"--backend_ca={authority.path}",
            "--backend_connect_timeout=1.5",
            f"--event_loop={loop_name}",
        )
        async with Service(*flags) as service:
            connecting = asyncio.ensure_future(websockets.connect(service.ws_url))
            await held.passes_while(service, 2.5)
            async with await connecting:
                pass


@LOOPS
async def test_messages_that_failed_before_a_stall_are_retried(
    io_loop, loop_name
):
    """--delivery_timeout has passed, but there were no attempts meanwhile."""
    is_back, taken, count = False, set(), 8

    async def answer(handler, event) -> None:
        handler.set_status(200 if is_back else 503)
        if is_back:
            taken.add(event["meta"]["connection_id"])

    flags = ("--delivery_timeout=4", "--breaker_attempts=4", "--breaker_connections=2",
             f"--event_loop={loop_name}")
    async with RecordingBackend() as backend:
        backend.answers["message"] = answer
        async with (
            Service(*backend.flags("message"), *flags) as service,
            contextlib.AsyncExitStack() as stack,
        ):
            clients = [
                await stack.enter_async_context(websockets.connect(service.ws_url))
                for _ in range(count)
            ]
            for client in clients:
                await client.send("hello")
            await eventually(
                lambda: any("backend unavailable" in line for line in service.log)
            )
            await asyncio.sleep(1)  # longer than until they are in line for a probe
            async with Stopped(service, 5):
                is_back = True
            # One whose attempt failed as the relay was stopped may be given up.
            await eventually(lambda: len(taken) >= count - 1)
    assert sum("delivery failed" in line for line in service.log) <= 1


@LOOPS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_held_request_that_was_reset_during_a_stall_is_retried(
    io_loop, loop_name, tls, tmp_path
):
    """Although the 5 s after the disconnect event have passed."""
    authority = Authority(tmp_path)
    context = authority.server().server_context() if tls else None
    kinds: list[str] = []

    def decide(attempt: Attempt) -> Reply:
        kinds.append(attempt.kind)
        return Reply(fault="hold") if kinds == ["message"] else Reply()

    flags = ["--order_wait=0.1", f"--event_loop={loop_name}"]
    if tls:
        flags.append(f"--backend_ca={authority.path}")
    async with FaultyBackend(decide, context) as backend:
        async with Service(*backend.flags(), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await leave([talker])
            await backend.wait_for("disconnect", 1)
            async with Stopped(service, 6):
                backend.make_unreachable("reset")
                await backend.make_reachable()
            await eventually(lambda: len(kinds) == 4)
    assert kinds == ["message", "disconnect", "message", "disconnect"]


@LOOPS
async def test_idle_time_restarts_after_a_stall(io_loop, loop_name):
    """Callers could not be served during it, so clients have got nothing either."""
    idle = 1.5  # seconds
    flags = (f"--idle_timeout={idle}", f"--event_loop={loop_name}")
    async with Service(*flags) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("open")
            await client.recv()
            async with service.stalled(idle + 1):
                resumed = asyncio.get_running_loop().time() + idle + 1
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            took = asyncio.get_running_loop().time() - resumed
    assert client.close_reason == "idle"
    assert took >= idle - 0.1


async def test_event_of_a_batch_has_its_time_after_a_stall(io_loop):
    """It waited for its retry when its --delivery_timeout passed."""
    failed = asyncio.Event()
    answers = [
        b"HTTP/1.1 500 Internal Server Error\r\nRetry-After: 9\r\n"
        b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    ]

    def script(kind: str) -> bytes:
        asyncio.get_running_loop().call_soon(failed.set)
        return answers.pop(0) if answers else b"HTTP/1.1 204 No Content\r\n\r\n"

    async with ScriptedBackend(script) as backend:
        flags = ("--backend=http", f"--batchuri={backend.url('batch')}")
        async with Service(*flags, "--delivery_timeout=3") as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("one")
                await asyncio.wait_for(failed.wait(), DEADLINE)
                await asyncio.wait_for(await client.ping(), DEADLINE)
                async with Stopped(service, 4):
                    pass
                await eventually(lambda: len(backend.of("batch")) == 3)
            *_, last = await backend.wait_for("batch", 4)
    (event,) = last["events"]
    assert event["meta"]["code"] == 1000 and event["meta"]["undelivered"] == 0
