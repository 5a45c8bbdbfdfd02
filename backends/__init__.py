"""The backends of the relay: the `Backend` interface, and loading one by name.

A backend is a module of this package (`--backend=http` is `backends.http`), or
any importable module with a dot in its name (`--backend=mycompany.queue`), which
may be in the current folder. It has one function, `make_backend(relay)`, which
returns a `Backend`, and may `tornado.options.define` options of its own at import.
With a second function, `make_check(relay)`, which returns a `Check`,
`socketdock check` also checks what it needs; with `make_trial(relay)`, which returns
a `Trial`, `socketdock check --send` sends it test events. `option_defaults()` returns
values of the relay's own options, by name, for those that are not set, and
`client_paths()` paths where clients connect beside `--ws_path`; handshakes to others
then get 403. A built-in one lists the shared modules whose options it reads in
`OPTION_MODULES`. To write one:

    from contextlib import suppress

    from backends import Backend, ConnectionClosed, SendBufferFull

    class PrintBackend(Backend):
        async def message(self, connection, message):
            print(connection.id, message)
            with suppress(ConnectionClosed, SendBufferFull):
                connection.send("thank you")

    def make_backend(relay):
        return PrintBackend()

The other end, where clients connect, is `handlers.clients.connection`.
"""

import abc
import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from tornado.options import Error as OptionError

# Part of the interface, for backends outside the project.
from backends.attempt import Attempt as Attempt
from backends.attempt import AttemptOutcome as AttemptOutcome
from backends.attempt import EventName as EventName
from backends.attempt import TraceContext as TraceContext
from backends.check import Check as Check
from backends.check import Finding as Finding
from backends.check import expiry_finding as expiry_finding
from backends.commands import Executor
from backends.loading import BUILT_IN as BUILT_IN
from backends.loading import built_in as built_in
from backends.loading import load as load
from backends.loading import names as names
from backends.loading import users_of_options as users_of_options
from backends.observer import BatchEnd as BatchEnd
from backends.observer import ForwardOutcome as ForwardOutcome
from backends.observer import HandshakeOutcome as HandshakeOutcome
from backends.observer import Initiator as Initiator
from backends.observer import Observer as Observer
from backends.observer import Outcome as Outcome
from backends.waiting import Taken as Taken

FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.1


class Occupancy(NamedTuple):
    """How many connections this instance has, and whether it is being stopped."""

    connections: int
    draining: bool


class Hold(Protocol):
    """Says when events must wait: another instance may have taken this one for dead.

    It begins with the first look at `active` after a stall of the process, and takes
    at most a few seconds, unless `persist` was called.
    """

    @property
    def active(self) -> bool:
        """Whether events must wait now."""

    def persist(self) -> None:
        """Let events wait until it is known, however long that takes."""

    def wait(self, call: Callable[[], None]) -> None:
        """Call `call` once, when events may be sent again."""

    def leave(self, call: Callable[[], None]) -> None:
        """Do not call it."""


class DeadRuns(Protocol):
    """Says which disconnect events of dead runs of this process are due here.

    Other instances send them, too (`backends.cluster`).
    """

    async def claim(self, instance: str, ids: Collection[str]) -> set[str]:
        """Return those of `ids` that are due here; nobody else sends these."""

    async def sent(self, instance: str, connection_id: str) -> None:
        """An event was accepted, refused or given up."""

    async def finish(self, instance: str, finished: bool) -> None:
        """End the claim; `finished`: nothing is left to send."""


@dataclass(frozen=True, slots=True)
class Relay:
    """What a backend is given of the relay that it serves.

    `callback_url` is how its service reaches this instance's callbacks: a URL
    without a trailing slash, or None where no address was given and none can
    be found out (a listener bound to a wildcard address). `instance` is
    `<name>/<boot id>`, new at every start. `version` is SocketDock's. A backend
    reports attempts and outcomes to `observer`; see `Backend.observes`. `sample`
    decides by the id of a new trace whether it is recorded; None: none is. `executor`
    carries out the commands of a backend's responses. `key_of` returns the key of a
    connection's callback URLs, by its id; None: they have none. `occupancy` returns
    that of now. `hold` and `dead_runs` are None where no other instance sends
    disconnect events of this one.
    """

    callback_url: str | None
    instance: str
    version: str
    observer: Observer = field(default_factory=Observer)
    sample: Callable[[str], bool] | None = None
    executor: Executor | None = None
    key_of: Callable[[str], str] | None = None
    occupancy: Callable[[], Occupancy] = lambda: Occupancy(0, draining=False)
    hold: Hold | None = None
    dead_runs: DeadRuns | None = None


