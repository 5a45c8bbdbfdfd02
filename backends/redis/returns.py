"""Commands that could not be carried out, and come back as events."""

import asyncio
import logging

from backends.events import EventWriter
from backends.redis.commands import Undelivered
from backends.redis.single import SingleEvent
from backends.redis.writer import StreamWriter

logger = logging.getLogger(__name__)

MAX_WAITING = 1000  # commands that wait to be returned; more are dropped


class Returns:
    """Adds an event for each of these commands; `waiting` is the number not added."""

    def __init__(self, writer: StreamWriter, events: EventWriter) -> None:
        self._writer = writer
        self._events = events
        self.waiting = 0

    def add(self, command: Undelivered) -> None:
        """Return a command, in the partition of its connection."""
        logger.info(
            "connection %s: %s of the command stream was not carried out: %d",
            command.connection_id, command.command, command.status,
            extra={"event": "undelivered", "connection_id": command.connection_id,
                   "status": command.status},
        )
        if self.waiting >= MAX_WAITING:
            logger.warning("commands that were not carried out are dropped: %d wait to"
                           " be returned already", MAX_WAITING)
            return
        self.waiting += 1
        single = SingleEvent("undelivered", command.connection_id, float("inf"))
        single.outcome.add_done_callback(self._on_added)
        single.send(
            self._writer,
            self._events.undelivered(
                command.event_id,
                command.connection_id,
                command.command,
                command.status,
            ),
        )

    def _on_added(self, outcome: "asyncio.Future[None]") -> None:
        self.waiting -= 1
