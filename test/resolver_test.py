"""Names are looked up in threads that delay nothing."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from programs import leave_out

from backends.client import resolver
from backends.client.resolver import Resolver

pytestmark = pytest.mark.gen_test(timeout=60)


class SlowDNS:
    """`getaddrinfo`, which answers when the test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.go_on = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host, port, *, type, flags=0):
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no IP address")
        self.asked.append(host)
        self.go_on.wait()
        return [(socket.AF_INET, type, 6, "", ("127.0.0.1", port))]


@pytest.fixture
def dns(monkeypatch):
    """A `getaddrinfo` that answers nothing until the end of the test."""
    slow = SlowDNS(monkeypatch)
    yield slow
    slow.go_on.set()


async def test_concurrent_lookups_of_one_name_are_shared(io_loop, dns):
    """Also after one caller was cancelled."""
    resolver = Resolver()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(resolver.resolve("backend.example", 80), 0.1)
    others = [
        asyncio.create_task(resolver.resolve("backend.example", 80)) for _ in range(3)
    ]
    await asyncio.sleep(0)
    dns.go_on.set()
    for addresses in await asyncio.gather(*others):
        assert [address[4] for address in addresses] == [("127.0.0.1", 80)]
    assert dns.asked == ["backend.example"]


async def test_look_ups_are_bounded(io_loop, dns):
    """More fail at once; IP addresses need none."""
    resolving = Resolver()
    under_way = [
        asyncio.create_task(resolving.resolve(f"{number}.example", 80))
        for number in range(resolver.MAX_LOOKUPS)
    ]
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="DNS has not answered"):
        await resolving.resolve("one.too.many.example", 80)
    dns.go_on.set()
    await asyncio.gather(*under_way)
    assert await resolving.resolve("now.example", 80)


async def test_ip_addresses_are_not_looked_up(io_loop):
    """The result is available at once."""
    before = threading.active_count()
    for host in ("127.0.0.1", "::1"):
        ((*_, address),) = await Resolver().resolve(host, 80)
        assert address[:2] == (host, 80)
    assert threading.active_count() == before


@pytest.mark.long
def test_silent_dns_delays_nothing():
    """Runs `silent_dns.py` in its own namespaces."""
    root = ["--map-root-user"] if os.getuid() else []
    unshare = ["unshare", "--net", "--mount", *root]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        leave_out("no network namespace can be made here")
    subprocess.run(
        [*unshare, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(Path(__file__).with_name("silent_dns.py"))],
        check=True,
        timeout=200,
    )
