"""Single events, which somebody waits for; `delivery` has a connection's messages."""

import asyncio

from backends import BackendError, Observer
from backends.events import Event
from backends.http.disconnects import DisconnectNotification, Disconnects
from backends.redis.entry import Entry, Name, Place, Reports
from backends.redis.writer import StreamWriter


class SingleEvent:
    """An event for which somebody waits: `outcome` is done when Redis has added it.

    It fails when the event is given up: `timeout` seconds after its first failure, or
    at its first failure if `timeout` is 0.
    """

    def __init__(
        self,
        name: Name,
        connection_id: str,
        timeout: float,
        reports: Reports | None = None,
    ) -> None:
        """Without `reports` its attempts are not observed."""
        self.name = name
        self.connection_id = connection_id
        self.timeout = timeout
        self._reports = reports
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entry: Entry | None = None

    def send(self, writer: StreamWriter, event: Event) -> "asyncio.Future[None]":
        """Send it, and return `outcome`."""
        self._entry = writer.add(self, event)
        return self.outcome

    def leave(self) -> None:
        """Send it no more: nobody waits for its outcome."""
        if self._entry is not None:
            self._entry.owner = None

    def on_accepted(self, entry: Entry, place: Place, seconds: float) -> None:
        if self._reports is not None:
            self._reports.added(self, entry, place, seconds)
        if not self.outcome.done():
            self.outcome.set_result(None)

    def on_failed(self, entry: Entry, error: BackendError, seconds: float) -> None:
        if self._reports is not None:
            self._reports.failed(self, entry, error, seconds)
        if not self.timeout:
            self.give_up(error)

    def give_up(self, error: BackendError) -> None:
        if self._entry is not None:
            self._entry.owner = None
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # whoever waited may have left


class StreamDisconnects(Disconnects):
    """Delivers disconnect events into the streams.

    An event is given up `timeout` seconds after its first failure.
    """

    def __init__(
        self, writer: StreamWriter, timeout: float, observer: Observer
    ) -> None:
        super().__init__(observer)
        self._writer = writer
        self._timeout = timeout
        self._reports = Reports(observer)

    async def _send(self, notification: DisconnectNotification) -> BackendError | None:
        single = SingleEvent(
            "disconnect", notification.connection_id, self._timeout, self._reports
        )
        try:
            await single.send(self._writer, notification.event())
        finally:
            single.leave()
        return None
