"""Writes the HTTP request of each attempt to deliver an event.

`credentials` provides headers and keys, `signature` signs, and `backends.client` sends.
"""

import time

from backends.events import Event
from backends.http.signature import Signer
from backends.target import Target


class RequestWriter:
    """Writes requests, with the credentials that were set last."""

    def __init__(self, version: str) -> None:
        self._user_agent = f"SocketDock/{version}"
        self._headers = b""
        self._signer: Signer | None = None
        self._heads: dict[Target, bytes] = {}  # the part that all events share

    def set_credentials(self, headers: bytes, signer: Signer | None) -> None:
        """Use these header lines, and signatures by `signer`, from now on."""
        self._headers, self._signer = headers, signer
        self._heads.clear()

    def write(self, target: Target, event: Event) -> bytes:
        """Return the request of one attempt to send `event`, with a new timestamp."""
        body, timestamp, signature = event.body, int(time.time()), ""
        if self._signer is not None:
            signed = self._signer.signatures(event.id.encode(), timestamp, bytes(body))
            signature = f"webhook-signature: {signed.decode()}\r\n"
        fields = (
            f"webhook-id: {event.id}\r\nwebhook-timestamp: {timestamp}\r\n{signature}"
            f"traceparent: {event.traceparent}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return b"".join((self._head(target), fields.encode(), body))

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
