"""From rounds to medians: tables and plots for docs/, and the ratios in README.md.

    python -m bench.report     again, from bench/results/
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import results
from bench.modes import MODES
from bench.relays import KNOWN, PROJECT
from bench.results import Results

PAGE = PROJECT / "docs" / "performance.md"
README = PROJECT / "README.md"
PLOTS = PROJECT / "docs" / "images"
FIGURES = "<!-- figures: by make bench -->\n", "<!-- end of figures -->\n"
RATIOS = "| multiple of Node.js |", "\n\n"  # README.md is short: no lines for marks

# The figures of each table, by its heading; each has its own rows.
TABLES = {
    "Processor time of the relay, µs per message": ["cpu_us"],
    "Messages, handshakes or visits per second": ["per_second"],
    "Latency at half of what each relay can do, ms": ["p50", "p99", "p99.9"],
    "Cost of a push by another instance, as a multiple of a local one": ["ratio"],
    "Cost of a message of a crowd, as a multiple of one of 64 clients": ["crowd_ratio"],
    "Memory per idle connection, bytes": ["bytes"],
    "Share of the clients that the process gets that gets the least": ["least_share"],
    "Processor time of the load, µs per message": ["load_us"],
}
USUAL_CLIENTS = 64
BASELINE = "node"  # the relay that ratios compare with
PLOTTED = {  # the row for each place on the plot
    **{
        mode: f"{mode}, 1 KiB"
        for mode in ("up", "push", "push-bulk", "echo", "echo-reply", "echo-batch")
    },
    "connect": "connect",
    "visit": "visit, 1 KiB",
    "visit-leases": "visit with leases, 1 KiB",
}
SUMMARY = ("up", "push", "echo", "connect", "visit")  # the columns in README.md
COLOURS = {
    "socketdock": "#1f5fa8",
    "socketdock-pure": "#4583c4",
    "socketdock-listeners": "#6ea3d8",
    "socketdock-processes": "#b3cfea",
    "tornado": "#c9822b",
    "nchan": "#7f8a93",
}

class Table:
    """Figures of all relays: a row for each mode and size, with all its rounds."""

    def __init__(self, found: Results, figures: Sequence[str]) -> None:
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.relays: list[str] = []
        for run in sorted(found["runs"], key=place):
            for figure in figures:
                if figure not in run:
                    continue
                name = label(run["mode"], run["size"], run["clients"])
                if len(figures) > 1:
                    name = f"{name}, {figure}"
                row = self.rows.setdefault(name, {})
                row.setdefault(run["relay"], []).append(run[figure])
                if run["relay"] not in self.relays:
                    self.relays.append(run["relay"])
        self.relays.sort(key=column)

    def ratio(self, name: str, relay: str) -> float | None:
        """Return the ratio of a relay's median to the baseline's; None without one."""
        row = self.rows.get(name, {})
        if relay not in row or BASELINE not in row:
            return None
        return median(row[relay]) / median(row[BASELINE])

    def markdown(self) -> str:
        """Return the table in Markdown, with a column for each relay."""
        lines = [["", *map(title, self.relays)], ["---"] * (len(self.relays) + 1)]
        for name in self.rows:
            lines.append([name, *(self.cell(name, relay) for relay in self.relays)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def cell(self, name: str, relay: str) -> str:
        """Format median, ratio, and half the range of the rounds."""
        values = self.rows[name].get(relay)
        if values is None:
            return ""
        middle = median(values)
        cell = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
        ratio = self.ratio(name, relay)
        if ratio is not None and relay != BASELINE:
            cell += f" (**{ratio:.2f}**)"
        return f"{cell} ±{(max(values) - min(values)) / 2 / middle:.0%}"


def span(values: Collection[float]) -> str:
    """Return the least and the greatest value, or the only one."""
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def tables(found: Results) -> str:
    """Return all figures, in Markdown."""
    machine, runs = found["machine"], found["runs"]
    rounds = Counter(map(place, runs)).values()
    seconds = [run["seconds"] for run in runs]
    stolen = [run["stolen"] for run in runs if "stolen" in run] or [0.0]
    parts = [
        f"{machine['date']}; {machine['processor']}, {machine['processors']}"
        f" processors; {machine['system']}; Python {machine['python']};"
        f" {span(rounds)} rounds of {span(seconds)} s for each figure; {USUAL_CLIENTS}"
        f" clients unless another number is given. The host kept the relay's processor"
        f" for itself {median(stolen):.0%} of the time ({max(stolen):.0%} at worst)."
    ]
    for heading, figures in TABLES.items():
        table = Table(found, figures)
        if table.rows:
            parts += [f"#### {heading}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def place(run: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Return the sort key of a run: by mode, clients and size, then by relay."""
    mode = [*MODES].index(run["mode"])
    return mode, run["clients"], run["size"], column(run["relay"])


