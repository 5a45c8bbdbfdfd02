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
from handlers.websocket.frames import SharedFrame

logger = logging.getLogger(__name__)

define("max_state_size", default=4096, metavar="BYTES",
       help="largest state that a backend may keep with a connection, as JSON")

TOO_LARGE = Outcome(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The frame or the state is too large."
)
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


# A command for a connection, and its outcome, now or later.
Pair = tuple[CommandName, str, Outcome | Sending]
Result = tuple[str, Outcome]  # of a connection


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

    def check(self, commands: Sequence[Command]) -> None:
        """Raise `CommandError` if a frame or a state is larger than permitted."""
        for command in commands:
            if (reason := self.too_large(command)) is not None:
                raise CommandError(reason)

    def too_large(self, command: Command) -> str | None:
        """Return a sentence if a frame or a state is larger than permitted."""
        action = command.action
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
            action, connection_id = commands[0].action, next(iter(own))
            outcome = self._act(action, connection_id, True)
            self._report(source, action.name, connection_id, _expected(outcome))
            return None
        return self._turns.run(
            self._reported(source, self._pairs(commands, own), on_failed)
        )

    async def results(self, commands: Sequence[Command]) -> list[Result]:
        """Carry out `commands`, each naming its connections, in order.

        Returns a result for each pair of command and connection, in order, when the
        kernel has taken all frames, or has not for `--send_timeout`, and all receipts
        have come or are late.
        """
        results: list[Result] = []
        waiting: list[tuple[int, CommandName, Sending]] = []
        pairs = self._pairs(commands, (), checked=False)
        done = self._turns.run(self._collected(pairs, results, waiting))
        if done is not None:
            await done
        if waiting:
            await all_ended([sending for _, _, sending in waiting])
        for index, command, sending in waiting:
            connection_id, outcome = results[index][0], sending.outcome
            self._report("callback", command, connection_id, outcome)
            results[index] = connection_id, outcome
        return results

    def _collected(
        self,
        pairs: Iterable[Pair],
        results: list[Result],
        waiting: list[tuple[int, CommandName, Sending]],
    ) -> Iterator[None]:
        """Append to `results`, and to `waiting` with the index of its result."""
        for command, connection_id, outcome in pairs:
            if isinstance(outcome, Sending):
                waiting.append((len(results), command, outcome))
            else:
                self._report("callback", command, connection_id, outcome)
            results.append((connection_id, _expected(outcome)))
            yield

    def _pairs(
        self, commands: Sequence[Command], own: Collection[str], checked: bool = True
    ) -> Iterator[Pair]:
        """Carry out each command for each of its connections.

        Unless `checked`, a command that is too large is refused for each of them.
        """
        for command in commands:
            action = command.action
            ids = own if command.connection_ids is None else command.connection_ids
            refused = not checked and self.too_large(command) is not None
            shared = None
            if len(ids) > 1 and isinstance(action, Send) and not refused:
                shared = SharedFrame(action.message)
            for connection_id in ids:
                if refused:
                    outcome: Outcome | Sending = TOO_LARGE
                else:
                    is_own = connection_id in own
                    outcome = self._act(action, connection_id, is_own, shared)
                yield action.name, connection_id, outcome

    def _act(
        self,
        action: Action,
        connection_id: str,
        is_own: bool,
        shared: SharedFrame | None = None,
    ) -> Outcome | Sending:
        """Carry out one command for one connection.

        For its own connection, the response itself shows that the backend has seen the
        message and those before it, but not those after it.
        """
        on_asked = _ignore if is_own else self._backend.called_back
        try:
            connection = find(connection_id, self._connections, on_asked)
            if connection is None:
                return GONE
            if isinstance(action, Send):
                return send(
                    connection, action.message, not is_own, shared, action.receipt
                )
            if isinstance(action, Close):
                return close(connection, action.code, action.reason, "backend")
            connection.backend_state = action.state
            return OK
        except Exception:  # a bug, which must not stop other commands or the caller
            logger.exception("bug in a command")
            return FAULT

    def _reported(
        self, source: Source, pairs: Iterable[Pair], on_failed: OnFailed | None
    ) -> Iterator[None]:
        for command, connection_id, outcome in pairs:
            self._report(source, command, connection_id, _expected(outcome))
            if on_failed is not None:
                _watch(outcome, connection_id, on_failed)
            yield

    def _report(
        self, source: Source, command: CommandName, connection_id: str, outcome: Outcome
    ) -> None:
        self._observer.commanded(source, command, OUTCOMES[outcome], connection_id)


def _expected(outcome: Outcome | Sending) -> Outcome:
    """Return the outcome if the kernel takes the frame."""
    return outcome.accepted if isinstance(outcome, Sending) else outcome


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
