"""Events in the format of API Gateway's Lambda proxy integration for WebSocket APIs.

An event is the body of a request that invokes a function. `backends.events` has the
events of the other backends.
"""

import base64
import random
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from backends import Closure, Connection, Handshake, Relay, TraceContext
from backends.apigateway.routes import CONNECT, DISCONNECT
from backends.events import Ended, Event, serialized, traceparent

# Of API Gateway for clients that send none; other closures have the client's text.
REASONS = {
    1005: "Client-side close frame status not set",
    1006: "Connection closed abnormally",
}
# For a connection of an earlier run, of which only the id is known.
UNKNOWN_ADDRESS = "0.0.0.0"
FORWARDED_FOR = "x-forwarded-for"
# Parts of the method's ARN that nobody but AWS has.
REGION, ACCOUNT = "us-east-1", "123456789012"


class Caller(NamedTuple):
    """What each event repeats of a connection's handshake.

    `connected_at` is in milliseconds since 1970, `authorizer` what the authorizer
    returned, None: nobody was asked.
    """

    source_ip: str
    user_agent: str
    connected_at: int
    authorizer: Mapping[str, Any] | None = None


class FunctionEvents:
    """Makes the events of one stage."""

    def __init__(
        self, relay: Relay, stage: str, api_id: str, domain_name: str
    ) -> None:
        self._sample = relay.sample
        self._stage = stage
        self._api_id = api_id
        self._domain_name = domain_name
        self.method_arn = (
            f"arn:aws:execute-api:{REGION}:{ACCOUNT}:{api_id}/{stage}/{CONNECT}"
        )

    def caller(self, connection: Connection, handshake: Handshake) -> Caller:
        """Return what later events repeat of this handshake."""
        return Caller(
            handshake.remote_ip,
            handshake.headers.get("user-agent", ""),
            int(connection.connected_at.timestamp() * 1000),
        )

    def authorizer(
        self, connection_id: str, caller: Caller, handshake: Handshake
    ) -> Event:
        """Make the request to the authorizer."""
        content = {
            "type": "REQUEST",
            "methodArn": self.method_arn,
            **_of_handshake(handshake),
            "stageVariables": {},
            "requestContext": self._context(connection_id, caller, CONNECT, "CONNECT"),
        }
        # Functions expect these, as an authorizer may read them without a check.
        content.setdefault("queryStringParameters", {})
        content.setdefault("multiValueQueryStringParameters", {})
        return self._event(f"{connection_id}-authorizer", content, handshake.trace)

    def connect(
        self, connection_id: str, caller: Caller, handshake: Handshake
    ) -> Event:
        """Make the event of `$connect`."""
        content = {
            **_of_handshake(handshake),
            "requestContext": self._context(connection_id, caller, CONNECT, "CONNECT"),
            "isBase64Encoded": False,
        }
        return self._event(f"{connection_id}-connect", content, handshake.trace)

    def message(
        self,
        connection: Connection,
        caller: Caller,
        number: int,
        route_key: str,
        message: str | bytes,
    ) -> Event:
        """Make the event of a message; `number` counts from 1."""
        event_id = f"{connection.id}-{number}"
        context = self._context(connection.id, caller, route_key, "MESSAGE")
        context["messageId"] = event_id
        body = message
        if isinstance(message, bytes):
            body = base64.b64encode(message).decode()
        content = {
            "requestContext": context,
            "body": body,
            "isBase64Encoded": body is not message,
        }
        return self._event(event_id, content, connection.trace)

    def disconnect(
        self,
        ended: Ended,
        undelivered: int,
        refused: int,
        caller: Caller | None = None,
    ) -> Event:
        """Make the event of `$disconnect`, which has no place for the counts.

        Without a `caller` the connection was one of an earlier run.
        """
        if caller is None:
            caller = Caller(UNKNOWN_ADDRESS, "", 0)
        context = self._context(ended.id, caller, DISCONNECT, "DISCONNECT")
        context["disconnectStatusCode"] = ended.closure.code
        context["disconnectReason"] = _reason(ended.closure)
        content = {
            # API Gateway does not repeat those of the handshake.
            **_headers(
                [
                    ("Host", self._domain_name),
                    ("x-api-key", ""),
                    ("X-Forwarded-For", ""),
                    ("x-restapi", ""),
                ]
            ),
            "requestContext": context,
            "isBase64Encoded": False,
        }
        return self._event(f"{ended.id}-disconnect", content, ended.trace)

    def _context(
        self, connection_id: str, caller: Caller, route_key: str, event_type: str
    ) -> dict[str, Any]:
        now = time.time()
        request_id = base64.urlsafe_b64encode(random.randbytes(11)).decode()
        context: dict[str, Any] = {
            "routeKey": route_key,
            "eventType": event_type,
            "extendedRequestId": request_id,
            "requestTime": _clf_time(int(now)),
            "messageDirection": "IN",
            "stage": self._stage,
            "connectedAt": caller.connected_at,
            "requestTimeEpoch": int(now * 1000),
            "identity": {"sourceIp": caller.source_ip},
            "requestId": request_id,
            "domainName": self._domain_name,
            "connectionId": connection_id,
            "apiId": self._api_id,
        }
        if caller.user_agent:
            context["identity"]["userAgent"] = caller.user_agent
        if caller.authorizer is not None:
            context["authorizer"] = caller.authorizer
        return context

    def _event(
        self, event_id: str, content: Mapping[str, Any], trace: TraceContext | None
    ) -> Event:
        return Event(
            event_id, serialized(content), traceparent(trace, self._sample), trace
        )


class ConnectionEnd(NamedTuple):
    """Makes the last event of one connection: a `DisconnectEvents`."""

    events: FunctionEvents
    caller: Caller | None

    def disconnect(self, ended: Ended, undelivered: int, refused: int) -> Event:
        """Make the event of `$disconnect`."""
        return self.events.disconnect(ended, undelivered, refused, self.caller)


@lru_cache(maxsize=4)
def _clf_time(now: int) -> str:
    """Return a time as in the common log format, in UTC."""
    return time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now))


def _reason(closure: Closure) -> str:
    return closure.reason or REASONS.get(closure.code, "")


def _of_handshake(handshake: Handshake) -> dict[str, Any]:
    """Return headers and query; without a query its members are missing."""
    content = _headers(
        [
            *(field for field in handshake.fields if field[0].lower() != FORWARDED_FOR),
            # API Gateway adds it; a client's own value would only look like that.
            ("X-Forwarded-For", handshake.remote_ip),
        ]
    )
    query = parse_qsl(handshake.query, keep_blank_values=True)
    if query:
        content["queryStringParameters"] = dict(query)  # the last of each name
        content["multiValueQueryStringParameters"] = _lists(query)
    return content


def _headers(headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    lists = _lists(headers, ignore_case=True)
    return {
        "headers": {name: values[-1] for name, values in lists.items()},
        "multiValueHeaders": lists,
    }


def _lists(
    pairs: Iterable[tuple[str, str]], ignore_case: bool = False
) -> dict[str, list[str]]:
    """Return all values by name; if cases are ignored, the first spelling counts."""
    names: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    for name, value in pairs:
        key = names.setdefault(name.lower(), name) if ignore_case else name
        lists.setdefault(key, []).append(value)
    return lists
