"""/readyz says when balancers should use other relays, and why; /status agrees."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import websockets
import yaml
from authorization_test import ask
from certificates import Authority
from faults import ScriptedBackend
from programs import leave_out
from service import (
    DEADLINE,
    DRAINS_SLOWLY,
    PROJECT,
    Service,
    draining,
    ended,
    refusal,
)
from tornado.web import Application

from backends.loopback import LoopbackBackend
from handlers.connections import ConnectionMap
from handlers.operators.status import Status
from handlers.probes import LiveHandler, Readiness, ReadyHandler

pytestmark = pytest.mark.gen_test(timeout=60)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BREAKER = ("--breaker_attempts=1", "--breaker_connections=1",
           "--breaker_first_probe=0.1", "--breaker_last_probe=0.1")


@pytest.fixture
def app(io_loop):
    """For pytest-tornado's `http_server`: the probes of a relay that starts."""

    async def make() -> Application:
        connections, backend = ConnectionMap(), LoopbackBackend()
        readiness = Readiness(connections, backend, 0.0)
        return Application(
            [(r"/livez", LiveHandler), (r"/readyz", ReadyHandler,
                                        {"readiness": readiness})],
            readiness=readiness,
            status=Status(connections, readiness, backend, "1", "a/b", "loopback", {}),
        )

    return io_loop.run_sync(make)


async def readyz(service: Service) -> str | None:
    """Return the detail of a 503; None: ready."""
    answer = await ask(service, "GET", "/readyz")
    assert answer.headers["cache-control"] == "no-store"
    if answer.status == 200:
        return None
    assert answer.status == 503
    return answer.detail


async def status(service: Service) -> dict:
    return json.loads((await ask(service, "GET", "/status")).body)


async def test_starting_relay_is_not_ready(
    io_loop, app, http_server, http_client, base_url
):
    """It is alive, and becomes ready when all parts have started."""
    current = app.settings["status"]
    answer = await http_client.fetch(f"{base_url}/readyz", raise_error=False)
    assert answer.code == 503
    assert json.loads(answer.body)["detail"] == "This instance is starting."
    assert (await http_client.fetch(f"{base_url}/livez")).code == 200
    described = current.describe()
    assert (described["state"], described["ready"]) == ("starting", False)
    app.settings["readiness"].started = True
    assert (await http_client.fetch(f"{base_url}/readyz")).code == 200
    described = current.describe()
    assert (described["state"], described["ready"]) == ("serving", True)


async def test_stopping_relay_is_not_ready(io_loop):
    """/status shows it, too."""
    async with Service(DRAINS_SLOWLY) as service:
        assert await readyz(service) is None
        async with draining(service):
            assert await readyz(service) == "This instance is shutting down."


async def test_unreachable_backend_keeps_readiness_by_default(io_loop):
    """Otherwise all relays would be unready at once, though they can retry."""
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *BREAKER) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while not (await status(service))["backend"]["away"]:
                        pass
                assert await readyz(service) is None
                backend.script = lambda kind: OK


async def test_unreachable_backend_can_end_readiness(io_loop):
    """From --ready_breaker_timeout on, until it is reachable."""
    flags = (*BREAKER, "--ready_breaker_timeout=0.5")
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while not (current := await status(service))["backend"]["away"]:
                        pass
                    assert current["ready"] is (current["backend"]["away"] < 0.5)
                    while (reason := await readyz(service)) is None:
                        pass
                assert reason.startswith("The backend has been unreachable for ")
                current = await status(service)
                assert not current["ready"]
                assert current["state"] == "serving"
                assert current["backend"]["away"] >= 0.5
                cause = current["backend"]["cause"]
                assert cause.startswith(f"POST {backend.url('message')}: ")
                for _ in range(50):  # the retry of its message probes the backend
                    assert await readyz(service)
                backend.script = lambda kind: OK
                async with asyncio.timeout(DEADLINE):
                    while await readyz(service) is not None:
                        pass
                recovered = (await status(service))["backend"]
                assert recovered["away"] is recovered["cause"] is None


async def test_readyz_recovers_when_no_event_can_probe(io_loop):
    """If no event waits, a new client's must be the probe: it is let through."""
    flags = (*BREAKER, "--ready_breaker_timeout=0.2", "--delivery_timeout=1")
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while await readyz(service) is None:
                        pass
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            backend.script = lambda kind: OK
            async with asyncio.timeout(DEADLINE):
                while await readyz(service) is not None:
                    pass
            assert (await status(service))["backend"]["away"]
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while (await status(service))["backend"]["away"]:
                        pass


def test_option_has_a_range():
    """Like other options in seconds."""
    assert "seconds" in refusal("--ready_breaker_timeout=-1")


# `socketdock health`.


