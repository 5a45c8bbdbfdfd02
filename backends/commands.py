"""Commands: what the relay shall do with connections, as a backend says it.

One vocabulary for all ways to say it: the response to an event or to a batch, and a
bulk callback. This module parses commands; the relay's `Executor` carries them out.
"""

import asyncio
import binascii
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import orjson

MEDIA_TYPE = "application/vnd.socketdock+json"
NORMAL_CLOSURE = 1000  # RFC 6455, section 7.4.1
MAX_CLOSE_REASON = 123  # bytes of UTF-8 (RFC 6455, section 5.5)
PONG = "pong"  # the only kind of receipt
RECEIPT_TIMEOUT = 10.0  # seconds
SHORTEST_RECEIPT, LONGEST_RECEIPT = 0.1, 60.0  # seconds
MAX_PAIRS = 10_000  # of a command and a connection, in one response or request
PER_STEP = 16  # commands that are parsed in about 20 microseconds
TOO_MANY = f"At most {MAX_PAIRS} pairs of command and connection are permitted."

Source = Literal["response", "batch", "callback", "broker"]
CommandName = Literal["send", "close", "state"]
CommandOutcome = Literal["done", "gone", "full", "invalid"]


new = object.__new__


class CommandError(ValueError):
    """Commands are malformed; the message is a sentence that says how."""


@dataclass(slots=True)
class Send:
    """Send one frame: a `str` as text, `bytes` as binary.

    `receipt`: seconds that the client has to confirm it; None: it need not.
    """

    name: ClassVar[CommandName] = "send"
    message: str | bytes
    receipt: float | None = None


@dataclass(slots=True)
class Close:
    """Start the closing handshake."""

    name: ClassVar[CommandName] = "close"
    code: int
    reason: str


@dataclass(slots=True)
class SetState:
    """Keep `state`, serialized JSON, with the connection; None: remove it."""

    name: ClassVar[CommandName] = "state"
    state: bytes | None


Action = Send | Close | SetState


@dataclass(slots=True)
class Command:
    """An action and whom it is for; None: the connection of the event."""

    action: Action
    connection_ids: Sequence[str] | None


@dataclass(slots=True)
class RoutedCommand(Command):
    """A command that names the stream of the instance that has its connections."""

    reply: str


# Is called with a connection and the status that a callback would have got.
OnFailed = Callable[[str, int], None]


class Executor(Protocol):
    """Carries out commands; the relay has one."""

    def run(self, steps: Iterator[object]) -> "asyncio.Future[None] | None":
        """Take all `steps`, as many at a time as a turn of the loop permits.

        Returns None if one turn was enough, else a future that is done after the last
        step. What a step raises ends them: it is raised, or the future has it.
        """

    def check(self, commands: Sequence[Command]) -> None:
        """Raise `CommandError` if a frame or a state is larger than permitted."""

    def carry_out(
        self,
        commands: Sequence[Command],
        source: Source,
        own: Collection[str],
        on_failed: OnFailed | None = None,
    ) -> "asyncio.Future[None] | None":
        """Carry out `commands` in order; commands without an id are for all in `own`.

        The connections in `own` get their frames even above `--max_send_buffer`. For
        others a full buffer drops the command. Returns None if all was done at once,
        or a future that is done when it was. `on_failed` is called for each that
        fails, maybe later; with it, no command is forwarded to another instance.
        """


def parse_commands(value: object, named: bool = False) -> list[Command]:
    """Return the commands in `value`; see `command_steps`."""
    commands: list[Command] = []
    for _ in command_steps(value, commands, named):
        pass
    return commands


def command_steps(
    value: object, commands: list[Command], named: bool = False
) -> Iterator[None]:
    """Append the commands in `value`, parsed JSON. Raises `CommandError`.

    It yields after each `PER_STEP` commands, so that others may have a turn.

    Members that are not known are ignored. If `named`, each command must name its
    connections, and a frame may ask for a receipt. A command for no connection counts
    as one for one, so that a body cannot have any number of them.
    """
    if not isinstance(value, list):
        raise CommandError("commands must be a list.")
    pairs = 0
    for index, each in enumerate(value):
        try:
            command = _parse_command(each, named)
        except CommandError as error:
            raise CommandError(f"commands[{index}]: {error}") from None
        ids = command.connection_ids
        pairs += len(ids) if ids else 1
        if pairs > MAX_PAIRS:
            raise CommandError(TOO_MANY)
        commands.append(command)
        if not len(commands) % PER_STEP:
            yield


