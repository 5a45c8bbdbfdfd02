"""Replies: commands, or one frame, in the response to an event.

`delivery` and `decisions` get the responses; the relay's `Executor` carries out what
they say. A reply that cannot be used is logged and counted, and changes nothing else:
whether the event is accepted is said by the status alone.
"""

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from tornado.options import define, options

from backends import Connection, Observer, Relay
from backends.client import Response
from backends.client.response import MAX_KEPT_BODY, MalformedResponse
from backends.commands import (
    MEDIA_TYPE,
    Command,
    CommandError,
    Executor,
    Send,
    Source,
    command_steps,
)
from backends.http.content import decoded, parsed_json
from backends.http.retries import is_success
from backends.media_types import (
    MAX_REMEMBERED,
    has_text_charset,
    is_text_type,
    media_type_of,
)

logger = logging.getLogger(__name__)

define("reply", default="commands", metavar="NAME",
       help="what is read in the response to a message: commands, body (commands, or "
            "any other body as one frame), or off")
define("max_reply_size", default=8 * 1024 * 1024, metavar="BYTES",
       help="largest response with commands, or with a frame")

# Bytes of a response that is read in one go: about 1 ms. A larger one is read in turns.
READ_AT_ONCE = 32 * 1024
NO_CONTENT = 204  # a response without a body (RFC 9110, section 15.3.5)

Mode = Literal["commands", "body", "off"]


class Unusable(Exception):
    """A reply cannot be used; the message is the reason."""


class Reply(NamedTuple):
    """What a response says: its commands, and all members of its JSON."""

    commands: list[Command]
    members: dict[str, Any]


class BatchReply(NamedTuple):
    """What the response to a batch says: commands, and the ids of failed events."""

    commands: list[Command]
    failed: frozenset[str]


