"""A DNS server that never answers, and a relay that must stop nevertheless.

`resolver_test.py` runs it in its own namespaces, where it sets the DNS server; pytest
collects it only by name.
"""

import asyncio
import socket
import subprocess
from pathlib import Path

import pytest
import websockets
from service import Service, eventually

pytestmark = pytest.mark.gen_test(timeout=120)


@pytest.fixture
def dns(tmp_path: Path):
    """The only DNS server, at 127.0.0.1, which sends nothing."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    subprocess.run(["mount", "--bind", str(resolv), "/etc/resolv.conf"], check=True)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 53))
        sock.setblocking(False)
        yield sock


@pytest.mark.parametrize("loop_name", ["uvloop", "asyncio"])
async def test_silent_dns_does_not_delay_the_stop(io_loop, dns, loop_name):
    """The process exits at the end of the drain, during a look-up."""
    loop = asyncio.get_running_loop()
    async with Service(
        "--backend=http",
        "--messageuri=http://backend.example/message",
        "--disconnecturi=http://backend.example/disconnect",
        "--backend_connect_timeout=1",
        "--drain_timeout=2",
        f"--event_loop={loop_name}",
    ) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("hello")
            await asyncio.wait_for(loop.sock_recv(dns, 4096), 20)
            said = "no connection in 1 s: DNS has not answered"
            await eventually(lambda: any(said in line for line in service.log))
            service.process.terminate()
            began = loop.time()
            await asyncio.wait_for(service.process.wait(), 60)
            # The drain, a second, and one for a busy machine.
            assert loop.time() - began < 4
