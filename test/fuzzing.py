"""What the property tests share: how many examples, and bytes that come in pieces."""

import os
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MORE = int(os.environ.get("FUZZ", "1"))  # times as many examples
GROWTH = 32 * 2**20  # bytes that the relay may grow by, over all examples of a test

Whole = TypeVar("Whole", bytes, str)


def examples(number: int) -> settings:
    """That many; the same ones each time, unless more are asked for."""
    return settings(
        max_examples=number * MORE,
        deadline=None,
        derandomize=MORE == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@st.composite
def in_pieces(
    draw: st.DrawFn, data: st.SearchStrategy[Whole], cuts: int = 5
) -> list[Whole]:
    """`data`, cut anywhere, up to so many times."""
    whole = draw(data)
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=cuts)))
    return [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]
