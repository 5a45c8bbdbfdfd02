"""Where the relay is reached: one address, its TLS, and accepting connections.

A server reads the requests: that of `handlers.http.server`, or Tornado's
(`handlers.http.tornado_server`). What may be asked, `socketdock.py` decides.
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
from typing import Any, Protocol

from tornado.netutil import bind_sockets
from tornado.options import Error as OptionError
from tornado.options import define

from backends import Unavailable
from backends.deadlines import after_reading
from backends.files import require_regular
from backends.pem import load_failure, no_password

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
ACCEPT_BATCH = 128  # connections accepted before others have their turn
ACCEPT_PAUSE = 0.2  # seconds, where the process or the machine has run out
# Descriptors that no connection is accepted into: what is open already needs some,
# to reach the backend or to read a file.
KEPT_DESCRIPTORS = 16
# Descriptors that WebSockets leave to probes and callbacks, and clients in all to the
# listener of callbacks where these have one: at most so many, and so large a part of
# all. Connections to the backend may have their part of all, too.
RESERVED_DESCRIPTORS = 64
RESERVED_PART = 8  # an eighth
BACKEND_PART = 4
# Those of Mozilla's intermediate profile, version 5.7: of TLS 1.2 the suites with
# forward secrecy and authenticated encryption; 1.3 has no others. Before Python 3.15
# groups can't be named but for a single one: OpenSSL's own choice begins with the
# first two of these, and has X448, P-521 and finite fields besides.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
GROUPS = "X25519:prime256v1:secp384r1"
WARNING_INTERVAL = 60.0  # seconds between two warnings of that


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files of a listener; `client_ca` makes it demand a certificate, too."""

    certificate: str
    key: str | None = None
    client_ca: str | None = None

    def context(self) -> ssl.SSLContext:
        """Read them. Raises `OptionError` with one sentence."""
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
    """Up to which number descriptors are for whom: the kernel gives the least one.

    So a number says how many are in use, and nobody has to count.
    """

    websocket: int  # of a connection that may become one
    client: int  # of any connection at the clients' listener
    callback: int  # at the listener of callbacks, where they have their own

    @classmethod
    def shared(cls, for_backend: int, one_listener: bool) -> "Descriptors":
        """As many as this process may have; the backend needs up to `for_backend`."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return cls(sys.maxsize, sys.maxsize, sys.maxsize)
        last = soft - 1 - KEPT_DESCRIPTORS - min(for_backend, soft // BACKEND_PART)
        reserve = min(RESERVED_DESCRIPTORS, soft // RESERVED_PART)
        client = last if one_listener else last - reserve
        return cls(client - reserve, client, last)


class Server(Protocol):
    """What reads the requests of connections that were accepted."""

    def begin(
        self, accepted: socket.socket, address: Any, tls: ssl.SSLContext | None
    ) -> None:
        """Serve one from now on; by TLS where there is a context."""

    def make_room(self) -> None:
        """Close some connections that wait for their peers, where there are any."""

    async def close_all_connections(self) -> None:
        """Close them at once."""


class Listener:
    """One address and port, served by one application.

    Binds at once. Raises `OptionError` where that can't be. `is_loopback` says
    that it can be reached from this machine only, `is_wildcard` that it is at every
    address.
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
        # Bound to every address, so to none that can be told; there are many
        # spellings of it.
        self.is_wildcard = any(
            is_wildcard(sock.getsockname()[0]) for sock in self._sockets
        )
        self._server: Server | None = None
        self._last_descriptor = sys.maxsize  # that a connection may get
        self._resumptions: dict[socket.socket, asyncio.TimerHandle] = {}
        self._warned_at = float("-inf")  # on the loop's clock

    @property
    def has_tls(self) -> bool:
        """Whether it serves https and wss, not http and ws."""
        return self._tls is not None

    def url(self, scheme: str) -> str:
        """Its URL, without a path; `scheme` is http or ws, and gets its s for TLS."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{scheme}{'s' * self.has_tls}://{host}:{self.port}"

    def serve(self, server: Server, last_descriptor: int) -> None:
        """Accept connections from now on, for `server` to serve.

        With a descriptor above `last_descriptor` there is none to spare for more.
        """
        self._server = server
        self._last_descriptor = last_descriptor
        for sock in self._sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def reload(self) -> None:
        """Read the certificate again, for connections that come from now on.

        Raises `OptionError` where that can't be; the old one stays.
        """
        if self._tls is not None:
            self._context = self._tls.context()

    def leave(self) -> None:
        """Listen no more; what is open stays.

        Of processes that share a port, the others get its share of connections
        from then on. Those that wait here are accepted, since they would be reset.
        """
        for sock in self._sockets:
            self._accept(sock)
            if (resumption := self._resumptions.pop(sock, None)) is not None:
                resumption.cancel()
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._sockets = []

    async def close(self) -> None:
        """Listen no more, and close what is open."""
        self.leave()
        if self._server is not None:
            await self._server.close_all_connections()

    def _accept(self, listening: socket.socket) -> None:
        if self._server is None:
            return
        for _ in range(ACCEPT_BATCH):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause(listening, error)
                return
            accepted.setblocking(False)
            descriptor = accepted.fileno()  # TLS would take it out of `accepted`
            self._server.begin(accepted, address, self._context)
            # The kernel gives the least that is free.
            if descriptor >= self._last_descriptor:
                self._pause(listening, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        """Look away for a moment: the loop would spin on what can't be accepted."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._warned_at + WARNING_INTERVAL:
            self._warned_at = loop.time()
            logger.warning("accepting pauses: %s", error.strerror)
        loop.remove_reader(listening)
        self._resumptions[listening] = loop.call_later(
            ACCEPT_PAUSE, after_reading, loop, partial(self._resume, listening)
        )

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() < 0:
            return  # it was closed meanwhile
        del self._resumptions[listening]
        if (error := self._shortage(listening)) is not None and self._server:
            self._server.make_room()
            error = self._shortage(listening)
        if error is not None:
            self._pause(listening, error)
            return
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _shortage(self, listening: socket.socket) -> OSError | None:
        """Why nothing can be accepted now."""
        try:
            free = os.dup(listening.fileno())
        except OSError as error:
            return error
        os.close(free)
        if free > self._last_descriptor:
            return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return None


def bindable(address: str) -> str:
    """`address` as it can be bound: one of IPv4 that is written as IPv6 is of IPv4."""
    try:
        mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
    except ValueError:  # a name
        return address
    return address if mapped is None else str(mapped)


def is_wildcard(host: str) -> bool:
    """Whether `host` is every address, in any spelling: `0.0.0.0`, `::`, `0`."""
    return any(ip.is_unspecified for ip in _resolved(host, socket.AI_NUMERICHOST))


def collide(one: str, other: str) -> bool:
    """Whether the same port can't be bound at both addresses."""
    ours, theirs = _resolved(one), _resolved(other)
    return any(
        a == b or (a.version == b.version and (a.is_unspecified or b.is_unspecified))
        for a in ours
        for b in theirs
    )


def _resolved(
    host: str, flags: int = 0
) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses of `host`; none where it has none."""
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
        return bind_sockets(port, address, backlog=BACKLOG, reuse_port=reuse_port)
    except OSError as error:  # in use, not there yet, or no such name
        raise Unavailable(f"{where}: {error.strerror or error}") from None
    except ValueError as error:  # not even a host's name
        raise OptionError(f"{where}: {error}") from None
