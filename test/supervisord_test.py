"""conf/supervisord.conf, as it stands, under the real supervisord."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import websockets
from project import copy_project, installation, library
from service import DEADLINE, RecordingBackend

SPAWNED = re.compile(r"spawned: 'socketdock-\d+' with pid (\d+)")
RUNNING = re.compile(r"socketdock-\d+ entered RUNNING state")
STARTED = re.compile(r"clients at (ws://\S+), callbacks at")
CALLBACKS = re.compile(r"callbacks at http://127.0.0.1:(\d+),")


class Supervisor:
    """A running supervisord and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def hears(self, pattern: re.Pattern[str], times: int = 1) -> list[str]:
        """What `pattern` matched, once it was said that many times."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while len(found := pattern.findall(self.said)) < times:
                line = await self.process.stdout.readline()
                assert line, f"supervisord ended: {self.said}"
                self.said += line.decode()
        return found

    async def end(self) -> int:
        """Its exit status, and all that it said, once it has ended."""
        assert self.process.stdout is not None
        async with asyncio.timeout(40):
            self.said += (await self.process.stdout.read()).decode()
            return await self.process.wait()


def free_ports(number: int) -> int:
    """The first of so many in a row that nobody uses."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            first = held.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            for other in range(port + 1, port + number):
                held.enter_context(socket.create_server(("127.0.0.1", other)))
            return port


def with_processes(conf: Path, number: int) -> Path:
    """The same file, with so many processes at ports that are free."""
    text = conf.read_text()
    for name, value in ("numprocs", number), ("numprocs_start", free_ports(number)):
        text, times = re.subn(rf"^{name}=\d+$", f"{name}={value}", text, flags=re.M)
        assert times == 1, name
    path = conf.with_name("processes.conf")
    path.write_text(text)
    return path


@contextlib.asynccontextmanager
async def supervisord(
    conf: Path, environment: Mapping[str, str]
) -> AsyncIterator[Supervisor]:
    """supervisord with `conf`, in a process group of its own that ends with it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "supervisor.supervisord",
        "-c",
        conf,
        cwd=conf.parent,  # for its pid file
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Supervisor(process)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.communicate(), DEADLINE)
            except TimeoutError:
                process.kill()
                await process.wait()


async def assert_echoes(url: str) -> None:
    async with websockets.connect(url) as client:
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"


def checkout(tmp_path: Path, _: Path) -> tuple[Path, dict[str, str]]:
    """A clone, with the console script where `make run` puts it."""
    tree = copy_project(tmp_path / "socketdock")
    script = tree / ".venv" / "bin" / "socketdock"
    script.parent.mkdir(parents=True)
    script.write_text(
        f"#!{sys.executable}\n"
        f"import sys; sys.path.insert(0, {str(tree)!r})\n"
        "import socketdock; socketdock.main()\n"
    )
    script.chmod(0o755)
    return tree / "conf" / "supervisord.conf", {}


def installed(_: Path, temporary: Path) -> tuple[Path, dict[str, str]]:
    """What the wheel puts down."""
    prefix = installation(temporary)
    conf = prefix / "share" / "socketdock" / "conf" / "supervisord.conf"
    return conf, {"PYTHONPATH": library(prefix)}


@pytest.mark.parametrize("place", [checkout, installed])
@pytest.mark.gen_test
async def test_starts_relays_restarts_and_stops(
    io_loop, place, tmp_path, tmp_path_factory
):
    """An echo, one more after `kill -9` of the relay, and a drain at SIGTERM."""
    conf, environment = place(tmp_path, tmp_path_factory.getbasetemp())
    environment |= {"SOCKETDOCK_BINDPORT": "0"}
    async with supervisord(with_processes(conf, 1), environment) as supervisor:
        (pid,) = await supervisor.hears(SPAWNED)
        (url,) = await supervisor.hears(STARTED)
        await assert_echoes(url)
        # Until then it counts as a failed start, which is tried again anyway.
        await supervisor.hears(RUNNING)

        os.kill(int(pid), signal.SIGKILL)
        _, pid = await supervisor.hears(SPAWNED, 2)
        _, url = await supervisor.hears(STARTED, 2)
        await assert_echoes(url)

        client = await websockets.connect(url)
        supervisor.process.terminate()
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 1001
        assert await supervisor.end() == 0
        assert re.search(
            r"stopped: socketdock-\d+ \(exit status 0\)", supervisor.said
        )
        assert "Traceback" not in supervisor.said
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.gen_test
async def test_processes_share_the_clients_port(io_loop, tmp_path):
    """Each gets some of them, and is called back at a port of its own."""
    conf, _ = checkout(tmp_path, tmp_path)
    async with RecordingBackend() as backend:
        environment = {
            "SOCKETDOCK_BINDPORT": str(free_ports(1)),
            "SOCKETDOCK_BACKEND": "http",
            "SOCKETDOCK_MESSAGEURI": backend.url("message"),
        }
        async with supervisord(with_processes(conf, 2), environment) as supervisor:
            url, same = await supervisor.hears(STARTED, 2)
            assert url == same
            assert len(set(await supervisor.hears(CALLBACKS, 2))) == 2

            clients = [await websockets.connect(url) for _ in range(60)]
            for client in clients:
                await client.send("hello")
            events = await backend.wait_for("message", len(clients))
            instances = {event["meta"]["instance"] for event in events}
            names = {instance.partition("/")[0] for instance in instances}
            assert len(instances) == len(names) == 2
            for event in events:
                answer = await backend.call(event["meta"]["send"], body=b"back")
                assert answer.code == 200
            for client in clients:
                assert await asyncio.wait_for(client.recv(), DEADLINE) == b"back"
                await client.close()


def test_waits_longer_than_the_drain_before_it_kills(tmp_path):
    """`stopwaitsecs` is above the default of `--drain_timeout`, 25 seconds."""
    text = (copy_project(tmp_path / "tree") / "conf" / "supervisord.conf").read_text()
    (seconds,) = re.findall(r"^stopwaitsecs=(\d+)$", text, flags=re.MULTILINE)
    assert int(seconds) > 25
