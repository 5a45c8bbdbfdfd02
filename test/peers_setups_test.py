"""Instances that take each other's callbacks: behind HAProxy, with TLS, with IPv6."""

import asyncio
import contextlib
import json
import signal
import socket

import pytest
import websockets
from balancer_test import HAProxy
from certificates import Authority
from check_test import check, only
from metrics_test import scrape
from peers_test import (
    OTHER,
    PATIENT,
    SECRET,
    at,
    call,
    joined,
    peer_flags,
    received,
    relays,
    silent_host,
)
from ports import free_ports
from redis_server import RedisServer
from service import DEADLINE, RecordingBackend, Service, eventually, refusal

from backends import Observer
from handlers.callbacks.peers.forward import Forwarder, PeerSettings
from handlers.callbacks.peers.forwarded import Forwarded
from handlers.callbacks.peers.hops import Hops
from handlers.connections import ConnectionMap
from handlers.owners import Address, SharedOwners

pytestmark = [pytest.mark.gen_test(timeout=90), pytest.mark.once]

CLIENTS = 300


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(f"# of all instances\n\n  {SECRET} \n")
    return path


class CallbackBalancer(HAProxy):
    """HAProxy with the part of its file for callbacks, for three relays."""

    def __init__(self, *words):
        super().__init__(*words)
        before, heading, rest = self.path.read_text("utf-8").partition(
            "#frontend callbacks\n"
        )
        part, blank, after = rest.partition("\n\n")
        lines = [line.removeprefix("#") for line in (heading + part).split("\n")]
        lines.append('    server relay-3 "${RELAY_3_CALLBACKS}"')
        self.path.write_text(before + "\n".join(lines) + blank + after)
        self.change("maxconn 400", "maxconn 4000")
        self.change(
            '    server relay-2 "${RELAY_2-',
            '    server relay-3 "${RELAY_3}" port "${RELAY_3_CALLBACKPORT}"\n'
            '    server relay-2 "${RELAY_2-',
        )
        self.callbacks = free_ports(1)

    def environment(self):
        found = super().environment()
        found["CALLBACKS_BIND"] = f"127.0.0.1:{self.callbacks}"
        for number, relay in enumerate(self.relays, 1):
            found[f"RELAY_{number}_CALLBACKS"] = relay.address
        return found


class PlannedRelay:
    """What the balancer knows of a relay that has not started."""

    def __init__(self, port):
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.ws_url = f"ws://{self.address}/ws"
        self.callback_url = f"http://{self.address}"


@pytest.mark.long
async def test_callbacks_to_a_balancer_reach_their_clients(
    io_loop, secret_file, tmp_path
):
    """300 clients of three relays, which have one address for their callbacks."""
    planned = [PlannedRelay(free_ports(1)) for _ in range(3)]
    balancer = CallbackBalancer(tmp_path, planned)
    external = f"--externalhostandport=127.0.0.1:{balancer.callbacks}"
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(RecordingBackend())
        services = [
            await stack.enter_async_context(
                Service(
                    *backend.flags("message"),
                    *peer_flags(secret_file, relay.port),
                    external,
                    "--trusted_proxies=127.0.0.1",
                )
            )
            for relay in planned
        ]
        await stack.enter_async_context(balancer)
        await eventually(lambda: listens(balancer.callbacks))
        clients = []
        for number in range(CLIENTS):
            client = await websockets.connect(balancer.url, compression=None)
            stack.push_async_callback(client.close)
            await client.send(f"{number}")
            clients.append(client)
        events = await backend.wait_for("message", CLIENTS)
        urls = {int(event["message"]): event["meta"]["send"] for event in events}
        assert len({event["meta"]["instance"] for event in events}) == 3

        async def reaches(number):
            url = urls[number]
            assert url.startswith(f"http://127.0.0.1:{balancer.callbacks}/socket/")
            answer = await call(backend, url, body=f"to {number}")
            assert answer.code == 200
            assert await received(clients[number]) == f"to {number}"

        await asyncio.gather(*map(reaches, range(CLIENTS)))
        found = [await scrape(service) for service in services]
        forwarded = [each['forwarded_total{outcome="answered"}'] for each in found]
        sends = [each['sends_total{status="200"}'] for each in found]
        assert min(forwarded) > 0
        # Each is answered by its owner, and by the relay that forwarded it.
        assert sum(sends) - sum(forwarded) == CLIENTS
        services[0].process.send_signal(signal.SIGKILL)
        await asyncio.wait_for(services[0].process.wait(), DEADLINE)
        # In each id, the owner follows 32 random digits.
        owner = Address.parse(planned[0].address).digits
        dead = [url for url in urls.values() if url.split("/")[-2][32:44] == owner]
        for url in dead[:10]:
            answer = await call(backend, url, body="x")
            assert answer.code == 410
            assert json.loads(answer.body)["type"] == "instance-gone"


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_peers_with_ipv6(io_loop, secret_file):
    """Ids have 84 hex digits."""
    async with relays(2, secret_file, host="[::1]") as (backend, (first, second)):
        async with joined(backend, second) as (client, meta):
            assert len(meta["connection_id"]) == 84
            for receipt in ("", "?receipt=pong"):
                answer = await call(backend, at(first, meta) + receipt, body="x")
                assert answer.code == 200
                assert await received(client) == "x"


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_peers_with_tls(io_loop, secret_file, tmp_path, server):
    """Verified against one name, with client certificates where they are required."""
    authority = Authority(tmp_path / "ca")
    good = authority.server("relays.internal", "127.0.0.1")
    other = authority.server("other.internal", "127.0.0.1")
    async with RecordingBackend() as backend, contextlib.AsyncExitStack() as stack:
        services = []
        for certificate in (good, good, other):
            port = free_ports(1)
            service = Service(
                *backend.flags("message"),
                "--callbackip=127.0.0.1",
                f"--callbackport={port}",
                f"--callback_tls_cert={certificate.both}",
                f"--peer_address=127.0.0.1:{port}",
                f"--peer_secret_file={secret_file}",
                "--peer_tls=on",
                f"--peer_ca={authority.path}",
                "--peer_name=relays.internal",
                f"--http_server={server}",
                PATIENT,
            )
            services.append(await stack.enter_async_context(service))
        first, second, third = services
        trust = {"ca_certs": str(authority.path)}
        async with joined(backend, second) as (client, meta):
            answer = await call(backend, at(first, meta), body="x", **trust)
            assert answer.code == 200
            assert await received(client) == "x"
        async with joined(backend, third) as (client, meta):
            answer = await call(backend, at(first, meta), body="x", **trust)
            assert answer.code == 503


