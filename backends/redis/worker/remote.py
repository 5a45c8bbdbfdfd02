"""Commands in replies of the backend, which go to the streams of the owners."""

import asyncio
import base64
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import orjson

from backends import Observer
from backends.commands import (
    Action,
    Close,
    Command,
    Executor,
    OnFailed,
    RoutedCommand,
    Send,
    Source,
)
from backends.redis_client import RedisAway, RedisError, TurnPipeline

RETRY = 0.5  # seconds, while Redis is away


class Streams:
    """Which stream of commands each connection of a worker has."""

    def __init__(self) -> None:
        self._by_id: dict[str, str] = {}

    def keep(self, connection_id: str, stream: str) -> None:
        """Remember the stream of a connection that has events now."""
        self._by_id[connection_id] = stream

    def forget(self, connection_id: str) -> None:
        """The connection has no events now."""
        self._by_id.pop(connection_id, None)

    def get(self, connection_id: str) -> str | None:
        """Return the stream, if it is known."""
        return self._by_id.get(connection_id)


class RemoteExecutor:
    """Adds commands to the streams of the instances that have their connections.

    See `backends.Executor`. `here` checks them.
    """

    def __init__(
        self,
        here: Executor,
        pipeline: TurnPipeline,
        streams: Streams,
        observer: Observer,
    ) -> None:
        self._here = here
        self._pipeline = pipeline
        self._streams = streams
        self._observer = observer
        self._tasks: set[asyncio.Task[None]] = set()
        self.closing = False

    def run(self, steps: Iterator[object]) -> "asyncio.Future[None] | None":
        return self._here.run(steps)

    def check(self, commands: Sequence[Command]) -> None:
        self._here.check(commands)

    def carry_out(
        self,
        commands: Sequence[Command],
        source: Source,
        own: Collection[str],
        on_failed: OnFailed | None = None,
    ) -> "asyncio.Future[None] | None":
        task = asyncio.get_running_loop().create_task(
            self._send(commands, source, own)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(
        self, commands: Sequence[Command], source: Source, own: Collection[str]
    ) -> None:
        """Add all commands, in order, and again what may have been lost."""
        waiting = []
        for command in commands:
            ids = own if command.connection_ids is None else command.connection_ids
            for connection_id in ids:
                stream = self._streams.get(connection_id)
                if isinstance(command, RoutedCommand):
                    stream = command.reply
                if stream is None:
                    self._report(source, command, connection_id, "gone")
                else:
                    waiting.append((command, connection_id, stream))
        while waiting and not self.closing:
            replies = await asyncio.gather(
                *(
                    self._pipeline.execute(
                        "XADD", stream, "NOMKSTREAM", "*",
                        "payload", payload_of(command.action, connection_id),
                    )
                    for command, connection_id, stream in waiting
                ),
                return_exceptions=True,
            )  # fmt: skip
            failed = []
            for each, reply in zip(waiting, replies, strict=True):
                command, connection_id, _ = each
                if isinstance(reply, RedisAway) or is_full(reply):
                    failed.append(each)
                elif isinstance(reply, RedisError):
                    self._report(source, command, connection_id, "invalid")
                else:
                    outcome = "gone" if reply is None else "done"
                    self._report(source, command, connection_id, outcome)
            waiting = failed
            if waiting:
                await asyncio.sleep(RETRY)

    def _report(
        self, source: Source, command: Command, connection_id: str, outcome: Any
    ) -> None:
        self._observer.commanded(source, command.action.name, outcome, connection_id)


def is_full(reply: object) -> bool:
    """Whether Redis has no memory for a command; there is some when events are read."""
    return isinstance(reply, RedisError) and reply.code == "OOM"


def payload_of(action: Action, connection_id: str) -> bytes:
    """Return a command as JSON."""
    command: dict[str, Any] = {"connection_id": connection_id}
    if isinstance(action, Send):
        if isinstance(action.message, str):
            command["send"] = action.message
        else:
            text = base64.b64encode(action.message).decode()
            command |= {"send": text, "type": "binary", "encoding": "base64"}
    elif isinstance(action, Close):
        command["close"] = {"code": action.code, "reason": action.reason}
    else:
        state = action.state
        command["state"] = None if state is None else orjson.Fragment(state)
    return orjson.dumps(command)