def column(relay: str) -> int:
    """Return the column of a relay, also of one from another checkout."""
    return [*KNOWN].index(relay.partition("@")[0])


def publish() -> None:
    """Write the figures of all machines into docs/ and README.md."""
    machines = results.read_all()
    sections = "\n".join(
        section(name, found) for name, found in machines.items() if "runs" in found
    )
    replace(PAGE, FIGURES, f"\n{sections}\n")
    replace(README, RATIOS, summary(machines))


def section(name: str, found: Results) -> str:
    """Return a machine's part of the page; draw its plot."""
    heading = f"### {found['machine']['processor']}\n\n"
    picture = PLOTS / f"performance-{name}.png"
    if plot(Table(found, ["cpu_us"]), picture):
        at = picture.relative_to(PAGE.parent)
        heading += f"![Processor time beside Node.js's]({at})\n\n"
    return heading + tables(found)


def summary(machines: Mapping[str, Results]) -> str:
    """Return the table of README.md: the ratios to Node.js on each machine."""
    lines = [[*SUMMARY, "idle"], ["---"] * (len(SUMMARY) + 2)]
    for found in machines.values():
        lines += summary_rows(found)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).removeprefix("|")


def summary_rows(found: Results) -> Iterator[list[str]]:
    """Yield a row for each form of SocketDock that was measured on a machine."""
    name = results.short_name(found["machine"]["processor"])
    if "ratios" in found:
        cells = [f"{found['ratios'][mode]:.2f}" for mode in SUMMARY]
        yield [f"{name} ({found['note']})", *cells, kilobytes(found["bytes"])]
        return
    prices, memory = Table(found, ["cpu_us"]), Table(found, ["bytes"])
    for relay, form in (("socketdock", "compiled"), ("socketdock-pure", "pure")):
        if relay not in prices.relays:
            continue
        ratios = (prices.ratio(PLOTTED[mode], relay) for mode in SUMMARY)
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        sizes = [row[relay] for row in memory.rows.values() if relay in row]
        cells.append(kilobytes(median(sizes[0])) if sizes else "")
        yield [f"{name}, {form}", *cells]


def kilobytes(size: float) -> str:
    """Format bytes as kB."""
    return f"{size / 1000:.1f} kB"


def replace(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what is between two marks on a page."""
    before, _, rest = page.read_text("utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}{text}{marks[1]}{after}", "utf-8")


def plot(table: Table, file: Path) -> bool:
    """Plot each relay's processor time per message as a multiple of Node's.

    Returns False if there is nothing to plot.
    """
    from matplotlib.figure import Figure

    modes = [mode for mode in PLOTTED if BASELINE in table.rows.get(PLOTTED[mode], {})]
    relays = [relay for relay in table.relays if relay != BASELINE]
    if not modes or not relays:
        return False
    picture = Figure(figsize=(9, 4.5), layout="constrained")
    axes = picture.subplots()
    width = 0.8 / len(relays)
    for index, relay in enumerate(relays):
        for place, mode in enumerate(modes):
            ratio = table.ratio(PLOTTED[mode], relay)
            if ratio is None:
                continue
            at = place + (index - (len(relays) - 1) / 2) * width
            name = title(relay) if mode == modes[0] else None
            colour = COLOURS.get(relay, "#444444")
            # From 1, so that bars of relays cheaper than Node are below the line.
            axes.bar(at, ratio - 1, width * 0.92, bottom=1, color=colour, label=name)
            up = 1 if ratio >= 1 else -1
            axes.annotate(
                f"{ratio:.2f}", (at, ratio), (0, 3 * up), textcoords="offset points",
                ha="center", va="bottom" if up > 0 else "top", fontsize=8,
            )  # fmt: skip
    axes.axhline(1, color="#2f7d4f", linewidth=1.5, label=f"{title(BASELINE)} = 1")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(modes)), modes)
    axes.set_ylabel("multiple of Node.js (less is better)")
    axes.set_title("Processor time per handshake, visit, or message of 1 KiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    picture.savefig(file, dpi=120)
    return True


def label(mode: str, size: int, clients: int) -> str:
    """Return a row's name; the size, if any, in bytes, KiB or MiB."""
    name = mode
    for unit, bytes in (("MiB", 2**20), ("KiB", 2**10), ("B", 1)):
        if size >= bytes:
            name = f"{mode}, {size / bytes:g} {unit}"
            break
    return name if clients == USUAL_CLIENTS else f"{name}, {clients:,} clients"


def title(relay: str) -> str:
    """Return a relay's name for readers."""
    name, _, tree = relay.partition("@")
    return f"{KNOWN[name].title} at {tree}" if tree else KNOWN[name].title


if __name__ == "__main__":
    publish()
