"""The events of connections, whatever transport takes them to a backend.

Their ids and their JSON are the contract with backend services; `backends.http.request`
makes HTTP requests of them.
"""

import base64
import random
from collections.abc import Callable
from mmap import mmap
from typing import Any, NamedTuple

import orjson

from backends import Closure, Handshake, Relay, TraceContext


class Event:
    """One event, the same on each attempt: its id, its JSON body and its span.

    `traceparent` is the span (W3C Trace Context), `trace` what the span belongs to,
    if anything. The body may be kept for long, and takes no more memory than its
    length. An event does not change.
    """

    __slots__ = ("body", "id", "trace", "traceparent")

    def __init__(
        self,
        event_id: str,
        body: bytes | mmap,
        traceparent: str,
        trace: TraceContext | None,
    ) -> None:
        self.id = event_id
        self.body = body
        self.traceparent = traceparent
        self.trace = trace

    def with_body(self, body: bytes | mmap) -> "Event":
        """Return the same event with another body."""
        return Event(self.id, body, self.traceparent, self.trace)


class Ended(NamedTuple):
    """A connection that has ended, for its disconnect event.

    `state` is `Connection.backend_state`, `instance` an earlier run that lost the
    connection, or None for this run.
    """

    id: str
    closure: Closure
    trace: TraceContext | None = None
    state: bytes | None = None
    instance: str | None = None


class EventWriter:
    """Makes the events of one relay: each once, in one piece.

    `reply` is where a broker takes commands for this instance; None: nowhere.
    """

    def __init__(self, relay: Relay, reply: str | None = None) -> None:
        self._callback_url = relay.callback_url
        self._sample = relay.sample
        self._key_of = relay.key_of
        self._own: dict[str, Any] = {"instance": relay.instance}
        if reply is not None:
            self._own["reply"] = reply
        # As JSON: the URL without its quotes, the members of `_own` without braces.
        self._quoted_url = orjson.dumps(f"{relay.callback_url}").decode()[1:-1]
        self._quoted_own = orjson.dumps(self._own).decode()[1:-1]

    def rename(self, instance: str) -> None:
        """Name another `Relay.instance` in the events made from now on."""
        self._own["instance"] = instance
        self._quoted_own = orjson.dumps(self._own).decode()[1:-1]

    def connect(self, connection_id: str, handshake: Handshake) -> Event:
        """Make the connect event, which asks for a decision."""
        asked = orjson.dumps(
            {
                "headers": dict(handshake.headers),
                "path": handshake.path,
                "query": handshake.query,
                "remote_ip": handshake.remote_ip,
                "subprotocols": list(handshake.subprotocols),
            }
        )
        meta = f'{{"meta":{{{self._quoted_meta(connection_id)},'
        body = b"".join((meta.encode(), memoryview(asked)[1:], b"}"))
        return self._event(f"{connection_id}-connect", body, handshake.trace)

    def message(
        self,
        connection_id: str,
        number: int,
        message: str | bytes,
        trace: TraceContext | None,
        state: bytes | None = None,
    ) -> Event:
        """Make the event of a connection's message; `number` counts from 1.

        `state` is `Connection.backend_state`.
        """
        if isinstance(message, str):
            kind, text = '"text"', message
        else:
            kind = '"binary"'
            try:
                text = message.decode()
            except UnicodeDecodeError:
                kind = '"binary","encoding":"base64"'
                text = base64.b64encode(message).decode()
        message_id = f"{connection_id}-{number}"
        held = "" if state is None else f',"state":{state.decode()}'
        meta = (
            f'{{"meta":{{{self._quoted_meta(connection_id)},'
            f'"message_id":"{message_id}","type":{kind}{held}}},"message":'
        )
        body = b"".join((meta.encode(), orjson.dumps(text), b"}"))  # see serialized()
        return Event(message_id, body, traceparent(trace, self._sample), trace)

    def disconnect(self, ended: Ended, undelivered: int, refused: int) -> Event:
        """Make the disconnect event; the counts are those of all its messages."""
        closure, own = ended.closure, self._quoted_own
        code = int(closure.code)  # which may be a `CloseCode`, with a name as its text
        seconds = round(closure.duration, 3)
        if ended.instance is not None:
            own = orjson.dumps({"instance": ended.instance}).decode()[1:-1]
        held = "" if ended.state is None else f',"state":{ended.state.decode()}'
        body = (
            f'{{"connection_id":"{ended.id}","meta":{{"connection_id":"{ended.id}",'
            f'{own},"code":{code},'
            f'"reason":{orjson.dumps(closure.reason).decode()},'
            f'"initiator":"{closure.initiator}","duration":{seconds},'
            f'"undelivered":{undelivered},"refused":{refused}{held}}}}}'
        )
        return self._event(f"{ended.id}-disconnect", body.encode(), ended.trace)

    def undelivered(
        self, event_id: str, connection_id: str, command: str, status: int
    ) -> Event:
        """Make the event of a broker's command that could not be carried out."""
        body = serialized(
            {"connection_id": connection_id, "command": command, "status": status}
        )
        return self._event(event_id, body, None)

    def _quoted_meta(self, connection_id: str) -> str:
        """Return the members of `meta` that each event of a live connection has.

        Byte by byte what orjson would write, in less time: only the ids change.
        """
        meta_id = f'"connection_id":"{connection_id}",'
        if self._callback_url is None:
            return f"{meta_id}{self._quoted_own}"
        url = f"{self._quoted_url}/socket/{connection_id}"
        query = self._query(connection_id)
        return (
            f'{meta_id}"send":"{url}/send{query}",'
            f'"disconnect":"{url}/disconnect{query}",{self._quoted_own}'
        )

    def _query(self, connection_id: str) -> str:
        """Return the query of a connection's callback URLs, with its key if any."""
        return "" if self._key_of is None else f"?key={self._key_of(connection_id)}"

    def _event(self, event_id: str, body: bytes, trace: TraceContext | None) -> Event:
        return Event(event_id, body, traceparent(trace, self._sample), trace)


def serialized(value: object) -> bytes:
    """Return JSON that takes no more memory than its length.

    `orjson.dumps` returns bytes that keep all the memory that was reserved for them,
    up to ten times their length.
    """
    return bytes(memoryview(orjson.dumps(value)))


def traceparent(
    trace: TraceContext | None, sample: Callable[[str], bool] | None = None
) -> str:
    """Return a new span of `trace`, or of a new trace (W3C Trace Context, level 2).

    A new trace is recorded where `sample` returns True for its id. `random` saves a
    system call for each message: the ids must differ, but need not be secret.
    """
    if trace is not None:
        span_id = random.getrandbits(64).to_bytes(8).hex()
        return f"00-{trace.trace_id}-{span_id}-{trace.flags}"
    ids = random.getrandbits(192).to_bytes(24).hex()
    flags = "01" if sample is not None and sample(ids[:32]) else "00"
    return f"00-{ids[:32]}-{ids[32:]}-{flags}"
