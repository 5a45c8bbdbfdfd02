"""Handles SIGTERM, SIGINT and SIGHUP: stops the relay, or reloads its files."""

import asyncio
import logging
import os
import signal
from typing import Protocol

from tornado.options import Error as OptionError

from handlers.process.systemd import SystemdNotifier

logger = logging.getLogger(__name__)


def stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets; a second signal exits."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            logger.warning("stopped by a second signal")
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # By default it would end the process; `reload_on_signal` replaces this handler.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    return stop


class Reloadable(Protocol):
    """Reads files that may change: level, certificates, tokens, secrets."""

    def reload(self) -> None:
        """Read the files again. Raises `OptionError`, and keeps the old values."""


def reload_on_signal(systemd: SystemdNotifier, *reloadables: Reloadable) -> None:
    """Make SIGHUP reload the files that options name."""

    def on_signal() -> None:
        systemd.reloading()
        failed = False
        for reloadable in reloadables:
            try:
                reloadable.reload()
            except OptionError as error:
                failed = True
                logger.error("reload failed, the previous values stay: %s", error)
        logger.info(
            "reloaded: %s",
            "everything else" if failed else "level, certificates, tokens, secrets",
        )
        systemd.ready()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)
