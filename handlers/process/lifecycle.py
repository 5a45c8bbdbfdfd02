"""The process itself: its standard streams at the start, and its end.

`socketdock.py` calls all of it; nothing here knows of connections.
"""

import atexit
import logging
import os
import sys
import threading
from typing import NoReturn

logger = logging.getLogger(__name__)

LAST_WORD = 0.1  # seconds for the log line of a forced end


def open_standard_streams() -> None:
    """Open /dev/null on those of descriptors 0 to 2 that are closed.

    Else sockets would get these numbers: libuv aborts when it closes one, and
    whatever is printed would go to a client.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def end_within(seconds: float, status: int) -> threading.Timer:
    """End the process with `status` in `seconds`, unless that is cancelled.

    By a thread of its own, since whatever keeps the process may keep its loop.
    """
    timer = threading.Timer(
        min(seconds, threading.TIMEOUT_MAX), _end, (status,)
    )
    timer.daemon = True
    timer.start()
    return timer


def _end(status: int) -> None:
    # Whoever keeps the process may have the log's lock.
    word = threading.Thread(
        target=logger.error,
        args=("the process has not ended in time: it is cut off",),
        daemon=True,
    )
    word.start()
    word.join(LAST_WORD)
    os._exit(status)


def leave(status: int) -> NoReturn:
    """End the process now, with all that was logged and printed written.

    What is registered with `atexit` is called: `logging` is, and what a backend's
    libraries are. No thread is waited for: one that resolves a name may take a minute.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `head` has seen enough
        pass
    except OSError as error:
        print(f"socketdock: can't print: {error.strerror}", file=sys.stderr)
        status = status or 1
    os._exit(status)
