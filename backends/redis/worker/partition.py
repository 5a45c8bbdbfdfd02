"""Reads one partition in the group of the workers, and acknowledges its events."""

import asyncio
import logging

from backends import BackendError
from backends.redis.keys import Keys
from backends.redis.worker.conversation import BackendContext, Conversation
from backends.redis.worker.entry import StoredEvent
from backends.redis.worker.failures import FailureLog
from backends.redis_client import RedisAway, RedisClient, RedisError, TurnPipeline

logger = logging.getLogger(__name__)

# All workers use one name: a partition has one reader at a time, which continues with
# what the one before has not acknowledged.
CONSUMER = "worker"
AHEAD = 1000  # entries that are read and not acknowledged
COUNT = 100  # entries that are read at once; fewer if they are large
READ_BYTES = 4 * 1024 * 1024  # of these entries
BLOCK = 1.0  # seconds; a read waits that long for an entry
REPLY = 5.0  # seconds for a reply, beyond the time that a read may wait
RETRY = 0.5  # seconds after a failure
NEW = ">"
# Of connections that have sent something, and have not ended; only their numbers of
# messages are forgotten if there are more.
MAX_CONVERSATIONS = 10_000


class PartitionReader:
    """Delivers the events of one partition, until it is finished or cut."""

    def __init__(
        self,
        client: RedisClient,
        pipeline: TurnPipeline,
        keys: Keys,
        group: str,
        number: int,
        context: BackendContext,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._pipeline = pipeline
        self._keys = keys
        self._stream = keys.events(number)
        self._group = group
        self._context = context
        self._failures = FailureLog(f"reading {self._stream}")
        self.conversations: dict[str, Conversation] = {}
        self._unsettled = 0  # events
        self._acks: list[str] = []
        self._room: asyncio.Future[None] | None = None
        self._count = COUNT  # entries of the next read
        self._is_cut = False
        self._finishing = False
        self._quiet: asyncio.Future[None] | None = None
        self._reading = asyncio.create_task(self._read())  # cancelled by `cut`

    async def finish(self) -> None:
        """Begin nothing else, and wait for what is under way."""
        self._finishing = True
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        for conversation in list(self.conversations.values()):
            conversation.finishing = True
        while any(each.working for each in self.conversations.values()):
            self._quiet = self._loop.create_future()
            await self._quiet
        await self._flush_acks()
        self.cut()

    def cut(self) -> None:
        """Stop immediately: another worker may read this partition."""
        self._is_cut = True
        self._reading.cancel()
        for conversation in list(self.conversations.values()):
            conversation.cut()
            self._forget(conversation)

    # Reading.

    async def _read(self) -> None:
        position = ""
        while True:
            try:
                if not position:
                    await self._make_group()
                    position = "0"
                await self._until_room()
                entries = await self._next(position)
                if position != NEW:
                    position = entries[-1][0] if entries else NEW
                for entry_id, fields in entries:
                    self._take(entry_id, fields)
                self._failures.succeeded()
            except RedisError as error:
                self._failures.failed(error)
                position = ""  # what was read, and not received here, is pending
                await asyncio.sleep(RETRY)
            except Exception:
                logger.exception("bug while reading %s", self._stream)
                position = ""
                await asyncio.sleep(RETRY)

    async def _make_group(self) -> None:
        try:
            await self._client.execute(
                *("XGROUP", "CREATE", self._stream, self._group, "0", "MKSTREAM"),
                timeout=REPLY,
            )
        except RedisError as error:
            if error.code != "BUSYGROUP" and "BUSYGROUP" not in str(error):
                raise

    async def _next(self, position: str) -> list[tuple[str, list[bytes]]]:
        block = ("BLOCK", int(BLOCK * 1000)) if position == NEW else ()
        reply = await self._client.execute(
            *("XREADGROUP", "GROUP", self._group, CONSUMER, "COUNT", self._count),
            *(*block, "STREAMS", self._stream, position),
            timeout=BLOCK + REPLY,
        )
        if not reply:
            return []
        (entries,) = reply.values()
        size = sum(len(value) for _, fields in entries for value in fields or ())
        self._count = max(1, min(COUNT, READ_BYTES * len(entries) // (size or 1)))
        return [(entry_id.decode(), fields) for entry_id, fields in entries]

    async def _until_room(self) -> None:
        context = self._context
        while self._unsettled >= AHEAD or context.bytes >= context.max_bytes:
            self._room = self._loop.create_future()
            context.readers.wait(self._on_room)
            await self._room

    def _on_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _take(self, entry_id: str, fields: list[bytes] | None) -> None:
        if not fields:  # it was removed from the stream
            self._acknowledge([entry_id])
            return
        stored = StoredEvent(entry_id, fields)
        conversation = self._conversation(stored.connection_id)
        same = conversation.unsettled.get(stored.event.id)
        if same is not None:  # the relay has added it again, or it is read again
            if entry_id not in same.ids:
                same.ids.append(entry_id)
        elif not stored.replayed and conversation.has_settled(stored):
            self._acknowledge([entry_id])
        else:
            self._unsettled += 1
            conversation.add(stored)

    # Called by conversations.

    def settle(self, stored: StoredEvent) -> None:
        """Acknowledge an event."""
        self._unsettled -= 1
        if not self._is_cut:
            self._acknowledge(stored.ids)

    async def bury(self, stored: StoredEvent, error: BackendError) -> None:
        """Put an event among the dead."""
        event, latest = stored.event, ""
        while not self._is_cut:
            try:
                await self._pipeline.execute(
                    "XADD", f"{self._keys.prefix}:dead", "*",
                    "event", stored.name, "id", event.id,
                    "connection_id", stored.connection_id, "payload", bytes(event.body),
                    "traceparent", event.traceparent, "error", str(error),
                )  # fmt: skip
                return
            except RedisError as failure:  # such as a full memory
                if not isinstance(failure, RedisAway) and failure.code != latest:
                    latest = failure.code
                    logger.error("event %s waits to be put among the dead: %s",
                                 event.id, failure)
                await asyncio.sleep(RETRY)

    def on_rest(self, conversation: Conversation) -> None:
        if self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)
        if conversation.ended:
            self._forget(conversation)

    def _forget(self, conversation: Conversation) -> None:
        if self.conversations.get(conversation.id) is conversation:
            del self.conversations[conversation.id]
            self._context.streams.forget(conversation.id)

    def _conversation(self, connection_id: str) -> Conversation:
        conversation = self.conversations.get(connection_id)
        if conversation is None:
            conversation = Conversation(connection_id, self._context, self)
            self.conversations[connection_id] = conversation
            if len(self.conversations) > MAX_CONVERSATIONS:
                # The oldest one that is idle may be of an instance that has crashed.
                oldest = next(iter(self.conversations.values()))
                del self.conversations[oldest.id]
                if oldest.unsettled:
                    self.conversations[oldest.id] = oldest
                else:
                    self._context.streams.forget(oldest.id)
        return conversation

    # Acknowledging: what gathers in one turn goes together, after the commands of
    # replies that were sent before.

    def _acknowledge(self, ids: list[str]) -> None:
        if not self._acks:
            self._loop.call_soon(self._send_acks)
        self._acks += ids

    def _send_acks(self) -> None:
        if not self._acks:
            return
        ids, self._acks = self._acks, []
        reply = self._pipeline.execute("XACK", self._stream, self._group, *ids)

        def on_reply(reply: "asyncio.Future[object]") -> None:
            if isinstance(reply.exception(), RedisAway) and not self._is_cut:
                self._loop.call_later(RETRY, self._acknowledge, ids)

        reply.add_done_callback(on_reply)

    async def _flush_acks(self) -> None:
        self._send_acks()
        try:
            await self._pipeline.execute("PING")
        except RedisError as error:
            logger.debug("%s: %s", self._stream, error)
