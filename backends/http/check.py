"""The checks of `socketdock check` for an HTTP service: names, TCP and TLS.

They connect once to each host that receives events, as `backends.client` does, and send
no request.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import aiohappyeyeballs

from backends.check import Check, Finding, expiry_finding
from backends.client.pool import HAPPY_EYEBALLS_DELAY
from backends.client.resolver import Resolver
from backends.client.tls_failures import (
    TLS_HANG_UP,
    is_hang_up,
    system_failure,
    tls_failure,
)
from backends.http.open_connections import NOTHING_TO_SEND
from backends.target import Target

# Seconds. In TLS 1.3 a server rejects a client's certificate only after the handshake;
# a server that accepts it sends nothing until there is a request.
REJECTION_WAIT = 0.5

# Codes of OpenSSL's X509_verify_cert_error_string(3).
CERT_HAS_EXPIRED = 10
HOSTNAME_MISMATCH = 62
IP_ADDRESS_MISMATCH = 64
# Four codes for an issuer that was not found; a self-signed certificate or chain.
OF_UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21, 27})

NO_TLS = "make it http://, or give the port that speaks TLS"
WHAT_ENDS_TLS = "check the log of what terminates TLS"


class HangUp(Exception):
    """The peer or the network ended a TLS connection: why, and the remedy."""


class HTTPCheck(Check):
    """Checks `targets`, by option; `tls` is the context for https."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        tls: ssl.SSLContext | None,
        *,
        connect_timeout: float,
        certificates: Sequence[str],
        state_dir: Path | None,
        descriptors: int,
        sends_disconnects: bool,
    ) -> None:
        self._targets = targets
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._state_dir = state_dir
        self._sends_disconnects = sends_disconnects
        self.certificates = certificates
        self.descriptors = descriptors

    async def findings(self) -> AsyncIterator[Finding]:
        """Yield one finding for each host, and one for `--state_dir`."""
        named: dict[tuple[str, str, int], list[str]] = {}
        for option, target in self._targets.items():
            named.setdefault(target.origin, []).append(option)
        for of_origin in named.values():
            yield await self._reach(", ".join(of_origin), self._targets[of_origin[0]])
        if self._state_dir is None:
            return
        if self._sends_disconnects:
            yield folder_finding(self._state_dir)
        else:
            yield Finding("warning", NOTHING_TO_SEND)

    async def _reach(self, where: str, target: Target) -> Finding:
        host = f"[{target.host}]" if ":" in target.host else target.host
        what = f"{where}: {target.scheme}://{host}:{target.port}"
        resolved = connected = False
        try:
            async with asyncio.timeout(self._connect_timeout):
                addresses = await Resolver().resolve(target.host, target.port)
                resolved = True
                sock = await aiohappyeyeballs.start_connection(
                    addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1
                )
                connected = True
                if target.scheme == "https":
                    return await self._handshake(what, target.server_name, sock)
                sock.close()
                return Finding("ok", f"{what} is reached")
        except TimeoutError:
            why = f"no connection in {self._connect_timeout:g} s"
            if not resolved:
                why += ": DNS has not answered"
                remedy = "check this machine's DNS servers"
            elif connected:
                why += ": the TLS handshake has not ended"
                remedy = NO_TLS
            else:
                remedy = "check firewalls and the address"
        except (socket.gaierror, UnicodeError) as error:
            why = "the name is unknown here"
            if error.__class__ is socket.gaierror:
                why += f" ({error.strerror})"
            remedy = "correct it, or this machine's DNS"
        except HangUp as hang_up:
            why, remedy = hang_up.args
        except ssl.SSLError as error:
            why, remedy = tls_failure(error), tls_remedy(error)
        except OSError as error:
            why = system_failure(error)
            remedy = "start the backend there, or correct the URL"
        return Finding("error", f"{what}: {why}; {remedy}")

    async def _handshake(self, what: str, host: str, sock: socket.socket) -> Finding:
        """Make a TLS handshake on `sock`, which is closed afterwards."""
        assert self._tls is not None
        try:
            reader, writer = await asyncio.open_connection(
                sock=sock, ssl=self._tls, server_hostname=host
            )
        except BaseException as error:
            sock.close()
            if is_hang_up(error):
                raise HangUp(TLS_HANG_UP, f"{NO_TLS}, or {WHAT_ENDS_TLS}") from error
            raise
        try:
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(REJECTION_WAIT):
                    await reader.read(1)
            if reader.at_eof() or reader.exception() is not None:
                raise HangUp(
                    "TLS: the connection was closed after the handshake",
                    "give --backend_cert if it wants a client certificate, or"
                    f" {WHAT_ENDS_TLS}",
                )
            certificate = writer.get_extra_info("peercert")
        finally:
            writer.transport.abort()
        return expiry_finding(
            f"{what} is reached by TLS: its certificate",
            ssl.cert_time_to_seconds(certificate["notAfter"]),
        )


def tls_remedy(error: ssl.SSLError) -> str:
    """Return what to do about a failed TLS handshake."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return NO_TLS
        return "check the backend's TLS, and --backend_cert if it requires one"
    if error.verify_code == CERT_HAS_EXPIRED:
        return "renew the backend's certificate"
    if error.verify_code in (HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH):
        return "use a name that is in the certificate"
    if error.verify_code in OF_UNKNOWN_AUTHORITY:
        return "put the CA that issued it into --backend_ca"
    return "renew the backend's certificate without this error"


def folder_finding(path: Path) -> Finding:
    """Check that a directory can be written to, or created."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return Finding(
            "error", f"--state_dir={path}: {there} is no folder; name another"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            "error",
            f"--state_dir={path}: this user may not write to {there}; change its"
            " owner, or name another",
        )
    return Finding("ok", f"--state_dir={path} can be written to")