async def test_secrets_rotate_without_a_gap(io_loop, tmp_path):
    """SIGHUP reads them again: the first one signs, each verifies."""
    files = [tmp_path / "first", tmp_path / "second"]
    for file in files:
        file.write_text(f"{SECRET}\n")
    async with RecordingBackend() as backend, contextlib.AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(
                Service(
                    *backend.flags("message"), *peer_flags(file, free_ports(1))
                )
            )
            for file in files
        ]
        first, second = services

        async def reread(which, *secrets):
            files[which].write_text("".join(f"{secret}\n" for secret in secrets))
            service = services[which]
            before = len(service.log)
            service.process.send_signal(signal.SIGHUP)
            await eventually(
                lambda: any("reloaded" in line for line in service.log[before:])
            )

        async def is_reached(expected):
            async with joined(backend, second) as (_, meta):
                answer = await call(backend, at(first, meta), body="x")
                return answer.code == expected

        async with joined(backend, second) as (client, old):
            for which in (0, 1):
                await reread(which, SECRET, OTHER)
                assert await is_reached(200)
            for which in (0, 1):
                await reread(which, OTHER, SECRET)
                assert await is_reached(200)
            assert (await call(backend, at(first, old), body="old")).code == 200
            assert await received(client) == "old"
            await reread(0, OTHER)
            assert await is_reached(200)
            # Its id was made with the secret that this instance has forgotten.
            assert (await call(backend, at(first, old), body="old")).code == 410
            # A file that cannot be used changes nothing.
            await reread(0, "short")
            assert await is_reached(200)
        assert any("short" not in line for line in first.log)
        assert not any(SECRET in line or OTHER in line for line in first.log)


class FakeLeases:
    """Says of each instance whether it is alive."""

    def __init__(self, alive):
        self.alive = alive
        self.asked = []

    async def has_lease(self, peer_address):
        self.asked.append(peer_address)
        if self.alive == "no answer":
            await asyncio.Event().wait()
        return self.alive


