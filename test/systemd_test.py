"""Notifications to systemd, and conf/socketdock.service.

`NOTIFY_SOCKET` is a real socket here, with the test at its other end.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess

import pytest
import websockets
from programs import program
from project import installation, library
from service import DEADLINE, PROJECT, Service

pytestmark = pytest.mark.gen_test(timeout=60)

UNIT = PROJECT / "conf" / "socketdock.service"
EXPOSURE = 1.6  # of 10, as `systemd-analyze security` counts


class Systemd:
    """The other end of `NOTIFY_SOCKET`, which records all datagrams."""

    def __init__(self, address: str) -> None:
        self.received: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Close the socket, as if systemd was gone."""
        self._socket.close()

    async def wait_for(self, state: str) -> None:
        """Read until the next `state`, which must be a whole line."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            while True:
                datagram = await loop.sock_recv(self._socket, 4096)
                self.received.append(datagram.decode())
                if state in self.received[-1].splitlines():
                    return

    def rest(self) -> list[str]:
        """Return all datagrams, also those that were not read yet."""
        while True:
            try:
                self.received.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.received


@pytest.fixture(params=["path", "abstract"])
def address(request, tmp_path):
    if request.param == "path":
        return str(tmp_path / "notify")
    return f"@socketdock-test-{os.getpid()}-{tmp_path.name}"


async def assert_echoes(url: str) -> None:
    async with websockets.connect(url) as client:
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"


async def test_systemd_is_notified_of_start_reload_and_stop(io_loop, address):
    """READY=1 once it relays, RELOADING=1 and READY=1 at SIGHUP, STOPPING=1."""
    with Systemd(address) as systemd:
        environment = {"NOTIFY_SOCKET": address}
        async with Service("--drain_delay=60", environment=environment) as service:
            await systemd.wait_for("READY=1")
            await assert_echoes(service.ws_url)
            service.process.send_signal(signal.SIGHUP)
            await systemd.wait_for("READY=1")
            service.process.send_signal(signal.SIGTERM)
            await systemd.wait_for("STOPPING=1")  # long before the end
            service.process.send_signal(signal.SIGTERM)
            await service.process.wait()
        started, reloading, ready, stopping = systemd.rest()
    assert (started, ready, stopping) == ("READY=1", "READY=1", "STOPPING=1")
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)


async def test_watchdog_is_fed_by_the_loop_until_the_end(io_loop, tmp_path):
    """More often than required, and during the drain, too."""
    address = str(tmp_path / "notify")
    environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}
    with Systemd(address) as systemd:
        async with Service("--drain_delay=60", environment=environment) as service:
            for _ in range(5):
                await systemd.wait_for("WATCHDOG=1")
            service.process.send_signal(signal.SIGTERM)
            await systemd.wait_for("STOPPING=1")
            for _ in range(3):
                await systemd.wait_for("WATCHDOG=1")
            service.process.send_signal(signal.SIGTERM)
            await service.process.wait()
        received = systemd.rest()
    assert received[:2] == ["READY=1", "WATCHDOG=1"]


@pytest.mark.parametrize(
    "watchdog",
    [{}, {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}],
    ids=["off", "another process's", "nonsense"],
)
async def test_watchdog_of_another_process_is_not_fed(io_loop, tmp_path, watchdog):
    """This process may have inherited its variables."""
    address = str(tmp_path / "notify")
    environment = {"NOTIFY_SOCKET": address, **watchdog}
    with Systemd(address) as systemd:
        async with Service("--drain_delay=0.3", environment=environment):
            await systemd.wait_for("READY=1")
        assert systemd.rest() == ["READY=1", "STOPPING=1"]


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody", "vsock:2:1"])
async def test_missing_systemd_socket_is_a_warning(io_loop, address):
    """One warning; the relay works."""
    async with Service(environment={"NOTIFY_SOCKET": address}) as service:
        await assert_echoes(service.ws_url)
    assert sum("NOTIFY_SOCKET" in line for line in service.log) == 1


async def test_lost_systemd_socket_is_a_warning(io_loop, tmp_path):
    """Clients are not affected."""
    address = str(tmp_path / "notify")
    with Systemd(address) as systemd:
        async with Service(environment={"NOTIFY_SOCKET": address}) as service:
            await systemd.wait_for("READY=1")
            systemd.close()
            await assert_echoes(service.ws_url)
    assert any("can't notify systemd of STOPPING" in line for line in service.log)


# The unit.


def setting(name: str) -> str:
    """A setting's value in the unit, which has it once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return value


async def test_unit_starts_the_installed_relay(io_loop, tmp_path, tmp_path_factory):
    """Its ExecStart and its environment, with systemd's folders elsewhere."""
    prefix = installation(tmp_path_factory.getbasetemp())
    conf = prefix / "share" / "socketdock" / "conf"
    command = setting("ExecStart").replace("/opt/socketdock", str(prefix))
    command = command.replace("/etc/socketdock", str(conf))
    address = str(tmp_path / "notify")
    environment = {
        "PYTHONPATH": library(prefix),
        "NOTIFY_SOCKET": address,
    }
    state = tmp_path / "state"
    http = (
        "--backend=http",
        "--messageuri=http://127.0.0.1:9/",
        "--disconnecturi=http://127.0.0.1:9/",
        f"--state_dir={state}",
    )
    with Systemd(address) as systemd:
        async with Service(
            *http, command=command.split(), environment=environment
        ) as service:
            await systemd.wait_for("READY=1")
            assert any(state.iterdir())
    assert not [line for line in service.log if "unknown variable" in line]


def test_unit_is_valid_and_hardened(tmp_path):
    """`systemd-analyze` reports no fault, and a low exposure."""
    analyze = program("systemd", "systemd-analyze")
    unit = tmp_path / UNIT.name
    # The program is not installed at its path here.
    unit.write_text(UNIT.read_text().replace("/opt/socketdock/bin/socketdock", SH))
    # With the units that every service needs, but not those of this machine.
    for needed in "sysinit", "basic", "shutdown", "network-online", "multi-user":
        (tmp_path / f"{needed}.target").write_text("[Unit]\nDescription=here\n")
    only = {"SYSTEMD_UNIT_PATH": str(tmp_path)}
    verified = analyzed(analyze, "verify", "--man=no", unit, **only)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    exposed = analyzed(
        analyze, "security", "--offline=yes", f"--threshold={EXPOSURE * 10:g}", unit
    )
    assert exposed.returncode == 0, exposed.stdout


SH = shutil.which("sh") or "/bin/sh"


def analyzed(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "SYSTEMD_COLORS": "0", **environment},
    )


def test_unit_waits_longer_than_the_drain_before_it_kills():
    """`TimeoutStopSec` is above the defaults of the drain: 0, 0 and 25 seconds."""
    assert int(setting("TimeoutStopSec")) > 25


def test_unit_allows_enough_descriptors_for_the_defaults():
    """15,000 clients, 4,096 connections to the backend, and the rest."""
    assert int(setting("LimitNOFILE")) > 15_000 + 4_096 + 256


def test_unit_does_not_restart_after_an_invalid_option():
    """After exit status 2; after others it restarts any number of times."""
    assert setting("Restart") == "always"
    assert setting("StartLimitIntervalSec") == "0"
    assert setting("RestartPreventExitStatus") == "2"