class Replies:
    """Reads replies, and has them carried out."""

    def __init__(
        self, mode: Mode, max_size: int, executor: Executor, observer: Observer
    ) -> None:
        self.mode = mode
        self.max_size = max_size  # bytes
        self._executor = executor
        self._observer = observer

    # How much of a response's body is kept (`client.response.Keep`).

    def of_message(self, status: int, headers: Mapping[str, str]) -> int:
        """Keep commands, and with `body` any body, of a response to a message."""
        if self.mode != "body":
            content_type = headers.get("content-type")
            if content_type is None or not is_commands(content_type):
                return 0
        return self.max_size if is_success(status) else 0

    def of_connect(self, status: int, headers: Mapping[str, str]) -> int:
        """Keep the whole body if it has commands, else its beginning."""
        if self.mode != "off" and is_success(status) and has_commands(headers):
            return self.max_size
        return MAX_KEPT_BODY

    def of_batch(self, status: int, headers: Mapping[str, str]) -> int:
        """Keep the body of a response to a batch if it has commands or failed ids."""
        if is_success(status) and has_commands(headers):
            return self.max_size
        return 0

    # What it says.

    def carry_out(
        self, connection: Connection, event_id: str, response: Response
    ) -> "asyncio.Future[None] | None":
        """Carry out the reply to a message.

        Returns None if all was done at once, or a future that is done when it was.
        """
        if is_large(response) and has_commands(response.headers):
            carried_out = self._carry_out_large(connection, event_id, response)
            return asyncio.ensure_future(carried_out)  # the caller waits for it
        try:
            commands = self.of_response(response)
            if not commands:
                return None
            return self._executor.carry_out(commands, "response", (connection.id,))
        except Unusable as error:
            self.report(connection.id, event_id, error)
        except Exception:  # a bug, which must not stop the connection's messages
            logger.exception("connection %s: bug in the reply to %s",
                             connection.id, event_id)
        return None

    async def _carry_out_large(
        self, connection: Connection, event_id: str, response: Response
    ) -> None:
        try:
            commands = (await self.read_large(response)).commands
            del response  # it may wait for slow clients
            done = self._executor.carry_out(commands, "response", (connection.id,))
            if done is not None:
                await done
        except Unusable as error:
            self.report(connection.id, event_id, error)
        except Exception:  # as in `carry_out`
            logger.exception("connection %s: bug in the reply to %s",
                             connection.id, event_id)

    async def carry_out_decision(self, connection_id: str, reply: Reply) -> None:
        """Carry out the commands of a decision; its frames follow the 101."""
        done = self._executor.carry_out(reply.commands, "response", (connection_id,))
        if done is not None:
            await done

    def carry_out_batch(
        self, commands: list[Command], own: Collection[str]
    ) -> "asyncio.Future[None] | None":
        """Carry out the commands of a response to a batch with events of `own`."""
        if not commands or self.mode == "off":
            return None
        return self._executor.carry_out(commands, "batch", own)

    def is_cut(self, response: Response) -> bool:
        """Whether the end of a body is missing, which is not larger than permitted.

        It may have named failed events, which would be lost.
        """
        body = response.body
        return (
            body is not None and not response.complete and len(body) < self.max_size
        )

    def read_batch(self, response: Response) -> BatchReply:
        """Parse the response to a batch. Raises `Unusable`."""
        return _batch_reply(self.read(response))

    async def read_large_batch(self, response: Response) -> BatchReply:
        """As `read_batch`, but in turns."""
        return _batch_reply(await self.read_large(response))

    def of_response(self, response: Response) -> list[Command]:
        """Parse the reply to a message, in either mode. Raises `Unusable`."""
        if has_commands(response.headers):
            return self.read(response).commands
        return self._plain(response) if self.mode == "body" else []

    def read(self, response: Response) -> Reply:
        """Parse commands. Raises `Unusable`."""
        reply = Reply([], {})
        for _ in self._steps(response, reply):
            pass
        return reply

    async def read_large(self, response: Response) -> Reply:
        """As `read`, but in turns: ten thousand commands take long."""
        reply = Reply([], {})
        done = self._executor.run(self._steps(response, reply))
        if done is not None:
            await done
        return reply

    def _steps(self, response: Response, reply: Reply) -> Iterator[None]:
        """Parse commands, and add them to `reply`. Raises `Unusable`."""
        if response.status == NO_CONTENT:
            return
        body = self._body(response)
        yield  # decoding may have taken long
        try:
            members = parsed_json(body)
        except (ValueError, RecursionError):
            raise Unusable("it is not JSON in UTF-8") from None
        if not isinstance(members, dict):
            raise Unusable("it is not a JSON object")
        del body
        reply.members.update(members)
        commands, checked = reply.commands, 0
        try:
            for _ in command_steps(members.get("commands", []), commands):
                self._executor.check(commands[checked:])
                checked = len(commands)
                yield
            self._executor.check(commands[checked:])
        except CommandError as error:
            raise Unusable(str(error)) from None

    def report(
        self,
        connection_id: str,
        event_id: str,
        why: Unusable,
        source: Source = "response",
    ) -> None:
        """Log and count a reply that cannot be used."""
        logger.warning(
            "connection %s: the reply to %s cannot be used: %s",
            connection_id,
            event_id,
            why,
            extra={"event": "bad_reply", "connection_id": connection_id},
        )
        self._observer.commanded(source, "none", "invalid", connection_id)

    def _check(self, commands: list[Command]) -> None:
        try:
            self._executor.check(commands)
        except CommandError as error:
            raise Unusable(str(error)) from None

    def _body(self, response: Response) -> bytes:
        assert response.body is not None
        if not response.complete:
            raise Unusable(
                "its body was cut off, came too late, or is larger than"
                f" --max_reply_size ({self.max_size} bytes)"
            )
        try:
            return decoded(response.headers, response.body, self.max_size)
        except MalformedResponse as error:
            raise Unusable(str(error)) from None

    def _plain(self, response: Response) -> list[Command]:
        """Return the command to send the body, text or binary as in a callback.

        Returns none if the body is empty. Raises `Unusable`.
        """
        body = self._body(response)
        if not body:
            return []
        frame: str | bytes = body
        content_type = response.headers.get("content-type", "")
        if is_text_type(content_type):
            if not has_text_charset(content_type):
                raise Unusable("the charset of a text type must be UTF-8")
            try:
                frame = body.decode()
            except UnicodeDecodeError:
                raise Unusable("a text frame must be UTF-8") from None
        commands = [Command(Send(frame), None)]
        self._check(commands)
        return commands


def is_large(response: Response) -> bool:
    """Whether reading the reply may take longer than a turn of the loop."""
    body = response.body
    return body is not None and (
        len(body) > READ_AT_ONCE or "content-encoding" in response.headers
    )


def _batch_reply(reply: Reply) -> BatchReply:
    """Return what a reply says about a batch. Raises `Unusable`."""
    commands, members = reply
    failed = members.get("failed", [])
    if not isinstance(failed, list) or not all(
        isinstance(each, str) for each in failed
    ):
        raise Unusable("failed must be a list of event ids")
    if any(command.connection_ids is None for command in commands):
        raise Unusable("a command names no connection")
    return BatchReply(commands, frozenset(failed))


def has_commands(headers: Mapping[str, str]) -> bool:
    """Whether the body of a response has the media type of commands."""
    content_type = headers.get("content-type")
    return content_type is not None and is_commands(content_type)


@lru_cache(MAX_REMEMBERED)
def is_commands(content_type: str) -> bool:
    """Whether a content type is the media type of commands, maybe with parameters."""
    return media_type_of(content_type) == MEDIA_TYPE


def make_replies(relay: Relay) -> Replies:
    """Make it from the options."""
    assert relay.executor is not None
    return Replies(
        options.reply, options.max_reply_size, relay.executor, relay.observer
    )
