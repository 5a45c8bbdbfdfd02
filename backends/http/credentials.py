"""Reads the relay's credentials for the backend: keys, headers and certificates.

Those in files are read at the start and again on SIGHUP. `request` adds signature and
headers to each request; `backends.client` uses the certificates.
"""

import re
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tornado.options import Error as OptionError
from tornado.options import define

from backends.files import read_lines, require_regular
from backends.http.signature import Signer, key_of
from backends.pem import load_certificate, verifying_context

define("webhook_secret", multiple=True, metavar="SECRETS",
       help="secrets that sign each event (Standard Webhooks: whsec_ and base64); "
            "list several to rotate them; none: not signed")
define("webhook_secret_file", type=str, metavar="PATH",
       help="file of secrets that sign each event, one per line; re-read on SIGHUP")
define("backend_headers_file", type=str, metavar="PATH",
       help="file of headers that are added to each event, such as a gateway's "
            "credentials: Name: value, one per line; re-read on SIGHUP")
define("backend_ca", type=str, metavar="PATH",
       help="CA certificates (PEM) that verify an https backend; re-read on SIGHUP; "
            "none: the system's")
define("backend_cert", type=str, metavar="PATH",
       help="client certificate chain (PEM) for an https backend that requests one; "
            "re-read on SIGHUP; none: no certificate")
define("backend_key", type=str, metavar="PATH",
       help="private key (PEM) of --backend_cert; none: in the same file")

MAX_FILE_SIZE = 16 * 1024  # bytes; most servers accept no more headers
MAX_SECRETS = 16  # each costs time and 48 bytes per event

# RFC 9110, sections 5.1 and 5.5, limited to ASCII.
HEADER_NAME = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*")
VALUE = re.compile(r"[ -~\t]*")

# Headers that the relay sets, or that change the framing or the permitted responses.
OWN_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "range",
        "te",
        "traceparent",
        "tracestate",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    }
)
OWN_PREFIX = "webhook-"


class Credentials(NamedTuple):
    """The credentials; `headers` are lines as they are sent. None: not used."""

    signer: Signer | None
    headers: bytes
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialSources:
    """The secrets, and the paths of files; None: not used.

    The system's CA certificates are read only if `https` is set.
    """

    https: bool
    webhook_secrets: Sequence[str] = ()
    webhook_secret_file: str | None = None
    headers_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def read(self) -> Credentials:
        """Read the files. Raises `OptionError`."""
        keys = list(self._keys())
        if len(keys) > MAX_SECRETS:
            raise OptionError(f"at most {MAX_SECRETS} secrets can sign each event")
        headers = _header_lines(self.headers_file) if self.headers_file else ()
        tls = None
        if self.https or self.ca or self.cert or self.key:
            tls = _client_context(self.ca, self.cert, self.key)
        return Credentials(Signer(keys) if keys else None, b"".join(headers), tls)

    def _keys(self) -> Iterator[bytes]:
        for number, secret in enumerate(self.webhook_secrets, start=1):
            yield _key_of(secret, f"--webhook_secret, number {number}")
        if path := self.webhook_secret_file:
            where = f"--webhook_secret_file={path}"
            for number, line in read_lines(path, where, MAX_FILE_SIZE):
                yield _key_of(line, f"{path}, line {number}")


def _key_of(secret: str, where: str) -> bytes:
    try:
        return key_of(secret)
    except ValueError as error:
        raise OptionError(f"{where}: a secret that is {error}") from None


def _header_lines(path: str) -> Iterator[bytes]:
    names: set[str] = set()
    opened = read_lines(path, f"--backend_headers_file={path}", MAX_FILE_SIZE)
    for number, line in opened:
        where = f"{path}, line {number}"
        named = HEADER_NAME.match(line)
        if named is None:  # the line is not shown: it may be a secret value
            raise OptionError(f"{where}: not Name: value")
        name = named[1]
        if name.lower() in OWN_HEADERS or name.lower().startswith(OWN_PREFIX):
            raise OptionError(f"{where}: {name} is set by the relay")
        if name.lower() in names:
            raise OptionError(f"{where}: {name} is there twice")
        names.add(name.lower())
        value = line[named.end() :]
        if VALUE.fullmatch(value) is None:
            raise OptionError(
                f"{where}: {name} has control characters, or others than ASCII"
            )
        yield f"{name}: {value}\r\n".encode("ascii")


def _client_context(
    ca: str | None, cert: str | None, key: str | None
) -> ssl.SSLContext:
    """Make the context that verifies the backend, with the relay's certificate."""
    if key and not cert:
        raise OptionError("--backend_key needs --backend_cert")
    context = verifying_context(ca, "backend_ca")
    if cert:
        require_regular(cert, f"--backend_cert={cert}")
        if key:
            require_regular(key, f"--backend_key={key}")
        files = f"--backend_cert={cert}" + (f", --backend_key={key}" if key else "")
        load_certificate(context, cert, key, files)
    return context
