"""The circuit breaker, on the loop's clock."""

import asyncio

import pytest
from service import eventually

from backends.breaker import Breaker, BreakerSettings

pytestmark = pytest.mark.gen_test(timeout=60)

QUICK = BreakerSettings(first_probe=0.05, last_probe=0.2)


def fail(breaker: Breaker, attempts: int, connections: int) -> None:
    for number in range(attempts):
        breaker.record(f"connection {number % connections}", cause="refused")


@pytest.mark.parametrize(
    ("answered", "away", "connections", "opens"),
    [
        (0, 20, 5, True),
        (0, 19, 5, False),  # too few attempts
        (0, 100, 4, False),  # of too few connections
        (20, 20, 5, True),  # half of them
        (21, 20, 5, False),  # less than half
    ],
)
async def test_opens_at_its_limits_and_not_before(
    io_loop, answered, away, connections, opens
):
    """Half of twenty attempts failed, of five connections."""
    breaker = Breaker(QUICK)
    for _ in range(answered):
        breaker.record("someone", cause=None)
    fail(breaker, away, connections)
    assert breaker.open is opens
    assert breaker.take() is not opens


async def test_probes_are_sent_one_at_a_time_in_turn(io_loop):
    """Each connection in line sends a probe while the backend is unreachable."""
    breaker = Breaker(QUICK)
    fail(breaker, 20, 5)
    turns: list[int] = []

    def wait_in_line(number: int) -> None:
        def call() -> None:
            if breaker.take():
                turns.append(number)
                under_way.append(number)
                assert len(under_way) == 1
                asyncio.get_running_loop().call_later(0.01, answer, number)
            else:
                wait_in_line(number)

        breaker.wait(call)

    def answer(number: int) -> None:
        under_way.remove(number)
        wait_in_line(number)
        breaker.record(str(number), cause="refused")

    under_way: list[int] = []
    for number in range(3):
        wait_in_line(number)
    await eventually(lambda: len(turns) == 7)
    assert turns == [0, 1, 2, 0, 1, 2, 0]


async def test_a_response_closes_it_and_wakes_all_waiters(io_loop):
    """Any response shows that the backend is reachable."""
    breaker = Breaker(QUICK)
    fail(breaker, 20, 5)
    woken: list[int] = []
    for number in range(5):

        def call(number: int = number) -> None:
            if breaker.take():
                woken.append(number)

        breaker.wait(call)
    await eventually(lambda: woken == [0])
    breaker.record("0", cause=None)
    assert not breaker.open
    assert woken == [0, 1, 2, 3, 4]


async def test_unused_probe_goes_to_the_next_caller(io_loop):
    """An open breaker with an empty line does not stay open for ever."""
    breaker = Breaker(BreakerSettings(first_probe=0.01))
    fail(breaker, 20, 5)
    await eventually(lambda: breaker._permit)
    assert breaker.take()
    assert not breaker.take()


async def test_probe_that_ends_without_an_outcome_is_not_the_last(io_loop):
    """Another probe is permitted."""
    breaker = Breaker(QUICK)
    fail(breaker, 20, 5)
    await eventually(breaker.take)
    breaker.record_nothing()
    await eventually(breaker.take)


async def test_failing_waiter_does_not_block_others(io_loop):
    """Neither at a probe nor when the breaker closes."""
    breaker = Breaker(QUICK)
    fail(breaker, 20, 5)
    turns: list[str] = []

    def break_down() -> None:
        raise OverflowError("of its own")

    def probe() -> None:
        if breaker.take():
            turns.append("probe")

    breaker.wait(break_down)
    breaker.wait(probe)
    await eventually(lambda: turns == ["probe"])
    breaker.wait(break_down)
    breaker.wait(probe)
    breaker.record("someone", cause=None)
    assert turns == ["probe", "probe"]
