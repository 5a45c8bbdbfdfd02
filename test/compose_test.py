"""conf/compose.yaml matches the relays, HAProxy and the other services.

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
import websockets
import yaml
from programs import kill, program
from service import DEADLINE, PROJECT, Service, eventually

CONF = PROJECT / "conf"


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((CONF / "compose.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def services(compose):
    return compose["services"]


@pytest.fixture
def token(tmp_path):
    """A file like the one that CALLBACK_TOKEN_FILE names."""
    path = tmp_path / "callback_token"
    path.write_text("0123456789abcdef\n")
    return path


@pytest.mark.parametrize("name", ["relay-1", "relay-2"])
@pytest.mark.gen_test
async def test_relay_starts_with_its_environment(io_loop, services, name, token):
    """Each variable is an option; callbacks reach the address in the file."""
    environment = services[name]["environment"]
    elsewhere = {
        "SOCKETDOCK_CALLBACKPORT": "0",
        "SOCKETDOCK_CALLBACK_TOKEN_FILE": str(token),
    }
    async with Service(environment=environment | elsewhere) as service:
        service.process.kill()  # do not wait for drain_delay
        await service.process.wait()
    assert not [line for line in service.log if "unknown variable" in line]
    assert environment["SOCKETDOCK_EXTERNALHOSTANDPORT"] == (
        f"{name}:{environment['SOCKETDOCK_CALLBACKPORT']}"
    )
    assert environment["SOCKETDOCK_INSTANCE_NAME"] == name


def test_relays_are_stopped_later_than_they_drain(services):
    """`stop_grace_period` is longer than the sum of the drain's times."""
    for name in ("relay-1", "relay-2"):
        environment = services[name]["environment"]
        drain = sum(
            float(environment.get(f"SOCKETDOCK_DRAIN_{part}", default))
            for part, default in [("DELAY", 0), ("SPREAD", 0), ("TIMEOUT", 25)]
        )
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > drain


def without_comments(name):
    """The text of a file in conf/, without its lines that are comments."""
    text = (CONF / name).read_text("utf-8")
    return re.sub(r"^ *#.*\n", "", text, flags=re.M)


def test_drain_delay_is_longer_than_haproxy_health_checks(services):
    """`--drain_delay` is longer than the interval of checks times their number."""
    text = without_comments("haproxy.cfg")
    ((interval, fall),) = re.findall(r"check inter (\d+)s fall (\d+)", text)
    for name in ("relay-1", "relay-2"):
        delay = services[name]["environment"]["SOCKETDOCK_DRAIN_DELAY"]
        assert float(delay) > int(interval) * int(fall)


def test_relays_trust_only_haproxy(compose, services):
    """HAProxy has a fixed address, which no other container gets."""
    (pool,) = compose["networks"]["default"]["ipam"]["config"]
    address = services["haproxy"]["networks"]["default"]["ipv4_address"]
    assert ip_address(address) in ip_network(pool["subnet"])
    assert ip_address(address) not in ip_network(pool["ip_range"])
    for name in ("relay-1", "relay-2"):
        environment = services[name]["environment"]
        assert environment["SOCKETDOCK_TRUSTED_PROXIES"] == address


def test_haproxy_gets_the_addresses_of_the_relays(services):
    """Its file uses each variable, and HAProxy accepts the result."""
    haproxy = program("haproxy", "haproxy", "/usr/sbin/haproxy")
    environment = services["haproxy"]["environment"]
    text = without_comments("haproxy.cfg")
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


def test_files_that_are_mounted_or_built_exist(services):
    """Paths are relative to the compose file."""
    paths = [
        volume.split(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
    ]
    paths += [f"{service['build']}/Dockerfile" for service in services.values()
              if "build" in service]
    assert len(paths) == 9
    for path in paths:
        assert (CONF / path).exists(), path


@pytest.mark.gen_test
async def test_backend_and_prometheus_know_the_token(io_loop, services, token):
    """The backend's command, at another address, answers a client of relay 1."""
    python, *words = services["backend"]["command"]
    assert python == "python"
    with socket.socket() as reserved:  # bound, but not listening
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        script = words.pop()
        secret = services["relay-1"]["environment"]["SOCKETDOCK_CALLBACK_TOKEN_FILE"]
        for old, new in [
            ('("", 8000)', f'("127.0.0.1", {port})'), (secret, str(token))
        ]:
            assert old in script
            script = script.replace(old, new)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            script,
            cwd=PROJECT / "examples",
            stdout=asyncio.subprocess.DEVNULL,
        )
        environment = {
            name: value.replace("//backend:8000/", f"//127.0.0.1:{port}/")
            for name, value in services["relay-1"]["environment"].items()
            if not name.endswith(("EXTERNALHOSTANDPORT", "DRAIN_DELAY", "DRAIN_SPREAD"))
        }
        environment |= {
            "SOCKETDOCK_CALLBACKPORT": "0",
            "SOCKETDOCK_CALLBACK_TOKEN_FILE": str(token),
        }
        try:
            await eventually(lambda: answers(port))
            async with (
                Service(environment=environment) as service,
                websockets.connect(service.ws_url) as client,
            ):
                await client.send("hello")
                answer = await asyncio.wait_for(client.recv(), DEADLINE)
                assert answer == "you said: hello"
        finally:
            await kill(process)
    prometheus = yaml.safe_load((CONF / "prometheus.yml").read_text("utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["authorization"] == {"credentials_file": secret}


def test_secret_is_where_it_is_read(compose, services):
    """Each container that reads /run/secrets/callback_token has it."""
    assert "CALLBACK_TOKEN_FILE:?" in compose["secrets"]["callback_token"]["file"]
    for name in ("relay-1", "relay-2", "backend", "prometheus"):
        assert services[name]["secrets"] == ["callback_token"], name


def test_prometheus_scrapes_every_relay(services):
    """At the callback listener of each."""
    prometheus = yaml.safe_load((CONF / "prometheus.yml").read_text("utf-8"))
    (job,) = prometheus["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == [
        service["environment"]["SOCKETDOCK_EXTERNALHOSTANDPORT"]
        for name, service in services.items()
        if name.startswith("relay-")
    ]


def test_grafana_finds_what_is_mounted(services):
    """Its dashboard's folder, and Prometheus by its name in this network."""
    mounted = dict(
        volume.removesuffix(":ro").split(":")
        for volume in services["grafana"]["volumes"]
    )
    (provider,) = yaml.safe_load(
        (CONF / "grafana-dashboards.yml").read_text("utf-8")
    )["providers"]
    dashboard = mounted["./grafana-dashboard.json"]
    assert dashboard.startswith(provider["options"]["path"] + "/")
    home = services["grafana"]["environment"]
    assert home["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    (source,) = yaml.safe_load(
        (CONF / "grafana-datasource.yml").read_text("utf-8")
    )["datasources"]
    (port,) = services["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{port.rpartition(':')[2]}"


def test_only_the_client_port_is_public(services):
    """All other published ports are bound to the loopback address."""
    outside = {
        name
        for name, service in services.items()
        for port in service.get("ports", [])
        if not port.startswith("127.0.0.1:")
    }
    assert outside == {"haproxy"}


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
