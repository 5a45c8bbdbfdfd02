"""Combines all observers of the relay into one, and observes backends that do not.

`backends.Observer` is the interface. Metrics observe always, the console's `Tail` only
while it has a viewer.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any

from backends import (
    Attempt,
    AttemptOutcome,
    Backend,
    BackendAway,
    BackendError,
    Choice,
    Closure,
    Connection,
    ConnectionRefused,
    EventName,
    Handshake,
    Observer,
    Outcome,
    TraceContext,
)
from backends.wrapper import BackendWrapper

SEEN = [name for name in vars(Observer) if not name.startswith("_")]


class Observers(Observer):
    """Calls each of the current observers; they may be added and removed at any time.

    Each change replaces the methods of this object. With a single observer they are
    that observer's own methods, which saves a call; without any they do nothing.
    """

    def __init__(self, *observers: Observer) -> None:
        self._current = list(observers)
        self._replace_methods()

    def add(self, observer: Observer) -> None:
        """Call `observer` from now on."""
        self._current.append(observer)
        self._replace_methods()

    def remove(self, observer: Observer) -> None:
        """Stop calling `observer`; does nothing if it was not added."""
        if observer in self._current:
            self._current.remove(observer)
            self._replace_methods()

    def _replace_methods(self) -> None:
        for name in SEEN:
            default = getattr(Observer, name)
            # An observer that does not override a method need not be called.
            calls = [
                getattr(observer, name)
                for observer in self._current
                if getattr(type(observer), name) is not default
            ]
            if calls:
                method = calls[0] if len(calls) == 1 else partial(_call_all, calls)
                setattr(self, name, method)
            else:
                vars(self).pop(name, None)


def _call_all(calls: list[Callable[..., None]], *args: Any, **kwargs: Any) -> None:
    for call in calls:
        call(*args, **kwargs)


class ObservedBackend(BackendWrapper):
    """Wraps a backend that calls no observer: each call of it counts as one attempt.

    It does not report the end of a failed message: the relay reports each message that
    is given up.
    """

    def __init__(self, backend: Backend, observer: Observer) -> None:
        super().__init__(backend)
        self._observer = observer
        self.observes = True

    def connect(self, connection: Connection, handshake: Handshake) -> Choice:
        began = monotonic()
        try:
            choice = self._backend.connect(connection, handshake)
        except (ConnectionRefused, BackendError) as error:
            self._report("connect", connection, began, error, handshake.trace)
            raise
        if choice is not None and not isinstance(choice, str):
            return self._chosen(connection, handshake, choice, began)
        self._report("connect", connection, began, None, handshake.trace)
        return choice

    async def _chosen(
        self,
        connection: Connection,
        handshake: Handshake,
        choice: Awaitable[str | None],
        began: float,
    ) -> str | None:
        try:
            subprotocol = await choice
        except (ConnectionRefused, BackendError) as error:
            self._report("connect", connection, began, error, handshake.trace)
            raise
        self._report("connect", connection, began, None, handshake.trace)
        return subprotocol

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        began = monotonic()
        try:
            taken = self._backend.message(connection, message)
        except BackendError as error:
            self._report("message", connection, began, error)
            raise
        if taken is not None:
            return self._taken(connection, taken, began)
        self._report("message", connection, began)
        return None

    async def _taken(
        self, connection: Connection, taken: Awaitable[None], began: float
    ) -> None:
        try:
            await taken
        except BackendError as error:
            self._report("message", connection, began, error)
            raise
        self._report("message", connection, began)

    async def disconnect(self, connection: Connection, closure: Closure) -> None:
        began = monotonic()
        try:
            delivered = self._backend.disconnect(connection, closure)
            if delivered is not None:
                await delivered
        except BackendError as error:
            self._report("disconnect", connection, began, error)
            raise
        self._report("disconnect", connection, began)

    def _report(
        self,
        event: EventName,
        connection: Connection,
        began: float,
        error: BackendError | ConnectionRefused | None = None,
        trace: TraceContext | None = None,
    ) -> None:
        status = error.status if isinstance(error, ConnectionRefused) else None
        attempt: AttemptOutcome = "delivered"
        outcome: Outcome = "delivered"
        if isinstance(error, ConnectionRefused):
            attempt = outcome = "refused"
        elif error is not None:
            attempt = "unreachable" if isinstance(error, BackendAway) else "error"
            outcome = "failed"
        self._observer.attempted(
            Attempt(
                event,
                connection.id,
                "",
                "",
                attempt,
                status,
                monotonic() - began,
                trace=trace or connection.trace,
            )
        )
        if event != "message" or error is None:
            self._observer.ended(event, connection.id, outcome)
