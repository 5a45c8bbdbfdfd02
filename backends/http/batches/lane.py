"""One lane: events gather, and leave together when the batch before was answered.

There is no timer: an event that finds its lane free leaves in this turn of the loop.
A batch that fails as a whole is sent again, or is split so that one event cannot stop
the others.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from backends import (
    Attempt,
    AttemptOutcome,
    BackendAway,
    BackendError,
    BatchEnd,
    Observer,
)
from backends.breaker import Breaker
from backends.client import Client, Exchange, NoConnection, Response
from backends.deadlines import STALL, after_reading
from backends.events import Event, traceparent
from backends.http.batches.entry import Entry
from backends.http.replies import BatchReply, Replies, Unusable, is_large
from backends.http.request import RequestWriter
from backends.http.retries import (
    attempt_outcome,
    backoff,
    hint,
    is_retryable,
    retry_after,
    unreachable_cause,
)
from backends.target import Target

logger = logging.getLogger(__name__)

# The batch is split at once: one of its events is bad.
BAD_REQUESTS = frozenset({400, 413, 422})
# The batch is sent again as it is: the backend is not available now.
UNAVAILABLE = frozenset({408, 425, 429, 502, 503, 504})
# Bytes of a body without events, and of what it adds to each (`batch_body`): the first
# one has no comma before it.
EMPTY = len('{"events":[]}') - len(",")
ADDED = len(',"event":"","id":"","traceparent":"",')
# Seconds for the answer to a batch, unless --backend_timeout is set.
BATCH_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Most events and bytes of a batch, and the times that apply to it, in seconds.

    The bytes are those of its body.
    """

    max_events: int = 256
    max_bytes: int = 1024 * 1024
    timeout: float = BATCH_TIMEOUT
    delivery_timeout: float = 60.0


@dataclass(slots=True)
class LaneContext:
    """What all lanes share; `boot_id` begins the id of each batch."""

    client: Client
    requests: RequestWriter
    breaker: Breaker
    target: Target
    replies: Replies
    observer: Observer
    limits: BatchLimits
    boot_id: str
    sample: Callable[[str], bool] | None = None  # see `Relay.sample`
    closing: bool = False  # the relay stops: nothing is retried


@dataclass(slots=True)
class Batch:
    """Events that are sent together, the same on each attempt.

    `suspect`: one of its events may be the reason why it, or a larger batch with it,
    has failed.
    """

    entries: list[Entry]
    event: Event
    suspect: bool = False
    attempts: int = 0  # failed ones
    # On the loop's clock; `began_at` is that of the latest attempt.
    formed_at: float = 0.0
    began_at: float = 0.0
    # Of the latest attempt.
    outcome: AttemptOutcome = "unreachable"
    status: int | None = None


