"""Observer: is called for what happens in the relay; the words for it.

Part of the interface: import these from `backends`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from backends.attempt import Attempt, AttemptOutcome, EventName
from backends.commands import CommandName, CommandOutcome, Source

if TYPE_CHECKING:
    from backends import Connection

Initiator = Literal["client", "backend", "relay"]

# What became of an event. "refused" is the backend's final decision; "abandoned" are
# requests that it held, unanswered, until nobody waited for the response.
Outcome = Literal["delivered", "refused", "failed", "abandoned"]
# What became of a handshake: "refused" by the backend, "rejected" by the relay, or
# "no_decision" of the backend; the client may also have left.
HandshakeOutcome = Literal["opened", "refused", "rejected", "no_decision", "left"]
# What became of a callback for a connection of another instance: "answered" by it; or
# the instance is "gone", was "unreachable", or left the callback "unanswered".
ForwardOutcome = Literal["answered", "gone", "unreachable", "unanswered"]


class BatchEnd(NamedTuple):
    """A batch of events that is not sent again.

    `batch_id` and `traceparent` are what was sent, `events` the `traceparent` of each
    of its events; empty if the trace of the batch is not recorded. `outcome` and
    `status` are those of its last attempt, `seconds` the time since it was formed. Its
    events are reported by `Observer.attempted`, too.
    """

    batch_id: str
    traceparent: str
    events: Sequence[str]
    outcome: AttemptOutcome
    status: int | None
    seconds: float
    url: str


class Observer:
    """Is called for what happens to connections, frames and events.

    These methods do nothing. They are called for each message: an override must be
    fast, and must not raise.
    """

    def handshake_ended(
        self, outcome: HandshakeOutcome, status: int, remote_ip: str, seconds: float
    ) -> None:
        """A handshake was answered with `status`, or its client has disconnected."""

    def opened(self, connection: "Connection") -> None:
        """A connection is open: from now on, frames are relayed both ways."""

    def closed(
        self,
        connection: "Connection",
        code: int,
        initiator: Initiator,
        duration: float,
    ) -> None:
        """A connection that was open has ended; the arguments are as in `Closure`."""

    def received(
        self, connection: "Connection", message: str | bytes, size: int
    ) -> None:
        """A message of `size` bytes came from a client."""

    def sent(self, connection: "Connection", message: str | bytes, size: int) -> None:
        """A message of `size` bytes is being sent to a client."""

    def send_answered(self, status: int) -> None:
        """A send callback of a backend was answered with `status`."""

    def attempted(self, attempt: Attempt) -> None:
        """An attempt to deliver an event has ended."""

    def batch_ended(self, batch: BatchEnd) -> None:
        """A batch of events is not sent again; its events may be."""

    def ended(
        self, event: EventName, connection_id: str, outcome: Outcome, count: int = 1
    ) -> None:
        """An event of a connection has ended so, or `count` of them."""

    def heartbeat_ended(self, delivered: bool) -> None:
        """A heartbeat of this instance was accepted by the backend, or was not."""

    def forwarded(
        self, connection_id: str, owner: str, outcome: ForwardOutcome, status: int
    ) -> None:
        """A callback was forwarded to `owner`, and is answered with `status`.

        `connection_id` is empty for a bulk callback.
        """

    def given_up(self, event_id: str) -> None:
        """An event that was attempted is given up; `ended` counts it, too."""

    def commanded(
        self,
        source: Source,
        command: CommandName | Literal["none"],
        outcome: CommandOutcome,
        connection_id: str,
    ) -> None:
        """A command for a connection was carried out, or not.

        `none`: a reply to an event of the connection could not be read at all, or a
        bulk callback; then `connection_id` is empty.
        """
