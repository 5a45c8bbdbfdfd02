"""conf/compose-redis.yaml matches the relays, the worker, HAProxy and Redis.

Docker itself is not run. Its programs run as the file says, at other ports.
"""

import asyncio
import re
import subprocess
import sys
from ipaddress import ip_address, ip_network

import pytest
import websockets
import yaml
from compose_test import answers, without_comments
from ports import free_ports
from programs import kill, program
from redis_server import RedisServer
from service import DEADLINE, PROJECT, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

CONF = PROJECT / "conf"
RELAYS = ("relay-1", "relay-2")
COMPOSE = yaml.safe_load((CONF / "compose-redis.yaml").read_text("utf-8"))
SERVICES = COMPOSE["services"]


def warnings_of_start(service: Service) -> list[str]:
    """Return what it said of its options, and not what a busy machine makes it say."""
    (serves,) = (i for i, line in enumerate(service.log) if " clients at " in line)
    return [line for line in service.log[:serves] if not line.startswith("[I ")]


async def test_client_gets_the_answer_of_the_backend_through_all(io_loop, tmp_path):
    """From relay 1 by Redis and the worker to the backend; back by relay 2."""
    redis = RedisServer(tmp_path, aof=True)
    backend_port, *callbacks = (free_ports(1) for _ in range(3))
    token, secret = tmp_path / "callback_token", tmp_path / "peer_secret"
    token.write_text("0123456789abcdef\n")
    secret.write_text("0123456789abcdef" * 2)

    def service(name: str, **changed: str) -> Service:
        environment = {
            name: value.replace("//redis:6379", f"//127.0.0.1:{redis.port}")
            .replace("//backend:8000/", f"//127.0.0.1:{backend_port}/")
            .replace("/run/secrets", str(tmp_path))
            for name, value in SERVICES[name]["environment"].items()
        }
        service = Service(environment=environment | changed)
        service.flags[:0] = SERVICES[name].get("command", [])
        return service

    def relay(name: str, port: int) -> Service:
        return service(
            name,
            SOCKETDOCK_CALLBACKPORT=str(port),
            SOCKETDOCK_PEER_ADDRESS=f"127.0.0.1:{port}",
            # HAProxy would choose this relay.
            SOCKETDOCK_EXTERNALHOSTANDPORT=f"127.0.0.1:{callbacks[1]}",
        )

    python, *words = SERVICES["backend"]["command"]
    assert python == "python"
    script = words.pop().replace('("", 8000)', f'("127.0.0.1", {backend_port})')
    script = script.replace("/run/secrets/callback_token", str(token))
    backend = await asyncio.create_subprocess_exec(
        sys.executable, *words, script,
        cwd=PROJECT / "examples",
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        await eventually(lambda: answers(backend_port))
        async with (
            redis,
            service("worker") as worker,
            relay("relay-1", callbacks[0]) as first,
            relay("relay-2", callbacks[1]) as second,
        ):
            async with websockets.connect(first.ws_url) as client:
                await client.send("hello")
                answer = await asyncio.wait_for(client.recv(), DEADLINE)
                assert answer == "you said: hello"
            for process in (first.process, second.process, worker.process):
                await kill(process)  # before its drain_delay
    finally:
        await kill(backend)
    for started in (first, second, worker):
        assert warnings_of_start(started) == []


def test_addresses_are_fixed_and_given_to_nobody_else():
    """HAProxy's is trusted; each relay's is where the other one forwards to."""
    (pool,) = COMPOSE["networks"]["default"]["ipam"]["config"]
    fixed = {
        name: SERVICES[name]["networks"]["default"]["ipv4_address"]
        for name in ("haproxy", *RELAYS)
    }
    assert len(set(fixed.values())) == 3
    for address in fixed.values():
        assert ip_address(address) in ip_network(pool["subnet"])
        assert ip_address(address) not in ip_network(pool["ip_range"])
    for name in RELAYS:
        environment = SERVICES[name]["environment"]
        port = environment["SOCKETDOCK_CALLBACKPORT"]
        assert environment["SOCKETDOCK_PEER_ADDRESS"] == f"{fixed[name]}:{port}"
        assert environment["SOCKETDOCK_TRUSTED_PROXIES"] == fixed["haproxy"]
        assert environment["SOCKETDOCK_INSTANCE_NAME"] == name


def test_haproxy_has_the_relays_and_the_callbacks():
    """It accepts both files, which use all of its variables and no others."""
    haproxy = program("haproxy", "haproxy", "/usr/sbin/haproxy")
    service = SERVICES["haproxy"]
    environment = service["environment"]
    mounted = dict(
        volume.removesuffix(":ro").split(":") for volume in service["volumes"]
    )
    names = ["haproxy.cfg", "haproxy-callbacks.cfg"]
    files = [mounted[f"./{name}"] for name in names]
    assert service["command"] == [
        "haproxy", "-W", "-db", *(word for file in files for word in ("-f", file))
    ]
    text = "".join(without_comments(name) for name in names)
    assert set(environment) == set(re.findall(r"\$\{(\w+)-", text))
    for name in RELAYS:
        variable = name.upper().replace("-", "_")
        port = SERVICES[name]["environment"]["SOCKETDOCK_CALLBACKPORT"]
        assert environment[variable] == f"{name}:8765"  # the image's port
        assert environment[f"{variable}_CALLBACKPORT"] == port
        assert environment[f"{variable}_CALLBACKS"] == f"{name}:{port}"
        external = SERVICES[name]["environment"]["SOCKETDOCK_EXTERNALHOSTANDPORT"]
        assert external == f"haproxy{environment['CALLBACKS_BIND']}"
    checked = subprocess.run(
        [haproxy, "-c", *(word for name in names for word in ("-f", CONF / name))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_part_for_callbacks_is_that_of_haproxy_cfg():
    """There it is in comments, since it needs an option of the relays."""
    whole = (CONF / "haproxy.cfg").read_text("utf-8")
    part = re.search(r"^#frontend callbacks\n(#.*\n)*", whole, flags=re.M)[0]
    own = (CONF / "haproxy-callbacks.cfg").read_text("utf-8")
    assert own.endswith("\n\n" + re.sub(r"^#", "", part, flags=re.M))


def test_only_the_clients_port_is_published():
    """Neither Redis, which has no password, nor the callbacks can be reached."""
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {"haproxy": ["8765:8765"]}
    bind = SERVICES["haproxy"]["environment"]["CLIENTS_BIND"]
    assert published["haproxy"][0].endswith(bind)


def test_redis_keeps_what_it_has_confirmed():
    """It appends to its file, on a volume, and evicts nothing."""
    service = SERVICES["redis"]
    name, *words = service["command"]
    assert name == "redis-server"
    settings = dict(zip(words[::2], words[1::2], strict=True))
    assert settings["--appendonly"] == "yes"
    assert settings["--maxmemory-policy"] == "noeviction"
    (volume,) = service["volumes"]
    assert volume.split(":") == [next(iter(COMPOSE["volumes"])), "/data"]
    for name in (*RELAYS, "worker"):
        url = SERVICES[name]["environment"]["SOCKETDOCK_REDIS_URL"]
        assert url == "redis://redis:6379"


def test_stops_take_less_than_their_grace_period():
    """And a relay drains for longer than HAProxy takes to see it."""
    ((interval, fall),) = re.findall(
        r"check inter (\d+)s fall (\d+)", without_comments("haproxy.cfg")
    )
    for name in RELAYS:
        environment = SERVICES[name]["environment"]
        delay = float(environment["SOCKETDOCK_DRAIN_DELAY"])
        assert delay > int(interval) * int(fall)
        drain = delay + float(environment["SOCKETDOCK_DRAIN_SPREAD"]) + 25
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain


def test_secrets_and_files_are_where_they_are_read():
    """Each secret is given to who names it; each mounted file exists."""
    for secret in COMPOSE["secrets"].values():
        assert re.match(r"\$\{\w+_FILE:\?", secret["file"])
    for service in SERVICES.values():
        named = set(re.findall(r"/run/secrets/(\w+)", str(service)))
        assert named <= set(service.get("secrets", []))
        for volume in service.get("volumes", []):
            path = volume.split(":")[0]
            assert path in COMPOSE["volumes"] or (CONF / path).exists(), path