class Lane:
    """Sends the events of its connections, one batch at a time."""

    def __init__(self, number: int, context: LaneContext) -> None:
        self._number = number
        self._context = context
        self._loop = context.client.loop
        self._sent = 0  # batches with different contents, for their ids
        self._queue: deque[Entry] = deque()
        # Of a split batch, the next one last; each with `Batch.suspect`.
        self._parts: list[tuple[list[Entry], bool]] = []
        # An event has failed alone, and the backend has taken none since.
        self._failed_alone = False
        self._batch: Batch | None = None  # under way, or waiting for its next attempt
        self._exchange: Exchange | None = None
        self._reading: asyncio.Task[None] | None = None  # of the latest large response
        self._timer: asyncio.TimerHandle | None = None
        self._in_line = False  # whether the wait is for the breaker
        self._is_due = False  # whether the loop will call `_go_on`

    def add(self, entry: Entry) -> None:
        """Send an event, as soon as it is its turn."""
        self._queue.append(entry)
        if self._batch is None:
            self._go_on_soon()

    def add_again(self, entries: Sequence[Entry]) -> None:
        """Send events next that have been in the lane before: they are the oldest."""
        self._queue.extendleft(reversed(entries))
        if self._batch is None:
            self._go_on_soon()

    def close(self) -> None:
        """Abandon what is under way."""
        self._stop_waiting()
        if self._exchange is not None:
            self._exchange.abandon()
            self._exchange = None
        if self._reading is not None:
            self._reading.cancel()

    # Forming batches.

    def _go_on_soon(self) -> None:
        """Send the next batch when this turn of the loop has gathered events."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._is_due = False
        if self._batch is None and not self._context.closing:
            entries, suspect = self._next_entries()
            if entries:
                self._batch = self._form(entries, suspect)
                self._try()

    def _next_entries(self) -> tuple[list[Entry], bool]:
        while self._parts:
            part, suspect = self._parts.pop()
            entries = still_here(part)
            if entries:
                return entries, suspect
        limits = self._context.limits
        entries, size = [], EMPTY
        while self._queue and len(entries) < limits.max_events:
            entry = self._queue[0]
            if entry.owner is not None:
                event = entry.event
                size += len(event.body) + len(event.id) + len(event.traceparent)
                size += len(entry.name) + ADDED
                if entries and size > limits.max_bytes:
                    break
                entries.append(entry)
            self._queue.popleft()
        return entries, False

    def _form(self, entries: list[Entry], suspect: bool) -> Batch:
        for entry in entries:
            entry.sending = True
        self._sent += 1
        batch_id = f"{self._context.boot_id}-{self._number}-{self._sent}"
        span = traceparent(None, self._context.sample)
        event = Event(batch_id, batch_body(entries), span, None)
        return Batch(entries, event, suspect, formed_at=self._loop.time())

    def _end_batch(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        is_recorded = batch.event.traceparent.endswith("-01")
        self._context.observer.batch_ended(
            BatchEnd(
                batch.event.id,
                batch.event.traceparent,
                [entry.event.traceparent for entry in batch.entries]
                if is_recorded
                else [],
                batch.outcome,
                batch.status,
                self._loop.time() - batch.formed_at,
                self._context.target.url,
            )
        )
        if self._queue or self._parts:
            self._go_on_soon()

    # Attempts.

    def _try(self) -> None:
        """Send the batch if the breaker permits it, or wait for that."""
        context, now = self._context, self._loop.time()
        assert self._batch is not None
        self._stop_waiting()
        batch = self._leave_out_ended(self._batch)
        if batch is None:
            return
        if not context.breaker.take():
            for entry in batch.entries:  # an open breaker counts as a failed attempt
                entry.failed_at = min(entry.failed_at, now)
            self._in_line = True
            self._wait(min(entry.deadline for entry in batch.entries))
            context.breaker.wait(self._try)
            return
        batch.began_at = now
        self._exchange = context.client.post(
            context.target,
            partial(context.requests.write, context.target, batch.event),
            on_done=self._on_done,
            timeout=context.limits.timeout,
            queue_timeout=context.limits.delivery_timeout,
            keep=context.replies.of_batch,
        )

    def _on_done(self, outcome: Response | BackendError) -> None:
        """There is a response to the batch, or there will be none."""
        self._exchange = None
        batch = self._batch
        assert batch is not None
        if isinstance(outcome, NoConnection):
            self._context.breaker.record_nothing()
            self._repeat(batch, outcome, 0.0)
            return
        became = attempt_outcome(outcome)
        batch.outcome = became
        batch.status = outcome.status if isinstance(outcome, Response) else None
        if isinstance(outcome, Response) and became == "delivered":
            if self._context.replies.is_cut(outcome):
                self._report(batch, batch.entries, "error", outcome.status)
                error = self._error("the response with failed events was cut off")
                self._repeat(batch, error, 0.0)
            else:
                self._on_accepted(batch, outcome)
        elif isinstance(outcome, BackendError):
            self._report(batch, batch.entries, became, None)
            self._on_failed(batch, outcome, None, 0.0)
        else:
            self._report(batch, batch.entries, became, outcome.status)
            error = self._error(f"answered {outcome.status}{hint(outcome.status)}")
            wait = retry_after(outcome) or 0.0
            self._on_failed(batch, error, outcome.status, wait)
        url = self._context.target.url
        self._record(batch, unreachable_cause(became, url, outcome))

    def _record(self, batch: Batch, cause: str | None) -> None:
        """Report the attempt to the breaker, for as many connections as open it."""
        breaker = self._context.breaker
        connections = {entry.connection_id for entry in batch.entries}
        for connection_id in islice(connections, breaker.connections if cause else 1):
            breaker.record(connection_id, cause)

    def _report(
        self,
        batch: Batch,
        entries: Sequence[Entry],
        outcome: AttemptOutcome,
        status: int | None,
    ) -> None:
        seconds = self._loop.time() - batch.began_at
        attempted, url = self._context.observer.attempted, self._context.target.url
        for entry in entries:
            event = entry.event
            attempted(
                Attempt(
                    entry.name,
                    entry.connection_id,
                    event.id,
                    event.traceparent,
                    outcome,
                    status,
                    seconds,
                    url,
                    event.trace,
                    entry.attempts + 1,
                )
            )

    # The batch as a whole is accepted.

    def _on_accepted(self, batch: Batch, response: Response) -> None:
        """Accept all events but those that the response names as failed."""
        self._acquit_parts()
        if response.body is None:
            self._settle(*self._judged(batch, frozenset()))
            self._end_batch()
        elif is_large(response):
            self._reading = self._loop.create_task(self._read(batch, response))
        else:
            try:
                reply = self._context.replies.read_batch(response)
            except Unusable as error:
                self._on_unusable(batch, error)
            else:
                self._on_reply(batch, reply)

    async def _read(self, batch: Batch, response: Response) -> None:
        """Read a large response in turns."""
        try:
            reply = await self._context.replies.read_large_batch(response)
        except Unusable as error:
            self._on_unusable(batch, error)
        else:
            self._on_reply(batch, reply)

    def _on_unusable(self, batch: Batch, error: Unusable) -> None:
        """Accept all events, though the response cannot be used."""
        self._settle(*self._judged(batch, frozenset()))
        self._context.replies.report("", batch.event.id, error, "batch")
        self._end_batch()

    def _on_reply(self, batch: Batch, reply: BatchReply) -> None:
        """Carry out the commands, and settle the events; then comes the next batch."""
        replies = self._context.replies
        accepted, rejected = self._judged(batch, reply.failed)
        owners = list(dict.fromkeys(entry.owner for entry in batch.entries))
        carried_out = replies.carry_out_batch(
            reply.commands, {entry.connection_id for entry in batch.entries}
        )
        self._settle(accepted, rejected)

        def end(_: object = None) -> None:
            for owner in owners:
                if owner is not None:
                    owner.on_replied()
            self._end_batch()

        if carried_out is None:
            end()
        else:
            carried_out.add_done_callback(end)

    def _judged(
        self, batch: Batch, failed: frozenset[str]
    ) -> tuple[list[Entry], list[Entry]]:
        """Report, and return, the events that are accepted, and those that failed.

        Behind a failed event, all of its connection failed.
        """
        accepted: list[Entry] = batch.entries
        rejected: list[Entry] = []
        if failed:
            accepted, owners = [], set()
            for entry in batch.entries:
                if entry.event.id in failed or entry.owner in owners:
                    owners.add(entry.owner)
                    rejected.append(entry)
                else:
                    accepted.append(entry)
            self._report(batch, rejected, "error", batch.status)
        self._report(batch, accepted, "delivered", batch.status)
        return accepted, rejected

    def _settle(self, accepted: Sequence[Entry], rejected: Sequence[Entry]) -> None:
        """Tell each owner."""
        for entry in accepted:
            if entry.owner is not None:
                entry.owner.on_accepted(entry)
        for entry in rejected:
            if entry.owner is not None:  # it leaves with the first one of its owner
                error = self._error("the response names it as failed")
                entry.owner.on_failed(entry, error, 0.0)

    # The batch as a whole has failed.

    def _on_failed(
        self, batch: Batch, error: BackendError, status: int | None, wait: float
    ) -> None:
        """Send it again, split it, or let its events be refused."""
        if self._context.closing:
            return
        if status is not None and not (status in BAD_REQUESTS or is_retryable(status)):
            self._refuse(batch, status)
        elif status in BAD_REQUESTS:
            if len(batch.entries) == 1:
                self._refuse(batch, status)
            else:
                self._split(batch)
        elif status in UNAVAILABLE or isinstance(error, BackendAway):
            self._repeat(batch, error, wait)
        elif len(batch.entries) == 1:
            self._fail_alone(batch, error, wait)
        elif batch.suspect:
            self._split(batch)
            self._judge_parts(error)
        else:
            batch.suspect = True
            self._repeat(batch, error, wait)

    def _fail_alone(self, batch: Batch, error: BackendError, wait: float) -> None:
        (entry,) = batch.entries
        if entry.owner is not None:
            entry.owner.on_failed(entry, error, wait)
        self._judge_parts(error)
        self._failed_alone = True
        self._end_batch()

    def _judge_parts(self, error: BackendError) -> None:
        """Give up what is overdue of a split batch if no event of it is to blame.

        The backend fails with one event after the other, and takes none.
        """
        if self._failed_alone:
            for entries, _ in self._parts:
                self._give_up(entries, error)

    def _acquit_parts(self) -> None:
        """The backend takes events: those that are left have not failed yet."""
        self._failed_alone = False
        for entries, _ in self._parts:
            for entry in entries:
                entry.acquit()

    def _refuse(self, batch: Batch, status: int) -> None:
        self._acquit_parts()
        for entry in batch.entries:
            if entry.owner is not None:
                entry.owner.on_refused(entry, status)
        self._end_batch()

    def _split(self, batch: Batch) -> None:
        """Send both halves, one after the other: most events are not to blame."""
        entries = still_here(batch.entries)
        half = (len(entries) + 1) // 2
        self._parts.append((entries[half:], batch.suspect))
        self._parts.append((entries[:half], batch.suspect))
        self._end_batch()

    def _repeat(self, batch: Batch, error: BackendError, wait: float) -> None:
        """Send the same batch again later, without events that are too late."""
        now = self._loop.time()
        batch.attempts += 1
        if batch.attempts == 1:
            logger.warning(
                "a batch of %d events is retried: %s", len(batch.entries), error
            )
        for entry in batch.entries:
            entry.attempts += 1
            entry.failed_at = min(entry.failed_at, now)
        rest = self._give_up_overdue(batch, error)
        if rest is not None:
            deadline = min(entry.deadline for entry in rest.entries)
            self._wait(min(deadline, now + max(backoff(batch.attempts), wait)))

    def _give_up_overdue(self, batch: Batch, error: BackendError) -> Batch | None:
        """Give up events whose time is over; return a batch of the others, if any."""
        self._give_up(batch.entries, error)
        return self._leave_out_ended(batch)

    def _give_up(self, entries: Sequence[Entry], error: BackendError) -> None:
        """Give up those whose time is over."""
        now = self._loop.time()
        for entry in entries:
            if entry.owner is not None and now >= entry.deadline:
                entry.owner.give_up(error)

    def _leave_out_ended(self, batch: Batch) -> Batch | None:
        """Return the batch without events that have left it; None: it has ended."""
        entries = still_here(batch.entries)
        if not entries:
            self._end_batch()
        elif len(entries) < len(batch.entries):
            self._batch = self._form(entries, batch.suspect)
            self._batch.attempts = batch.attempts
        return self._batch

    def _error(self, why: str) -> BackendError:
        return BackendError(f"POST {self._context.target}: {why}")

    # Waits for the next attempt.

    def _wait(self, deadline: float) -> None:
        self._timer = self._loop.call_at(deadline, self._on_time, deadline)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._in_line:
            self._in_line = False
            self._context.breaker.leave(self._try)

    def _on_time(self, due: float) -> None:
        now = self._loop.time()
        if now > due + STALL and self._batch is not None:
            # The process was stopped: restart the time in which events may fail.
            for entry in self._batch.entries:
                entry.restart(now)
        after_reading(self._loop, self._judge)

    def _judge(self) -> None:
        """Go on after a wait; called after reading what has arrived."""
        batch = self._batch
        if self._timer is None or batch is None:
            return  # the wait has ended meanwhile
        if self._in_line:
            batch = self._give_up_overdue(batch, self._error("the backend is away"))
        if batch is not None:
            self._try()
        else:
            self._stop_waiting()


def still_here(entries: Sequence[Entry]) -> list[Entry]:
    """Return those that have not left the lane."""
    return [entry for entry in entries if entry.owner is not None]


def batch_body(entries: Sequence[Entry]) -> bytes:
    """Return `{"events": [...]}`; each element is the single event's body, and more.

    These bytes take no more memory than their length.
    """
    parts: list[bytes | memoryview] = []
    start = '{"events":[{'
    for entry in entries:
        event = entry.event
        head = (
            f'{start}"event":"{entry.name}","id":"{event.id}",'
            f'"traceparent":"{event.traceparent}",'
        )
        start = ",{"
        parts += (head.encode(), memoryview(event.body)[1:])
    return b"".join((*parts, b"]}"))
