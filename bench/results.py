"""The results of each machine: one file in bench/results/ for each processor.

A file has the runs that `python -m bench` made there. For a machine that was measured
in another way it has only the ratios to Node.js, and a note how.
"""

import json
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.relays import PROJECT

FOLDER = PROJECT / "bench" / "results"

Results = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """Describe this machine."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2]
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": cpu.partition("\n")[0].lstrip("\t :") or platform.machine(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def short_name(processor: str) -> str:
    """Return a processor's name without what makers add to it."""
    brief = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|\d+-Core|@.*", "", processor)
    return " ".join(brief.split())


def file_of(processor: str) -> Path:
    """Return the file with the results of a processor."""
    name = re.sub(r"[^a-z0-9]+", "-", short_name(processor).lower()).strip("-")
    return FOLDER / f"{name}.json"


def read(file: Path) -> dict[str, Any]:
    """Return the results of a file."""
    results: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return results


def read_all() -> dict[str, Results]:
    """Return the results of all machines, by the names of their files.

    Those with runs are the first.
    """
    found = {file.stem: read(file) for file in sorted(FOLDER.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda each: "runs" not in each[1]))


def added(file: Path, results: Results) -> Results:
    """Return the results with those runs of the file that measured something else."""

    def what(run: Any) -> tuple[Any, ...]:
        return run["relay"], run["mode"], run["size"], run["clients"]

    if not file.exists():
        return results
    before, machine = read(file), dict(results["machine"])
    measured = {what(run) for run in results["runs"]}
    kept = [run for run in before["runs"] if what(run) not in measured]
    first = before["machine"]["date"].partition(" to ")[0]
    if kept and first != machine["date"]:
        machine["date"] = f"{first} to {machine['date']}"
    return {"machine": machine, "runs": [*kept, *results["runs"]]}


def write(results: Results, file: Path) -> None:
    """Write the results, one line per run, for readable diffs."""
    runs = ",\n".join(map(json.dumps, results["runs"]))
    machine = json.dumps(results["machine"])
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"machine": {machine},\n"runs": [\n{runs}\n]}}\n', "utf-8")
