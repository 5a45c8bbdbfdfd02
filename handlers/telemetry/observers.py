"""Everybody who watches the relay, as one observer; and what backends do, watched.

`backends.Observer` says what there is to see. Metrics watch always, the console
while somebody looks at it.
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
    """Tells each of those who watch now; they may come and go.

    Its methods are replaced whenever one does: with a single observer they are
    that one's own, so that it costs no second call to watch alone, and without
    any, those that do nothing.
    """

    def __init__(self, *observers: Observer) -> None:
        self._watching = list(observers)
        self._present()

    def add(self, observer: Observer) -> None:
        """It watches from now on."""
        self._watching.append(observer)
        self._present()

    def remove(self, observer: Observer) -> None:
        """It watches no more; nothing where it did not."""
        if observer in self._watching:
            self._watching.remove(observer)
            self._present()

    def _present(self) -> None:
        for name in SEEN:
            unseen = getattr(Observer, name)
            # Whoever has not overridden a method does not want to be called.
            calls = [
                getattr(observer, name)
                for observer in self._watching
                if getattr(type(observer), name) is not unseen
            ]
            if calls:
                tell = calls[0] if len(calls) == 1 else partial(_tell, calls)
                setattr(self, name, tell)
            else:
                vars(self).pop(name, None)


def _tell(calls: list[Callable[..., None]], *seen: Any, **more: Any) -> None:
    for call in calls:
        call(*seen, **more)


class ObservedBackend(Backend):
    """A backend that does not observe itself: what it is given is one attempt.

    Messages that fail are not told here, since the relay tells of all that is
    given up.
    """

    observes = True

    def __init__(self, backend: Backend, observer: Observer) -> None:
        self._backend = backend
        self._observer = observer
        self.descriptors = backend.descriptors
        # Asked for as they are: nobody has to know of this wrapper.
        self.called_back = backend.called_back  # type: ignore[method-assign]
        self.reload = backend.reload  # type: ignore[method-assign]
        self.drain = backend.drain  # type: ignore[method-assign]
        self.close = backend.close  # type: ignore[method-assign]

    def condition(self) -> Condition:
        """The backend's own."""
        return self._backend.condition()

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        began = monotonic()
        try:
            subprotocol = await self._backend.connect(connection, handshake)
        except ConnectionRefused as refused:
            self._tell("connect", connection, began, refused, handshake.trace)
            raise
        except BackendError as error:
            self._tell("connect", connection, began, error, handshake.trace)
            raise
        self._tell("connect", connection, began, None, handshake.trace)
        return subprotocol

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        began = monotonic()
        try:
            taken = self._backend.message(connection, message)
        except BackendError as error:
            self._tell("message", connection, began, error)
            raise
        if taken is not None:
            return self._taken(connection, taken, began)
        self._tell("message", connection, began)
        return None

    async def _taken(
        self, connection: Connection, taken: Awaitable[None], began: float
    ) -> None:
        try:
            await taken
        except BackendError as error:
            self._tell("message", connection, began, error)
            raise
        self._tell("message", connection, began)

    async def disconnect(self, connection: Connection, closure: Closure) -> None:
        began = monotonic()
        try:
            await self._backend.disconnect(connection, closure)
        except BackendError as error:
            self._tell("disconnect", connection, began, error)
            raise
        self._tell("disconnect", connection, began)

    def _tell(
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
