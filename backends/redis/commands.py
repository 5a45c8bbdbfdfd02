"""The stream of commands for this instance: reads it, and has them carried out.

The stream exists while its instance renews it, so that senders (`XADD ... NOMKSTREAM`)
learn that the instance is gone. A command that cannot be carried out comes back as an
event.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import orjson

from backends import Observer
from backends.commands import (
    Command,
    CommandError,
    CommandName,
    Executor,
    parse_commands,
)
from backends.redis_client import RedisClient, RedisError

logger = logging.getLogger(__name__)

EXPIRY = 30.0  # seconds after the last renewal
RENEWAL = 5.0  # seconds between renewals, at least
BLOCK = 5.0  # seconds; a read waits that long for a command
REPLY = 5.0  # seconds for a reply, beyond the time that a read may wait
COUNT = 256  # commands that are read at once
RETRY = 1.0  # seconds after a failure
BEGINNING = "0-0"  # the id before all ids

INVALID, TOO_LARGE, GONE = 400, 413, 410  # the statuses of callbacks

# KEYS: the stream. ARGV: milliseconds until it expires. Returns 1 if it was made.
RENEW = """\
local made = 0
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('XADD', KEYS[1], '*', 'payload', '')
  redis.call('XTRIM', KEYS[1], 'MAXLEN', 0)
  made = 1
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return made
"""

# KEYS: the stream. ARGV: where to begin, and most entries to return. Removes it.
END = """\
local left = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
redis.call('DEL', KEYS[1])
return left
"""


class Undelivered(NamedTuple):
    """A command that could not be carried out for one connection.

    `status` is that which a callback would have got; `command` is `none` if the
    command could not be read.
    """

    event_id: str
    connection_id: str
    command: CommandName | Literal["none"]
    status: int


class CommandStream:
    """Reads the commands in `stream` and has them carried out, one after the other."""

    def __init__(
        self,
        client: RedisClient,
        stream: str,
        executor: Executor,
        observer: Observer,
        on_undelivered: Callable[[Undelivered], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._stream = stream
        self._executor = executor
        self._observer = observer
        self._on_undelivered = on_undelivered
        self._last = self._trimmed = BEGINNING  # the latest command, and its removal
        self._renew_at = 0.0  # on the loop's clock
        self._carrying_out = self._ending = False
        self.on_failed: Callable[[], None] = lambda: None
        self._reading: asyncio.Task[None] | None = None  # cancelled by `end`

    async def begin(self) -> None:
        """Make the stream, if Redis can be reached, and read it."""
        with contextlib.suppress(RedisError):
            await self._renew()
        self._reading = asyncio.create_task(self._read())

    async def end(self, timeout: float) -> None:
        """Remove the stream; the commands in it come back.

        At most `timeout` seconds; then it expires.
        """
        if self._reading is None:
            return
        reading, self._reading = self._reading, None
        self._ending = True
        if self._carrying_out:  # what has begun must not come back
            await asyncio.wait({reading}, timeout=timeout)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        try:
            left = await self._client.execute(
                *("EVAL", END, 1, self._stream, f"({self._last}", COUNT),
                timeout=min(timeout, REPLY),
            )
        except RedisError as error:
            logger.warning("%s is not removed, and expires: %s", self._stream, error)
            return
        for entry_id, payload in payloads_of(left):
            self._return_all(entry_id, payload)

    # Reading.

    async def _read(self) -> None:
        while not self._ending:
            self._carrying_out = False
            try:
                await self._renew()
                entries = await self._next()
                self._carrying_out = True
                for entry_id, payload in entries:
                    await self._carry_out(entry_id, payload)
                    self._last = entry_id
                self._carrying_out = False
                await self._trim()
            except RedisError as error:
                # Once: the writer says when Redis is away, and when it is back.
                logger.debug("%s: %s", self._stream, error)
                self._renew_at = 0.0
                self.on_failed()
                await asyncio.sleep(RETRY)
            except Exception:  # a bug, which must not end the reading
                logger.exception("bug while reading %s", self._stream)
                await asyncio.sleep(RETRY)

    async def _renew(self) -> None:
        if self._loop.time() < self._renew_at:
            return
        made = await self._client.execute(
            "EVAL", RENEW, 1, self._stream, int(EXPIRY * 1000), timeout=REPLY
        )
        self._renew_at = self._loop.time() + RENEWAL
        if made:  # new, or again after it was lost: its ids may be any
            self._last = self._trimmed = BEGINNING

    async def _next(self) -> list[tuple[str, bytes]]:
        """Return commands, or none after `BLOCK` seconds."""
        reply = await self._client.execute(
            *("XREAD", "COUNT", COUNT, "BLOCK", int(BLOCK * 1000)),
            *("STREAMS", self._stream, self._last),
            timeout=BLOCK + REPLY,
        )
        if reply is None:
            return []
        (entries,) = reply.values()
        return list(payloads_of(entries))

    async def _trim(self) -> None:
        """Remove what was carried out."""
        if self._last != self._trimmed:
            await self._client.execute(
                "XTRIM", self._stream, "MINID", after(self._last), timeout=REPLY
            )
            self._trimmed = self._last

    # Carrying out.

    async def _carry_out(self, entry_id: str, payload: bytes) -> None:
        """Carry out one command for each of its connections."""
        try:
            command = read_command(payload)
        except CommandError as error:
            logger.warning("%s: command %s: %s", self._stream, entry_id, error)
            self._observer.commanded("broker", "none", "invalid", "")
            self._return(entry_id, (named_in(payload),), "none", INVALID)
            return
        ids, name = command.connection_ids or (), command.action.name
        try:
            self._executor.check([command])
        except CommandError as error:
            logger.warning("%s: command %s: %s", self._stream, entry_id, error)
            for connection_id in ids:
                self._observer.commanded("broker", name, "invalid", connection_id)
            self._return(entry_id, ids, name, TOO_LARGE)
            return

        def on_failed(connection_id: str, status: int) -> None:
            self._return(entry_id, (connection_id,), name, status, many=len(ids) > 1)

        done = self._executor.carry_out([command], "broker", (), on_failed)
        if done is not None:
            await done

    def _return_all(self, entry_id: str, payload: bytes) -> None:
        """Return a command that nobody carries out any more."""
        try:
            command = read_command(payload)
        except CommandError:
            self._return(entry_id, (named_in(payload),), "none", INVALID)
        else:
            ids = command.connection_ids or ()
            self._return(entry_id, ids, command.action.name, GONE)

    def _return(
        self,
        entry_id: str,
        ids: Sequence[str],
        command: CommandName | Literal["none"],
        status: int,
        many: bool = False,
    ) -> None:
        """Return a command as an event of each connection.

        The events of a command for `many` connections have different ids.
        """
        for connection_id in ids:
            event_id = f"{entry_id}-undelivered"
            if many or len(ids) > 1:
                event_id = f"{entry_id}-{connection_id}-undelivered"
            self._on_undelivered(Undelivered(event_id, connection_id, command, status))


def read_command(payload: bytes) -> Command:
    """Parse a command that names its connections. Raises `CommandError`."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise CommandError("payload must be JSON.") from None
    (command,) = parse_commands([value], named=True)
    return command


def named_in(payload: bytes) -> str:
    """Return the connection that a malformed command names, or an empty string."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return ""
    found = value.get("connection_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def payloads_of(entries: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the id and the payload of each entry."""
    for entry_id, fields in entries:
        pairs = dict(zip(fields[::2], fields[1::2], strict=True))
        yield entry_id.decode(), pairs.get(b"payload", b"")


def after(entry_id: str) -> str:
    """Return the id that follows `entry_id`."""
    milliseconds, _, number = entry_id.partition("-")
    return f"{milliseconds}-{int(number) + 1}"
