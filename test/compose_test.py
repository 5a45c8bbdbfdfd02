"""conf/compose.yaml: what it says of relays, HAProxy and backend holds for these.

Docker itself is not run. The relays and the backend run as the file says, at
other ports.
"""

import asyncio
import re
import socket
import subprocess
import sys
from ipaddress import ip_address, ip_network

import pytest
import yaml
from interop_test import kill, program
from service import PROJECT, Service, eventually
from tornado.httpclient import AsyncHTTPClient

CONF = PROJECT / "conf"


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((CONF / "compose.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def services(compose):
    return compose["services"]


@pytest.mark.parametrize("name", ["relay-1", "relay-2"])
@pytest.mark.gen_test
async def test_relay_starts_with_its_environment(io_loop, services, name):
    """Each variable is an option; callbacks come to where the file says."""
    environment = services[name]["environment"]
    elsewhere = {"SOCKETDOCK_CALLBACKPORT": "0"}
    async with Service(environment=environment | elsewhere) as service:
        service.process.kill()  # rather than wait for drain_delay
        await service.process.wait()
    assert not [line for line in service.log if " is no option" in line]
    assert environment["SOCKETDOCK_EXTERNALHOSTANDPORT"] == (
        f"{name}:{environment['SOCKETDOCK_CALLBACKPORT']}"
    )
    assert environment["SOCKETDOCK_INSTANCE_NAME"] == name


def test_relays_are_stopped_later_than_they_drain(services):
    """`stop_grace_period` is above the three times of the drain."""
    for name in ("relay-1", "relay-2"):
        environment = services[name]["environment"]
        drain = sum(
            float(environment.get(f"SOCKETDOCK_DRAIN_{part}", default))
            for part, default in [("DELAY", 0), ("SPREAD", 0), ("TIMEOUT", 25)]
        )
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > drain


def test_relays_stop_later_than_haproxy_has_looked_away(services):
    """`--drain_delay` is above the interval of the checks times their number."""
    text = (CONF / "haproxy.cfg").read_text("utf-8")
    ((interval, fall),) = re.findall(r"check inter (\d+)s fall (\d+)", text)
    for name in ("relay-1", "relay-2"):
        delay = services[name]["environment"]["SOCKETDOCK_DRAIN_DELAY"]
        assert float(delay) > int(interval) * int(fall)


def test_relays_believe_haproxy_alone(compose, services):
    """Its address is fixed, and no other container gets it."""
    (pool,) = compose["networks"]["default"]["ipam"]["config"]
    address = services["haproxy"]["networks"]["default"]["ipv4_address"]
    assert ip_address(address) in ip_network(pool["subnet"])
    assert ip_address(address) not in ip_network(pool["ip_range"])
    for name in ("relay-1", "relay-2"):
        environment = services[name]["environment"]
        assert environment["SOCKETDOCK_TRUSTED_PROXIES"] == address


def test_haproxy_is_told_where_the_relays_are(services):
    """By each variable that its file has; HAProxy accepts the result."""
    haproxy = program("haproxy", "haproxy", "/usr/sbin/haproxy")
    environment = services["haproxy"]["environment"]
    text = (CONF / "haproxy.cfg").read_text("utf-8")
    assert set(environment) == set(re.findall(r"\$\{(\w+)-", text))
    for name in ("relay-1", "relay-2"):
        variable = name.upper().replace("-", "_")
        assert environment[variable] == f"{name}:8765"  # the image's port
        callbacks = services[name]["environment"]["SOCKETDOCK_CALLBACKPORT"]
        assert environment[f"{variable}_CALLBACKPORT"] == callbacks
    (published,) = services["haproxy"]["ports"]
    assert published.endswith(environment["CLIENTS_BIND"])
    checked = subprocess.run(
        [haproxy, "-c", "-f", CONF / "haproxy.cfg"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_files_that_are_mounted_or_built_are_there(services):
    """Relative to the file's own folder."""
    paths = [
        volume.split(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
    ]
    paths += [f"{service['build']}/Dockerfile" for service in services.values()
              if "build" in service]
    assert len(paths) == 4
    for path in paths:
        assert (CONF / path).exists(), path


@pytest.mark.gen_test
async def test_backend_takes_events(io_loop, services):
    """Its command, at another address, where the relays' URLs lead."""
    python, *words = services["backend"]["command"]
    assert python == "python"
    with socket.socket() as reserved:  # bound, but not listening
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        script = words.pop().replace('("", 8000)', f'("127.0.0.1", {port})')
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            script,
            cwd=PROJECT / "examples",
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            await eventually(lambda: answers(port))
            urls = services["relay-1"]["environment"]
            for kind in ("CONNECT", "MESSAGE", "DISCONNECT"):
                url = urls[f"SOCKETDOCK_{kind}URI"].replace(
                    "//backend:8000/", f"//127.0.0.1:{port}/"
                )
                event = b'{"meta": {"send": "http://127.0.0.1:9/"}, "message": ""}'
                answer = await AsyncHTTPClient().fetch(url, method="POST", body=event)
                assert answer.code == 200
        finally:
            await kill(process)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
