"""The REQUEST authorizer: who may connect.

It is asked once for each handshake, before `$connect`. What it returns as `context` is
in every later event of the connection.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any
from urllib.parse import parse_qs

from tornado.options import Error as OptionError
from tornado.options import options

from backends import BackendError, ConnectionRefused, Handshake
from backends.apigateway.answers import (
    FORBIDDEN,
    SERVER_ERROR,
    BadAnswer,
    FunctionFailed,
    read_result,
)
from backends.apigateway.decisions import error_refusal
from backends.apigateway.events import Caller, FunctionEvents
from backends.apigateway.functions import InvokeTimeouts
from backends.events import Event
from backends.http.attempts import Attempts
from backends.target import Target

logger = logging.getLogger(__name__)

MAX_RESULT_SIZE = 8 * 1024  # bytes; API Gateway's for what an authorizer returns
UNAUTHORIZED = "Unauthorized"  # the error of a function that asks for a 401
# Members of a Statement that would change what it means.
UNSUPPORTED = frozenset({"Condition", "NotAction", "NotResource"})
ACTION = "execute-api:Invoke"
SOURCE = re.compile(r"route\.request\.(header|querystring)\.(.+)")


class Authorizer:
    """Invokes the function at `target` for each handshake.

    `identity` has the sources that a handshake must have.
    """

    def __init__(
        self,
        target: Target,
        identity: Sequence[tuple[str, str]],
        events: FunctionEvents,
        attempts: Attempts,
        timeouts: InvokeTimeouts,
    ) -> None:
        self.target = target
        self._identity = identity
        self._events = events
        self._attempts = attempts
        self._terms = attempts.terms(*timeouts)

    async def ask(
        self, connection_id: str, caller: Caller, handshake: Handshake
    ) -> dict[str, Any]:
        """Return `requestContext.authorizer` of later events.

        Raises `ConnectionRefused`: 401 without an identity, 403 if access is denied,
        500 if there is no valid answer.
        """
        event = self._events.authorizer(connection_id, caller, handshake)
        if not self._has_identity(handshake):
            raise error_refusal(401, UNAUTHORIZED, connection_id, event)
        began = monotonic()
        try:
            response = await self._attempts.make(
                "connect",
                connection_id,
                self.target,
                event,
                self._terms,
            )
            result = read_result(response, MAX_RESULT_SIZE)
            context = context_of(result)
            allowed = is_allowed(result, self._events.method_arn)
        except FunctionFailed as failed:
            if failed.error == UNAUTHORIZED:
                raise error_refusal(401, UNAUTHORIZED, connection_id, event) from None
            raise self._broken(connection_id, event, failed) from failed
        except (BackendError, BadAnswer) as error:
            raise self._broken(connection_id, event, error) from error
        if not allowed:
            raise error_refusal(403, FORBIDDEN, connection_id, event)
        context["integrationLatency"] = round((monotonic() - began) * 1000)
        return context

    def _has_identity(self, handshake: Handshake) -> bool:
        query = parse_qs(handshake.query)
        headers = {name.lower() for name, value in handshake.fields if value}
        return all(
            name.lower() in headers if kind == "header" else any(query.get(name, ()))
            for kind, name in self._identity
        )

    def _broken(
        self, connection_id: str, event: Event, error: Exception
    ) -> ConnectionRefused:
        logger.warning(
            "connection %s: authorizer %s: %s", connection_id, self.target, error,
            extra={"connection_id": connection_id},
        )
        return error_refusal(500, SERVER_ERROR, connection_id, event)


def context_of(result: Any) -> dict[str, Any]:
    """Return the context and `principalId` that an authorizer returned.

    As on AWS, the values are strings. Raises `BadAnswer`.
    """
    if not isinstance(result, dict):
        raise BadAnswer("it returned no JSON object")
    principal, context = result.get("principalId"), result.get("context")
    if not isinstance(principal, str):
        raise BadAnswer("it returned no principalId")
    if context is None:
        context = {}
    if not isinstance(context, dict):
        raise BadAnswer("its context is not an object")
    found = {
        name: _as_string(value) for name, value in context.items() if value is not None
    }
    return found | {"principalId": principal}


def _as_string(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise BadAnswer("its context has a value that is no string, number or boolean")


def is_allowed(result: Mapping[str, Any], method_arn: str) -> bool:
    """Whether a policy allows to invoke `method_arn`: what denies it counts first.

    Raises `BadAnswer` if the policy is malformed.
    """
    policy = result.get("policyDocument")
    statements = policy.get("Statement") if isinstance(policy, dict) else None
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list):
        raise BadAnswer("it returned no policyDocument with a Statement")
    effects = set()
    for statement in statements:
        if not isinstance(statement, dict):
            raise BadAnswer("a Statement of its policyDocument is not an object")
        if unknown := UNSUPPORTED.intersection(statement):
            raise BadAnswer(f"its policyDocument has {min(unknown)}: not supported")
        if _matches(statement, "Action", ACTION.lower()) and _matches(
            statement, "Resource", method_arn
        ):
            effect = statement.get("Effect")
            if effect not in ("Allow", "Deny"):
                raise BadAnswer("an Effect of its policyDocument is not Allow or Deny")
            effects.add(effect)
    return effects == {"Allow"}


def _matches(statement: Mapping[str, Any], member: str, value: str) -> bool:
    """Whether one of the patterns in a member matches; `*` and `?` are wildcards."""
    patterns = statement.get(member)
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if not isinstance(pattern, str):
            raise BadAnswer(f"a {member} of its policyDocument is not a string")
        if matches_pattern(pattern.lower() if member == "Action" else pattern, value):
            return True
    return False


def matches_pattern(pattern: str, value: str) -> bool:
    """Whether `value` matches; the time is at most the product of both lengths."""
    p = v = 0
    star, resume = -1, 0  # the last * and where the value goes on behind it
    while v < len(value):
        if p < len(pattern) and pattern[p] == "*":
            star, resume = p, v
            p += 1
        elif p < len(pattern) and pattern[p] in ("?", value[v]):
            p += 1
            v += 1
        elif star >= 0:
            resume += 1
            p, v = star + 1, resume
        else:
            return False
    return not pattern[p:].strip("*")


def identity_sources() -> list[tuple[str, str]]:
    """Read `--authorizer_identity`: kinds and names. Raises `OptionError`."""
    found = []
    for source in options.authorizer_identity:
        match = SOURCE.fullmatch(source)
        if match is None:
            raise OptionError(
                f"--authorizer_identity={source} is not like"
                " route.request.header.Authorization or"
                " route.request.querystring.token"
            )
        found.append((match[1], match[2]))
    return found
