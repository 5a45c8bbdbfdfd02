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
    Closure,
    Condition,
    Connection,
    ConnectionRefused,
    EventName,
    Handshake,
    Observer,
    Outcome,
    TraceContext,
)

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


class ObservedBackend(Backend):
    """Wraps a backend that calls no observer: each call of it counts as one attempt.

    It does not report the end of a failed message: the relay reports each message that
    is given up.
    """

    observes = True

    def __init__(self, backend: Backend, observer: Observer) -> None:
        self._backend = backend
        self._observer = observer
        self.descriptors = backend.descriptors
        self.takes_many = backend.takes_many
        self.wants_fields = backend.wants_fields
        # These are not observed: use the backend's own.
        self.start = backend.start  # type: ignore[method-assign]
        self.called_back = backend.called_back  # type: ignore[method-assign]
        self.reload = backend.reload  # type: ignore[method-assign]
        self.drain = backend.drain  # type: ignore[method-assign]
        self.close = backend.close  # type: ignore[method-assign]
        self.lost = backend.lost  # type: ignore[method-assign]
        self.abandon = backend.abandon  # type: ignore[method-assign]
        self.rename = backend.rename  # type: ignore[method-assign]

    def condition(self) -> Condition:
        """Return the backend's own condition."""
        return self._backend.condition()

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        began = monotonic()
        try:
            subprotocol = await self._backend.connect(connection, handshake)
        except ConnectionRefused as refused:
            self._report("connect", connection, began, refused, handshake.trace)
            raise
        except BackendError as error:
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
            await self._backend.disconnect(connection, closure)
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
