"""Where to POST: a URL in the parts that a request and its connection need."""

from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from backends.hosts import DEFAULT_PORTS, encoded_host


@dataclass(frozen=True, eq=False)
class Target:
    """An http(s) URL in its parts.

    `host` is as DNS takes it: an international name is encoded, and a trailing dot,
    which disables the resolver's search list, is kept. There are few targets, and
    each request asks for the same properties: they are computed once, and a target
    is equal only to itself.
    """

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Raises `ValueError` with what is wrong with `url`."""
        if any(c <= " " or c == "\x7f" for c in url):
            raise ValueError("it has characters that a URL must percent-encode")
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS:
            raise ValueError("it is not an http:// or https:// URL")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it has a user name or a password in it")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii():
            raise ValueError("it has characters that a URL must percent-encode")
        if not (parts.hostname or "").strip("."):
            raise ValueError("it has no host")
        host = encoded_host(parts.hostname or "")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError("its port is not a number from 1 to 65535")
        return cls(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], path)

    @cached_property
    def origin(self) -> tuple[str, str, int]:
        """The key by which connections are shared."""
        return self.scheme, self.host, self.port

    @property
    def server_name(self) -> str:
        """The host for certificates, SNI (RFC 6066, section 3) and the Host header."""
        return self.host.removesuffix(".")

    @cached_property
    def authority(self) -> str:
        """The Host header's value (RFC 9110, section 7.2)."""
        name = self.server_name
        host = f"[{name}]" if ":" in name else name
        if self.port == DEFAULT_PORTS[self.scheme]:
            return host
        return f"{host}:{self.port}"

    @cached_property
    def url(self) -> str:
        """Without the query, which may hold a secret."""
        return f"{self.scheme}://{self.authority}{self.path.partition('?')[0]}"

    def __str__(self) -> str:
        return self.url
