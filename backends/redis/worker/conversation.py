"""The events of one connection on their way from its stream to the backend.

They are delivered one after the other, as by the `http` backend: `Delivery` has the
order of its messages, retries and held answers. This module decides what becomes of an
event that `Delivery` has given up.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Protocol

from backends import Attempt, BackendError, Closure, ConnectionRefused, TraceContext
from backends.commands import Close, Command
from backends.events import Ended, Event, EventWriter
from backends.http.decisions import Decisions
from backends.http.delivery import Delivery, SingleDeliveries
from backends.http.disconnects import DisconnectDelivery, DisconnectNotification
from backends.http.retries import backoff
from backends.redis.worker.entry import StoredEvent
from backends.redis.worker.remote import RemoteExecutor, Streams
from backends.waiting import Waiters

# Outcomes after which an event is acknowledged.
FINAL = frozenset({"delivered", "refused", "abandoned"})

logger = logging.getLogger(__name__)

POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1
NOWHERE = Closure(1006, "", "relay", 0.0)  # the event has the real one


@dataclass(slots=True)
class BackendContext:
    """What the conversations of a worker share.

    `event_timeout` is how long an event may fail while others are accepted, and
    `delivery_timeout` how long the backend may be away, in seconds.
    """

    deliveries: SingleDeliveries
    disconnects: DisconnectDelivery
    decisions: Decisions
    executor: RemoteExecutor
    streams: Streams
    events: EventWriter
    event_timeout: float
    delivery_timeout: float
    max_bytes: int  # of payloads that are read and not settled
    accepted_at: float = 0.0  # when the backend accepted an event, on the loop's clock
    # By the id of each event that is not settled.
    senders: dict[str, "Conversation"] = field(default_factory=dict)
    bytes: int = 0  # of payloads that are read and not settled
    readers: Waiters = field(default_factory=Waiters)  # that wait for room

    def on_attempted(self, attempt: Attempt) -> None:
        """Tell a conversation what became of an attempt for its event."""
        final = attempt.outcome in FINAL
        now = self.deliveries.loop.time()
        if final:
            self.accepted_at = now
        sender = self.senders.get(attempt.event_id)
        if sender is None:
            return
        if not final:
            sender.on_failed(attempt, now)
        elif attempt.event != "connect":  # see `Conversation._decide`
            sender.on_settled(attempt.event_id)


class Outcomes(Protocol):
    """Where a conversation reports what became of its events."""

    async def bury(self, stored: StoredEvent, error: BackendError) -> None:
        """Put an event that cannot be delivered among the dead."""

    def settle(self, stored: StoredEvent) -> None:
        """Acknowledge an event."""

    def on_rest(self, conversation: "Conversation") -> None:
        """Nothing of it is under way, except what is overdue."""


class StoredEnd:
    """A disconnect event as the relay has written it; it is not made again."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def disconnect(self, ended: Ended, undelivered: int, refused: int) -> Event:
        """Return it; its counts are those of the relay."""
        return self._event