def _parse_command(value: object, named: bool) -> Command:
    if not isinstance(value, dict):
        raise CommandError("A command must be an object.")
    if len(value) == 2 and "send" in value and "connection_id" in value:
        text, connection_id = value["send"], value["connection_id"]
        if isinstance(text, str) and isinstance(connection_id, str):
            # Most commands of a bulk callback: they need no other check.
            return _plain_send(text, connection_id)
    if ("send" in value) + ("close" in value) + ("state" in value) != 1:
        raise CommandError("A command must have exactly one of send, close, state.")
    action: Action
    if "send" in value:
        action = Send(_message_of(value), _receipt_of(value) if named else None)
    elif "close" in value:
        action = _close_of(value["close"])
    else:
        state = value["state"]
        action = SetState(None if state is None else _serialized(state))
    ids = _ids_of(value)
    if ids is None and named:
        raise CommandError("connection_id or connection_ids is missing.")
    reply = value.get("reply")
    if isinstance(reply, str):
        return RoutedCommand(action, ids, reply)
    return Command(action, ids)


def _plain_send(text: str, connection_id: str) -> Command:
    """Return `Command(Send(text), (connection_id,))`, in a third of the time."""
    send, command = new(Send), new(Command)
    send.message, send.receipt = text, None
    command.action, command.connection_ids = send, (connection_id,)
    return command


def _message_of(value: dict[str, Any]) -> str | bytes:
    text, kind = value["send"], value.get("type", "text")
    encoding = value.get("encoding")
    if not isinstance(text, str):
        raise CommandError("send must be a string.")
    if kind not in ("text", "binary"):
        raise CommandError("type must be text or binary.")
    if encoding is None:
        return text if kind == "text" else text.encode()
    if encoding != "base64" or kind != "binary":
        raise CommandError("encoding must be base64, and type binary.")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise CommandError("send must be base64.") from None


def _receipt_of(value: dict[str, Any]) -> float | None:
    if "receipt" not in value and "timeout" not in value:
        return None
    timeout = value.get("timeout", RECEIPT_TIMEOUT)
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise CommandError("timeout must be a number.")
    try:
        seconds = receipt_timeout(timeout)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if "receipt" not in value:
        return None
    if value["receipt"] != PONG:
        raise CommandError(f"receipt must be {PONG}.")
    return seconds


def receipt_timeout(seconds: float) -> float:
    """Return `seconds` if a receipt may be awaited that long.

    Raises `ValueError` with a sentence for a problem document.
    """
    if not SHORTEST_RECEIPT <= seconds <= LONGEST_RECEIPT:
        raise ValueError(
            f"timeout must be {SHORTEST_RECEIPT:g} to {LONGEST_RECEIPT:g} seconds."
        )
    return float(seconds)


def _close_of(value: object) -> Close:
    if value is True:
        return Close(NORMAL_CLOSURE, "")
    if not isinstance(value, dict):
        raise CommandError("close must be true or an object.")
    try:
        return Close(*closing_of(value))
    except ValueError as error:
        raise CommandError(str(error)) from None


def closing_of(closing: Mapping[str, Any]) -> tuple[int, str]:
    """Return `code` and `reason` of parsed JSON; 1000 and "" by default.

    Raises `ValueError` with a sentence for a problem document.
    """
    code = closing.get("code", NORMAL_CLOSURE)
    if isinstance(code, float) and code.is_integer():
        code = int(code)  # 1000.0 equals 1000 in JSON (RFC 8259, section 6)
    if not isinstance(code, int) or isinstance(code, bool) or not (
        code in (1000, 1001, 1008) or 1011 <= code <= 1014 or 3000 <= code <= 4999
    ):
        raise ValueError("code must be 1000, 1001, 1008, 1011-1014 or 3000-4999.")
    reason = closing.get("reason", "")
    try:
        fits = len(reason.encode()) <= MAX_CLOSE_REASON
    except (AttributeError, UnicodeEncodeError):
        raise ValueError("reason must be a string of UTF-8.") from None
    if not fits:
        raise ValueError(f"reason must be at most {MAX_CLOSE_REASON} bytes of UTF-8.")
    return code, reason


def _serialized(state: object) -> bytes:
    """Return `state` as JSON that takes no more memory than its length."""
    try:
        return bytes(memoryview(orjson.dumps(state)))
    except orjson.JSONEncodeError:  # orjson parses 1024 levels, and writes 254
        raise CommandError("state is nested too deeply.") from None


def _ids_of(value: dict[str, Any]) -> Sequence[str] | None:
    if "connection_ids" not in value:
        if "connection_id" not in value:
            return None
        if not isinstance(value["connection_id"], str):
            raise CommandError("A connection id must be a string.")
        return (value["connection_id"],)
    if "connection_id" in value:
        raise CommandError("connection_id and connection_ids exclude each other.")
    ids = value["connection_ids"]
    if not isinstance(ids, list):
        raise CommandError("connection_ids must be a list.")
    if len(ids) > MAX_PAIRS:
        raise CommandError(TOO_MANY)
    if not all(isinstance(each, str) for each in ids):
        raise CommandError("A connection id must be a string.")
    return ids
