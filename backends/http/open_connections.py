"""Records on disk which disconnect events are due, and sends those of earlier runs.

`backends.journal` writes and reads the ids; `disconnects` sends the events.
"""

import asyncio
import logging
from pathlib import Path

from tornado.options import options

from backends import LOST, BackendError, DeadRuns
from backends.events import Ended
from backends.http.disconnects import (
    DisconnectEvents,
    DisconnectNotification,
    Disconnects,
    log_failure,
)
from backends.journal import DeadRun, StateDirectory
from backends.target import Target

logger = logging.getLogger(__name__)

MAX_NOTIFICATIONS = 64  # events of earlier runs that are sent at once
STOP_TIMEOUT = 2.0  # seconds for these to end when the relay stops
NOTHING_TO_SEND = "--state_dir has no effect without --disconnecturi"


class OpenConnections:
    """Records open connections in `state`; None: nothing is recorded."""

    def __init__(
        self,
        state: StateDirectory | None,
        events: DisconnectEvents,
        disconnects: Disconnects,
        dead_runs: DeadRuns | None = None,
    ) -> None:
        self._state = state
        self._events = events
        self._disconnects = disconnects
        self._dead_runs = dead_runs
        self._stopping = False
        # Awaited by `stop`, cancelled by `close`.
        self._recovering: asyncio.Task[None] | None = None

    def add(self, connection_id: str) -> None:
        """Record a connection before its first event: a crash must not lose it."""
        if self._state is not None:
            self._state.journal.add(connection_id)

    def remove(self, connection_id: str) -> None:
        """Remove a connection: its disconnect event has ended, or none is due."""
        if self._state is not None:
            self._state.journal.remove(connection_id)

    def rename(self, instance: str) -> None:
        """Name another run as that of the open connections."""
        if self._state is not None:
            self._state.journal.rename(instance)

    def start_recovery(self) -> None:
        """Start to send disconnect events for connections that earlier runs lost."""
        if self._state is not None:
            self._recovering = asyncio.create_task(self._recover(self._state.dead))

    async def stop(self, timeout: float) -> None:
        """Start no more of these events, and wait for those that are being sent.

        For at most `timeout` and `STOP_TIMEOUT` seconds.
        """
        self._stopping = True
        if self._recovering is not None:
            await asyncio.wait({self._recovering}, timeout=min(timeout, STOP_TIMEOUT))

    async def cancel(self) -> None:
        """Give up these events; the next start sends them."""
        self._stopping = True
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.gather(self._recovering, return_exceptions=True)

    def close(self) -> None:
        """Release the state directory for another process."""
        if self._state is not None:
            self._state.close()

    async def _recover(self, runs: list[DeadRun]) -> None:
        limit = asyncio.Semaphore(MAX_NOTIFICATIONS)
        async with asyncio.TaskGroup() as tasks:
            for run in runs:
                tasks.create_task(self._recover_run(run, limit))

    async def _recover_run(self, run: DeadRun, limit: asyncio.Semaphore) -> None:
        if self._dead_runs is not None:
            due = await self._dead_runs.claim(run.instance, run.ids)
            for connection_id in set(run.ids) - due:
                run.remove(connection_id)  # another instance has sent its event
        logger.warning(
            "sending disconnect events of %d connections lost by %s",
            len(run.ids), run.instance,
        )
        async with asyncio.TaskGroup() as tasks:
            for connection_id in run.ids:
                tasks.create_task(self._notify(run, connection_id, limit))
        if self._dead_runs is not None:
            await self._dead_runs.finish(run.instance, finished=not run.ids)

    async def _notify(
        self, run: DeadRun, connection_id: str, limit: asyncio.Semaphore
    ) -> None:
        notification = DisconnectNotification(
            self._events, Ended(connection_id, LOST, instance=run.instance)
        )
        try:
            async with limit:
                if self._stopping:
                    return  # the next start sends it
                await self._disconnects.deliver(notification)
        except BackendError as error:
            if self._disconnects.closing:
                return
            log_failure(connection_id, error)
        run.remove(connection_id)
        if self._dead_runs is not None:
            await self._dead_runs.sent(run.instance, connection_id)


def make_state(
    instance: str, disconnect_target: Target | None
) -> StateDirectory | None:
    """Open `--state_dir`, if there is a URL for disconnect events.

    Without that URL the directory is not changed: a later start with the URL may send
    the events. Raises `Unavailable` if the directory cannot be used.
    """
    if not options.state_dir:
        return None
    if disconnect_target is None:
        logger.warning(NOTHING_TO_SEND)
        return None
    return StateDirectory(Path(options.state_dir), instance)
