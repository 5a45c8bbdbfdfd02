"""Listens at one address, with or without TLS, and accepts connections.

A server reads the requests: `handlers.http.server`, or Tornado's
(`handlers.http.tornado_server`). `handlers.program.service` defines the routes.
"""

import asyncio
import errno
import ipaddress
import logging
import os
import resource
import socket
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Protocol

from tornado.netutil import bind_sockets
from tornado.options import Error as OptionError
from tornado.options import define

from backends import Unavailable
from backends.deadlines import after_reading
from backends.files import require_regular
from backends.pem import load_failure, no_password
from handlers.process.log_limit import LineQuota

logger = logging.getLogger(__name__)

define("tls_cert", type=str, metavar="PATH",
       help="certificate chain (PEM) of the client listener, which then serves wss; "
            "re-read on SIGHUP; none: no TLS")
define("tls_key", type=str, metavar="PATH",
       help="private key (PEM) of --tls_cert; none: in the same file")
define("callback_tls_cert", type=str, metavar="PATH",
       help="certificate chain (PEM) of the separate callback listener, which then "
            "serves https; re-read on SIGHUP; none: no TLS")
define("callback_tls_key", type=str, metavar="PATH",
       help="private key (PEM) of --callback_tls_cert; none: in the same file")
define("callback_client_ca", type=str, metavar="PATH",
       help="CA certificates (PEM) that verify the certificates of callers on the "
            "separate callback listener (mutual TLS); none: callers need no "
            "certificate")
define("header_timeout", default=10.0, metavar="SECONDS",
       help="longest wait for the first request of a connection, TLS handshake "
            "included")
define("body_timeout", default=60.0, metavar="SECONDS",
       help="longest wait for a request body, from its headers to its last byte")
define("max_header_size", default=64 * 1024, metavar="BYTES",
       help="largest request line plus headers")
define("http_server", default="fast", metavar="NAME",
       help="HTTP parser: fast (in C; answers sends without a handler object) or "
            "tornado")
define("reuse_port", default=False,
       help="let several processes on one host share the client port (SO_REUSEPORT)")

