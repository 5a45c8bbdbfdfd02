"""Carries out the commands of backends (`backends.commands`) on connections."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from http import HTTPStatus

from tornado.options import define

from backends import Backend, Observer
from backends.commands import (
    Action,
    Close,
    Command,
    CommandError,
    CommandName,
    CommandOutcome,
    OnFailed,
    Send,
    SetState,
    Source,
)
from handlers.callbacks.actions import (
    ACCEPTED,
    FULL,
    GONE,
    OK,
    TOO_MANY_RECEIPTS,
    UNCONFIRMED,
    Outcome,
    Sending,
    all_ended,
    close,
    find,
    send,
)
from handlers.clients.connection import ClientConnection, Connections
from handlers.clients.inbox import size_of
from handlers.websocket.frames import MessageFrame

logger = logging.getLogger(__name__)

define("max_state_size", default=4096, metavar="BYTES",
       help="largest state that a backend may keep with a connection, as JSON")

TOO_LARGE = Outcome(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The frame or the state is too large."
)
# Pairs of a command and a connection that are carried out before the clock is read,
# and the bytes of a frame that take as long as one more.
PER_STEP = 8
COSTLY = 2048

FAULT = Outcome(HTTPStatus.INTERNAL_SERVER_ERROR, "A fault in the relay.")

OUTCOMES: dict[Outcome, CommandOutcome] = {
    OK: "done",
    ACCEPTED: "done",
    GONE: "gone",
    FULL: "full",
    TOO_MANY_RECEIPTS: "full",
    UNCONFIRMED: "done",
    TOO_LARGE: "invalid",
    FAULT: "invalid",
}


# The index of an outcome that is not known yet, the command, and the connection.
Waiting = tuple[int, CommandName, str, Sending]


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
        self._turns = connections.turns
        self._backend = backend

    def run(self, steps: Iterator[object]) -> "asyncio.Future[None] | None":
        """Take all `steps` in turns; see `Turns.run`."""
        return self._turns.run(steps)

    def check(self, commands: Sequence[Command]) -> None:
        """Raise `CommandError` if a frame or a state is larger than permitted."""
        for command in commands:
            if (reason := self.too_large(command.action)) is not None:
                raise CommandError(reason)

    def too_large(self, action: Action) -> str | None:
        """Return a sentence if a frame or a state is larger than permitted."""
        if isinstance(action, Send):
            if size_of(action.message) > self._max_message_size:
                return f"A frame may have {self._max_message_size} bytes at most."
        elif (
            isinstance(action, SetState)
            and action.state is not None
            and len(action.state) > self._max_state_size
        ):
            return f"A state may have {self._max_state_size} bytes at most."
        return None

    def carry_out(
        self,
        commands: Sequence[Command],
        source: Source,
        own: Collection[str],
        on_failed: OnFailed | None = None,
    ) -> "asyncio.Future[None] | None":
        """Carry out `commands` in order, as far as this turn permits, then the rest."""
        if len(commands) == 1 and commands[0].connection_ids is None:
            # Without the turns, which take longer than most commands.
            (command,), (connection_id,) = commands, own
            outcome = self._act(command.action, None, connection_id, True)
            self._report(source, command.action.name, connection_id, outcome)
            return None
        return self._turns.run(self._steps(commands, source, own, on_failed))

    async def outcomes(self, commands: Sequence[Command]) -> list[Outcome]:
        """Carry out `commands`, each naming its connections, in order.

        Returns one for each pair of command and connection, in order, when the kernel
        has taken all frames, or has not for `--send_timeout`, and all receipts have
        come or are late.
        """
        outcomes: list[Outcome] = []
        waiting: list[Waiting] = []
        steps = self._collected(commands, outcomes, waiting)
        if (done := self._turns.run(steps)) is not None:
            await done
        if waiting:
            await all_ended([sending for _, _, _, sending in waiting])
            done = self._turns.run(self._awaited(outcomes, waiting))
            if done is not None:
                await done
        return outcomes

    def _steps(
        self,
        commands: Iterable[Command],
        source: Source,
        own: Collection[str],
        on_failed: OnFailed | None,
    ) -> Iterator[None]:
        """Carry out each command for each of its connections."""
        for command in commands:
            action, ids = command.action, command.connection_ids
            frame = MessageFrame(action.message) if isinstance(action, Send) else None
            for connection_id in own if ids is None else ids:
                outcome = self._act(action, frame, connection_id, connection_id in own)
                self._report(source, action.name, connection_id, outcome)
                if on_failed is not None:
                    _watch(outcome, connection_id, on_failed)
                yield

    def _collected(
        self,
        commands: Iterable[Command],
        outcomes: list[Outcome],
        waiting: list[Waiting],
    ) -> Iterator[None]:
        """As `_steps`, but append to `outcomes`, and to `waiting` what is not known.

        A command that is too large is refused for each of its connections.
        """
        left = PER_STEP
        for command in commands:
            action, frame, cost = command.action, None, 1
            name = action.name
            if isinstance(action, Send):
                frame = MessageFrame(action.message)
                refused = frame.size > self._max_message_size
                cost += frame.size // COSTLY
            else:
                refused = self.too_large(action) is not None
            for connection_id in command.connection_ids or ():
                if refused:
                    outcome: Outcome | Sending = TOO_LARGE
                else:
                    outcome = self._act(action, frame, connection_id, False)
                if isinstance(outcome, Sending):
                    waiting.append((len(outcomes), name, connection_id, outcome))
                    outcome = outcome.accepted
                else:
                    self._observer.commanded(
                        "callback", name, OUTCOMES[outcome], connection_id
                    )
                outcomes.append(outcome)
                left -= cost
                if left <= 0:
                    left = PER_STEP
                    yield

    def _awaited(
        self, outcomes: list[Outcome], waiting: Iterable[Waiting]
    ) -> Iterator[None]:
        """Replace the outcomes of what was waited for."""
        for index, command, connection_id, sending in waiting:
            outcomes[index] = sending.outcome
            self._report("callback", command, connection_id, outcomes[index])
            yield

    def _act(
        self,
        action: Action,
        frame: MessageFrame | None,
        connection_id: str,
        is_own: bool,
    ) -> Outcome | Sending:
        """Carry out one command for one connection.

        `frame` is that of a `Send`, or None if it is not built yet. For its own
        connection, the response itself shows that the backend has seen the message
        and those before it, but not those after it.
        """
        on_asked = _ignore if is_own else self._backend.called_back
        try:
            connection = find(connection_id, self._connections, on_asked)
            if connection is None:
                return GONE
            if isinstance(action, Send):
                if frame is None:
                    frame = MessageFrame(action.message)
                return send(connection, frame, not is_own, action.receipt)
            if isinstance(action, Close):
                return close(connection, action.code, action.reason, "backend")
            connection.backend_state = action.state
            return OK
        except Exception:  # a bug, which must not stop other commands or the caller
            logger.exception("bug in a command")
            return FAULT

    def _report(
        self,
        source: Source,
        command: CommandName,
        connection_id: str,
        outcome: Outcome | Sending,
    ) -> None:
        """Report the outcome, or the one if the kernel takes the frame."""
        if isinstance(outcome, Sending):
            outcome = outcome.accepted
        self._observer.commanded(source, command, OUTCOMES[outcome], connection_id)


def _watch(
    outcome: Outcome | Sending, connection_id: str, on_failed: OnFailed
) -> None:
    """Call `on_failed` if a command fails, now or later."""
    if isinstance(outcome, Sending):
        outcome.ended.add_done_callback(
            lambda _: _watch(outcome.outcome, connection_id, on_failed)
        )
    elif outcome.status >= HTTPStatus.BAD_REQUEST:
        on_failed(connection_id, outcome.status)


def _ignore(connection: ClientConnection) -> None:
    """Take no note of a command."""
