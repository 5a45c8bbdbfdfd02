"""Sends a test event to each URL, for `socketdock check --send`.

The events are those of a connection that never existed. They have the mark `meta.test`,
and are signed and answered like others. `check` finds out before whether their hosts
are reached.
"""

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from backends import (
    BackendAway,
    BackendError,
    Closure,
    EventName,
    Handshake,
    Relay,
)
from backends.check import Finding, Trial
from backends.client import Client, Response
from backends.commands import MEDIA_TYPE, Command
from backends.events import Ended, Event, EventWriter, serialized
from backends.heartbeat import heartbeat_event
from backends.http.attempts import Attempts
from backends.http.content import parsed_json
from backends.http.decisions import REFUSALS
from backends.http.replies import Replies, Unusable, has_commands
from backends.http.retries import hint, is_success
from backends.media_types import is_text_type, media_type_of
from backends.target import Target

MESSAGE = "a test of socketdock check --send"
TIMEOUT = 10.0  # seconds for each answer, unless the options have a shorter one
MAX_SHOWN = 60  # characters of a media type
NOT_FOUND = 404
SEE_THE_LOG = "; see the backend's log"

# What the relay reads commands in.
WITH_COMMANDS = ("--connecturi", "--messageuri", "--batchuri")


class TestEvent(NamedTuple):
    """A marked event for the URL in an option."""

    option: str
    target: Target
    event: Event


class HTTPTrial(Trial):
    """Sends test events to `targets` and reads the answers; both are by option.

    `timeouts` are in seconds; 0: `TIMEOUT`. It owns `client`, which `attempts` use.
    """

    def __init__(
        self,
        relay: Relay,
        targets: Mapping[str, Target],
        client: Client,
        attempts: Attempts,
        replies: Replies,
        timeouts: Mapping[str, float],
    ) -> None:
        self._relay = relay
        self._targets = targets
        self._client = client
        self._attempts = attempts
        self._replies = replies
        self._timeouts = timeouts

    async def findings(self) -> AsyncIterator[Finding]:
        """Send each event when the one before was answered, as the relay does."""
        connection_id = secrets.token_hex(16)
        try:
            for test in self._tests(connection_id):
                yield await self._send(connection_id, test)
        finally:
            await self._client.close()

    def _tests(self, connection_id: str) -> Iterator[TestEvent]:
        events = EventWriter(self._relay)
        handshake = Handshake({}, "/ws", "", "127.0.0.1", ())
        ended = Ended(connection_id, Closure(1000, "", "client", 0.0))
        connect = marked(events.connect(connection_id, handshake))
        message = marked(events.message(connection_id, 1, MESSAGE, None))
        disconnect = marked(events.disconnect(ended, 0, 0))
        for option, event in (
            ("--connecturi", connect),
            ("--messageuri", message),
            ("--disconnecturi", disconnect),
            ("--batchuri", batch({"message": message, "disconnect": disconnect})),
            ("--instanceuri", marked(heartbeat_event(self._relay, 1, ttl=0))),
        ):
            if (target := self._targets.get(option)) is not None:
                yield TestEvent(option, target, event)

    async def _send(self, connection_id: str, test: TestEvent) -> Finding:
        loop = self._client.loop
        began = loop.time()
        try:
            response = await self._attempts.make(
                "message",
                connection_id,
                test.target,
                test.event,
                self._attempts.terms(
                    min(self._timeouts.get(test.option) or TIMEOUT, TIMEOUT),
                    keep=lambda status, headers: self._replies.max_size,
                ),
            )
        except BackendAway as error:
            return Finding("error", f"{test.option}: {error}{SEE_THE_LOG}")
        except BackendError as error:
            why = f"{error}{SEE_THE_LOG}, unless the backend holds answers"
            return Finding("warning", f"{test.option}: {why}")
        what = (
            f"{test.option}: POST {test.target} answered {response.status} in"
            f" {1000 * (loop.time() - began):.0f} ms"
        )
        if is_success(response.status):
            return self._accepted(test.option, what, response)
        if test.option == "--connecturi" and response.status in REFUSALS - {NOT_FOUND}:
            return Finding("ok", f"{what}: it refuses a client without credentials")
        return Finding("warning", f"{what}{hint(response.status) or SEE_THE_LOG}")

    def _accepted(self, option: str, what: str, response: Response) -> Finding:
        """Return the finding about the reply; the body is not shown."""
        try:
            commands = self._commands(option, response)
        except Unusable as error:
            why = str(error).removesuffix(".")
            return Finding("warning", f"{what}, but its reply is unusable: {why};"
                                      " correct it")
        members = members_of(response)
        if option == "--connecturi" and members.get("subprotocol") is not None:
            return Finding("warning", f"{what}, but chooses a subprotocol that was not"
                                      " offered: a client would get 503; choose one of"
                                      " meta.subprotocols")
        if commands:
            return Finding("ok", f"{what}: {counted(commands)}")
        if not response.body:
            return Finding("ok", what)
        media_type = shown(response.headers.get("content-type", ""))
        what = f"{what}: {len(response.body)} bytes of {media_type}"
        if option not in WITH_COMMANDS:
            return Finding("ok", what)
        if "commands" in members:
            if self._replies.mode == "off":
                remedy = "set --reply=commands"
            elif has_commands(response.headers):
                return Finding("ok", f"{what}, without commands")
            else:
                remedy = f"make the Content-Type {MEDIA_TYPE}"
            return Finding("warning", f"{what}, whose commands are ignored; {remedy}")
        return Finding("ok", f"{what}, without commands")

    def _commands(self, option: str, response: Response) -> Sequence[Command]:
        """Return what the relay would carry out. Raises `Unusable`."""
        replies = self._replies
        if option == "--messageuri" and replies.mode != "off":
            return replies.of_response(response)
        if not has_commands(response.headers):
            return ()
        if option == "--connecturi" and replies.mode != "off":
            return replies.read(response).commands
        if option == "--batchuri":
            reply = replies.read_batch(response)
            if reply.failed:
                raise Unusable("it names failed events")
            return reply.commands if replies.mode != "off" else ()
        return ()


def marked(event: Event) -> Event:
    """Return `event` with the mark in its body, so that a backend can ignore it."""
    content = orjson.loads(bytes(event.body))
    content["meta"]["test"] = True
    return event.with_body(serialized(content))


def batch(events: Mapping[EventName, Event]) -> Event:
    """Return a batch of events, as `backends.http.batches` sends them."""
    listed: list[dict[str, Any]] = [
        {"event": name, "id": event.id, "traceparent": event.traceparent}
        | orjson.loads(bytes(event.body))
        for name, event in events.items()
    ]
    first = next(iter(events.values()))
    body = serialized({"events": listed})
    return Event(f"{first.id}-batch", body, first.traceparent, first.trace)


def counted(commands: Sequence[Command]) -> str:
    """Return the number of commands of each kind, such as `commands: 2 send`."""
    counts = Counter(command.action.name for command in commands)
    return "commands: " + ", ".join(f"{n} {name}" for name, n in counts.items())


def members_of(response: Response) -> Mapping[str, Any]:
    """Return the members of a JSON object; none of a body that is no such text."""
    if not is_text_type(response.headers.get("content-type", "text/plain")):
        return {}
    try:
        members = parsed_json(response.body or b"")
    except (ValueError, RecursionError):
        return {}
    return members if isinstance(members, Mapping) else {}


def shown(content_type: str) -> str:
    """Return a media type, which the backend chose, for a terminal."""
    media_type = media_type_of(content_type)[:MAX_SHOWN]
    return media_type if media_type.isprintable() and media_type else "no media type"
