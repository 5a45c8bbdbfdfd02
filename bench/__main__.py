"""Measures relays in turn, round after round."""

import argparse
import asyncio
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench import comparison, relays, report, results
from bench.load import BenchError
from bench.modes import ALL_SIZES, MODES, ONE_SIZE, Cell, Figures, measure

RELAYS = [
    "socketdock", "socketdock-pure", "socketdock-listeners", "node", "tornado", "nchan"
]  # fmt: skip
SIZES = [128, 1024, 64 * 1024, 1024 * 1024]  # bytes
SHARING = 1000  # clients, in mode share
QUIET = 0.02  # share of the relay's processor time that the host may take
# Defaults with --against: about 15 minutes.
COMPARED: dict[str, Any] = {
    "modes": ["up", "push", "echo", "visit", "idle"],
    "sizes": [1024],
    "rounds": 15,
    "seconds": 2.0,
    "warm_up": 1.0,
    "results": None,
}


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--peers", default=RELAYS, type=names(relays.KNOWN), metavar="A,B",
        help=f"of {', '.join(relays.KNOWN)}; socketdock@PATH is that of a checkout")
    add("--modes", default=list(MODES), type=names(MODES), metavar="A,B",
        help=f"of {', '.join(MODES)}")
    add("--sizes", default=SIZES, type=lambda text: [*map(int, text.split(","))],
        metavar="A,B", help=f"bytes of a message, for {', '.join(ALL_SIZES)}")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=3.0, help="for each figure")
    add("--warm-up", type=float, default=3.0, help="seconds before")
    add("--tries", type=int, default=3,
        help="for a figure while the host takes the processor; the quietest counts")
    add("--clients", type=int, default=64)
    add("--idle-clients", type=int, default=8000, help="in mode idle")
    add("--crowd-clients", type=int, default=10_000, help="in mode up-crowd")
    add("--add", action="store_true",
        help="keep what other runs have left in the results, and add to it")
    add("--results", type=Path, metavar="FILE",
        default=results.file_of(results.machine()["processor"]),
        help="default: that of this processor; another one leaves docs/ as it is")
    add("--profile", type=Path, metavar="FOLDER",
        help="flame graphs by py-spy; the figures, spoilt, are not kept")
    add("--against", type=checkout, metavar="PATH",
        help="compare with SocketDock in that checkout: the ratio of each round, its "
             "median and what the median's 95 %% interval is; exit status 1 where "
             f"that lies above {comparison.TOLERANCE:g}. {described(COMPARED)}")
    arguments, _ = parser.parse_known_args(words)
    if arguments.against is not None:
        parser.set_defaults(**COMPARED, peers=["socketdock", arguments.against])
    return parser.parse_args(words)


def checkout(path: str) -> str:
    """A type for argparse: a folder with SocketDock becomes a relay's name."""
    if not (Path(path) / "socketdock.py").exists():
        raise argparse.ArgumentTypeError(f"{path}: there is no socketdock.py in it")
    return f"socketdock@{Path(path).resolve()}"


def is_alike(relay: str) -> bool:
    """Whether that checkout and this one are both compiled, or neither."""
    other = Path(relay.partition("@")[2])
    return relays.is_compiled(other) == relays.is_compiled(relays.PROJECT)


def described(defaults: dict[str, Any]) -> str:
    """Describe `defaults` for the help."""
    flags = (
        f"--{name.replace('_', '-')}="
        + (",".join(map(str, value)) if isinstance(value, list) else f"{value:g}")
        for name, value in defaults.items()
        if value is not None
    )
    return f"Then the defaults are {' '.join(flags)}, and no results are kept"


def names(known: Sequence[str] | dict[str, Any]) -> Any:
    """Return a type for argparse: a list of names out of `known`."""

    def split(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name.partition("@")[0] not in known:
                raise argparse.ArgumentTypeError(f"{name}: none of {', '.join(known)}")
        return found

    return split


def cells(arguments: argparse.Namespace, number: int) -> Iterator[Cell]:
    """Yield the cells of round `number`: for each mode and size, each relay.

    Every other round has the reverse order, so that no relay is always the first.
    """
    peers = arguments.peers if number % 2 else arguments.peers[::-1]
    for mode in arguments.modes:
        clients = {
            "idle": arguments.idle_clients,
            "share": SHARING,
            "up-crowd": arguments.crowd_clients,
        }.get(mode, arguments.clients)
        for size in arguments.sizes if mode in ALL_SIZES else [ONE_SIZE.get(mode, 0)]:
            for relay in peers:
                if not relays.KNOWN[relay.partition("@")[0]].can(mode):
                    continue
                cell = Cell(
                    relay, mode, size, clients, arguments.seconds, arguments.warm_up
                )
                if arguments.profile is not None:
                    name = f"{relay}-{mode}-{size}.svg".replace("/", "_")
                    cell = cell._replace(profile=str(arguments.profile / name))
                yield cell


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all rounds, and return their figures."""
    # SIGTERM must stop the relays, too.
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    runs = []
    for number in range(1, arguments.rounds + 1):
        for cell in cells(arguments, number):
            figures = await quietest(cell, arguments.tries)
            runs.append({"round": number, **cell._asdict(), **figures})
            shown = " ".join(f"{name}={value:.5g}" for name, value in figures.items())
            print(f"{number} {cell.mode} {cell.size} {cell.relay}: {shown}", flush=True)
    return runs


async def quietest(cell: Cell, tries: int) -> Figures:
    """Measure one cell; repeat it if the host used the relay's processor meanwhile."""
    best = await measure(cell)
    for _ in range(tries - 1):
        if best.get("stolen", 0) <= QUIET:
            break
        best = min(best, await measure(cell), key=lambda figures: figures["stolen"])
    return best


def main() -> None:
    arguments = read_arguments(sys.argv[1:])
    is_kept = arguments.results is not None and arguments.profile is None
    is_published = is_kept and arguments.results.parent == results.FOLDER
    if is_published and not relays.is_compiled(relays.PROJECT):
        sys.exit("bench: run `make compile` before, or keep the --results elsewhere")
    if arguments.against is not None and not is_alike(arguments.against):
        sys.exit(
            "bench: only one of the two checkouts is compiled: run `make compile` in"
            " the other one, or `make pure`"
        )
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {relays.LOAD_PROCESSOR})
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runs = runner.run(run(arguments))
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted, nothing is kept")
    found: results.Results = {"machine": results.machine(), "runs": runs}
    if arguments.add and arguments.results is not None:
        found = results.added(arguments.results, found)
    print(f"\n{report.tables(found)}")
    if arguments.against is not None:
        compared = list(comparison.comparisons(runs, "socketdock", arguments.against))
        print(*compared, sep="\n")
        if any(pair.is_slower for pair in compared):
            sys.exit(1)
    if is_kept:
        results.write(found, arguments.results)
    if is_published:
        report.publish()


if __name__ == "__main__":
    main()
