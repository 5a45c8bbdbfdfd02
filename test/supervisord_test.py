"""conf/supervisord.conf, unchanged, with the real supervisord."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import websockets
from ports import free_ports
from project import copy_project, installation, library
from service import DEADLINE, RecordingBackend, eventually

pytestmark = [pytest.mark.gen_test(timeout=180), pytest.mark.long]

LONG = 120.0  # seconds; starts may take supervisord ten, since it waits between them

SPAWNED = re.compile(r"spawned: 'socketdock-\d+' with pid (\d+)")
RUNNING = re.compile(r"socketdock-\d+ entered RUNNING state")
FATAL = re.compile(r"socketdock-\d+ entered FATAL state")
# As supervisord writes them, and the relay.
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \S.*|\{.*\}")
STARTED = re.compile(r"clients at (ws://\S+), callbacks at")
CALLBACKS = re.compile(r"callbacks at http://127.0.0.1:(\d+),")


class Supervisor:
    """A running supervisord, and its output."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def wait_for(self, pattern: re.Pattern[str], times: int = 1) -> list[str]:
        """Wait until the output matches `pattern` `times` times; return the matches."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LONG):
            while len(found := pattern.findall(self.said)) < times:
                line = await self.process.stdout.readline()
                assert line, f"supervisord ended: {self.said}"
                self.said += line.decode()
        return found

    async def end(self) -> int:
        """Wait for its end; return its exit status and its output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(40):
            self.said += (await self.process.stdout.read()).decode()
            return await self.process.wait()


@pytest.fixture
def control() -> Iterator[Path]:
    """Where supervisorctl connects: a short path, since a socket's has 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "control.sock"


def adapted(conf: Path, control: Path, number: int = 1) -> Path:
    """The same file, with this number of processes, and with free ports."""
    text = conf.read_text()
    for name, old, new in (
        ("numprocs", r"\d+", number),
        ("numprocs_start", r"\d+", free_ports(number)),
        ("file", r"/tmp/socketdock-supervisor\.sock", control),
        ("serverurl", r"unix:///tmp/socketdock-supervisor\.sock", f"unix://{control}"),
    ):
        text, times = re.subn(rf"^{name}={old}$", f"{name}={new}", text, flags=re.M)
        assert times == 1, name
    path = conf.with_name("adapted.conf")
    path.write_text(text)
    return path


@contextlib.asynccontextmanager
async def supervisord(
    conf: Path, environment: Mapping[str, str], stdout: Any = asyncio.subprocess.PIPE
) -> AsyncIterator[Supervisor]:
    """supervisord with `conf`, which ends with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "supervisor.supervisord",
        "-c",
        conf,
        cwd=conf.parent,  # for its pid file
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
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
    """A clone in a path with a space, with the console script of `make run`."""
    tree = copy_project(tmp_path / "my socketdock")
    script = tree / ".venv" / "bin" / "socketdock"
    script.parent.mkdir(parents=True)
    command = shlex.join([sys.executable, str(tree / "socketdock.py")])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    return tree / "conf" / "supervisord.conf", {}


def installed(_: Path, temporary: Path) -> tuple[Path, dict[str, str]]:
    """The file as the wheel installs it."""
    prefix = installation(temporary)
    conf = prefix / "share" / "socketdock" / "conf" / "supervisord.conf"
    return conf, {"PYTHONPATH": library(prefix)}


@pytest.mark.parametrize("place", [checkout, installed])
async def test_starts_relays_restarts_and_stops(
    io_loop, place, control, tmp_path, tmp_path_factory
):
    """An echo, another one after `kill -9` of the relay, and a drain at SIGTERM."""
    conf, environment = place(tmp_path, tmp_path_factory.getbasetemp())
    environment |= {"SOCKETDOCK_BINDPORT": "0"}
    async with supervisord(adapted(conf, control), environment) as supervisor:
        (pid,) = await supervisor.wait_for(SPAWNED)
        (url,) = await supervisor.wait_for(STARTED)
        await assert_echoes(url)
        # Until then it counts as a failed start, which is tried again anyway.
        await supervisor.wait_for(RUNNING)

        os.kill(int(pid), signal.SIGKILL)
        _, pid = await supervisor.wait_for(SPAWNED, 2)
        _, url = await supervisor.wait_for(STARTED, 2)
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


