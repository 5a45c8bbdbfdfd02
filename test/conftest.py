"""Fixtures of all tests: one asyncio loop per test, which must end empty."""

import asyncio
import contextlib
import os
from collections.abc import Iterator

import pytest
import uvloop
from tornado.ioloop import IOLoop

from handlers.process.form import require_unchanged_sources

require_unchanged_sources()

# If it is set, all sources would be compiled again for each of a thousand relays.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture
def event_loop_name() -> str:
    """Which loop a test itself runs on; services choose theirs."""
    return "asyncio"


@pytest.fixture
def io_loop(event_loop_name: str) -> Iterator[IOLoop]:
    """pytest-tornado's fixture, on a fresh loop.

    The fixture of pytest-tornado leaves tasks, and causes deprecation warnings.
    """
    with running(event_loop_name) as io_loop:
        yield io_loop


@pytest.fixture(scope="module")
def module_io_loop() -> Iterator[IOLoop]:
    """One loop for all tests of a module, whose `io_loop` returns it.

    They can share a process, which must survive each test.
    """
    with running("asyncio") as io_loop:
        yield io_loop


@pytest.fixture(scope="module")
def shared(module_io_loop: IOLoop) -> Iterator[contextlib.AsyncExitStack]:
    """Holds what the tests of a module share, and closes it when all have run."""
    stack = contextlib.AsyncExitStack()
    yield stack
    module_io_loop.run_sync(stack.aclose)


@contextlib.contextmanager
def running(event_loop_name: str) -> Iterator[IOLoop]:
    """A new loop; tasks that are left at its end are cancelled."""
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


@pytest.hookimpl(trylast=True)  # when `-m` has taken its choice
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Begin with the long tests, so that none is left to one worker at the end.

    pytest-xdist gives each worker an equal share of `items`, in their order, and a
    worker that has finished takes tests from the end of another's share. Only half of
    the workers begin with long tests: these often wait, and the other half has the
    processors meanwhile.
    """
    if not (workers := getattr(config, "workerinput", {}).get("workercount")):
        return
    half = max(1, workers // 2)
    long = [item for item in items if item.get_closest_marker("long")]
    rest = [item for item in items if not item.get_closest_marker("long")]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        share = (len(items) - len(ordered)) // (workers - worker)
        first = long[worker::half] if worker < half else []
        others = max(0, share - len(first))
        ordered += first + rest[:others]
        del rest[:others]
    items[:] = ordered


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests were skipped: to `make test` in the file LEFT_OUT, or here."""
    skipped: dict[str, int] = {}
    for report in terminalreporter.getreports("skipped"):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        skipped[reason] = skipped.get(reason, 0) + 1
    lines = [f"{count} tests, since {reason}" for reason, count in skipped.items()]
    if path := os.environ.get("LEFT_OUT"):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    else:
        for line in lines:
            terminalreporter.write_line(f"Left out: {line}")
