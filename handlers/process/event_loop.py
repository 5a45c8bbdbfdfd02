"""The event loop, and how often the garbage collector interrupts it."""

import asyncio
import gc
import importlib
from collections.abc import Callable

from tornado.options import Error as OptionError
from tornado.options import define

define("event_loop", default="auto", metavar="LOOP",
       help="uvloop, asyncio, or auto: uvloop if it is installed")

COLLECT_AFTER = 10_000  # objects that were made and have not gone


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop of that name; None: asyncio's own.

    Raises `OptionError` where there is none of that name, or it is not installed.
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


def save_collecting() -> None:
    """Have the garbage collector look at less, and less often.

    It stops everything: for 10 ms to look at what was made at the start, which
    stays to the end, and for 50 ms with 10,000 clients, whose messages on their way
    would call it once a second, as if they were garbage. What a visit leaves needs
    no collector (test/memory_cycles_test.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
