"""A backend's host that vanishes without a word, and comes back.

`faults_test.py` runs it in a network namespace of its own; it is collected only
where it is named.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest
from faults import BackendProcess, assert_complete, leave, talkers
from service import Service, eventually

pytestmark = pytest.mark.gen_test(timeout=180)

NEAR, FAR = "198.18.0.1", "198.18.0.2"  # of the block for benchmarks (RFC 2544)


@contextlib.asynccontextmanager
async def far_host() -> AsyncIterator[list[str]]:
    """A host at `FAR`: a namespace at the end of a cable; how to run things there."""
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
    """Held requests fail within --backend_dead_after, and go to who comes next."""
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
                return sum("goes again" in line for line in service.log)

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
