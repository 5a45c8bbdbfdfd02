"""Decides whether this checkout costs more than another one, from pairs of figures.

In each round both are measured, one right after the other, and their ratio is taken:
what slows the machine for a while affects both. This checkout counts as slower only if
the whole 95 % interval of the median ratio lies above `TOLERANCE`.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from statistics import median
from typing import Any, NamedTuple

TOLERANCE = 1.03  # a ratio
CONFIDENCE = 0.95  # the least probability that the interval contains the median
PRICES = ("cpu_us", "bytes")  # the figures that are compared: less is better

Runs = Sequence[Mapping[str, Any]]


class Comparison(NamedTuple):
    """One mode and size in all rounds: `ratios` are this checkout to the other."""

    mode: str
    size: int  # bytes of a message; 0 if the mode sends none
    ratios: list[float]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the confidence interval of the median ratio; None: too few rounds."""
        rank = lower_rank(len(self.ratios))
        if rank == 0:
            return None
        ordered = sorted(self.ratios)
        return ordered[rank - 1], ordered[-rank]

    @property
    def is_slower(self) -> bool:
        """Whether the whole interval is above `TOLERANCE`."""
        return self.interval is not None and self.interval[0] > TOLERANCE

    def __str__(self) -> str:
        name = f"{self.mode} {self.size}" if self.size else self.mode
        rounds = " ".join(f"{ratio:.3f}" for ratio in self.ratios)
        result = "too few rounds to decide"
        if self.interval is not None:
            least, most = self.interval
            result = f"95 % interval {least:.3f} to {most:.3f}: "
            result += "SLOWER" if self.is_slower else "not slower"
        return f"{name}: {rounds}\n  median {median(self.ratios):.3f}, {result}"


def lower_rank(count: int) -> int:
    """Return which of `count` ordered values begins the interval; 0: none does.

    As many values lie above the interval. Each value lies below the median with a
    probability of one half, so the number of such values is binomial; no other
    assumption about their distribution is made.
    """
    rank, outside = 0, 0.0
    while rank < count // 2:
        outside += 2 * comb(count, rank) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank += 1
    return rank


def comparisons(runs: Runs, ours: str, other: str) -> Iterator[Comparison]:
    """Yield each mode and size with figures of both, in the order of the runs."""
    prices: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for run in runs:
        price = next((run[name] for name in PRICES if name in run), None)
        if price is not None:
            rounds = prices.setdefault((run["mode"], run["size"]), {})
            rounds.setdefault(run["round"], {})[run["relay"]] = price
    for (mode, size), rounds in prices.items():
        ratios = [
            pair[ours] / pair[other]
            for pair in rounds.values()
            if ours in pair and other in pair
        ]
        if ratios:
            yield Comparison(mode, size, ratios)
