"""Reads the command line of a running relay, for `socketdock health --pid`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tornado.options import Error as OptionError


def arguments_of(process: str) -> list[str]:
    """Return the command line of the relay in a process, without the program's name.

    Searches the children of `process` as well, since it may be a shell. A container's
    health check finds the relay's flags by this. Raises `OptionError`.
    """
    for number, pid in enumerate(_with_children(process)):
        try:
            content = Path("/proc", pid, "cmdline").read_bytes()
        except (OSError, ValueError):
            if number == 0:
                raise OptionError(
                    f"--pid={process}: there is no such process"
                ) from None
            continue  # a child that has ended
        words = os.fsdecode(content).split("\0")[:-1]
        for place, word in enumerate(words):
            if Path(word).name in ("socketdock", "socketdock.py"):
                return words[place + 1 :]
    raise OptionError(f"--pid={process}: it is not SocketDock")


def _with_children(process: str) -> Iterator[str]:
    """Yield a process and its descendants, except this process."""
    waiting = [process]
    while waiting:
        pid = waiting.pop(0)
        if pid == str(os.getpid()):
            continue
        yield pid
        with contextlib.suppress(OSError, ValueError):
            waiting += Path("/proc", pid, "task", pid, "children").read_text().split()