def healthy(service: Service, *flags: str) -> tuple[int, str]:
    """Exit status and sentence, with the relay's environment."""
    asked = ended(
        "health",
        *flags,
        **{**service.environment, "http_proxy": "http://127.0.0.1:1",
           "https_proxy": "http://127.0.0.1:1"},
    )
    assert asked.stderr == ""
    return asked.returncode, asked.stdout


@pytest.mark.parametrize("bindip", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::", "::1"])
async def test_health_asks_where_the_relay_listens(io_loop, tmp_path, bindip):
    """For each source of the options, and without a proxy of the environment."""
    if ":" in bindip and not has_ipv6():
        leave_out("IPv6")
    async with Service(f"--bindip={bindip}") as service:
        port = re.search(r":(\d+)/", service.ws_url)[1]
        conf = tmp_path / "conf"
        conf.write_text(f"bindip = {bindip!r}\nbindport = {port}\n")
        for flags in (
            [f"--bindip={bindip}", f"--bindport={port}"],
            [f"--pid={service.process.pid}", f"--bindport={port}"],
            [f"--config={conf}"],
        ):
            status, said = healthy(service, *flags)
            assert (status, said.endswith(": ok\n")) == (0, True), flags
        service.environment |= {
            "SOCKETDOCK_BINDIP": bindip, "SOCKETDOCK_BINDPORT": port
        }
        status, said = healthy(service)
        assert (status, said.endswith(": ok\n")) == (0, True)


async def test_health_uses_tls(io_loop, tmp_path):
    """It does not verify the certificate."""
    server = Authority(tmp_path).server("relay.example")
    async with Service(f"--tls_cert={server.both}") as service:
        port = re.search(r":(\d+)/", service.ws_url)[1]
        status, _ = healthy(
            service, f"--pid={service.process.pid}", f"--bindport={port}"
        )
        assert status == 0
        status, _ = healthy(service, f"--bindport={port}")
        assert status == 1


@pytest.mark.parametrize("command", ["exec {}", "{}; exit $?", "sh -c '{}; exit $?'"])
async def test_health_finds_the_relay_behind_a_shell(io_loop, command):
    """A container's first process may be the shell that starts the relay."""
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    relay = f'"{sys.executable}" socketdock.py --bindip=127.0.0.2 --bindport={port}'
    shell = await asyncio.create_subprocess_exec(
        "sh", "-c", command.format(relay), cwd=PROJECT, stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while b"clients at" not in await asyncio.wait_for(
            shell.stderr.readline(), DEADLINE
        ):
            pass
        asked = await asyncio.to_thread(ended, "health", f"--pid={shell.pid}")
        assert (asked.stdout, asked.stderr) == (f"port {port} of 127.0.0.2: ok\n", "")
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        await shell.wait()


async def test_health_asks_the_clients_listener(io_loop, tmp_path):
    """Even if the callback listener requires a client certificate."""
    authority = Authority(tmp_path)
    server = authority.server("relay.example")
    flags = ["--callbackport=0", f"--callback_tls_cert={server.both}",
             f"--callback_client_ca={authority.path}", f"--tls_cert={server.both}"]
    async with Service(*flags) as service:
        port = re.search(r":(\d+)/", service.ws_url)[1]
        status, _ = healthy(
            service, f"--pid={service.process.pid}", f"--bindport={port}"
        )
    assert status == 0


@pytest.mark.parametrize(
    "flags", [["--bindport=1"], ["--bindport=0"], ["--pid=0"], ["--pid=self"],
              ["--no_such_option"], ["--bindip=no..host"]]
)
def test_health_without_a_relay_is_status_1(flags):
    """Docker permits no other status; one line has the reason."""
    asked = ended("health", *flags)
    assert asked.returncode == 1
    assert len((asked.stdout + asked.stderr).splitlines()) == 1


async def test_health_of_a_hanging_relay_is_status_1(io_loop):
    """Within seconds."""
    async with Service() as service:
        port = re.search(r":(\d+)/", service.ws_url)[1]
        service.process.send_signal(signal.SIGSTOP)
        try:
            status, said = healthy(service, f"--bindport={port}")
        finally:
            service.process.send_signal(signal.SIGCONT)
    assert (status, "timed out" in said) == (1, True)


def test_image_and_compose_ask_health():
    """With process 1, whose command line has options that no file has."""
    command = '["socketdock", "health", "--pid=1"]'
    assert f"CMD {command}" in (PROJECT / "Dockerfile").read_text()
    compose = yaml.safe_load((PROJECT / "conf" / "compose.yaml").read_text())
    for relay in ("relay-1", "relay-2"):
        test = compose["services"][relay]["healthcheck"]["test"]
        assert test == ["CMD", "socketdock", "health", "--pid=1"]


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
