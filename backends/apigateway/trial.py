"""Invokes functions for `socketdock check --send`, and says what they return.

The events are `$connect` and `$disconnect` of a connection that never existed, after
the authorizer's request: a function that stores the id also removes it. Messages are
not sent, since the relay does not know what they would do.
"""

import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import NamedTuple

import orjson

from backends import BackendError, Closure, Handshake
from backends.apigateway.answers import BadAnswer, read_answer, read_result
from backends.apigateway.authorizer import MAX_RESULT_SIZE, context_of, is_allowed
from backends.apigateway.events import Caller, FunctionEvents
from backends.apigateway.functions import InvokeTimeouts
from backends.apigateway.settings import Settings
from backends.check import Finding, Trial
from backends.client import Client, Response
from backends.events import Ended, Event, serialized
from backends.http.attempts import Attempts
from backends.target import Target

ADDRESS = "127.0.0.1"
SEE_THE_LOG = "; see the function's log"


class TestInvocation(NamedTuple):
    """A marked event for a function, and what it is for."""

    what: str
    target: Target
    event: Event


class FunctionTrial(Trial):
    """Invokes the functions in `settings` by `attempts`, whose `client` it owns."""

    def __init__(
        self,
        settings: Settings,
        events: FunctionEvents,
        client: Client,
        attempts: Attempts,
        timeouts: InvokeTimeouts,
    ) -> None:
        self._settings = settings
        self._events = events
        self._client = client
        self._attempts = attempts
        self._terms = attempts.terms(*timeouts)

    async def findings(self) -> AsyncIterator[Finding]:
        """Invoke one function after the other."""
        connection_id = secrets.token_hex(16)
        try:
            for test in self._tests(connection_id):
                yield await self._invoke(connection_id, test)
        finally:
            await self._client.close()

    def _tests(self, connection_id: str) -> list[TestInvocation]:
        settings, events = self._settings, self._events
        now = datetime.now(UTC)
        caller = Caller(ADDRESS, "", int(now.timestamp() * 1000))
        handshake = Handshake({}, f"/{settings.stage}", "", ADDRESS, ())
        ended = Ended(connection_id, Closure(1000, "", "client", 0.0))
        return [
            TestInvocation(what, target, marked(event))
            for what, target, event in (
                (
                    "authorizer",
                    settings.authorizer,
                    events.authorizer(connection_id, caller, handshake),
                ),
                (
                    "$connect",
                    settings.routes.connect,
                    events.connect(connection_id, caller, handshake),
                ),
                (
                    "$disconnect",
                    settings.routes.disconnect,
                    events.disconnect(ended, 0, 0, caller),
                ),
            )
            if target is not None
        ]

    async def _invoke(self, connection_id: str, test: TestInvocation) -> Finding:
        began = time.monotonic()
        try:
            response = await self._attempts.make(
                "connect", connection_id, test.target, test.event, self._terms
            )
            said = self._said(test.what, response)
        except BackendError as error:
            return Finding("error", f"{test.what}: {error}{SEE_THE_LOG}")
        except BadAnswer as error:
            why = f"POST {test.target}: {error}"
            return Finding("error", f"{test.what}: {why}{SEE_THE_LOG}")
        milliseconds = 1000 * (time.monotonic() - began)
        return Finding(
            "ok", f"{test.what}: POST {test.target} {said} in {milliseconds:.0f} ms"
        )

    def _said(self, what: str, response: Response) -> str:
        """Return what a function has decided. Raises `BadAnswer`."""
        if what == "authorizer":
            result = read_result(response, MAX_RESULT_SIZE)
            context_of(result)
            allows = is_allowed(result, self._events.method_arn)
            return "allowed it" if allows else "denied a client without credentials"
        if what == "$connect":
            answer = read_answer(response)
            if answer.accepts:
                return "accepted"
            return f"refused a client without credentials with {answer.status}"
        read_result(response)
        return "answered"


def marked(event: Event) -> Event:
    """Return `event` with a mark in its body, so that a function can ignore it."""
    content = orjson.loads(bytes(event.body))
    content["requestContext"]["test"] = True
    return event.with_body(serialized(content))
