"""One event on its way through a lane, and what its owner does with its outcome."""

from typing import Protocol

from backends import BackendError, EventName
from backends.events import Event


class Owner(Protocol):
    """The sender of an event: a connection's messages, or its disconnect event."""

    name: EventName
    timeout: float  # seconds after the first failure until the event is given up

    @property
    def connection_id(self) -> str:
        """The connection of the event."""

    def on_accepted(self, entry: "Entry") -> None:
        """The backend has accepted the event."""

    def on_refused(self, entry: "Entry", status: int) -> None:
        """The backend has refused the event, finally."""

    def on_failed(self, entry: "Entry", error: BackendError, wait: float) -> None:
        """The event failed, and leaves the lane with all later ones of its owner.

        `wait` is for how many seconds the backend wants no retry.
        """

    def give_up(self, error: BackendError) -> None:
        """The deadline of the first event in the lane is over."""

    def on_replied(self) -> None:
        """The commands in the response to a batch with its event are carried out."""


class Entry:
    """An event in a lane; `owner` is None once the event has left the lane."""

    __slots__ = (
        "attempts",
        "connection_id",
        "event",
        "failed_alone_at",
        "failed_at",
        "name",
        "owner",
        "sending",
    )

    def __init__(
        self,
        owner: Owner,
        event: Event,
        attempts: int = 0,
        failed_at: float = float("inf"),
    ) -> None:
        """`attempts` have failed, the first one at `failed_at` on the loop's clock."""
        self.owner: Owner | None = owner
        self.name = owner.name
        self.connection_id = owner.connection_id
        self.event = event
        self.attempts = attempts
        self.failed_at = failed_at
        # Without the failures of batches that may have another event to blame.
        self.failed_alone_at = failed_at
        self.sending = False  # part of a batch that is under way

    def leave(self, owner: Owner) -> "Entry":
        """Leave the lane; return a new entry of the same event, to be added later."""
        self.owner = None
        return Entry(owner, self.event, self.attempts, self.failed_at)

    def acquit(self) -> None:
        """Count no failure of a batch: the backend has accepted the rest of it."""
        self.failed_at = self.failed_alone_at

    def restart(self, now: float) -> None:
        """Restart the time until it is given up, if it has failed."""
        self.failed_at = max(self.failed_at, now)
        self.failed_alone_at = max(self.failed_alone_at, now)

    @property
    def deadline(self) -> float:
        """When the event is given up, on the loop's clock."""
        return self.failed_at + (self.owner.timeout if self.owner is not None else 0.0)
