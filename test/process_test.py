"""The process: its standard streams, its log lines while it stops, its exit."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import websockets
from service import DEADLINE, PROJECT, RecordingBackend, Service, eventually, withhold

pytestmark = pytest.mark.gen_test(timeout=60)

# A backend that leaves a thread running, like one that resolves a name.
LEAVES_A_THREAD = """
import threading, time
from backends import Backend

class LeavingBackend(Backend):
    async def message(self, connection, message):
        connection.send(message)
        threading.Thread(target=time.sleep, args=(60,)).start()

    async def close(self):
        {on_close}

def make_backend(relay):
    return LeavingBackend()
"""


# Handlers of the log that write later, one by itself, the other by a thread.
WAITING_HANDLERS = """
import atexit, logging
from queue import SimpleQueue
from logging.handlers import MemoryHandler, QueueHandler, QueueListener

def memory(path):
    return MemoryHandler(10_000, logging.CRITICAL, logging.FileHandler(path))

def queue(path):
    lines = SimpleQueue()
    listener = QueueListener(lines, logging.FileHandler(path))
    atexit.register(lambda: (listener.start(), listener.stop()))
    return QueueHandler(lines)
"""


@pytest.mark.parametrize("event_loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
async def test_closed_standard_streams_change_nothing(io_loop, event_loop, closed):
    """No socket gets their numbers, with which libuv aborts at the stop."""
    closing = " ".join(f"{number}>&-" for number in closed.split())
    flags = f"--event_loop={event_loop} --bindport=0"
    # If stderr is closed the log has no port; the kernel knows it.
    relay = await asyncio.create_subprocess_exec(
        "sh", "-c", f'exec "$0" socketdock.py {flags} {closing}', sys.executable,
        cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    port = await listening_port(relay.pid)
    for number in closed.split():
        assert os.readlink(f"/proc/{relay.pid}/fd/{number}") == "/dev/null"
    async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
        relay.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(relay.wait(), DEADLINE) == 0


async def listening_port(pid: int) -> int:
    """Wait until a process listens, and return its port."""
    found: list[int] = []

    def listens() -> bool:
        # Kept: a second look may find none, while the process closes a file.
        found[:] = listening_ports(pid)
        return found != []

    await eventually(listens)
    (port,) = found
    return port


def listening_ports(pid: int) -> list[int]:
    """Return the ports where a process listens, by /proc."""
    folder = f"/proc/{pid}/fd"
    try:
        links = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
    except OSError:
        return []
    with open(f"/proc/{pid}/net/tcp") as table:
        rows = [row.split() for row in table][1:]
    return [
        int(row[1].partition(":")[2], 16)
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in links
    ]


@pytest.mark.parametrize(
    ("on_close", "status"),
    [("pass", 0), ("time.sleep(60)", 0), ("await asyncio.sleep(60)", 0)],
    ids=["thread", "blocked loop", "await"],
)
async def test_nothing_outlives_the_drain(io_loop, tmp_path, on_close, status):
    """A thread, a blocked loop, or an awaitable; the exit status is the drain's."""
    source = LEAVES_A_THREAD.format(on_close=on_close)
    (tmp_path / "leaving").mkdir()
    (tmp_path / "leaving" / "__init__.py").write_text("")
    (tmp_path / "leaving" / "backend.py").write_text(f"import asyncio\n{source}")
    environment = {"PYTHONPATH": str(tmp_path)}
    flags = ("--backend=leaving.backend", "--drain_timeout=1")
    async with Service(*flags, environment=environment) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
        service.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == status
    cut_off = [line for line in service.log if "has not ended in time" in line]
    assert bool(cut_off) is (on_close != "pass")


@pytest.mark.parametrize("kind", ["memory", "queue"])
async def test_lines_that_wait_in_a_handler_are_written_at_the_end(
    io_loop, tmp_path, kind
):
    """Functions registered with `atexit` are called, as at a normal exit."""
    (tmp_path / "waiting.py").write_text(WAITING_HANDLERS)
    config = tmp_path / "log.json"
    config.write_text(json.dumps({
        "version": 1,
        "root": {"handlers": ["waiting"], "level": "INFO"},
        "handlers": {"waiting": {"()": f"waiting.{kind}", "path": f"{tmp_path}/log"}},
    }))
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.setblocking(False)
        relay = await asyncio.create_subprocess_exec(
            sys.executable, "socketdock.py", "--bindport=0", f"--log_config={config}",
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "NOTIFY_SOCKET": address},
        )
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.sock_recv(systemd, 99), DEADLINE)
        relay.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(relay.wait(), DEADLINE) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert "clients at" in lines[0] and lines[-1] == "stopped"


async def test_stop_says_what_it_waits_for(io_loop):
    """Every few seconds; the line says that a second signal stops immediately."""
    async with RecordingBackend() as backend:
        answered = withhold(backend, "disconnect")
        async with Service(*backend.flags("message", "disconnect")) as service:
            async with websockets.connect(service.ws_url):
                pass
            await backend.wait_for("disconnect", 1)
            service.process.send_signal(signal.SIGINT)
            await eventually(lambda: len(said(service)) >= 2)
            answered.set()
            assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
    assert said(service)[0].endswith(
        "stopping: waiting for 0 connections and 1 events for the backend;"
        " a second signal stops immediately"
    )


async def test_stop_takes_no_longer_than_the_clients_stay(io_loop):
    """The rest of --drain_spread is not waited for."""
    async with Service("--drain_spread=3600") as service:
        clients = [await websockets.connect(service.ws_url) for _ in range(3)]
        service.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(clients[0].wait_closed(), DEADLINE)
        for client in clients:
            await client.close()
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0


def said(service: Service) -> list[str]:
    return [line for line in service.log if "stopping: " in line]


@pytest.mark.parametrize("source", ["--log_file_prefix", "--log_config"])
async def test_full_disk_under_the_log_is_one_line(io_loop, tmp_path, source):
    """Not one traceback per line; the relay continues."""
    log = tmp_path / "log"
    log.symlink_to("/dev/full")
    value = log
    if source == "--log_config":
        value = tmp_path / "log.json"
        value.write_text(
            '{"version": 1, "root": {"handlers": ["file"], "level": "INFO"},'
            ' "handlers": {"file": {"class": "logging.FileHandler",'
            f' "filename": "{log}"}}}}}}'
        )
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "socketdock.py", "--bindport=0", f"{source}={value}",
        cwd=PROJECT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    port = await listening_port(relay.pid)
    for _ in range(5):  # each is two lines
        async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as client:
            await client.send("hello")
            assert await client.recv() == "hello"
    relay.send_signal(signal.SIGTERM)
    _, stderr = await asyncio.wait_for(relay.communicate(), DEADLINE)
    assert relay.returncode == 0
    (line,) = stderr.decode().splitlines()
    assert line.startswith("socketdock: can't write to the log, lines are lost: ")
    assert line.endswith("No space left on device")
