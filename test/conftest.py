"""What every test stands on: one asyncio loop per test, nothing left behind."""

import asyncio
from collections.abc import Iterator

import pytest
import uvloop
from tornado.ioloop import IOLoop


@pytest.fixture
def event_loop_name() -> str:
    """Which loop a test itself runs on; services choose theirs."""
    return "asyncio"


@pytest.fixture
def io_loop(event_loop_name: str) -> Iterator[IOLoop]:
    """pytest-tornado's fixture, on a fresh loop.

    Its own one leaves tasks behind, and warns on the Pythons we run.
    """
    factory = uvloop.new_event_loop if event_loop_name == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        loop = runner.get_loop()
        asyncio.set_event_loop(loop)

        async def current() -> IOLoop:
            return IOLoop.current()

        io_loop = runner.run(current())
        yield io_loop
        io_loop.run_sync(cancel_what_is_left)
        asyncio.set_event_loop(None)


async def cancel_what_is_left() -> None:
    """Cancel every task of the loop, and wait for their ends."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def pytest_configure(config: pytest.Config) -> None:
    config.option.async_test_timeout = 60.0
