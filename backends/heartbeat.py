"""Tells the backend every few seconds that this instance runs (`--instanceuri`).

A backend that has not heard of an instance for `ttl` seconds may drop all of its
connections: so it detects a crash. A backend that speaks HTTP to a service makes the
heartbeat, and writes its requests as those of events.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tornado.options import define

from backends import BackendError, Relay
from backends.client import Client, Response
from backends.events import Event, serialized, traceparent
from backends.target import Target

logger = logging.getLogger(__name__)

define("instanceuri", type=str, metavar="URL",
       help="URL that receives a heartbeat of this instance every 5 seconds, so that a "
            "backend can detect its crash; none: not sent")

INTERVAL = 5.0  # seconds; also the longest wait for the response to a heartbeat
TTL = 15  # seconds without a heartbeat after which the instance counts as dead
LAST_TIMEOUT = 0.5  # seconds for the last heartbeat, so that it delays no stop
# Its client has few connections of its own: requests with held answers may have taken
# all those for events, and a heartbeat that waits would look like a crash.
CONNECTIONS = 2

Write = Callable[[Target, Event], bytes]


class Heartbeat:
    """Sends heartbeats to `target` by `client`, which it owns, until `close()`.

    `write` returns a whole request. A heartbeat that fails is not repeated.
    """

    def __init__(
        self, target: Target, client: Client, write: Write, relay: Relay
    ) -> None:
        self.client = client
        self._target = target
        self._write = write
        self._relay = relay
        self._numbers = itertools.count(1)
        self._failing = False  # so that an outage is one line in the log
        self._task = client.loop.create_task(self._run())

    async def _run(self) -> None:
        loop = self.client.loop
        while True:
            due = loop.time() + INTERVAL
            await self._send(TTL, INTERVAL)
            await asyncio.sleep(due - loop.time())

    def rename(self, instance: str) -> None:
        """Name another instance: this run was taken for dead."""
        self._relay = replace(self._relay, instance=instance)

    async def close(self) -> None:
        """Send the last heartbeat, within `LAST_TIMEOUT`, and close the client."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._send(0, LAST_TIMEOUT)
        await self.client.close()

    async def _send(self, ttl: int, timeout: float) -> None:
        event = heartbeat_event(self._relay, next(self._numbers), ttl)
        answered: asyncio.Future[Response | BackendError]
        answered = self.client.loop.create_future()

        def on_done(outcome: Response | BackendError) -> None:
            if not answered.done():  # `close` may have cancelled it in this turn
                answered.set_result(outcome)

        exchange = self.client.post(
            self._target,
            partial(self._write, self._target, event),
            on_done,
            timeout=timeout,
        )
        try:
            self._record(await answered)
        finally:
            exchange.abandon()

    def _record(self, outcome: Response | BackendError) -> None:
        why = None
        if isinstance(outcome, BackendError):
            why = str(outcome)
        elif not 200 <= outcome.status < 300:
            why = f"POST {self._target}: answered {outcome.status}"
        self._relay.observer.heartbeat_ended(why is None)
        if why is not None and not self._failing:
            logger.warning("heartbeats fail, so the backend may take this instance for"
                           " dead: %s", why)
        elif why is None and self._failing:
            logger.info("heartbeats are accepted again")
        self._failing = why is not None


def heartbeat_event(relay: Relay, number: int, ttl: int) -> Event:
    """Return the heartbeat with this `number`; `ttl` is in seconds."""
    occupancy = relay.occupancy()
    meta = {
        "instance": relay.instance,
        "connections": occupancy.connections,
        "ttl": ttl,
        "draining": occupancy.draining,
    }
    boot_id = relay.instance.rpartition("/")[2]
    return Event(
        f"{boot_id}-heartbeat-{number}",
        serialized({"meta": meta}),
        traceparent(None),
        None,
    )
