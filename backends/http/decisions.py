"""The backend's decision on a handshake: the connect event and its response."""

import re
from collections.abc import Mapping, Sequence

from tornado.options import define

from backends import BackendError, ConnectionRefused
from backends.client import Response
from backends.client.response import MAX_KEPT_BODY, MalformedResponse
from backends.events import Event
from backends.http.attempts import Attempts
from backends.http.content import decoded, parsed_json
from backends.http.replies import Replies, Unusable, has_commands
from backends.http.retries import hint, is_success
from backends.target import Target

define("connecturi", type=str, group=__name__, metavar="URL",
       help="URL that decides whether each connection is accepted; none: accept all")
define("handshake_timeout", default=10.0, group=__name__, metavar="SECONDS",
       help="longest wait for the response of --connecturi; then the client gets 503")

MAX_REFUSAL_BODY = 4096  # bytes of a refusal's body that the client gets

# Statuses of a refusal, which the client gets; other statuses are not a decision.
REFUSALS = frozenset({401, 403, 404, 429})
REFUSAL_HEADERS = ("content-type", "www-authenticate", "retry-after")
CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")


class Decisions:
    """Asks `target` for each decision, with one attempt; None: accepts every client."""

    def __init__(
        self,
        target: Target | None,
        attempts: Attempts,
        replies: Replies,
        timeout: float,
    ) -> None:
        self.target = target
        self._attempts = attempts
        self._replies = replies
        self._terms = attempts.terms(timeout, keep=replies.of_connect)

    async def ask(
        self, connection_id: str, event: Event, offered: Sequence[str]
    ) -> str | None:
        """Return the one of the `offered` subprotocols that the backend chose, or None.

        Carries out the commands in the response. Raises `ConnectionRefused` if it
        refuses, and `BackendError` if there is no decision in time.
        """
        target = self.target
        assert target is not None
        response = await self._attempts.make(
            "connect", connection_id, target, event, self._terms
        )
        if response.status in REFUSALS:
            raise refusal(response)
        if not is_success(response.status):
            raise BackendError(
                f"POST {target}: answered {response.status}{hint(response.status)}"
            )
        reply = None
        if self._replies.mode != "off" and has_commands(response.headers):
            try:
                reply = await self._replies.read_large(response)
            except Unusable as error:
                self._replies.report(connection_id, event.id, error)
                return None
            subprotocol = chosen_subprotocol(reply.members)
        elif not response.body:
            return None  # the usual case: accepted without a word
        else:
            try:
                subprotocol = chosen_subprotocol(parsed_json(body_of(response)))
            except ValueError:
                return None  # not JSON, such as "OK": accepted nevertheless
            except MalformedResponse as error:
                raise BackendError(f"POST {target}: {error}") from error
        if subprotocol is not None and subprotocol not in offered:
            raise BackendError("the backend chose a subprotocol that was not offered")
        if reply is not None:
            await self._replies.carry_out_decision(connection_id, reply)
        return subprotocol


def refusal(response: Response) -> ConnectionRefused:
    """Return the backend's refusal, with the headers and body that the client gets.

    A body that cannot be decoded is omitted.
    """
    try:
        body = body_of(response)
    except MalformedResponse:
        body = b""
    return ConnectionRefused(
        response.status,
        {
            # RFC 9110, section 5.5: control characters are replaced with spaces.
            name: CONTROLS.sub(" ", response.headers[name]).strip()
            for name in REFUSAL_HEADERS
            if name in response.headers
        },
        body[:MAX_REFUSAL_BODY],
    )


def body_of(response: Response) -> bytes:
    """Return the decoded body. Raises `MalformedResponse`."""
    return decoded(response.headers, response.body or b"", MAX_KEPT_BODY)


def chosen_subprotocol(decision: object) -> str | None:
    """Return the `subprotocol` of parsed JSON, if there is one."""
    if not isinstance(decision, Mapping) or decision.get("subprotocol") is None:
        return None
    if not isinstance(decision["subprotocol"], str):
        raise BackendError("the backend's subprotocol is not a string")
    return decision["subprotocol"]