BACKLOG = 4096  # connections that the kernel holds until they are accepted
# Seconds for accepting connections in each turn of the loop. Most of them ask for
# something in the next turn, which takes several times as long.
ACCEPT_TIME = 0.00025
ACCEPT_PAUSE = 0.2  # seconds, when the process or the machine has no descriptor left
# Descriptors that accepted connections never use. The relay needs them to connect to
# the backend and to read files.
KEPT_DESCRIPTORS = 16
# Descriptors that WebSockets leave free for probes and callbacks; and that all clients
# leave free for the callback listener, if it is separate. At most this many, and at
# most this part of the limit. The backend may use the same part of the limit.
RESERVED_DESCRIPTORS = 64
RESERVED_PART = 8  # an eighth
BACKEND_PART = 4
# As in Mozilla's intermediate profile, version 5.7: for TLS 1.2 the suites with forward
# secrecy and authenticated encryption; TLS 1.3 has no others. Before Python 3.15 only
# one group could be set, so OpenSSL's default applies: it begins with the first two of
# these, and adds X448, P-521 and finite fields.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
GROUPS = "X25519:prime256v1:secp384r1"
WARNING_INTERVAL = 60.0  # seconds between warnings that accepting pauses


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files of a listener; with `client_ca` clients need a certificate."""

    certificate: str
    key: str | None = None
    client_ca: str | None = None

    def context(self) -> ssl.SSLContext:
        """Load the files. Raises `OptionError`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        if hasattr(context, "set_groups"):  # from Python 3.15 on
            context.set_groups(GROUPS)
        paths = [path for path in (self.certificate, self.key) if path]
        files = " and ".join(paths)
        for path in paths:
            require_regular(path, f"can't use {path} for TLS")
        try:
            context.load_cert_chain(self.certificate, self.key, no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise Unavailable(
                f"can't use {files} for TLS: {load_failure(error)}"
            ) from None
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            require_regular(self.client_ca, f"can't use {self.client_ca} for TLS")
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                raise Unavailable(
                    f"can't use {self.client_ca} for TLS: {load_failure(error)}"
                ) from None
        return context


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The highest file descriptor that each kind of connection may have.

    The kernel assigns the lowest free number, so the number shows how many are in
    use, without counting.
    """

    websocket: int  # of a connection that may become a WebSocket
    client: int  # of any connection at the client listener
    callback: int  # at a separate callback listener

    @classmethod
    def shared(cls, for_backend: int, one_listener: bool) -> "Descriptors":
        """Divide this process's limit; the backend needs up to `for_backend`."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return cls(sys.maxsize, sys.maxsize, sys.maxsize)
        last = soft - 1 - KEPT_DESCRIPTORS - min(for_backend, soft // BACKEND_PART)
        reserve = min(RESERVED_DESCRIPTORS, soft // RESERVED_PART)
        client = last if one_listener else last - reserve
        return cls(client - reserve, client, last)


class Server(Protocol):
    """Reads the requests of accepted connections."""

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve an accepted connection; with TLS if `tls` is set."""

    def make_room(self) -> None:
        """Close some of the connections that wait for their peers, if any do."""

    async def close_all_connections(self) -> None:
        """Close all connections at once."""


class Listener:
    """One address and port, served by one application.

    Binds immediately. Raises `OptionError` if it cannot. `is_loopback` says that only
    this machine can reach it, `is_wildcard` that it is bound to every address.
    """

    def __init__(
        self,
        address: str,
        port: int,
        tls: TLSFiles | None = None,
        reuse_port: bool = False,
    ) -> None:
        self.address = bindable(address)
        self._tls = tls
        self._context = tls.context() if tls is not None else None
        self._sockets: Sequence[socket.socket] = _bind(self.address, port, reuse_port)
        self.port: int = self._sockets[0].getsockname()[1]
        self.is_loopback = all(
            ipaddress.ip_address(sock.getsockname()[0]).is_loopback
            for sock in self._sockets
        )
        # A wildcard address has many spellings, and cannot be used in a URL.
        self.is_wildcard = any(
            is_wildcard(sock.getsockname()[0]) for sock in self._sockets
        )
        self._server: Server | None = None
        self._last_descriptor = sys.maxsize  # the highest for a connection
        self._resumptions: dict[socket.socket, asyncio.TimerHandle] = {}
        self._warnings = LineQuota(1, WARNING_INTERVAL)

    @property
    def has_tls(self) -> bool:
        """Whether it serves https and wss, not http and ws."""
        return self._tls is not None

    def url(self, scheme: str) -> str:
        """Return its URL without a path; with TLS an s is added to `scheme`."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{scheme}{'s' * self.has_tls}://{host}:{self.port}"

    def serve(self, server: Server, last_descriptor: int) -> None:
        """Accept connections for `server` from now on.

        Accepting pauses while descriptors above `last_descriptor` are in use.
        """
        self._server = server
        self._last_descriptor = last_descriptor
        for sock in self._sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def reload(self) -> None:
        """Read the certificate again, for new connections.

        Raises `OptionError` if it cannot be used; then the old one stays.
        """
        if self._tls is not None:
            self._context = self._tls.context()

    def stop_listening(self) -> None:
        """Stop listening; open connections stay.

        Other processes that share the port then get all new connections. Those that
        wait in the kernel are accepted first, since they would be reset.
        """
        for sock in self._sockets:
            for _ in range(BACKLOG):
                if not self._accept_one(sock):
                    break
            if (resumption := self._resumptions.pop(sock, None)) is not None:
                resumption.cancel()
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._sockets = []

    async def close(self) -> None:
        """Stop listening, and close all connections."""
        self.stop_listening()
        if self._server is not None:
            await self._server.close_all_connections()

    def _accept(self, listening: socket.socket) -> None:
        """Accept connections for a short time; others have their turn in between."""
        ends_at = perf_counter() + ACCEPT_TIME
        while self._accept_one(listening) and perf_counter() < ends_at:
            pass

    def _accept_one(self, listening: socket.socket) -> bool:
        """Accept a connection; returns whether there may be more."""
        if self._server is None:
            return False
        try:
            accepted, address = listening.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionAbortedError:
            return True
        except OSError as error:
            self._pause(listening, error)
            return False
        accepted.setblocking(False)
        descriptor = accepted.fileno()  # TLS detaches `accepted`
        self._server.begin(accepted, address, self._context)
        # The kernel assigns the lowest free descriptor.
        if descriptor >= self._last_descriptor:
            self._pause(listening, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            return False
        return True

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        """Stop accepting for `ACCEPT_PAUSE`, so that the loop does not spin."""
        loop = asyncio.get_running_loop()
        if self._warnings.allow():
            logger.warning("accepting pauses: %s", error.strerror)
        loop.remove_reader(listening)
        self._resumptions[listening] = loop.call_later(
            ACCEPT_PAUSE, after_reading, loop, partial(self._resume, listening)
        )

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() < 0:
            return  # the listener was closed meanwhile
        del self._resumptions[listening]
        if (error := self._shortage(listening)) is not None and self._server:
            self._server.make_room()
            error = self._shortage(listening)
        if error is not None:
            self._pause(listening, error)
            return
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _shortage(self, listening: socket.socket) -> OSError | None:
        """Return why nothing can be accepted now; None if it can."""
        try:
            free = os.dup(listening.fileno())
        except OSError as error:
            return error
        os.close(free)
        if free > self._last_descriptor:
            return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return None


def bindable(address: str) -> str:
    """Return `address` as it can be bound: an IPv4-mapped one as IPv4."""
    try:
        mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
    except ValueError:  # a name
        return address
    return address if mapped is None else str(mapped)


def is_wildcard(host: str) -> bool:
    """Whether `host` is a wildcard, in any spelling: `0.0.0.0`, `::`, `0`."""
    return any(ip.is_unspecified for ip in _resolved(host, socket.AI_NUMERICHOST))


def collide(one: str, other: str) -> bool:
    """Whether both addresses cannot be bound at the same port."""
    ours, theirs = _resolved(one), _resolved(other)
    return any(
        a == b or (a.version == b.version and (a.is_unspecified or b.is_unspecified))
        for a in ours
        for b in theirs
    )


def _resolved(
    host: str, flags: int = 0
) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses of `host`; empty if there are none."""
    try:
        found = socket.getaddrinfo(
            bindable(host), None, type=socket.SOCK_STREAM, flags=flags
        )
    except (OSError, ValueError):
        return set()
    return {ipaddress.ip_address(address[0]) for *_, address in found}


def _bind(address: str, port: int, reuse_port: bool) -> Sequence[socket.socket]:
    where = f"can't listen at port {port} of {address or '*'}"
    try:
        bound = bind_sockets(port, address, backlog=BACKLOG, reuse_port=reuse_port)
        for sock in bound:  # accepted connections inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return bound
    except OSError as error:  # in use, not there yet, or no such name
        raise Unavailable(f"{where}: {error.strerror or error}") from None
    except ValueError as error:  # not even a host's name
        raise OptionError(f"{where}: {error}") from None