class Handshake(NamedTuple):
    """A client's request for a WebSocket, as the relay read it.

    Header names are lower-case, and a repeated header is joined with `, `.
    `query` is without its question mark. `subprotocols` are the client's
    offers, in its order. `trace` is that of the handshake, where there is one.
    `headers` are for a backend that `wants_headers`, `fields` for one that
    `wants_fields`: the header fields as they were sent.
    """

    headers: Mapping[str, str]
    path: str
    query: str
    remote_ip: str
    subprotocols: Sequence[str]
    trace: TraceContext | None = None
    fields: Sequence[tuple[str, str]] = ()


class Closure(NamedTuple):
    """How a connection ended.

    `code` is the relay's own close code where it closed first, else the one
    received: 1005 for a close frame without one, 1006 where no close frame was
    seen (RFC 6455, section 7.4.1). `duration` is in seconds since the
    connection was listed. `undelivered` counts messages that were read from
    the client and given up before the backend took them.
    """

    code: int
    reason: str
    initiator: Initiator
    duration: float
    undelivered: int = 0


# Of a connection whose run is dead.
LOST = Closure(1006, "instance lost", "relay", 0.0)


class Connection(Protocol):
    """One client's WebSocket, as a backend sees it."""

    @property
    def id(self) -> str:
        """128 random bits as 32 hex digits."""

    @property
    def connected_at(self) -> datetime:
        """When its handshake began, in UTC."""

    @property
    def trace(self) -> TraceContext | None:
        """The trace of its client, if there is one to continue."""

    @property
    def backend_state(self) -> bytes | None:
        """What the backend keeps with it (`meta.state`): JSON; None: nothing."""

    def send(self, message: str | bytes) -> "asyncio.Future[None] | None":
        """Send a `str` as a text frame, `bytes` as a binary one, whole.

        Returns None when the kernel has taken the last byte, or when the frame
        leaves right after the handshake, which is still being decided. Otherwise
        returns a future that is done when the kernel has taken the last byte, or
        fails with `ConnectionClosed`.

        Raises `ConnectionClosed` where the connection is not open, and
        `SendBufferFull` where too much waits already.
        """

    def drained(self) -> Awaitable[None]:
        """Wait until nothing waits to be sent. Returns when closed, too."""

    def has_room(self) -> "asyncio.Future[None] | None":
        """Return None if less than half of `--max_send_buffer` waits to be sent.

        Otherwise returns a future that is done when it does, or at the end.
        """

    def close(
        self, code: int = 1000, reason: str = "", initiator: Initiator = "backend"
    ) -> None:
        """Start the closing handshake, unless it has started already.

        `reason` is at most 123 bytes of UTF-8 (RFC 6455, section 5.5). Raises
        `ValueError` for a longer one, a code that no close frame may have, or another
        `initiator`.
        """

    def give_up(self, error: "BackendError", messages: int = 1) -> None:
        """Report that `messages` of this connection can't be delivered.

        For messages that `Backend.message` has taken without raising an error;
        where it raises, that is enough. The client is closed with 1013, and the
        messages behind them are given up, too.
        """


class Unavailable(OptionError):
    """What an option names can't be used now, though the option may be valid.

    A missing file, an address in use, a full disk. The start ends with exit status
    1, so that it is tried again; any other `OptionError` ends it with 2.
    """


class ConnectionClosed(Exception):
    """The connection is closing or closed: nothing more can be sent to its client."""


class SendBufferFull(Exception):
    """The client reads more slowly than messages are sent to it."""


class BackendError(Exception):
    """The backend did not accept an event: it is unreachable, or answered wrongly."""


class BackendAway(BackendError):
    """The backend can't be reached, or disconnected before it answered."""