@pytest.mark.parametrize(
    ("alive", "status"), [(False, 410), (True, 503), (None, 503), ("no answer", 503)]
)
async def test_lease_decides_about_a_silent_owner(io_loop, alive, status):
    """An owner without a lease is gone; who does not know answers 503."""
    with silent_host() as port:
        own, owner = Address.parse("127.0.0.1:9"), Address.parse(f"127.0.0.1:{port}")
        keys = [SECRET.encode()]
        connections = ConnectionMap(owners=SharedOwners(own, keys), observer=Observer())
        settings = PeerSettings(timeout=0.2, send_timeout=10)
        forwarder = Forwarder(connections, Hops("x", keys), settings)
        forwarder.leases = leases = FakeLeases(alive)
        connection_id = SharedOwners(owner, keys).new_id()
        found = forwarder.owner_of(connection_id)
        callback = Forwarded("POST", f"/socket/{connection_id}/send", "", 10)
        async with asyncio.timeout(DEADLINE):
            answer = await forwarder.forward(found, callback)
        assert answer.status == status
        assert (b"instance-gone" in answer.body) == (status == 410)
        assert set(leases.asked) == {f"127.0.0.1:{port}"}
        await forwarder.close()


async def test_lease_decides_about_an_owner_that_is_stopped(io_loop, secret_file):
    """Its kernel takes the request, and it says nothing: the cluster knows more."""
    async with relays(1, secret_file) as (backend, (service,)):
        async with joined(backend, service) as (_, meta):
            own = Address.parse("127.0.0.1:9")
            keys = [SECRET.encode()]
            connections = ConnectionMap(owners=SharedOwners(own, keys))
            settings = PeerSettings(timeout=2, send_timeout=60)
            forwarder = Forwarder(connections, Hops("x", keys), settings)
            forwarder.leases = FakeLeases(False)
            owner = forwarder.owner_of(meta["connection_id"])
            callback = Forwarded(
                "POST", f"/socket/{meta['connection_id']}/send", "text/plain", 60
            )
            async with asyncio.timeout(DEADLINE):
                assert (await forwarder.forward(owner, callback)).status == 200
                async with service.stalled(0):
                    answer = await forwarder.forward(owner, callback)
            assert answer.status == 410
            assert json.loads(answer.body)["type"] == "instance-gone"
            await forwarder.close()


@pytest.mark.long
async def test_instance_that_is_stopped_is_gone_when_its_lease_is(
    io_loop, secret_file, tmp_path
):
    """Until then a callback waits for its answer; both in real Redis."""
    async with RedisServer(tmp_path) as redis:
        flags = (f"--cluster={redis.url}", "--lease_ttl=2", "--peer_timeout=2")
        async with relays(2, secret_file, *flags) as (backend, (first, second)):
            for service in (first, second):
                await eventually(lambda s=service: "holds its lease" in str(s.log))
            async with joined(backend, second) as (_, meta):
                url = at(first, meta)
                assert (await call(backend, url, body="x")).code == 200
                async with second.stalled(0):
                    async with asyncio.timeout(DEADLINE):
                        while True:
                            # 504 as long as the lease is there.
                            answer = await call(
                                backend, url, body="x", request_timeout=DEADLINE
                            )
                            if answer.code == 410:
                                break
                            assert answer.code in (503, 504)
                assert json.loads(answer.body)["type"] == "instance-gone"


# Options, and the check.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peer_address=10.0.0.3:80"], "needs --peer_secret_file"),
        (["--peer_secret_file=x"], "needs --peer_address"),
        (["--peer_timeout=0"], "--peer_timeout must be above 0"),
        (["--peer_tls=on"], "needs --peer_address"),
        (["--peer_address=relay-1:80", "--peer_secret_file=x"], "=relay-1:80"),
        (["--peer_address=0.0.0.0:80", "--peer_secret_file=x"], "=0.0.0.0:80"),
    ],
)
def test_options_that_cannot_be_right(flags, words):
    assert words in refusal(*flags)


def test_secret_files_that_cannot_be_right(tmp_path):
    path = tmp_path / "secret"
    flags = ("--peer_address=127.0.0.1:80", f"--peer_secret_file={path}")
    assert str(path) in refusal(*flags, status=1)
    path.write_text("too short\n")
    line = refusal(*flags)
    assert "line 1" in line and "too short" not in line


async def test_check_knows_peers(io_loop, secret_file):
    """What other instances could not reach is an error; secrets are not shown."""
    async with RecordingBackend() as backend:
        start = (*backend.flags("message"), f"--peer_secret_file={secret_file}")
        port = free_ports(1)
        lines = await check(
            *start, f"--bindport={port}", f"--peer_address=127.0.0.1:{port}", status=0
        )
        assert any(f"{secret_file}: 1 secret" in line for line in lines)
        assert not any(SECRET in line for line in lines)
        lines = await check(
            *start, f"--bindport={port}", "--peer_address=192.0.2.1:8765", status=1
        )
        assert "--peer_address" in only("error", lines)
        lines = await check(
            *start,
            f"--bindport={port}",
            f"--peer_address=127.0.0.1:{port + 1}",
            status=0,
        )
        assert "--peer_address" in only("warning", lines)
