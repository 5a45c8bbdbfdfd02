"""Carries out the commands of backends (`backends.commands`) on connections."""

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence

from tornado.options import define

from backends import Backend, ConnectionClosed, Observer, SendBufferFull
from backends.commands import (
    Action,
    Close,
    Command,
    CommandError,
    CommandOutcome,
    Send,
    SetState,
    Source,
)
from handlers.callbacks.actions import find
from handlers.clients.connection import ClientConnection, Connections
from handlers.clients.inbox import size_of
from handlers.websocket.frames import message_frame
from handlers.websocket.turns import TURN, clock

logger = logging.getLogger(__name__)

define("max_state_size", default=4096, metavar="BYTES",
       help="largest state that a backend may keep with a connection, as JSON")


class CommandExecutor:
    """Finds connections, and acts on them; see `backends.Executor`."""

    def __init__(
        self, max_message_size: int, max_state_size: int, observer: Observer
    ) -> None:
        self._max_message_size = max_message_size
        self._max_state_size = max_state_size
        self._observer = observer
        self._connections: Connections
        self._backend: Backend

    def begin(self, connections: Connections, backend: Backend) -> None:
        """Carry out commands for `connections`; `backend` is told whom they concern."""
        self._connections = connections
        self._backend = backend

    def check(self, commands: Sequence[Command]) -> None:
        """Raise `CommandError` if a frame or a state is larger than permitted."""
        for command in commands:
            if (reason := self.too_large(command)) is not None:
                raise CommandError(reason)

    def too_large(self, command: Command) -> str | None:
        """Return a sentence if a frame or a state is larger than permitted."""
        match command.action:
            case Send(message=message) if size_of(message) > self._max_message_size:
                return f"A frame may have {self._max_message_size} bytes at most."
            case SetState(state=bytes(state)) if len(state) > self._max_state_size:
                return f"A state may have {self._max_state_size} bytes at most."
        return None

    def carry_out(
        self, commands: Sequence[Command], source: Source, own: Collection[str]
    ) -> "asyncio.Future[None] | None":
        """Carry out `commands` in order, as far as this turn permits, then the rest."""
        if len(commands) == 1 and commands[0].connection_ids is None:
            # Without the turns, which take longer than most commands.
            try:
                self._act(commands[0].action, next(iter(own)), source, True)
            except Exception:
                logger.exception("bug in a command")
            return None
        steps = self._steps(commands, source, own)
        if self._take(steps):
            return None
        loop = self._connections.loop
        done: asyncio.Future[None] = loop.create_future()

        def take_on() -> None:
            if not self._take(steps):
                self._connections.turns.wait(take_on)
            elif not done.done():
                done.set_result(None)

        self._connections.turns.wait(take_on)
        return done

    def _take(self, steps: Iterator[None]) -> bool:
        """Carry out steps until the turn is over; return whether none is left."""
        ends_at = clock() + TURN
        try:
            for _ in steps:
                if clock() >= ends_at:
                    return False
        except Exception:  # a bug, which must not stop the caller
            logger.exception("bug in a command")
        return True

    def _steps(
        self, commands: Sequence[Command], source: Source, own: Collection[str]
    ) -> Iterator[None]:
        for command in commands:
            action = command.action
            ids = own if command.connection_ids is None else command.connection_ids
            encoded = None
            if isinstance(action, Send) and len(ids) > 1:
                encoded = message_frame(action.message)
            for connection_id in ids:
                is_own = connection_id in own
                self._act(action, connection_id, source, is_own, encoded)
                yield

    def _act(
        self,
        action: Action,
        connection_id: str,
        source: Source,
        is_own: bool,
        encoded: bytes | None = None,
    ) -> None:
        """Carry out one command for one connection.

        For its own connection, the response itself shows that the backend has seen the
        message and those before it, but not those after it.
        """
        connection = find(
            connection_id,
            self._connections,
            _ignore if is_own else self._backend.called_back,
        )
        outcome: CommandOutcome = "gone"
        if connection is not None:
            outcome = _done_to(connection, action, not is_own, encoded)
        self._observer.commanded(source, action.name, outcome, connection_id)


def _done_to(
    connection: ClientConnection, action: Action, limited: bool, encoded: bytes | None
) -> CommandOutcome:
    if isinstance(action, Send):
        try:
            connection.send(action.message, limited, encoded)
        except SendBufferFull:
            return "full"
        except ConnectionClosed:
            return "gone"
    elif isinstance(action, Close):
        connection.close(action.code, action.reason, "backend")
    else:
        connection.backend_state = action.state
    return "done"


def _ignore(connection: ClientConnection) -> None:
    """Take no note of a command."""
