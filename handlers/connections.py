"""Every connection of this process by its id, and disconnect notifications under way.

One `ConnectionMap` is created on the running IOLoop and passed to each handler by
its route. Client handlers and callback handlers share nothing else.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Generic, Protocol, TypeVar

from tornado.options import define

from backends import BackendError, Observer
from backends.deadlines import after_reading
from handlers.admission import RETRY_AFTER, Admission, Refusal, RefusalLog
from handlers.backlog import Backlog
from handlers.owners import Owners
from handlers.websocket.turns import Turns

logger = logging.getLogger(__name__)

define("drain_delay", default=0.0, group=__name__, metavar="SECONDS",
       help="at shutdown: how long handshakes are still accepted, until load "
            "balancers have noticed")
define("drain_spread", default=0.0, group=__name__, metavar="SECONDS",
       help="at shutdown: period over which the clients are closed, one after the "
            "other")
define("drain_timeout", default=25.0, group=__name__, metavar="SECONDS",
       help="at shutdown: longest wait after --drain_spread for clients to close and "
            "events to be delivered")

NEVER = float("inf")  # on the loop's clock


class Listed(Protocol):
    """The interface of a connection that the map needs."""

    @property
    def id(self) -> str: ...
    @property
    def remote_ip(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def waiting_since(self) -> float:
        """When its oldest waiting event was read, on the loop's clock."""

    def drain(self) -> None:
        """Close because this instance stops."""

    def abort(self) -> None:
        """Cut the connection off immediately."""

    def on_notified(self, error: BaseException | None) -> None:
        """Its disconnect notification has ended; None: without an error, or cut off."""


C = TypeVar("C", bound=Listed)


class ConnectionMap(Generic[C]):
    """Connections from before their handshake is decided until they close.

    `backlog` bounds what waits for the backend, `admission` the connections. `owners`
    makes their ids, and finds the owners of those that are not here.
    """

    def __init__(
        self,
        backlog: Backlog | None = None,
        admission: Admission | None = None,
        observer: Observer | None = None,
        owners: Owners | None = None,
    ) -> None:
        # Kept because each lookup is a system call (getpid) before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.turns = Turns(self.loop)
        self._connections: dict[str, C] = {}
        # Returns the connection of an id, connecting or open or closing, or None.
        # The dictionary's own method, since it is called for each message.
        self.get: Callable[[str], C | None] = self._connections.get
        # Kept here so that they aren't collected while they run; awaited by drain().
        self._notifications: dict[C, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self.total = 0  # connections listed since the start
        self.backlog = backlog or Backlog()
        self._admission = admission or Admission()
        self.refusals = RefusalLog()
        self.observer = observer or Observer()
        self.owners = owners or Owners()
        self.stopping = False  # /readyz returns 503
        self.draining = False  # handshakes are rejected

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[C]:
        return iter(list(self._connections.values()))

    @property
    def open(self) -> int:
        """Number of open connections, without connecting and closing ones."""
        return sum(
            connection.state == "open" for connection in self._connections.values()
        )

    def add(self, connection: C) -> None:
        """List a connection."""
        self._connections[connection.id] = connection
        self._admission.enter(connection.remote_ip)
        self.total += 1

    def remove(self, connection: C) -> None:
        """Remove a connection, if it is listed."""
        if self._connections.pop(connection.id, None) is not None:
            self._admission.leave(connection.remote_ip)
        self._changed.set()

    def refusal(self, remote_ip: str, descriptor: int) -> Refusal | None:
        """Return None if a handshake is allowed, else the rejection.

        `descriptor` is the number of its socket.
        """
        if self.draining or self.backlog.full:
            return Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "This instance is shutting down."
                if self.draining
                else "Backend queue is full.",
                RETRY_AFTER,
            )
        return self._admission.refusal(remote_ip, descriptor)

    @property
    def oldest_pending(self) -> float:
        """Seconds that the oldest waiting event has waited, or 0."""
        if not self.backlog.events:  # the usual case, without a look at each connection
            return 0.0
        waiting = chain(self._connections.values(), self._notifications)
        since = min((connection.waiting_since for connection in waiting), default=NEVER)
        return max(0.0, self.loop.time() - since)

    # Shutdown.

    def add_notification(
        self, connection: C, notification: "asyncio.Future[None]"
    ) -> None:
        """Wait for `notification`, which sends the disconnect event of `connection`."""
        self.backlog.hold(0)
        self._notifications[connection] = notification
        notification.add_done_callback(partial(self._on_notification_ended, connection))

    def _on_notification_ended(
        self, connection: C, ended: "asyncio.Future[None]"
    ) -> None:
        del self._notifications[connection]
        self._changed.set()
        self.backlog.release(0)
        error = None if ended.cancelled() else ended.exception()
        connection.on_notified(error)
        if error is not None and not isinstance(error, BackendError):
            logger.error("bug in a disconnect notification", exc_info=error)

    async def drain(
        self,
        delay: float,
        spread: float,
        timeout: float,
        on_refusing: Callable[[], None] = lambda: None,
        settle: Callable[[float], Awaitable[int]] | None = None,
    ) -> bool:
        """Close every connection with 1001 and wait for the disconnect notifications.

        Handshakes are accepted for `delay` more seconds; then `on_refusing` is called.
        The closes are spread evenly over `spread` seconds, so that clients do not all
        reconnect at once; the turn of a client that has left takes no time. Finally
        `settle` gets the seconds that are left, and returns how many messages it cut
        off (see `Backend.drain`).

        Returns False if `timeout` seconds after `spread` were not enough; the rest is
        cut off.
        """
        self.stopping = True
        await asyncio.sleep(delay)
        self.draining = True
        on_refusing()
        logger.info("draining %d connections", len(self))
        await self._close_all(spread)
        deadline = self.loop.time() + timeout
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._emptied()
        if self._connections or self._notifications:
            # The bytes that end them may have arrived already.
            read = self.loop.create_future()
            after_reading(self.loop, lambda: read.set_result(None))
            await read
        left = 0
        if settle is not None:
            left = await settle(max(0.0, deadline - self.loop.time()))
        if not self._connections and not self._notifications and not left:
            return True
        logger.error(
            "not drained in %g s: %d connections, %d disconnect notifications and"
            " %d messages are cut off",
            timeout,
            len(self._connections),
            len(self._notifications),
            self.backlog.events - len(self._notifications) + left,
        )
        for connection in self:
            connection.abort()
        for notification in list(self._notifications.values()):
            notification.cancel()
        return False

    async def _emptied(self) -> None:
        while self._connections or self._notifications:
            self._changed.clear()
            await self._changed.wait()

    async def _left(self, connection: C, due: float) -> None:
        """Wait until a connection has left, or until `due` on the loop's clock."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                while connection.id in self._connections:
                    self._changed.clear()
                    await self._changed.wait()

    async def _close_all(self, spread: float) -> None:
        loop = self.loop
        connections = list(self)
        began = loop.time()
        for number, connection in enumerate(connections):
            due = began + spread * number / len(connections)
            if due > loop.time():
                await self._left(connection, due)
            connection.drain()
        for connection in self:  # those accepted meanwhile
            connection.drain()
