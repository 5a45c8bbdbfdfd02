"""Writes events into their streams: what has gathered in one turn goes in one write.

`partition` keeps the order. After a failure all that was not added is sent again, in
order: at once after a reconnect, else after a while. Redis that is away, and a stream
that is full, are one outage to the rest of the relay.
"""

import asyncio
import logging
from functools import partial
from typing import Any

from backends import BackendAway, BackendError, Hold
from backends.deadlines import STALL, after_reading
from backends.events import Event
from backends.redis.entry import Entry, NotAdded, Owner
from backends.redis.keys import Keys, count_in, partition_of
from backends.redis.partition import Partition
from backends.redis_client import RedisAway, RedisClient

logger = logging.getLogger(__name__)

# Of one write, whose reply must come in time; a single event is always sent.
MAX_BYTES = 4 * 1024 * 1024
RETRY = 0.5  # seconds between attempts while a stream takes nothing
MAX_SHOWN = 40  # characters of a value that should be a number


class StreamWriter:
    """Writes events into the streams of `count` partitions."""

    def __init__(
        self,
        client: RedisClient,
        keys: Keys,
        count: int,
        backlog: int,
        shortest_timeout: float,
        hold: Hold | None = None,
    ) -> None:
        """`shortest_timeout` is that of all events that are retried, in seconds."""
        self._hold = hold
        if hold is not None:
            # Without Redis no event leaves, and with it, the streams may be reached
            # before the lease.
            hold.persist()
        self.loop = asyncio.get_running_loop()
        self._keys = keys
        self._address = client.address
        self._partitions = [
            Partition(keys.events(number), backlog, shortest_timeout)
            for number in range(count)
        ]
        self._pipeline = client.pipeline(self._on_connected, self._on_lost)
        # They have something to send; the first ones have waited longest.
        self._due: dict[Partition, None] = {}
        self._under_way = 0  # batches
        self._is_scheduled = False  # whether the loop will call `_send`
        self._timer: asyncio.TimerHandle | None = None
        # Whether Redis has our number of partitions; only then anything is sent.
        self._usable = False
        self._began = False  # it has been usable
        self._lost_since: float | None = self.loop.time()  # on the loop's clock
        self.why = "not connected yet"  # the latest failure
        self._reported = False  # the outage is in the log
        self.wrong_count: str | None = None  # what Redis has instead
        # Done when it is usable, or when the first attempt to connect has failed.
        self.tried: asyncio.Future[None] = self.loop.create_future()
        self._emptied: asyncio.Future[None] | None = None
        self._closed = False

    def begin(self) -> None:
        """Connect."""
        self._pipeline.connect()

    def add(self, owner: Owner, event: Event) -> Entry:
        """Send an event behind those of its partition."""
        number = partition_of(owner.connection_id, len(self._partitions))
        partition = self._partitions[number]
        entry = Entry(owner, event)
        partition.add(entry)
        if self._lost_since is not None or partition.failing_since is not None:
            entry.since = self.loop.time()
            self._fail(partition)
        else:
            self._due[partition] = None
            if not (self._is_scheduled or self._under_way):
                self._is_scheduled = True
                self.loop.call_soon(self._send)
        return entry

    # Its state.

    def away_for(self) -> float | None:
        """Seconds for which an outage has lasted; None: there is none."""
        since = min(self._failures(), default=None)
        return None if since is None else self.loop.time() - since

    @property
    def connected(self) -> bool:
        """Whether it has a connection."""
        return self._pipeline.connected

    @property
    def longest(self) -> int:
        """Entries of the longest stream, when they were last asked."""
        return max(partition.length for partition in self._partitions)

    @property
    def waiting(self) -> int:
        """Number of events that are not added."""
        return sum(map(len, self._partitions))

    def probe(self) -> None:
        """Find out whether the connection works: another one to Redis does not."""
        if self._pipeline.connected and not self._under_way:
            self._pipeline.execute("PING").add_done_callback(_take)

    async def emptied(self) -> None:
        """Wait until no event waits."""
        while self.waiting:
            self._emptied = self.loop.create_future()
            await self._emptied

    async def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._pipeline.close()

    # Sending.

    def _send(self) -> None:
        """Send the next batch of each partition that has one, all in one write."""
        self._is_scheduled = False
        if self._closed or self._under_way or not self._usable:
            return
        if self._hold is not None and self._hold.active:
            self._hold.wait(self._send)
            return
        now, size = self.loop.time(), 0
        while self._due and size < MAX_BYTES:
            partition = next(iter(self._due))
            del self._due[partition]
            reply = self._pipeline.execute(*partition.next_command(now))
            reply.add_done_callback(partial(self._on_reply, partition))
            self._under_way += 1
            size += partition.batch_size

    def _on_reply(self, partition: Partition, reply: "asyncio.Future[Any]") -> None:
        self._under_way -= 1
        error = reply.exception()
        if self._closed:
            return
        if error is not None:
            kind = BackendAway if isinstance(error, RedisAway) else BackendError
            self._on_failed(partition, kind(f"{self._address}: {error}"))
        else:
            self._on_answered(partition, reply.result())
        if self._under_way:
            return
        self._judge_outage()
        if self._due:
            self._send()
        if self._emptied is not None and not self.waiting:
            emptied, self._emptied = self._emptied, None
            if not emptied.done():  # the stop may have ended the wait for it
                emptied.set_result(None)

    def _on_answered(self, partition: Partition, reply: list[Any]) -> None:
        partition.length = int(reply[0])
        if len(reply) == 1:
            self._on_failed(
                partition,
                NotAdded(
                    f"{partition.stream} has {partition.length} entries, more than"
                    " --redis_backlog"
                ),
            )
            return
        partition.on_added(reply[1].decode(), self.loop.time())
        if partition:
            self._due[partition] = None

    # Failures.

    def _failures(self) -> list[float]:
        """Return when each failure began that has not ended, on the loop's clock."""
        return [
            since
            for since in (
                self._lost_since,
                *(partition.failing_since for partition in self._partitions),
            )
            if since is not None
        ]

    def _on_failed(self, partition: Partition, error: BackendError) -> None:
        self.why = str(error)
        self._fail(partition)
        partition.on_failed(error, self.loop.time())

    def _fail(self, partition: Partition) -> None:
        """Retry the events of a partition later, or give them up in time."""
        now = self.loop.time()
        if partition.failing_since is None:
            partition.failing_since = now
        due = now + RETRY
        if not self._under_way:
            due = min(due, partition.next_deadline())
        if self._timer is None or self._timer.when() > due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(due, self._on_time, due)

    def _on_time(self, due: float) -> None:
        self._timer = None
        now = self.loop.time()
        if now > due + STALL:
            # The process was stopped: restart the time in which events may fail.
            for partition in self._partitions:
                if partition.failing_since is not None:
                    partition.failing_since = now
        after_reading(self.loop, self._judge)

    def _judge(self) -> None:
        """Give up what has waited too long, and try the rest again."""
        if self._closed:
            return
        now, error = self.loop.time(), BackendError(self.why)
        for partition in self._partitions:
            if partition.failing_since is None:
                continue
            if not self._under_way:
                partition.give_up_overdue(now, error)
            self._due[partition] = None
            self._fail(partition)
        self._send()

    def _judge_outage(self) -> None:
        """Log the beginning and the end of an outage."""
        away = bool(self._failures())
        if away and not self._reported:
            logger.error("backend unavailable: %s", self.why,
                         extra={"event": "backend_unavailable"})
        elif self._reported and not away:
            logger.warning("backend available again",
                           extra={"event": "backend_available"})
        self._reported = away

    # The connection.

    def _on_connected(self) -> None:
        """Write the number of partitions where there is none, and compare it."""
        key, count = self._keys.partitions, len(self._partitions)
        self._pipeline.execute("SET", key, count, "NX").add_done_callback(_take)
        self._pipeline.execute("GET", key).add_done_callback(self._on_count)

    def _on_count(self, reply: "asyncio.Future[Any]") -> None:
        error = reply.exception()
        if self._closed or isinstance(error, RedisAway):
            return  # it connects again
        if error is not None:  # such as a missing permission
            self._postpone(f"{self._address}: {error}")
            return
        text = (reply.result() or b"nothing").decode(errors="replace")[:MAX_SHOWN]
        stored, count = count_in(text), len(self._partitions)
        # The number may grow while relays run that do not use all of them yet.
        if stored != count and not (self._began and stored > count):
            self.wrong_count = text
            if not self.tried.done():  # the start ends with this
                self.tried.set_result(None)
                return
            self._postpone(
                f"{self._keys.partitions} is {text}, and --redis_partitions {count}"
            )
            return
        self._usable = self._began = True
        self._lost_since = None
        self._end_try()
        for partition in self._partitions:
            if partition or partition.failing_since is not None:
                self._due[partition] = None
        self._send()

    def _postpone(self, why: str) -> None:
        """Ask for the number of partitions again later."""
        self.why = why
        self.loop.call_later(RETRY, self._ask_again)
        self._end_try()

    def _ask_again(self) -> None:
        if self._pipeline.connected and not self._closed:
            self._on_connected()

    def _on_lost(self, error: RedisAway) -> None:
        self._usable = False
        self.why = str(error)
        if self._lost_since is None:
            self._lost_since = self.loop.time()
        for partition in self._partitions:
            if partition:
                self._fail(partition)
                partition.refuse(BackendAway(self.why))
        self._end_try()

    def _end_try(self) -> None:
        self._judge_outage()
        if not self.tried.done():
            self.tried.set_result(None)


def _take(reply: "asyncio.Future[Any]") -> None:
    """Take note of an error: what it means shows in the next reply."""
    reply.exception()
