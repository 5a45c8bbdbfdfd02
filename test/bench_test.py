"""The benchmark still runs. No test asserts a time: the figures are in docs/."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from service import PROJECT

pytestmark = pytest.mark.gen_test(timeout=120)

PRICE = {"cpu_us", "load_us", "per_second", "busy", "stolen"}
FIGURES = {
    "up": PRICE,
    "push": PRICE,
    "echo": PRICE,
    "connect": PRICE,
    "visit": PRICE,
    "idle": {"bytes", "empty"},
    "latency": {"p50", "p99", "p99.9", "per_second", "stolen"},
    "share": {"least_share"},
}


async def test_every_mode_of_the_benchmark_gives_its_figures(
    io_loop: object, tmp_path: Path
) -> None:
    """A moment of each mode, with messages that need several reads, has figures.

    What is measured later is added to them where that is wanted.
    """
    results = tmp_path / "results.json"
    await bench(
        "--peers=socketdock", "--rounds=1", "--tries=1",
        "--seconds=0.2", "--warm-up=0.1", "--clients=4", "--idle-clients=70",
        "--sizes=65536", f"--results={results}",
    )  # fmt: skip
    await bench(
        "--peers=socketdock-processes", "--modes=share", "--rounds=1",
        f"--results={results}", "--add",
    )  # fmt: skip
    runs = json.loads(results.read_text("utf-8"))["runs"]
    assert {run["mode"]: set(run) & FIGURES[run["mode"]] for run in runs} == FIGURES
    for run in runs:
        assert all(run[figure] >= 0 for figure in FIGURES[run["mode"]] - {"bytes"})


async def bench(*flags: str) -> None:
    """Run it; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench", *flags, cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
