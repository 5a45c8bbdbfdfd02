"""Runs commands in Redis.

`RedisClient` runs single commands, also blocking ones; `TurnPipeline` sends the
commands of one turn of the loop in one write. Neither repeats a command: the caller
decides, since a command whose reply is lost may have been carried out.

`backends.redis_py` makes the connections. It is imported when there is a client, so
that redis-py is needed only then.
"""

import asyncio
import importlib
import random
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Protocol

from tornado.options import Error as OptionError

from backends.redis_url import RedisAddress

REPLY_TIMEOUT = 5.0  # seconds, for the replies of one pipeline
MAX_PIPELINE = 1000  # commands in one write
FIRST_RETRY = 0.1  # seconds to the first reconnect; doubles up to LAST_RETRY
LAST_RETRY = 2.0

Word = str | bytes | int | float
Command = tuple[Word, ...]


class RedisError(Exception):
    """A command failed; its text contains no secret.

    `code` is the first word of an error reply, such as NOPERM, OOM or NOSCRIPT, or
    empty where there was no reply.
    """

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class RedisAway(RedisError):
    """Redis can't be reached, or can't serve now. The command may have been run."""


def load_redis_py(option: str) -> ModuleType:
    """Import `backends.redis_py`. Raises `OptionError` if redis-py is missing."""
    try:
        return importlib.import_module("backends.redis_py")
    except ImportError as error:
        raise OptionError(
            f"{option} needs redis-py: pip install socketdock[redis] ({error})"
        ) from None


class RedisClient:
    """Connections to the Redis at `address`, made when they are needed.

    Raises `OptionError`, which names `option`, if redis-py is missing.
    """

    def __init__(self, address: RedisAddress, option: str) -> None:
        self.address = address
        self._redis_py = load_redis_py(option)
        self._single: Single = self._redis_py.Commands(address)

    async def execute(self, *command: Word, timeout: float | None = None) -> Any:
        """Run one command on a connection of its own, and return its reply.

        Waits at most `timeout` seconds; None: a blocking command has its own. Replies
        are of RESP3: maps are dicts, strings are bytes. Raises `RedisError`.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._single.execute(command)
        except TimeoutError:
            raise RedisAway(f"{self.address}: no reply in {timeout:g} s") from None

    def pipeline(
        self,
        on_connected: Callable[[], None] = lambda: None,
        on_lost: Callable[[RedisAway], None] = lambda error: None,
        reply_timeout: float = REPLY_TIMEOUT,
    ) -> "TurnPipeline":
        """Return a new pipeline; it connects from its first command on.

        Without replies for `reply_timeout` seconds Redis counts as away.
        """
        wire: Wire = self._redis_py.make_wire(self.address)
        return TurnPipeline(wire, on_connected, on_lost, reply_timeout)

    async def close(self) -> None:
        """Close the connections of `execute`."""
        await self._single.close()


class TurnPipeline:
    """Sends the commands of one turn of the loop in one write, in order.

    At most one write is unanswered; what is given meanwhile goes with the next. When
    a write fails, all commands given until then fail with `RedisAway`, in order, and
    `on_lost` is called before. While it reconnects, commands fail immediately; then
    `on_connected` is called, so that the first commands may be those that failed.
    """

    def __init__(
        self,
        wire: "Wire",
        on_connected: Callable[[], None],
        on_lost: Callable[[RedisAway], None],
        reply_timeout: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._wire = wire
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._reply_timeout = reply_timeout
        self._waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        # Connects, and sends what waits; cancelled by close().
        self._running: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None] | None = None  # done when something waits
        self._failures = 0  # in sequence
        self.connected = False
        self.away: RedisAway | None = None  # why it reconnects now
        self._closed = False

    def connect(self) -> None:
        """Connect now, and not with the first command."""
        if self._running is None and not self._closed:
            self._running = self._loop.create_task(self._run())

    def execute(self, *command: Word) -> "asyncio.Future[Any]":
        """Send a command; the future has its reply, or fails with `RedisError`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.away is not None or self._closed:
            error = self.away or RedisAway("closed")
            _fail([future], error)
            return future
        self._waiting.append((command, future))
        if self._running is None:
            self.connect()
        elif self._idle is not None and not self._idle.done():
            # The task goes on in the next turn: more may be added in this one.
            self._idle.set_result(None)
        return future

    async def close(self) -> None:
        """Close; commands that are not answered fail."""
        self._closed = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        _fail([future for _, future in self._waiting], RedisAway("closed"))
        await self._wire.close()

    async def _run(self) -> None:
        while True:
            while not self.connected:
                await self._connect()
            if self._waiting:
                batch = self._waiting[:MAX_PIPELINE]
                del self._waiting[:MAX_PIPELINE]
                await self._send(batch)
            else:
                self._idle = self._loop.create_future()
                await self._idle

    async def _connect(self) -> None:
        try:
            await self._wire.connect()
        except RedisAway as error:
            await self._lose(error, [])
            self._failures += 1
            longest = min(LAST_RETRY, FIRST_RETRY * 2 ** min(self._failures, 10))
            # Jitter, so that many instances do not reconnect at once.
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))
        else:
            self._failures = 0
            self.away = None
            self.connected = True
            self._on_connected()

    async def _send(self, batch: list[tuple[Command, "asyncio.Future[Any]"]]) -> None:
        try:
            async with asyncio.timeout(self._reply_timeout):
                replies = await self._wire.exchange([command for command, _ in batch])
        except TimeoutError:
            why = f"no reply in {self._reply_timeout:g} s"
            await self._lose(RedisAway(f"{self._wire.address}: {why}"), batch)
        except RedisAway as error:
            await self._lose(error, batch)
        except asyncio.CancelledError:
            _fail([future for _, future in batch], RedisAway("closed"))
            raise
        else:
            for (_, future), reply in zip(batch, replies, strict=True):
                if isinstance(reply, RedisError):
                    _fail([future], reply)
                elif not future.done():  # cancelled: nobody waits for it any more
                    future.set_result(reply)

    async def _lose(
        self,
        error: RedisAway,
        batch: list[tuple[Command, "asyncio.Future[Any]"]],
    ) -> None:
        waiting, self._waiting = batch + self._waiting, []
        was_away, self.away, self.connected = self.away is not None, error, False
        if not was_away:
            self._on_lost(error)
        _fail([future for _, future in waiting], error)
        await self._wire.close()


def _fail(futures: Iterable["asyncio.Future[Any]"], error: RedisError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(type(error)(str(error), error.code))
            future.exception()  # not logged, if nobody waits for it


class Single(Protocol):
    """Runs single commands, each on a connection that is not used otherwise."""

    async def execute(self, command: Command) -> Any:
        """Raises `RedisError`."""

    async def close(self) -> None: ...


class Wire(Protocol):
    """What a `TurnPipeline` sends through."""

    address: RedisAddress

    async def connect(self) -> None:
        """Raises `RedisAway`."""

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Return a reply or a `RedisError` for each. Raises `RedisAway`."""

    async def close(self) -> None: ...
