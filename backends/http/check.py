"""What `socketdock check` looks at of an HTTP service: its names, TCP and TLS.

Each host that events go to is connected to once, as `client` would, and nothing
is asked of it.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import aiohappyeyeballs

from backends import Check, Finding, expiry_finding
from backends.http.client import HAPPY_EYEBALLS_DELAY, Target, tls_failure

# Seconds. By TLS 1.3 a client learns only afterwards that its certificate is not
# taken; a server that takes it says nothing until it is asked.
REJECTION_WAIT = 0.5

# Of OpenSSL's X509_verify_cert_error_string(3).
CERT_HAS_EXPIRED = 10
HOSTNAME_MISMATCH = 62
IP_ADDRESS_MISMATCH = 64

NO_TLS = "make it http://, or give the port that speaks TLS"


class HTTPCheck(Check):
    """`targets` are by the option that names them; `tls` is for the https ones."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        tls: ssl.SSLContext | None,
        *,
        connect_timeout: float,
        certificates: Sequence[str],
        state_dir: Path | None,
        descriptors: int,
    ) -> None:
        self._targets = targets
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._state_dir = state_dir
        self.certificates = certificates
        self.descriptors = descriptors

    async def findings(self) -> AsyncIterator[Finding]:
        """One for each host, and for the folder."""
        named: dict[tuple[str, str, int], list[str]] = {}
        for option, target in self._targets.items():
            named.setdefault(target.origin, []).append(option)
        for origin, of_origin in named.items():
            yield await self._reach(", ".join(of_origin), *origin)
        if self._state_dir is not None:
            yield folder_finding(self._state_dir)

    async def _reach(self, where: str, scheme: str, host: str, port: int) -> Finding:
        what = f"{where}: {scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        connected = False
        try:
            async with asyncio.timeout(self._connect_timeout):
                addresses = await asyncio.get_running_loop().getaddrinfo(
                    host, port, type=socket.SOCK_STREAM
                )
                sock = await aiohappyeyeballs.start_connection(
                    addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1
                )
                connected = True
                if scheme == "https":
                    return await self._shake_hands(what, host, sock)
                sock.close()
                return Finding("ok", f"{what} is reached")
        except TimeoutError:
            why = f"no connection in {self._connect_timeout:g} s"
            remedy = NO_TLS if connected else "look at firewalls, and at the address"
        except (socket.gaierror, UnicodeError) as error:
            why = "the name is unknown here"
            if error.__class__ is socket.gaierror:
                why += f" ({error.strerror})"
            remedy = "mend it, or this machine's DNS"
        except ssl.SSLError as error:
            why, remedy = tls_failure(error), tls_remedy(error)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            remedy = "start the backend there, or mend the URL"
        return Finding("error", f"{what}: {why}; {remedy}")

    async def _shake_hands(self, what: str, host: str, sock: socket.socket) -> Finding:
        """Finding of a TLS handshake on `sock`, which is closed afterwards."""
        assert self._tls is not None
        try:
            reader, writer = await asyncio.open_connection(
                sock=sock, ssl=self._tls, server_hostname=host
            )
        except BaseException:
            sock.close()
            raise
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REJECTION_WAIT):
                    await reader.read(1)
                if reader.at_eof():
                    raise ConnectionResetError(
                        0, "TLS: closed at once: it may want --backend_cert"
                    )
            certificate = writer.get_extra_info("peercert")
        finally:
            writer.transport.abort()
        return expiry_finding(
            f"{what} is reached by TLS: its certificate",
            ssl.cert_time_to_seconds(certificate["notAfter"]),
        )


def tls_remedy(error: ssl.SSLError) -> str:
    """What to do about a TLS handshake that failed."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return NO_TLS
        return "look at the backend's TLS, and at --backend_cert if it asks for one"
    if error.verify_code == CERT_HAS_EXPIRED:
        return "renew the backend's certificate"
    if error.verify_code in (HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH):
        return "use a name that stands in the certificate"
    return "give the authority that issued it in --backend_ca"


def folder_finding(path: Path) -> Finding:
    """Whether a folder can be written to, or be made."""
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
