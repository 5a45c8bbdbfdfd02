"""Opens the standard streams at the start, and exits the process.

The commands of `socketdock` call these functions; they know nothing about connections.
"""

import atexit
import logging
import os
import sys
import threading
from typing import NoReturn

logger = logging.getLogger(__name__)

LAST_LINE_TIMEOUT = 0.1  # seconds to write the log line of a forced exit


def open_standard_streams() -> None:
    """Open /dev/null on those of descriptors 0 to 2 that are closed.

    Otherwise sockets would get these numbers: libuv aborts when it closes one, and
    printed text would be sent to a client.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def exit_after(seconds: float, status: int) -> threading.Timer:
    """Exit with `status` after `seconds`, unless the returned timer is cancelled.

    It runs in a thread of its own, since the loop may be what hangs.
    """
    timer = threading.Timer(
        min(seconds, threading.TIMEOUT_MAX), _end, (status,)
    )
    timer.daemon = True
    timer.start()
    return timer


def _end(status: int) -> None:
    # In a thread, since the code that hangs may hold the log's lock.
    last_line = threading.Thread(
        target=logger.error,
        args=("the process has not ended in time: exiting now",),
        daemon=True,
    )
    last_line.start()
    last_line.join(LAST_LINE_TIMEOUT)
    os._exit(status)


def exit_now(status: int) -> NoReturn:
    """Exit now, after writing all that was logged and printed.

    Calls the functions registered with `atexit`, such as those of `logging` and of a
    backend's libraries. Does not wait for threads: resolving a name may take a minute.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        pass
    except OSError as error:
        print(f"socketdock: can't print: {error.strerror}", file=sys.stderr)
        status = status or 1
    os._exit(status)
