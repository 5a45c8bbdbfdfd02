"""The benchmark runs. No test asserts a time: the figures are in docs/."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from service import PROJECT, ended

from bench import report, results
from bench.comparison import Comparison, comparisons
from bench.relays import is_compiled

pytestmark = [pytest.mark.gen_test(timeout=240), pytest.mark.long]

PRICE = {"cpu_us", "load_us", "per_second", "busy", "stolen"}
FIGURES = {
    "up": PRICE,
    "up-crowd": PRICE | {"few_cpu_us", "crowd_ratio"},
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
        "--crowd-clients=70", "--sizes=65536", f"--results={results}",
    )  # fmt: skip
    await bench(
        "--peers=socketdock-processes", "--modes=share", "--rounds=1",
        f"--results={results}", "--add",
    )  # fmt: skip
    runs = json.loads(results.read_text("utf-8"))["runs"]
    assert {run["mode"]: set(run) & FIGURES[run["mode"]] for run in runs} == FIGURES
    for run in runs:
        assert all(run[figure] >= 0 for figure in FIGURES[run["mode"]] - {"bytes"})


async def test_idle_clients_are_opened_pinged_and_drained(io_loop: object) -> None:
    """By several processes, and each client gets a close frame."""
    said = await run_module(
        "bench.crowd", "--clients=50", "--processes=2", "--seconds=0.2",
        "--drain-spread=0.2",
    )  # fmt: skip
    assert "50 clients, 2 processes" in said
    assert re.search(r"^drained in [\d.]+ s: 50 close frames$", said, re.MULTILINE)


async def test_storm_of_handshakes_is_measured(io_loop: object) -> None:
    """Beside the messages of clients that are connected."""
    said = await run_module("bench.storm", "--handshakes=100")
    assert "100 handshakes in" in said and "p99" in said


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


def test_compiled_checkout_is_not_compared_with_a_pure_one(tmp_path: Path) -> None:
    """It would seem to cost less, whatever has changed."""
    (tmp_path / "socketdock.py").touch()
    if not is_compiled(PROJECT):
        (tmp_path / "handlers").mkdir()
        (tmp_path / "handlers" / "module.so").touch()
    tried = ended(f"--against={tmp_path}", command=(sys.executable, "-m", "bench"))
    assert tried.returncode == 1
    assert tried.stderr.startswith("bench: only one of the two checkouts is compiled")


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


def run(relay: str, mode: str, **figures: float) -> dict[str, Any]:
    """Make a run of the results."""
    size = 0 if mode in ("connect", "idle") else 1024
    return {"relay": relay, "mode": mode, "size": size, "clients": 64, **figures}


def test_readme_has_a_row_for_each_machine_and_form() -> None:
    """Ratios to Node.js; where a mode was not measured, the cell is empty."""
    runs = [
        run("node", "up", cpu_us=40.0),
        run("socketdock-pure", "up", cpu_us=36.0),
        run("socketdock", "up", cpu_us=20.0),
        run("socketdock", "up", cpu_us=30.0),
        run("socketdock", "up", cpu_us=99.0),
        run("socketdock", "idle", bytes=2040.0),
    ]
    modes = {"up": 1.0, "push": 2.0, "echo": 3.0, "connect": 4.0, "visit": 5.0}
    table = report.summary({
        "one": {"machine": {"processor": "Intel(R) Xeon(R) Processor"}, "runs": runs},
        "two": {
            "machine": {"processor": "AMD EPYC 7R13 48-Core Processor"},
            "note": "by hand", "ratios": modes, "bytes": 2700,
        },
    })  # fmt: skip
    assert table.splitlines()[2:] == [
        "| Intel Xeon, compiled | 0.75 |  |  |  |  | 2.0 kB |",
        "| Intel Xeon, pure | 0.90 |  |  |  |  |  |",
        "| AMD EPYC 7R13 (by hand) | 1.00 | 2.00 | 3.00 | 4.00 | 5.00 | 2.7 kB |",
    ]


def test_results_are_added_to_those_of_the_machine(tmp_path: Path) -> None:
    """What is measured again replaces the runs before; the dates of both are kept."""
    file = tmp_path / results.file_of("Intel(R) Xeon(R) CPU @ 2.20GHz").name
    assert file.name == "intel-xeon.json"
    before = [run("node", "up", cpu_us=1.0), run("socketdock", "up", cpu_us=1.0)]
    results.write({"machine": {"date": "2026-01-01"}, "runs": before}, file)
    again = [run("socketdock", "up", cpu_us=2.0)]
    found = results.added(file, {"machine": {"date": "2026-01-02"}, "runs": again})
    assert found["runs"] == [before[0], *again]
    assert found["machine"]["date"] == "2026-01-01 to 2026-01-02"


async def bench(*flags: str) -> str:
    """Run it; it must succeed. Returns what it printed."""
    return await run_module("bench", *flags)


async def run_module(name: str, *flags: str) -> str:
    """Run a module; it must succeed. Returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", name, *flags, cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()
