"""Events as HTTP requests: what the backend service reads.

Shapes and headers are the contract's; `backends.http.client` sends the bytes.
"""

import base64
import time
from collections.abc import Mapping
from typing import Any

import orjson

from backends import Closure, Handshake, Relay
from backends.http.client import Target


class EventWriter:
    """Writes the events of one relay, each as one whole request."""

    def __init__(self, relay: Relay) -> None:
        self._callback_url = relay.callback_url
        self._instance = relay.instance
        self._user_agent = f"SocketDock/{relay.version}"
        self._heads: dict[Target, bytes] = {}

    def meta(self, connection_id: str) -> dict[str, Any]:
        """The members of `meta` that every event to a live connection has."""
        socket_url = f"{self._callback_url}/socket/{connection_id}"
        return {
            "connection_id": connection_id,
            "send": f"{socket_url}/send",
            "disconnect": f"{socket_url}/disconnect",
            "instance": self._instance,
        }

    def connect(
        self, target: Target, connection_id: str, handshake: Handshake
    ) -> bytes:
        """The request that asks for a verdict."""
        meta = self.meta(connection_id)
        meta["headers"] = dict(handshake.headers)
        meta["path"] = handshake.path
        meta["query"] = handshake.query
        meta["remote_ip"] = handshake.remote_ip
        meta["subprotocols"] = list(handshake.subprotocols)
        return self._request(target, f"{connection_id}-connect", {"meta": meta})

    def message(
        self, target: Target, connection_id: str, number: int, message: str | bytes
    ) -> bytes:
        """The request that carries a connection's message of that number."""
        meta = self.meta(connection_id)
        meta["message_id"] = message_id = f"{connection_id}-{number}"
        if isinstance(message, str):
            meta["type"], text = "text", message
        else:
            meta["type"] = "binary"
            try:
                text = message.decode()
            except UnicodeDecodeError:
                meta["encoding"] = "base64"
                text = base64.b64encode(message).decode()
        return self._request(target, message_id, {"meta": meta, "message": text})

    def disconnect(
        self,
        target: Target,
        connection_id: str,
        closure: Closure,
        refused: int,
    ) -> bytes:
        """The request that tells of a connection's end."""
        meta = {
            "connection_id": connection_id,
            "instance": self._instance,
            "code": closure.code,
            "reason": closure.reason,
            "initiator": closure.initiator,
            "duration": round(closure.duration, 3),
            "undelivered": closure.undelivered,
            "refused": refused,
        }
        event = {"connection_id": connection_id, "meta": meta}
        return self._request(target, f"{connection_id}-disconnect", event)

    def _request(
        self, target: Target, event_id: str, event: Mapping[str, Any]
    ) -> bytes:
        body = orjson.dumps(event)
        return (
            b"%bwebhook-id: %b\r\nwebhook-timestamp: %d\r\n"
            b"Content-Length: %d\r\n\r\n%b"
        ) % (
            self._head(target),
            event_id.encode(),
            time.time(),
            len(body),
            body,
        )

    def _head(self, target: Target) -> bytes:
        head = self._heads.get(target)
        if head is None:
            head = self._heads[target] = (
                f"POST {target.path} HTTP/1.1\r\n"
                f"Host: {target.authority}\r\n"
                f"User-Agent: {self._user_agent}\r\n"
                "Accept: */*\r\n"
                "Content-Type: application/json; charset=utf-8\r\n"
            ).encode()
        return head
