"""Free memory goes back to the system, where glibc would keep it."""

import asyncio
import resource

import pytest
from service import eventually

from handlers import memory
from handlers.memory import MemoryTrimmer, resident

pytestmark = pytest.mark.gen_test(timeout=60)

MIB = 2**20


async def test_free_memory_goes_back_to_the_system(io_loop, monkeypatch):
    """What was freed between blocks that stay in use does not count for long."""
    monkeypatch.setattr(memory, "INTERVAL", 0.05)  # seconds
    trimmer = MemoryTrimmer(asyncio.get_running_loop())
    before = resident()
    # Blocks that malloc does not map one by one, every eighth of which stays.
    blocks = [b"x" * 60_000 for _ in range(8_000)]
    assert resident() > before + 400 * MIB
    blocks[:] = [block for number, block in enumerate(blocks) if number % 8 == 0]
    await eventually(lambda: resident() < before + 150 * MIB)
    trimmer.close()


async def test_nothing_is_said_where_no_descriptor_is_free(io_loop, monkeypatch):
    """How much memory there is can't be asked then: it is another time."""
    loop = asyncio.get_running_loop()
    faults: list[dict] = []
    monkeypatch.setattr(memory, "INTERVAL", 0.05)  # seconds
    trimmer = MemoryTrimmer(loop)
    loop.set_exception_handler(lambda loop, fault: faults.append(fault))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        await asyncio.sleep(0.3)  # for some looks
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    trimmer.close()
    assert faults == []
