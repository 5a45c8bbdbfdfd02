"""Divides commands among the instances that have their connections.

`shared_bulk` does so for bulk callbacks, `outgoing` for commands in responses.
"""

import binascii
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import orjson

from backends.commands import NORMAL_CLOSURE, PONG, Action, Close, Command, Send
from backends.events import serialized
from handlers.callbacks.bulk import JSON, PATH
from handlers.callbacks.peers.forward import Forwarder
from handlers.callbacks.peers.forwarded import STATUSES, Forwarded
from handlers.callbacks.responses import Response
from handlers.owners import Address


class Part:
    """The commands for the connections of one instance; None: of this one.

    `indexes` are the places of their results among all.
    """

    __slots__ = ("commands", "indexes", "owner")

    def __init__(self, owner: Address | None) -> None:
        self.owner = owner
        self.commands: list[Command] = []
        self.indexes = array("I")

    def body(self, request: bytes | None = None) -> bytes:
        """Return the body of a bulk callback with these commands.

        With `request`, the body of the whole bulk callback, a repeat of the part is one
        of the whole: it has the same body only if all others are the same.
        """
        document: dict[str, Any] = {}
        if request is not None:
            document["request"] = hashlib.sha256(request).hexdigest()
        document["commands"] = [
            {"connection_ids": command.connection_ids, **_as_json(command.action)}
            for command in self.commands
        ]
        return serialized(document)

    def callback(
        self, send_timeout: float, body: bytes, key: str = "", traceparent: str = ""
    ) -> Forwarded:
        """Return the request for the owner."""
        receipts = (
            command.action.receipt or 0.0
            for command in self.commands
            if isinstance(command.action, Send)
        )
        longest = max(send_timeout, *receipts, 0.0)
        return Forwarded(
            "POST", PATH, JSON, longest, key, body, traceparent=traceparent
        )


class Parts:
    """Commands by the owner of their connections, as far as they are divided."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._by_owner: dict[Address | None, Part] = {}
        self.pairs = 0

    def __iter__(self) -> Iterator[Part]:
        return iter(self._by_owner.values())

    def __len__(self) -> int:
        return len(self._by_owner)

    def divide(self, commands: Sequence[Command]) -> Iterator[None]:
        """Divide commands that name their connections; it yields after each of these.

        For each owner the order of the commands, and of their connections, stays.
        """
        for command in commands:
            divided: dict[Address | None, list[str]] = {}
            for connection_id in command.connection_ids or ():
                owner = self._forwarder.owner_of(connection_id)
                part = self._by_owner.get(owner)
                if part is None:
                    part = self._by_owner[owner] = Part(owner)
                ids = divided.get(owner)
                if ids is None:
                    ids = divided[owner] = []
                    part.commands.append(Command(command.action, ids))
                ids.append(connection_id)
                part.indexes.append(self.pairs)
                self.pairs += 1
                yield


def statuses_in(answer: Response, number: int) -> Sequence[int]:
    """Return the statuses in an owner's answer to `number` pairs.

    Without results each pair has the status of the answer.
    """
    if answer.status == HTTPStatus.OK:
        try:
            results = orjson.loads(answer.body)["results"]
            statuses = array("H", [each["status"] for each in results])
        except (ValueError, TypeError, KeyError, OverflowError):
            statuses = array("H")
        if len(statuses) == number and all(each in STATUSES for each in statuses):
            return statuses
        return array("H", [HTTPStatus.GATEWAY_TIMEOUT] * number)
    return array("H", [answer.status] * number)


def _as_json(action: Action) -> dict[str, Any]:
    """Return the members of a command that say what it does."""
    if isinstance(action, Send):
        members: dict[str, Any] = {"send": action.message}
        if isinstance(action.message, bytes):
            members = _binary(action.message)
        if action.receipt is not None:
            members |= {"receipt": PONG, "timeout": action.receipt}
        return members
    if isinstance(action, Close):
        if action.code == NORMAL_CLOSURE and not action.reason:
            return {"close": True}
        return {"close": {"code": action.code, "reason": action.reason}}
    return {"state": None if action.state is None else orjson.Fragment(action.state)}


def _binary(message: bytes) -> dict[str, Any]:
    """Return a binary frame in the shorter form; see `backends.events`."""
    try:
        return {"send": message.decode(), "type": "binary"}
    except UnicodeDecodeError:
        text = binascii.b2a_base64(message, newline=False).decode()
        return {"send": text, "type": "binary", "encoding": "base64"}
