"""A short soak: random faults, and an account of every message."""

import asyncio
import os
import signal
import sys

import pytest
from service import PROJECT

# It judges by time who was late.
pytestmark = [pytest.mark.alone, pytest.mark.gen_test(timeout=300)]


@pytest.mark.parametrize(
    "flags",
    [("--seed=11", "--seconds=30"), ("--seed=12", "--seconds=15", "--one-relay")],
)
async def test_random_faults_break_no_promise(io_loop, flags):
    """What was wrong is what the soak prints."""
    soak = await asyncio.create_subprocess_exec(
        sys.executable, "test/soak.py", *flags, cwd=PROJECT, start_new_session=True,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = await soak.communicate()
    finally:
        if soak.returncode is None:
            os.killpg(soak.pid, signal.SIGKILL)  # its relays with it
            await soak.wait()
    assert soak.returncode == 0, printed.decode()
