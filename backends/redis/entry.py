"""One event on its way into its stream, and what its owner does with its outcome."""

from typing import Literal, NamedTuple, Protocol

from backends import Attempt, AttemptOutcome, BackendAway, BackendError, Observer
from backends.events import Event

Name = Literal["connect", "message", "disconnect", "undelivered"]


class NotAdded(BackendError):
    """An event was certainly not added to its stream: it is full, or was not asked."""


class Place(NamedTuple):
    """Where an event is: a stream, and the id of the entry in it."""

    stream: str
    id: str


class Owner(Protocol):
    """The sender of an event: a connection's messages, or a single event."""

    name: Name
    timeout: float  # seconds without success until the event is given up

    @property
    def connection_id(self) -> str:
        """The connection of the event."""

    def on_accepted(self, entry: "Entry", place: Place, seconds: float) -> None:
        """Redis has added the event, after `seconds`."""

    def on_failed(self, entry: "Entry", error: BackendError, seconds: float) -> None:
        """An attempt has failed. It is repeated, unless the owner withdraws it."""

    def give_up(self, error: BackendError) -> None:
        """The time of the owner's oldest event is over: withdraw all of them."""


class Entry:
    """An event in a partition; `owner` is None once it was added or withdrawn.

    `since` is when it came, on the loop's clock, if its partition was failing then.
    """

    __slots__ = ("attempts", "event", "owner", "since")

    def __init__(self, owner: Owner, event: Event, since: float = 0.0) -> None:
        self.owner: Owner | None = owner
        self.event = event
        self.since = since
        self.attempts = 0


class Reports:
    """Reports the attempts of events to an observer."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def added(self, owner: Owner, entry: Entry, place: Place, seconds: float) -> None:
        """Redis has added an event of `owner`."""
        self._report(owner, entry, "delivered", seconds, f"{place.stream} {place.id}")

    def failed(
        self, owner: Owner, entry: Entry, error: BackendError, seconds: float
    ) -> None:
        """An attempt for an event of `owner` has failed."""
        away = isinstance(error, BackendAway)
        self._report(owner, entry, "unreachable" if away else "error", seconds, "")

    def _report(
        self,
        owner: Owner,
        entry: Entry,
        outcome: AttemptOutcome,
        seconds: float,
        place: str,
    ) -> None:
        if owner.name == "undelivered":
            return
        event = entry.event
        self.observer.attempted(
            Attempt(
                owner.name,
                owner.connection_id,
                event.id,
                event.traceparent,
                outcome,
                None,
                seconds,
                "",
                event.trace,
                entry.attempts,
                place,
            )
        )
