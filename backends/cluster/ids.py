"""The ids of this run's connections, in Redis; `lease` decides when all are written."""

import asyncio
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from backends.cluster.keys import CHANGE, REPLACE, Keys
from backends.redis_client import RedisError, TurnPipeline


class RecordedIds:
    """Ids of connections whose disconnect event would be due if this run died.

    What gathers in a turn of the loop, or until the last write is answered, goes in one
    command. `on_failed` is called where Redis did not take it: then Redis is not
    `complete`, and all ids must be written. `on_tombstone` is called where it did not
    since this run was taken for dead.
    """

    def __init__(
        self,
        redis: TurnPipeline,
        keys: Keys,
        instance: str,
        on_failed: Callable[[BaseException], None],
        on_tombstone: Callable[[], None],
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._instance = instance
        self._on_failed = on_failed
        self._on_tombstone = on_tombstone
        self._loop = asyncio.get_running_loop()
        self._ids: dict[str, None] = {}
        self._added: list[str] = []  # to be written, as `_removed`
        self._removed: list[str] = []
        self._waiting: list[asyncio.Future[None]] = []  # done when `_added` is written
        self._writing = False  # a write is due, or unanswered
        self.complete = False  # whether Redis has all of them, as far as is known

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def add(self, connection_id: str) -> "asyncio.Future[None] | None":
        """Record a connection before its first event is sent.

        Returns a future that is done when Redis has it, or is found to be away; None
        while it is away.
        """
        self._ids[connection_id] = None
        if self._redis.away is not None:
            return None
        written: asyncio.Future[None] = self._loop.create_future()
        self._added.append(connection_id)
        self._waiting.append(written)
        self._write_soon()
        return written

    def remove(self, connection_id: str) -> None:
        """Remove a connection: its disconnect event has ended, or none is due."""
        if connection_id in self._ids:
            del self._ids[connection_id]
            if self._redis.away is None:
                self._removed.append(connection_id)
                self._write_soon()

    def rename(self, instance: str, reaped: Collection[str]) -> set[str]:
        """Keep them under another instance, without those that others have ended.

        Returns these.
        """
        self._instance = instance
        ended = {id_ for id_ in self._ids if id_ in reaped}
        self._ids = {id_: None for id_ in self._ids if id_ not in ended}
        self.complete = False
        return ended

    async def write_all(self) -> None:
        """Replace what Redis has: it may have lost some, or keep some that have ended.

        Raises `RedisError`.
        """
        self._added, self._removed = [], []
        waiting, self._waiting = self._waiting, []
        self.complete = True  # what changes from now on is written after these
        try:
            await self._change(REPLACE, list(self._ids), [])
        except RedisError:
            self.complete = False
            raise
        finally:
            _finish(waiting)

    def _write(self) -> None:
        """Write what has gathered."""
        added, self._added = self._added, []
        removed, self._removed = self._removed, []
        waiting, self._waiting = self._waiting, []
        change = self._change(CHANGE, added, removed)
        change.add_done_callback(partial(self._on_written, waiting))

    def _change(
        self, script: str, added: list[str], removed: list[str]
    ) -> "asyncio.Future[Any]":
        dead = self._keys.dead(self._instance)
        connections = self._keys.connections(self._instance)
        return self._redis.execute(
            "EVAL", script, 2, dead, connections, len(added), *added, *removed
        )

    def _write_soon(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.call_soon(self._write)

    def _on_written(
        self, waiting: list["asyncio.Future[None]"], reply: "asyncio.Future[Any]"
    ) -> None:
        _finish(waiting)
        error = reply.exception()
        if error is not None:
            self.complete = False
            self._on_failed(error)
        elif not reply.result():
            self._on_tombstone()
        self._writing = False
        if self._added or self._removed:
            self._write_soon()


def _finish(waiting: list["asyncio.Future[None]"]) -> None:
    for written in waiting:
        if not written.done():  # whoever waited may have left
            written.set_result(None)