@dataclass
class ConnectionRefused(Exception):
    """The backend refuses a handshake.

    `status` is the HTTP status for the client, sent with `headers` and `body`. Raises
    `ValueError` for one that can't refuse, the interim and the successful ones, and
    for headers that are no strings, or have names that no header has; `TypeError` for
    a body that is not `bytes`.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __post_init__(self) -> None:
        if not isinstance(self.status, int) or not 300 <= self.status <= 599:
            raise ValueError(f"a handshake can't be refused with {self.status!r}")
        for name, value in self.headers.items():
            if not (isinstance(value, str) and FIELD_NAME.fullmatch(name)):
                raise ValueError(f"no header of a refusal: {name!r}, or its value")
        if not isinstance(self.body, bytes):
            raise TypeError("the body of a refusal must be bytes")


class Condition(NamedTuple):
    """The state of a backend, for probes, operators and metrics.

    `away` is for how many seconds it has been considered unreachable; None while
    it is reachable. `cause` says why the latest attempt did not reach it. `untried`
    means that the next event is sent nevertheless, to find out whether the backend is
    back. `held` counts requests that wait for an overdue response, `connections` those
    that are open to it. `entries` are those of the longest stream of a broker.
    """

    away: float | None = None
    untried: bool = False
    held: int = 0
    connections: int = 0
    cause: str | None = None
    entries: int = 0


# A backend's decision to accept a handshake; see `Backend.connect`.
Choice = Awaitable[str | None] | str | None


async def chosen(choice: Choice) -> str | None:
    """Return the subprotocol of a choice, which may have to be waited for."""
    return choice if choice is None or isinstance(choice, str) else await choice


class Backend(abc.ABC):
    """Receives the three events of each connection, in this order.

    One connect, the messages in the order received, one disconnect; each is
    called when the one before it has completed. Connections run in parallel,
    on one thread: a method must never block.

    `descriptors` is how many files and sockets it may have open at once. A backend
    that `observes` reports its attempts, and the outcomes of the events that it was
    given, to `Relay.observer`; for the others the relay does, from what their
    methods return and raise.

    One that `takes_many` is given a message of a connection although others are not
    completed; their awaitables then complete in order. One that `wants_headers` gets
    `Handshake.headers`, and one that `wants_fields` gets `Handshake.fields`.
    """

    descriptors = 0
    observes = False
    takes_many = False
    wants_headers = True
    wants_fields = False

    async def start(self) -> None:
        """Prepare, before clients are accepted. Called once.

        Raises `OptionError` with one sentence if an option prevents the start.
        """
        return None

    def connect(self, connection: Connection, handshake: Handshake) -> Choice:
        """Decide on a handshake, before it is answered.

        Returns the subprotocol that it chose, which must be one of those
        offered, or None to leave the choice to `--subprotocols`; or an awaitable
        of either, so write `async def` for the simple case.
        Raises `ConnectionRefused` to refuse, after which nothing more is
        called for this connection, or `BackendError` where there is no
        decision: the client gets 503 and `disconnect` follows. It raises them
        immediately or from the awaitable.
        """
        return None

    @abc.abstractmethod
    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Take one message: `str` from a text frame, `bytes` from a binary one.

        Returns None where the next message may follow immediately, or an awaitable
        that completes when it may; write `async def` for the simple case. A `Taken`
        takes less time than a future.
        Raises `BackendError`, immediately or from the awaitable, where it can't be
        delivered: the client is closed with 1013, and what it sent since
        counts as undelivered.
        """

    def disconnect(
        self, connection: Connection, closure: Closure
    ) -> Awaitable[None] | None:
        """Handle the end of an accepted connection.

        Returns None if that is done, or an awaitable that completes when it is; write
        `async def` for the simple case. The awaitable fails with `BackendError` where
        the end could not be delivered; the relay logs it.
        """
        return None

    async def lost(self, connection_id: str, instance: str) -> None:
        """Handle the end of a connection that `instance`, a dead run, has lost.

        Called with --cluster, for runs of other processes; the closure is `LOST`.
        Raises `BackendError` where this could not be delivered.
        """
        delivered = self.disconnect(LostConnection(connection_id), LOST)
        if delivered is not None:
            await delivered

    def abandon(self, connection_id: str) -> None:
        """Send nothing more for a connection: another instance has sent its end.

        Called with --cluster. Nothing more is called for it, and a `disconnect` that
        is under way is cancelled.
        """
        return None

    def rename(self, instance: str) -> None:
        """Go on with another `Relay.instance`: this run was taken for dead."""
        return None

    def called_back(self, connection: Connection) -> None:
        """Handle that a callback request for `connection` was received."""
        return None

    def condition(self) -> Condition:
        """Return its state now."""
        return Condition()

    def reload(self) -> None:
        """Read the files that options name again: the relay got SIGHUP.

        Raises `OptionError` with one sentence where that fails; then nothing may
        have changed.
        """
        return None

    async def drain(self, timeout: float) -> int:
        """Wait until nothing is left to deliver, after the last disconnect.

        At most `timeout` seconds. Returns how many messages are then lost without
        a report to anybody: above 0, the relay ends with status 1.
        """
        return 0

    async def close(self) -> None:
        """Close what is open. Called once, after the last disconnect."""
        return None


class LostConnection:
    """A connection of a dead run: only its id is known."""

    trace = None
    backend_state = None

    def __init__(self, connection_id: str) -> None:
        self.id = connection_id
        self.connected_at = datetime.fromtimestamp(0, UTC)

    def send(self, message: str | bytes) -> None:
        """Raises `ConnectionClosed`."""
        raise ConnectionClosed

    async def drained(self) -> None:
        """Nothing waits."""

    def has_room(self) -> None:
        """There is room."""

    def close(
        self, code: int = 1000, reason: str = "", initiator: Initiator = "backend"
    ) -> None:
        """It is closed."""

    def give_up(self, error: BackendError, messages: int = 1) -> None:
        """Nobody is there to be closed."""
