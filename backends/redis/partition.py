"""One partition: a stream, and the events on their way into it, in order.

One batch at a time is under way. A batch is added by one script, completely or up to
an error, so that no event can overtake one that has failed. A batch that fails is sent
again before anything new.
"""

from collections import deque
from collections.abc import Iterator

from backends import BackendError
from backends.redis.entry import Entry, NotAdded, Place
from backends.redis_client import Word

MAX_EVENTS = 512  # of a batch
MAX_BYTES = 1024 * 1024  # of the payloads of a batch; a single event is always sent

# KEYS: the stream. ARGV: most entries before it counts as full, then for each event
# the values of its fields. Returns the length of the stream and the new ids, or only
# the length if it is full. Without events it only tells whether it is full.
ADD = """\
local length = redis.call('XLEN', KEYS[1])
if length > tonumber(ARGV[1]) then return {length} end
local ids = {}
for i = 2, #ARGV, 5 do
  ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', 'event', ARGV[i],
    'id', ARGV[i + 1], 'connection_id', ARGV[i + 2], 'payload', ARGV[i + 3],
    'traceparent', ARGV[i + 4])
end
return {length + #ids, table.concat(ids, ' ')}
"""


class Partition:
    """The events of one partition that Redis has not added yet.

    `failing_since` is the time of the first failure after the last success, on the
    loop's clock; None: the last attempt succeeded.
    """

    def __init__(self, stream: str, backlog: int, shortest_timeout: float) -> None:
        self.stream = stream
        self._backlog = backlog
        self._shortest = shortest_timeout  # of messages and disconnect events
        self._queue: deque[Entry] = deque()
        # Under way, or to be sent again.
        self.batch: list[Entry] = []
        self.batch_size = 0  # bytes of its payloads
        self._sent_at = 0.0  # on the loop's clock
        self.failing_since: float | None = None
        self.length = 0  # of the stream, when it was last asked

    def __len__(self) -> int:
        """Number of events that are not added; some may have been withdrawn."""
        return len(self.batch) + len(self._queue)

    def add(self, entry: Entry) -> None:
        """Put an event behind all others."""
        self._queue.append(entry)

    def next_command(self, now: float) -> tuple[Word, ...]:
        """Return the command that adds a batch: what has failed, then new events.

        `now` is on the loop's clock.
        """
        self._sent_at = now
        size, batch = 0, []
        for entry in self.batch:
            if entry.owner is not None:
                size += len(entry.event.body)
                batch.append(entry)
        queue = self._queue
        while queue and len(batch) < MAX_EVENTS:
            entry = queue[0]
            if entry.owner is not None:
                length = len(entry.event.body)
                if batch and size + length > MAX_BYTES:
                    break
                size += length
                batch.append(entry)
            queue.popleft()
        self.batch, self.batch_size = batch, size
        words: list[Word] = ["EVAL", ADD, 1, self.stream, self._backlog]
        for entry in batch:
            owner, event = entry.owner, entry.event
            assert owner is not None
            entry.attempts += 1
            words += (
                owner.name,
                event.id,
                owner.connection_id,
                event.body,  # type: ignore[arg-type] # bytes, or memory like them
                event.traceparent,
            )
        return tuple(words)

    def on_added(self, ids: str, now: float) -> None:
        """Redis has added the batch; `ids` are those of its entries."""
        self.failing_since = None
        batch, self.batch = self.batch, []
        seconds = now - self._sent_at
        for entry, id_ in zip(batch, ids.split(), strict=True):
            owner = entry.owner
            if owner is not None:
                entry.owner = None
                owner.on_accepted(entry, Place(self.stream, id_), seconds)

    def on_failed(self, error: BackendError, now: float) -> None:
        """The batch was not added, or only a part of it."""
        for entry in self.batch:
            if entry.owner is not None:
                entry.owner.on_failed(entry, error, now - self._sent_at)

    def refuse(self, error: BackendError) -> None:
        """Give up events in the queue that are not retried; none was sent."""
        for entry in self._queue:
            if entry.owner is not None and not entry.owner.timeout:
                entry.owner.give_up(NotAdded(str(error)))

    # Deadlines, while it fails. Events wait in the order in which they came, so that
    # none behind one whose shortest timeout is not over can be overdue.

    def give_up_overdue(self, now: float, error: BackendError) -> None:
        """Give up the owners whose oldest event has waited too long."""
        overdue = []
        for entry in self._waiting():
            if self._began(entry) + self._shortest > now:
                break
            if entry.owner is not None and now >= self._deadline(entry):
                overdue.append(entry)
        for entry in overdue:
            if entry.owner is not None:
                entry.owner.give_up(error)

    def next_deadline(self) -> float:
        """Return when the next event is given up, on the loop's clock."""
        first = float("inf")
        for entry in self._waiting():
            if self._began(entry) + self._shortest >= first:
                break
            first = min(first, self._deadline(entry))
        return first

    def _began(self, entry: Entry) -> float:
        assert self.failing_since is not None
        return max(self.failing_since, entry.since)

    def _deadline(self, entry: Entry) -> float:
        if entry.owner is None:
            return float("inf")
        return self._began(entry) + entry.owner.timeout

    def _waiting(self) -> Iterator[Entry]:
        yield from self.batch
        yield from self._queue
