"""Whether this checkout costs more than another one, judged by pairs of figures.

Both are measured in each round, one right after the other, and their ratio is
taken by rounds: what slows the machine down for a while slows both. Slower is
only what can't be chance: where the whole 95 % interval of the median ratio lies
above `TOLERANCE`.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from statistics import median
from typing import Any, NamedTuple

TOLERANCE = 1.03  # a ratio
CONFIDENCE = 0.95  # of the interval that is said to hold the median, at least
PRICES = ("cpu_us", "bytes")  # what is compared: less is better

Runs = Sequence[Mapping[str, Any]]


class Comparison(NamedTuple):
    """One mode, of all rounds: `ratios` are ours to the other's, by round."""

    mode: str
    size: int  # bytes of a message; 0 where there is none
    ratios: list[float]

    @property
    def interval(self) -> tuple[float, float] | None:
        """What holds the median ratio with `CONFIDENCE`; None: too few rounds."""
        rank = lower_rank(len(self.ratios))
        if rank == 0:
            return None
        ordered = sorted(self.ratios)
        return ordered[rank - 1], ordered[-rank]

    @property
    def is_slower(self) -> bool:
        """Whether it is, beyond doubt and tolerance."""
        return self.interval is not None and self.interval[0] > TOLERANCE

    def __str__(self) -> str:
        name = f"{self.mode} {self.size}" if self.size else self.mode
        rounds = " ".join(f"{ratio:.3f}" for ratio in self.ratios)
        verdict = "too few rounds for a verdict"
        if self.interval is not None:
            least, most = self.interval
            verdict = f"95 % interval {least:.3f} to {most:.3f}: "
            verdict += "SLOWER" if self.is_slower else "not slower"
        return f"{name}: {rounds}\n  median {median(self.ratios):.3f}, {verdict}"


def lower_rank(count: int) -> int:
    """Return which of `count` ordered values begins the interval; 0: none does.

    The interval ends with as many values above it. Each value lies below the
    median with a chance of one half, so that how many do is binomial; nothing
    is assumed of how the values are spread.
    """
    rank, outside = 0, 0.0
    while rank < count // 2:
        outside += 2 * comb(count, rank) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank += 1
    return rank


def comparisons(runs: Runs, ours: str, other: str) -> Iterator[Comparison]:
    """Yield each mode and size that both have figures of, in the runs' order."""
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
