"""The event loop, and how often the garbage collector interrupts it."""

import asyncio
import gc
import importlib
from collections.abc import Callable

from tornado.options import Error as OptionError
from tornado.options import define

define("event_loop", default="auto", metavar="LOOP",
       help="uvloop, asyncio, or auto: uvloop if it is installed")

COLLECT_AFTER = 10_000  # objects that were made and not freed


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the factory of event loops called `name`; None: asyncio's default.

    Raises `OptionError` if the name is unknown, or that loop is not installed.
    """
    if name not in ("auto", "uvloop", "asyncio"):
        raise OptionError(
            f"--event_loop must be auto, uvloop or asyncio, not {name!r}"
        )
    if name == "asyncio":
        return None
    try:
        uvloop = importlib.import_module("uvloop")  # not on every platform
    except ImportError:
        if name == "uvloop":
            raise OptionError("--event_loop=uvloop: uvloop is not installed") from None
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def collect_garbage_less_often() -> None:
    """Make the garbage collector run less often, and traverse fewer objects.

    A collection stops everything: 10 ms for the objects made at the start, which
    live until the end, and 50 ms with 10,000 clients, whose pending messages would
    trigger one every second. A closed connection leaves nothing that needs the
    collector (test/memory_cycles_test.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