class Conversation:
    """Delivers the events of one connection; `Delivery` sees it as the connection."""

    backend_state: bytes | None = None

    def __init__(
        self, connection_id: str, context: BackendContext, outcomes: Outcomes
    ) -> None:
        self.id = connection_id
        self.trace: TraceContext | None = None
        self._context = context
        self._outcomes = outcomes
        self._queue: deque[StoredEvent] = deque()
        # Read and not settled, by id, in order: waiting, under way, or overdue.
        self.unsettled: dict[str, StoredEvent] = {}
        self._delivery: Delivery | None = None
        self._given_up: BackendError | None = None
        self._task: asyncio.Task[None] | None = None  # cancelled by `cut`
        self.finishing = False  # nothing else is begun
        self.ended = False  # the disconnect event is settled
        self._settled_number = 0  # the highest number of a settled message

    def add(self, stored: StoredEvent) -> None:
        """Deliver an event after those before it."""
        self.unsettled[stored.event.id] = stored
        self._context.senders[stored.event.id] = self
        self._context.bytes += len(stored.event.body)
        self._queue.append(stored)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    @property
    def working(self) -> bool:
        """Whether an event is under way."""
        return self._task is not None

    def has_settled(self, stored: StoredEvent) -> bool:
        """Whether an event is a message that the backend has accepted already."""
        return (
            stored.name == "message" and 0 < stored.number <= self._settled_number
        )

    def cut(self) -> None:
        """Stop immediately; nothing of it is acknowledged any more."""
        self.finishing = True
        if self._task is not None:
            self._task.cancel()
        for stored in list(self.unsettled.values()):
            self._drop(stored)
        if self._delivery is not None:
            self._delivery.end()

    def _drop(self, stored: StoredEvent) -> None:
        context, event_id = self._context, stored.event.id
        del self.unsettled[event_id]
        if context.senders.get(event_id) is self:
            del context.senders[event_id]
        context.bytes -= len(stored.event.body)
        if context.readers:
            context.readers.call_all()

    def on_settled(self, event_id: str) -> None:
        """The backend has accepted or refused an event."""
        stored = self.unsettled.get(event_id)
        if stored is not None:
            self._drop(stored)
            self._settled_number = max(self._settled_number, stored.number)
            self.ended = self.ended or stored.name == "disconnect"
            self._outcomes.settle(stored)

    def on_failed(self, attempt: Attempt, now: float) -> None:
        """An attempt has failed."""
        stored = self.unsettled.get(attempt.event_id)
        if stored is None:
            return
        if attempt.outcome == "unreachable":
            stored.alone_since = float("inf")
        elif self._context.accepted_at > stored.failed_at:
            stored.alone_since = min(stored.alone_since, now)
        stored.failed = True
        stored.failed_at = min(stored.failed_at, now)

    # Called by `Delivery`, and by what carries out replies.

    def give_up(self, error: BackendError, messages: int = 1) -> None:
        """Messages were given up: the one that is under way, and those that failed."""
        self._given_up = error

    def has_room(self) -> None:
        """Redis takes the commands of all replies."""
        return None

    def drained(self) -> Awaitable[None]:
        return asyncio.sleep(0)

    def send(self, message: str | bytes) -> None:
        """Nobody sends through it: commands are for the executor."""
        raise NotImplementedError

    def close(self, code: int = 1000, reason: str = "", initiator: str = "") -> None:
        """Likewise."""
        raise NotImplementedError

    # Delivering.

    async def _run(self) -> None:
        try:
            while self._queue and not self.finishing:
                stored = self._queue.popleft()
                reply = stored.meta().get("reply")
                if isinstance(reply, str):
                    self._context.streams.keep(self.id, reply)
                await self._deliver(stored)
        except Exception:  # a bug; the events stay pending
            logger.exception("connection %s: bug in a worker", self.id)
        finally:
            self._task = None
            self._outcomes.on_rest(self)

    async def _deliver(self, stored: StoredEvent) -> None:
        """Deliver an event until the next one may follow."""
        match stored.name:
            case "message":
                await self._deliver_message(stored)
            case "disconnect" if self._context.disconnects.target is not None:
                await self._deliver_disconnect(stored)
            case "connect" if self._context.decisions.target is not None:
                await self._decide(stored)
            case "undelivered":
                logger.warning("connection %s: a command was not carried out: %s",
                               self.id, stored.event.id,
                               extra={"event": "undelivered", "connection_id": self.id})
                self.on_settled(stored.event.id)
            case _:
                if stored.name == "disconnect" and self._delivery is not None:
                    await self._delivery.settle()
                self.on_settled(stored.event.id)

    async def _deliver_message(self, stored: StoredEvent) -> None:
        deliveries = self._context.deliveries
        if self._delivery is None:
            self._delivery = deliveries.new(self)  # type: ignore[arg-type] # see above
        self._given_up = None
        self._delivery.number = stored.number
        self._delivery.post(stored.event)
        await self._delivery.quiet()
        error = self._why_given_up()
        if error is not None:
            await self._on_given_up(stored, error)

    def _why_given_up(self) -> BackendError | None:
        """Why the message that was posted last is given up, if it is."""
        return self._given_up

    async def _on_given_up(self, stored: StoredEvent, error: BackendError) -> None:
        """Send again what was given up; the first may be dead."""
        stored.failed = True
        now = self._context.deliveries.loop.time()
        stored.failed_at = min(stored.failed_at, now)
        waiting = set(self._queue)
        again = [
            each
            for each in self.unsettled.values()
            if each.failed and each.name == "message" and each not in waiting
        ]
        if self._is_dead(again[0], now):
            await self._bury(again.pop(0), error)
        for each in again:
            each.failed = False
        self._queue.extendleft(reversed(again))

    def _is_dead(self, stored: StoredEvent, now: float) -> bool:
        context = self._context
        return (
            now >= stored.alone_since + context.event_timeout
            or now >= stored.failed_at + context.delivery_timeout
        )

    async def _bury(self, stored: StoredEvent, error: BackendError) -> None:
        logger.error("connection %s: event %s is dead: %s", self.id, stored.event.id,
                     error, extra={"event": "dead", "connection_id": self.id})
        await self._outcomes.bury(stored, error)
        if stored.name == "message":  # of others this is reported already
            self._context.deliveries.observer.ended("message", self.id, "failed")
        self.on_settled(stored.event.id)

    async def _deliver_disconnect(self, stored: StoredEvent) -> None:
        delivery = self._delivery
        ended = Ended(self.id, NOWHERE)
        notification = DisconnectNotification(StoredEnd(stored.event), ended, delivery)
        while stored.event.id in self.unsettled:
            try:
                await self._context.disconnects.deliver(notification)
            except BackendError as error:
                if stored.event.id not in self.unsettled:
                    break  # refused
                now = self._context.deliveries.loop.time()
                stored.failed_at = min(stored.failed_at, now)
                if self._is_dead(stored, now):
                    await self._bury(stored, error)
        if delivery is not None:
            delivery.on_disconnect_answered()
            await delivery.until_failure(delivery.failures)
            delivery.end()
            self._delivery = None

    async def _decide(self, stored: StoredEvent) -> None:
        """Ask for a decision; a refusal closes the connection."""
        offered = stored.meta().get("subprotocols") or ()
        attempts = 0
        while True:
            try:
                await self._context.decisions.ask(self.id, stored.event, offered)
            except ConnectionRefused as refused:
                close = Close(POLICY_VIOLATION, f"refused with {refused.status}")
                self._context.executor.carry_out(
                    [Command(close, (self.id,))], "response", (self.id,)
                )
            except BackendError as error:
                now = self._context.deliveries.loop.time()
                stored.failed_at = min(stored.failed_at, now)
                attempts += 1
                if self._is_dead(stored, now):
                    await self._bury(stored, error)
                    return
                await asyncio.sleep(backoff(attempts))
                continue
            self.on_settled(stored.event.id)
            return
