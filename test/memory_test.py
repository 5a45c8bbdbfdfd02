"""Free memory goes back to the system, where glibc would keep it."""

import asyncio

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