async def test_processes_share_the_clients_port(io_loop, control, tmp_path):
    """Each gets some clients, and has its own callback port."""
    conf, _ = checkout(tmp_path, tmp_path)
    async with RecordingBackend() as backend:
        environment = {
            "SOCKETDOCK_BINDPORT": str(free_ports(1)),
            "SOCKETDOCK_BACKEND": "http",
            "SOCKETDOCK_MESSAGEURI": backend.url("message"),
        }
        async with supervisord(adapted(conf, control, 2), environment) as supervisor:
            url, same = await supervisor.wait_for(STARTED, 2)
            assert url == same
            assert len(set(await supervisor.wait_for(CALLBACKS, 2))) == 2

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


async def test_invalid_option_ends_fatal(io_loop, control, tmp_path):
    """It is started four times; then supervisorctl shows FATAL."""
    conf, environment = checkout(tmp_path, tmp_path)
    conf = adapted(conf, control)
    # A busy machine needs more than its five seconds for a start that fails.
    conf.write_text(conf.read_text().replace("startsecs=5\n", "startsecs=60\n"))
    environment |= {"SOCKETDOCK_BINDPORT": "nine"}
    async with supervisord(conf, environment) as supervisor:
        await supervisor.wait_for(FATAL)
        assert len(SPAWNED.findall(supervisor.said)) == 4
        assert not RUNNING.search(supervisor.said)
        assert supervisor.said.count("SOCKETDOCK_BINDPORT must be") == 4
        status = await asyncio.to_thread(supervisorctl, conf, "status")
    assert re.search(r"socketdock-\d+ +FATAL", status)


def supervisorctl(conf: Path, *words: str) -> str:
    """Return its output; its exit status depends on the processes."""
    return subprocess.run(
        [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(conf), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    ).stdout


@pytest.mark.parametrize("mode", ["w", "a"], ids=[">", ">>"])
async def test_no_line_of_the_log_is_overwritten_in_a_file(
    io_loop, mode, control, tmp_path
):
    """Lines of supervisord and of the relay are complete and in order."""
    conf, environment = checkout(tmp_path, tmp_path)
    environment |= {"SOCKETDOCK_BINDPORT": "0"}
    log = tmp_path / "log"
    log.write_text("from before\n")
    with log.open(mode) as stdout:
        async with supervisord(
            adapted(conf, control), environment, stdout
        ) as supervisor:
            for said in (STARTED, RUNNING):
                await eventually(
                    lambda said=said: said.search(log.read_text()) is not None, LONG
                )
            supervisor.process.terminate()
            assert await asyncio.wait_for(supervisor.process.wait(), 40) == 0
    lines = log.read_text().splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == (
        ["from before"] if mode == "a" else []
    )
    text = "\n".join(lines)
    # Each writes in order; which of the two is first depends on their speed.
    for expected in (
        [
            "supervisord started with pid",
            "spawned: ",
            "entered RUNNING state",
            "received SIGTERM",
            "(exit status 0)",
        ],
        [
            "spawned: ",
            '"message":"SocketDock ',
            '"message":"stopped"',
            "(exit status 0)",
        ],
    ):
        assert [text.count(words) for words in expected] == [1] * len(expected)
        assert sorted(expected, key=text.index) == expected


def test_waits_longer_than_the_drain_before_it_kills(tmp_path):
    """`stopwaitsecs` is above the default of `--drain_timeout`, 25 seconds."""
    text = (copy_project(tmp_path / "tree") / "conf" / "supervisord.conf").read_text()
    (seconds,) = re.findall(r"^stopwaitsecs=(\d+)$", text, flags=re.MULTILINE)
    assert int(seconds) > 25
