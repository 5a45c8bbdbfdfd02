"""--event_loop: uvloop where it is installed, asyncio's own loop otherwise."""

import asyncio
from pathlib import Path

import pytest
import websockets
from service import DEADLINE, Service, refusal


@pytest.fixture
def without_uvloop(tmp_path):
    """An environment in which uvloop can't be imported."""
    (tmp_path / "uvloop.py").write_text("raise ImportError('not here')\n")
    return {"PYTHONPATH": str(tmp_path)}


def runs_uvloop(service):
    """Whether the process is woken as libuv does it; asyncio has a pair of sockets."""
    files = Path(f"/proc/{service.process.pid}/fd").iterdir()
    return any(str(file.readlink()) == "anon_inode:[eventfd]" for file in files)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("name", "expected"), [("auto", True), ("uvloop", True), ("asyncio", False)]
)
async def test_event_loop_is_selected_by_name(io_loop, name, expected):
    """`auto` selects uvloop if it is installed."""
    async with (
        Service(f"--event_loop={name}") as service,
        websockets.connect(service.ws_url) as client,
    ):
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
        assert runs_uvloop(service) is expected


@pytest.mark.gen_test
async def test_relay_runs_without_uvloop(io_loop, without_uvloop):
    """With asyncio's own loop."""
    async with (
        Service("--event_loop=auto", environment=without_uvloop) as service,
        websockets.connect(service.ws_url) as client,
    ):
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
        assert not runs_uvloop(service)


def test_missing_uvloop_exits_with_an_error(without_uvloop):
    """One line, if uvloop was requested by name."""
    line = refusal("--event_loop=uvloop", **without_uvloop)
    assert "--event_loop=uvloop: uvloop is not installed" in line


def test_unknown_loop_exits_with_an_error():
    """One line with the known names."""
    line = refusal("--event_loop=epoll")
    assert "--event_loop must be auto, uvloop or asyncio, not 'epoll'" in line
