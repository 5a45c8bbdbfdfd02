"""The benchmark runs. No test asserts a time: the figures are in docs/."""

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest
from service import PROJECT

from bench.comparison import Comparison, comparisons

pytestmark = [pytest.mark.gen_test(timeout=240), pytest.mark.long]

PRICE = {"cpu_us", "load_us", "per_second", "busy", "stolen"}
FIGURES = {
    "up": PRICE,
    "up-redis": PRICE,
    "push": PRICE,
    "push-bulk": PRICE,
    "push-forward": PRICE | {"local_cpu_us", "ratio"},
    "echo": PRICE,
    "echo-reply": PRICE,
    "echo-batch": PRICE,
    "connect": PRICE,
    "visit": PRICE,
    "visit-leases": PRICE,
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


async def test_checkouts_are_compared_by_rounds(io_loop: object) -> None:
    """Each round has a ratio; with too few rounds there is no interval."""
    said = await bench(
        f"--against={PROJECT}", "--modes=up,idle", "--rounds=2", "--tries=1",
        "--seconds=0.2", "--warm-up=0.1", "--clients=4", "--idle-clients=70",
    )  # fmt: skip
    ratio = r"\d+\.\d{3}"
    for name in ("up 1024", "idle"):
        assert re.search(
            rf"^{name}: {ratio} {ratio}\n  median {ratio}, too few rounds",
            said,
            re.MULTILINE,
        )


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.04, 1.05] * 8, True),
        # A quarter of the rounds below is enough for doubt.
        ([1.0] * 4 + [1.05] * 11, False),
        ([1.0] * 3 + [1.05] * 12, True),
        ([0.5, 1.5] * 8, False),
        ([2.0] * 5, False),
        ([2.0] * 6, True),
    ],
)
def test_slower_is_judged_by_the_whole_interval(
    ratios: list[float], slower: bool
) -> None:
    """Only if the whole interval of the median lies above the tolerance."""
    assert Comparison("up", 1024, ratios).is_slower is slower


def test_costs_are_compared_within_a_round() -> None:
    """In either order of measurement."""
    runs = [
        {"round": 1, "relay": "ours", "mode": "up", "size": 1, "cpu_us": 30.0},
        {"round": 1, "relay": "theirs", "mode": "up", "size": 1, "cpu_us": 20.0},
        {"round": 2, "relay": "theirs", "mode": "up", "size": 1, "cpu_us": 10.0},
        {"round": 2, "relay": "ours", "mode": "up", "size": 1, "cpu_us": 5.0},
        {"round": 3, "relay": "ours", "mode": "up", "size": 1, "cpu_us": 5.0},
    ]
    (comparison,) = comparisons(runs, "ours", "theirs")
    assert comparison.ratios == [1.5, 0.5]


async def bench(*flags: str) -> str:
    """Run it; it must succeed. Returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench", *flags, cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()
