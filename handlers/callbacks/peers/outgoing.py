"""Commands in responses for connections of other instances.

They are forwarded as bulk callbacks, and not waited for. What is forwarded is counted
by its owner, as commands of a callback; what is dropped is counted here.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from http import HTTPStatus
from typing import NamedTuple

from backends import Observer
from backends.commands import (
    MAX_PAIRS,
    Action,
    Command,
    CommandOutcome,
    Executor,
    OnFailed,
    Send,
    SetState,
    Source,
)
from handlers.callbacks.peers.forward import Forwarder
from handlers.callbacks.peers.parts import Part
from handlers.clients.inbox import size_of
from handlers.owners import Address
from handlers.websocket.turns import Turns

logger = logging.getLogger(__name__)

# Of all that wait for all instances; what is more is dropped.
MAX_WAITING = 50_000  # pairs of a command and a connection
MAX_WAITING_BYTES = 64 * 1024 * 1024  # of frames and states
MAX_REQUEST = 1024 * 1024  # bytes of one request, if it has more than one pair
LAST_WAIT = 0.5  # seconds at the stop for what was not sent yet


class _Pair(NamedTuple):
    source: Source
    action: Action
    connection_id: str

    @property
    def size(self) -> int:
        """Bytes of the frame or the state."""
        action = self.action
        if isinstance(action, Send):
            return size_of(action.message)
        return len(action.state or b"") if isinstance(action, SetState) else 0


class Outgoing:
    """What waits to be forwarded: for each owner one request at a time, in order."""

    def __init__(self, forwarder: Forwarder, observer: Observer) -> None:
        self._forwarder = forwarder
        self._observer = observer
        self._waiting: dict[str, deque[_Pair]] = {}  # by the owner's digits
        self._tasks: set[asyncio.Task[None]] = set()  # one for each of these
        self._pairs = self._bytes = 0
        self._full = False  # so that the log has one line for each time

    def add(
        self, owner: Address, source: Source, action: Action, connection_id: str
    ) -> None:
        """Forward a command soon; drop it if too much waits."""
        pair = _Pair(source, action, connection_id)
        if (
            self._pairs >= MAX_WAITING
            or self._bytes + pair.size > MAX_WAITING_BYTES
        ):
            if not self._full:
                self._full = True
                logger.warning("commands for instance %s are dropped: %d wait",
                               owner, self._pairs)
            self._report(pair, "full")
            return
        self._pairs += 1
        self._bytes += pair.size
        waiting = self._waiting.get(owner.digits)
        if waiting is not None:
            waiting.append(pair)
            return
        self._waiting[owner.digits] = deque((pair,))
        task = asyncio.get_running_loop().create_task(self._forward(owner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait shortly for what is not sent, then drop it."""
        tasks = list(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WAIT)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, owner: Address) -> None:
        """Forward until nothing waits for `owner`."""
        waiting = self._waiting[owner.digits]
        try:
            while waiting:
                pairs = self._take(waiting)
                part = _part_of(owner, pairs)
                callback = part.callback(self._forwarder.send_timeout, part.body())
                answer = await self._forwarder.forward(owner, callback)
                if answer.status != HTTPStatus.OK:
                    for pair in pairs:
                        self._report(pair, "gone")
        finally:
            del self._waiting[owner.digits]
            for pair in waiting:
                self._on_taken(pair)
                self._report(pair, "gone")

    def _take(self, waiting: deque[_Pair]) -> list[_Pair]:
        """Return the commands of the next request."""
        pairs: list[_Pair] = []
        size = 0
        while waiting and len(pairs) < MAX_PAIRS:
            size += waiting[0].size
            if pairs and size > MAX_REQUEST:
                break
            pairs.append(waiting.popleft())
            self._on_taken(pairs[-1])
        return pairs

    def _on_taken(self, pair: _Pair) -> None:
        self._pairs -= 1
        self._bytes -= pair.size
        self._full = self._full and (
            self._pairs > MAX_WAITING // 2 or self._bytes > MAX_WAITING_BYTES // 2
        )

    def _report(self, pair: _Pair, outcome: CommandOutcome) -> None:
        self._observer.commanded(
            pair.source, pair.action.name, outcome, pair.connection_id
        )


def _part_of(owner: Address, pairs: Sequence[_Pair]) -> Part:
    """Return these commands; one for many connections is there once."""
    part = Part(owner)
    latest: Action | None = None
    ids: list[str] = []
    for pair in pairs:
        if pair.action is not latest:
            latest, ids = pair.action, []
            part.commands.append(Command(latest, ids))
        ids.append(pair.connection_id)
    return part


class SharedExecutor:
    """Carries out commands on connections here, and forwards the others.

    See `backends.Executor`. `here` carries them out.
    """

    def __init__(self, here: Executor) -> None:
        self._here = here
        self._outgoing: Outgoing
        self._forwarder: Forwarder
        self._turns: Turns
        self._tasks: set[asyncio.Task[None]] = set()  # of large responses

    def begin(self, forwarder: Forwarder, outgoing: Outgoing, turns: Turns) -> None:
        """Forward commands from now on."""
        self._forwarder, self._outgoing, self._turns = forwarder, outgoing, turns

    def run(self, steps: Iterator[object]) -> "asyncio.Future[None] | None":
        """Take all `steps` in turns."""
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
        if on_failed is not None:  # whoever waits for failures addresses the owner
            return self._here.carry_out(commands, source, own, on_failed)
        if all(command.connection_ids is None for command in commands):
            return self._here.carry_out(commands, source, own)
        here: list[Command] = []
        divided = self._turns.run(self._divide(commands, source, here))
        if divided is None:
            return self._here.carry_out(here, source, own)
        task = divided.get_loop().create_task(self._then(divided, here, source, own))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _divide(
        self, commands: Sequence[Command], source: Source, here: list[Command]
    ) -> Iterator[None]:
        """Append to `here`, and add the rest to what is forwarded."""
        for command in commands:
            if command.connection_ids is None:
                here.append(command)
                continue
            ids = []
            for connection_id in command.connection_ids:
                owner = self._forwarder.owner_of(connection_id)
                if owner is None:
                    ids.append(connection_id)
                else:
                    self._outgoing.add(owner, source, command.action, connection_id)
                yield
            if ids:
                here.append(Command(command.action, ids))

    async def _then(
        self,
        divided: "asyncio.Future[None]",
        here: Sequence[Command],
        source: Source,
        own: Collection[str],
    ) -> None:
        await divided
        done = self._here.carry_out(here, source, own)
        if done is not None:
            await done
