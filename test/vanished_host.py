"""A host that vanishes without FIN: a backend's, which is replaced, or a client's.

`faults_test.py` runs it in its own network namespace; pytest collects it only by name.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import pytest
from faults import BackendProcess, assert_complete, leave, talkers
from service import RecordingBackend, Service, eventually
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=180)

NEAR, FAR = "198.18.0.1", "198.18.0.2"  # of the block for benchmarks (RFC 2544)

# A client that sends what it is given, and reads all that comes.
READER = """
import socket, sys, threading
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def read():
    while sock.recv(65536): pass
threading.Thread(target=read, daemon=True).start()
while data := sys.stdin.buffer.read1(65536): sock.sendall(data)
"""


@contextlib.asynccontextmanager
async def far_host() -> AsyncIterator[list[str]]:
    """A host at `FAR`, a network namespace; yields the prefix of commands."""
    host = await asyncio.create_subprocess_exec("unshare", "--net", "sleep", "infinity")
    there = ["nsenter", f"--target={host.pid}", "--net"]
    ours = os.readlink("/proc/self/ns/net")
    try:
        await eventually(lambda: os.readlink(f"/proc/{host.pid}/ns/net") != ours)
        await run("ip", "link", "add", "near", "type", "veth",
                  "peer", "name", "far", "netns", str(host.pid))
        await run("ip", "address", "add", f"{NEAR}/24", "dev", "near")
        await run("ip", "link", "set", "near", "up")
        await run(*there, "ip", "address", "add", f"{FAR}/24", "dev", "far")
        await run(*there, "ip", "link", "set", "far", "up")
        yield there
    finally:
        await run("ip", "link", "delete", "near")
        host.kill()
        await host.wait()


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0, command


async def test_vanished_host_is_noticed_and_its_successor_told(io_loop):
    """Held requests fail within --backend_dead_after, and are sent to its successor."""
    await run("ip", "link", "set", "lo", "up")
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        there = await stack.enter_async_context(far_host())
        at_far = (f"--host={FAR}", "--port=8000")
        holder = await stack.enter_async_context(
            BackendProcess("--hold", *at_far, command=there)
        )
        # At debug each failure has its line, however many there are.
        flags = [*holder.flags(), "--backend_dead_after=6", "--logging=debug"]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 20)
            await asyncio.gather(*(client.say(3) for client in clients))
            await eventually(lambda: len(holder.attempts) == 60)
            await run(*there, "ip", "link", "set", "far", "down")
            began = loop.time()

            def noticed() -> int:
                return sum("is retried" in line for line in service.log)

            await eventually(lambda: noticed() == 60, 30)
            # Two seconds for the kernel's timers and for a busy machine.
            assert loop.time() - began < 8
            await asyncio.gather(*(client.say() for client in clients))
            await stack.aclose()
            async with far_host() as there:
                async with BackendProcess(*at_far, command=there) as successor:
                    await successor.wait_for("message", 80)
                    # Held requests fail one by one here, as their timers go.
                    assert_complete(successor, clients, in_order=False)
                    assert all(client.is_open for client in clients)
                    await leave(clients)
                    await successor.wait_for("disconnect", 20)


async def test_client_that_vanishes_with_bytes_under_way_is_found_in_time(io_loop):
    """Within a ping's interval and timeout, though its kernel never took the ping."""
    await run("ip", "link", "set", "lo", "up")
    loop = asyncio.get_running_loop()
    async with far_host() as there, RecordingBackend() as backend:
        flags = ("--bindip=" + NEAR, "--callbackip=127.0.0.1", "--callbackport=0",
                 "--ping_interval=2", "--ping_timeout=2", "--send_timeout=60")
        async with Service(*backend.flags(), *flags) as service:
            port = service.ws_url.removesuffix("/ws").rpartition(":")[2]
            client = await asyncio.create_subprocess_exec(
                *there, sys.executable, "-c", READER, NEAR, port,
                stdin=asyncio.subprocess.PIPE,
            )
            assert client.stdin is not None
            client.stdin.write(handshake())
            (event,) = await backend.wait_for("connect", 1)
            send = event["meta"]["send"]
            assert (await backend.call(send, body=bytes(1000))).code in (200, 202)
            await run(*there, "ip", "link", "set", "far", "down")
            began = loop.time()
            assert (await backend.call(send, body=bytes(10_000))).code == 200
            (event,) = await backend.wait_for("disconnect", 1)
            # Four seconds, the rest for a busy machine; --send_timeout is 60.
            assert loop.time() - began < 20
            client.kill()
            await client.wait()
    meta = event["meta"]
    assert (meta["code"], meta["reason"]) == (1006, "ping timeout")
