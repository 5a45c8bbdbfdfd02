"""A client's handshake as it was read, by whichever HTTP server."""

from collections.abc import Mapping, Sequence
from time import monotonic


class HandshakeRequest:
    """A request for a WebSocket.

    `headers` has the values of each header, by its lower-case name. `fields` are all
    headers as they were sent, if the backend wants them. `peer` is the address of the
    other end, maybe of a proxy, and `descriptor` that of the socket.
    """

    __slots__ = (
        "_began",
        "descriptor",
        "fields",
        "has_body",
        "has_tls",
        "headers",
        "path",
        "peer",
        "query",
        "version",
    )

    def __init__(
        self,
        target: str,
        headers: Mapping[str, Sequence[str]],
        peer: str,
        has_tls: bool,
        descriptor: int,
    ) -> None:
        self.path, _, self.query = target.partition("?")
        self.headers = headers
        self.peer = peer
        self.has_tls = has_tls
        self.descriptor = descriptor
        self.version = "1.1"  # of HTTP
        self.has_body = False
        self.fields: Sequence[tuple[str, str]] = ()
        self._began = monotonic()

    def lines(self, name: str) -> Sequence[str]:
        """Return the values of a header, one for each time that it was sent."""
        return self.headers.get(name, ())

    def text(self, name: str) -> str:
        """Return the value of a header; repeated ones are joined by a comma."""
        lines = self.headers.get(name)
        if lines is None:
            return ""
        return lines[0] if len(lines) == 1 else ",".join(lines)

    @property
    def seconds(self) -> float:
        """How long ago its head was read."""
        return monotonic() - self._began
