"""Shared by the property tests: the number of examples, and splitting of bytes."""

import os
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MORE = int(os.environ.get("FUZZ", "1"))  # times as many examples
GROWTH = 32 * 2**20  # bytes that the relay may grow by, over all examples of a test

Whole = TypeVar("Whole", bytes, str)


def examples(number: int) -> settings:
    """Settings with that many examples, the same each time unless FUZZ is set."""
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
    """Draw `data`, split at up to `cuts` places."""
    whole = draw(data)
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=cuts)))
    return [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]
