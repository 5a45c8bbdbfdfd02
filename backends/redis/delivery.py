"""The messages of one connection on their way into its stream, in order."""

import asyncio
from collections import deque

from backends import BackendError, Connection
from backends.events import Event
from backends.redis.entry import Entry, Name, Place, Reports
from backends.redis.writer import StreamWriter


class StreamDelivery:
    """Delivers one connection's messages.

    `timeout` is how many seconds they may wait without any success. Then all of them
    are given up, and the client is closed.
    """

    name: Name = "message"

    __slots__ = (
        "_connection",
        "_entries",
        "_reports",
        "_writer",
        "connection_id",
        "number",
        "timeout",
    )

    def __init__(
        self,
        connection: Connection,
        writer: StreamWriter,
        timeout: float,
        reports: Reports,
    ) -> None:
        self._connection = connection
        self._writer = writer
        self._reports = reports
        # Those that are not added, in order, with futures for the relay.
        self._entries: deque[tuple[Entry, asyncio.Future[None]]] = deque()
        self.connection_id = connection.id
        self.timeout = timeout
        self.number = 0  # of the latest message, from 1

    def post(self, event: Event) -> "asyncio.Future[None]":
        """Send the next message; the future is done when it is added or given up."""
        taken: asyncio.Future[None] = self._writer.loop.create_future()
        self._entries.append((self._writer.add(self, event), taken))
        return taken

    def on_accepted(self, entry: Entry, place: Place, seconds: float) -> None:
        self._reports.added(self, entry, place, seconds)
        self._reports.observer.ended("message", self.connection_id, "delivered")
        _, taken = self._entries.popleft()
        if not taken.done():
            taken.set_result(None)

    def on_failed(self, entry: Entry, error: BackendError, seconds: float) -> None:
        self._reports.failed(self, entry, error, seconds)

    def give_up(self, error: BackendError) -> None:
        for entry, _ in self._entries:
            self._reports.observer.given_up(entry.event.id)
        self._connection.give_up(error, len(self._entries))
        self.end()

    def end(self) -> None:
        """Drop what is not added."""
        dropped, self._entries = self._entries, deque()
        for entry, taken in dropped:
            entry.owner = None
            if not taken.done():
                taken.set_result(None)
