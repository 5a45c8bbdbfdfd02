"""Answers forwarded sends without a Tornado handler."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from backends.media_types import has_text_charset
from handlers.callbacks.actions import Outcome, Sending, send
from handlers.callbacks.bodies import message_of
from handlers.callbacks.peers.forwarded import OWN_KEY
from handlers.callbacks.peers.hops import HEADER, digest_of_body
from handlers.callbacks.peers.received_hops import ReceivedHops
from handlers.callbacks.repeats import HEADER as KEY_HEADER
from handlers.callbacks.responses import response_of
from handlers.http.fast import FastResponse
from handlers.http.plain import is_plain_host
from handlers.http.request import FastHandler, Request
from handlers.websocket.frames import MessageFrame

HOP, KEY = HEADER.lower().encode(), KEY_HEADER.lower().encode()
CONTENT_TYPE = b"content-type"
OWN = OWN_KEY.encode()
SEND = b"/send"
# The queries that are plain, and their values of `type`.
TYPES: Mapping[bytes, Sequence[str]] = {
    b"": (), b"type=text": ("text",), b"type=binary": ("binary",)
}


class FastHop:
    """Answers a forwarded send by the rules of `HopHandler`, but without it.

    Only those without a key of the backend. `otherwise` may answer all requests that
    are not forwarded.
    """

    def __init__(
        self,
        received: ReceivedHops,
        max_message_size: int,
        otherwise: Callable[[Request], FastHandler | None],
    ) -> None:
        self._otherwise = otherwise
        self._received = received
        self._hops = received.hops
        self._recent = received.recent
        self._loop = received.connections.loop
        self._max_message_size = max_message_size
        prefix = received.prefix.encode()
        self._starts = frozenset({b"/socket", b"%b/socket" % prefix})

    def __call__(self, request: Request) -> FastHandler | None:
        """Return the function that receives the body; None if it is not plain."""
        headers = request.headers
        if not headers or headers[0][0] != HOP:
            return self._otherwise(request)
        if request.method != "POST" or request.declared > self._max_message_size:
            return None
        path, _, query = request.target.partition(b"?")
        start, _, connection_id = path[: -len(SEND)].rpartition(b"/")
        if start not in self._starts or not path.endswith(SEND):
            return None
        types = TYPES.get(query)
        if types is None or request.upgrade or request.chunked:
            return None
        if request.version != "1.1" or not request.keep_alive:
            return None
        fields = dict(headers)
        key = fields.get(KEY, b"")
        if not key.startswith(OWN) or len(fields) < len(headers):
            return None
        if b"expect" in fields or b"content-encoding" in fields:
            return None
        if not is_plain_host(fields.get(b"host", b"")):
            return None
        content_type = fields.get(CONTENT_TYPE, b"")
        kind = content_type.decode("latin-1")
        if ";" in kind and not has_text_charset(kind):
            return None
        return partial(
            self._send,
            connection_id.decode("latin-1"),
            types,
            kind,
            headers[0][1],
            (b"POST", request.target, content_type, key),
        )

    def _send(
        self,
        connection_id: str,
        types: Sequence[str],
        content_type: str,
        hop: bytes,
        parts: tuple[bytes, bytes, bytes, bytes],
        body: bytes,
    ) -> FastResponse | Awaitable[FastResponse] | None:
        digest = digest_of_body(body)
        if not self._hops.accepts(hop, (*parts, digest)):
            return None
        key = parts[3].decode()
        if key in self._recent:
            return None
        try:
            message = message_of(body, content_type, types)
        except ValueError:
            return None
        connection = self._received.find(connection_id)
        if connection is None:
            return None
        outcome = send(connection, MessageFrame(message))
        if isinstance(outcome, Outcome):
            self._recent.add(key, outcome)
            return response_of(outcome)
        task = self._loop.create_task(_ended(outcome))
        self._recent.add(key, task)
        return _respond(task)


async def _ended(sending: Sending) -> Outcome:
    return await sending


async def _respond(task: "asyncio.Task[Outcome]") -> FastResponse:
    return response_of(await asyncio.shield(task))
