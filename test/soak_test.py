"""A short soak: random faults, and an account of every message."""

import asyncio
import os
import signal
import sys

import pytest
from service import PROJECT

pytestmark = [pytest.mark.gen_test(timeout=300), pytest.mark.long]

# What the seed draws for the first round; `make soak` has many, and longer ones.
ROUNDS = {
    "held answers, a killed relay": ("--seed=125",),
    "strict order, a relay that stops": ("--seed=59",),
    "no pause for the memory": ("--seed=12", "--one-relay"),
}


@pytest.mark.parametrize("flags", ROUNDS.values(), ids=ROUNDS)
async def test_random_faults_violate_no_guarantee(io_loop, flags):
    """The soak prints each violation."""
    await run("soak.py", "--seconds=2", "--round=2", "--clients=20", *flags)


async def test_random_faults_violate_no_guarantee_of_batches(io_loop):
    """Also when the relay stops, or is killed, amid batches."""
    await run("batch_soak.py", "--seed=1", "--clients=20", "--messages=30")


async def test_random_deaths_violate_no_guarantee_of_leases(io_loop):
    """Each kind of death once, of three relays that share Redis."""
    await run("cluster_soak.py", "--seconds=0", "--clients=5", "--lease-ttl=2")


async def test_random_deaths_lose_nothing_of_a_durable_queue(io_loop):
    """Relays, workers, Redis and the backend die; each message is accounted for."""
    await run(
        "queue_soak.py", "--seconds=6", "--away=0", "--clients=15", "--lease-ttl=2"
    )


async def run(program: str, *flags: str) -> None:
    soak = await asyncio.create_subprocess_exec(
        sys.executable, f"test/{program}", *flags,
        cwd=PROJECT, start_new_session=True,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = await soak.communicate()
    finally:
        if soak.returncode is None:
            os.killpg(soak.pid, signal.SIGKILL)  # its relays with it
            await soak.wait()
    assert soak.returncode == 0, printed.decode()
