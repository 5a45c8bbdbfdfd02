"""Events as HTTP requests: what the backend service reads.

Shapes and headers are the contract's; `backends.client` sends the bytes.
"""

import base64
import random
import time
from collections.abc import Callable
from mmap import mmap
from typing import Any, NamedTuple

import orjson

from backends import Closure, Handshake, Relay, TraceContext
from backends.http.signature import Signer
from backends.target import Target


class Event(NamedTuple):
    """One event, the same on each attempt: its webhook-id, its JSON body, its span.

    `trace` is what that span belongs to, where there is something. The body may be
    kept for long, and takes no more memory than its length says.
    """

    id: str
    body: bytes | mmap
    traceparent: str
    trace: TraceContext | None


class EventWriter:
    """Writes the events of one relay, and each attempt as one whole request."""

    def __init__(self, relay: Relay) -> None:
        self._callback_url = relay.callback_url
        self._sample = relay.sample
        self._instance = relay.instance
        # Within, and with, the quotes of JSON.
        self._quoted_url = orjson.dumps(f"{relay.callback_url}").decode()[1:-1]
        self._quoted_instance = orjson.dumps(relay.instance).decode()
        self._user_agent = f"SocketDock/{relay.version}"
        self._headers = b""
        self._signer: Signer | None = None
        self._heads: dict[Target, bytes] = {}

    def present(self, headers: bytes, signer: Signer | None) -> None:
        """From now on, requests carry these lines, and signatures of that signer."""
        self._headers, self._signer = headers, signer
        self._heads.clear()

    def meta(self, connection_id: str) -> dict[str, Any]:
        """The members of `meta` that every event to a live connection has."""
        socket_url = f"{self._callback_url}/socket/{connection_id}"
        return {
            "connection_id": connection_id,
            "send": f"{socket_url}/send",
            "disconnect": f"{socket_url}/disconnect",
            "instance": self._instance,
        }

    def connect(self, connection_id: str, handshake: Handshake) -> Event:
        """Asks for a verdict."""
        meta = self.meta(connection_id)
        meta["headers"] = dict(handshake.headers)
        meta["path"] = handshake.path
        meta["query"] = handshake.query
        meta["remote_ip"] = handshake.remote_ip
        meta["subprotocols"] = list(handshake.subprotocols)
        body = serialized({"meta": meta})
        return self._event(f"{connection_id}-connect", body, handshake.trace)

    def message(
        self,
        connection_id: str,
        number: int,
        message: str | bytes,
        trace: TraceContext | None,
    ) -> Event:
        """Carries a connection's message of that number."""
        message_id = f"{connection_id}-{number}"
        if isinstance(message, str):
            rest, text = '"text"', message
        else:
            rest = '"binary"'
            try:
                text = message.decode()
            except UnicodeDecodeError:
                rest = '"binary","encoding":"base64"'
                text = base64.b64encode(message).decode()
        # As orjson would write it: of these members, only the ids change.
        url = f"{self._quoted_url}/socket/{connection_id}"
        meta = (
            f'{{"meta":{{"connection_id":"{connection_id}","send":"{url}/send",'
            f'"disconnect":"{url}/disconnect","instance":{self._quoted_instance},'
            f'"message_id":"{message_id}","type":{rest}}},"message":'
        )
        body = b"".join((meta.encode(), orjson.dumps(text), b"}"))  # see serialized()
        return self._event(message_id, body, trace)

    def disconnect(
        self,
        connection_id: str,
        closure: Closure,
        undelivered: int,
        refused: int,
        trace: TraceContext | None,
        instance: str | None = None,
    ) -> Event:
        """Tells of a connection's end; of an earlier `instance`'s, if given."""
        meta = {
            "connection_id": connection_id,
            "instance": instance or self._instance,
            "code": closure.code,
            "reason": closure.reason,
            "initiator": closure.initiator,
            "duration": round(closure.duration, 3),
            "undelivered": undelivered,
            "refused": refused,
        }
        event = {"connection_id": connection_id, "meta": meta}
        return self._event(f"{connection_id}-disconnect", serialized(event), trace)

    def _event(self, event_id: str, body: bytes, trace: TraceContext | None) -> Event:
        return Event(event_id, body, traceparent(trace, self._sample), trace)

    def request(self, target: Target, event: Event) -> bytes:
        """One attempt to deliver `event`, of now."""
        event_id, timestamp, signature = event.id.encode(), int(time.time()), b""
        body = bytes(event.body)  # no copy, unless it was held
        if self._signer is not None:
            signature = b"webhook-signature: %b\r\n" % self._signer.signatures(
                event_id, timestamp, body
            )
        return (
            b"%bwebhook-id: %b\r\nwebhook-timestamp: %d\r\n%b"
            b"traceparent: %b\r\nContent-Length: %d\r\n\r\n%b"
        ) % (
            self._head(target),
            event_id,
            timestamp,
            signature,
            event.traceparent.encode(),
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
                "Accept-Encoding: identity\r\n"
                "Content-Type: application/json; charset=utf-8\r\n"
            ).encode() + self._headers
        return head


def serialized(value: object) -> bytes:
    """JSON, in memory of its own size.

    What `orjson.dumps` returns has all the memory that was reserved for it, up to
    ten times its length.
    """
    return bytes(memoryview(orjson.dumps(value)))


def traceparent(
    trace: TraceContext | None, sample: Callable[[str], bool] | None = None
) -> str:
    """A new span of `trace`, or of a new one (W3C Trace Context, level 2).

    A new one is recorded where `sample` says so of its id. Not of the system's
    randomness, which is a call of it for each message: these ids are to differ,
    not to be secret.
    """
    if trace is not None:
        return f"00-{trace.trace_id}-{random.randbytes(8).hex()}-{trace.flags}"
    ids = random.randbytes(24).hex()
    flags = "01" if sample is not None and sample(ids[:32]) else "00"
    return f"00-{ids[:32]}-{ids[32:]}-{flags}"
