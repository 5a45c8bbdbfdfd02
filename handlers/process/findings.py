"""The checks of `socketdock check` on this machine, each with a remedy.

They do not listen on a port: a client of a running relay might connect to the check
instead. `handlers.program.check` adds the findings of the backend.
"""

import errno
import os
import resource
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

from tornado.options import Error as OptionError

from backends.check import Finding, expiry_finding
from backends.files import read_text

# Tags of DER (X.680, section 8.6).
VERSION = 0xA0  # of an X.509 certificate, explicitly tagged
UTC_TIME = 0x17

PEM_END = "-----END CERTIFICATE-----"
REMEDIES = {
    errno.EADDRINUSE: "stop what listens there, which may be a relay, or choose"
    " another port",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE; or choose another",
    errno.EADDRNOTAVAIL: "give an address that this machine has",
}


def port_finding(
    what: str, address: str, port: int, reuse_port: bool = False
) -> Finding:
    """Check that `port` of `address` is free; "" is every address, port 0 any port."""
    where = f"{what}: port {port} of {address or 'every address'}"
    try:
        for family, kind, protocol, _, bound in socket.getaddrinfo(
            address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(bound)
    except socket.gaierror as error:
        return Finding("error", f"{where}: {error.strerror}; give an IP address")
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number else str(error)
        remedy = REMEDIES.get(number, "choose another address or port")
        return Finding("error", f"{where}: {why}; {remedy}")
    return Finding("ok", f"{where} is free")


def certificate_finding(path: str) -> Finding:
    """Check that no certificate of the chain in a PEM file has expired."""
    try:
        return expiry_finding(path, min(_ends(read_text(path, path))))
    except OptionError as error:
        return Finding("error", f"{error}; give another file")
    except ValueError:
        return Finding("error", f"{path}: there is no PEM certificate in it; give"
                                " another file")


def _ends(pem: str) -> Iterator[float]:
    """Yield each certificate's expiry, in seconds since 1970. Raises `ValueError`."""
    for part in pem.split(PEM_END)[:-1]:
        start = part.rindex("-----BEGIN CERTIFICATE-----")
        der = ssl.PEM_cert_to_DER_cert(part[start:] + PEM_END)
        yield _not_after(der)


def _not_after(der: bytes) -> float:
    """Return a certificate's expiry, in seconds since 1970 (RFC 5280, section 4.1)."""
    ((_, certificate),) = _elements(der)
    _, to_be_signed = next(_elements(certificate))
    fields = [field for tag, field in _elements(to_be_signed) if tag != VERSION]
    _, _, _, validity, *_ = fields  # after serial number, algorithm and issuer
    _, (tag, end) = _elements(validity)
    text = end.decode("ascii")
    if tag == UTC_TIME:  # a year of two digits (section 4.1.2.5.1)
        text = ("19" if text >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element (X.690, section 8.1)."""
    while len(der) >= 2:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start])
        yield tag, der[start : start + length]
        der = der[start + length :]


def descriptors_finding(wanted: int, max_connections: int) -> Finding:
    """Check that the limit of open files, with sockets, is at least `wanted`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return Finding(
            "error",
            f"at most {hard} files may be open here, and"
            f" --max_connections={max_connections} with what the backend needs takes"
            f" {wanted}; raise the limit (ulimit -Hn, LimitNOFILE=, minfds), or"
            " lower --max_connections",
        )
    limit = "any number" if hard == resource.RLIM_INFINITY else f"{hard}"
    return Finding(
        "ok",
        f"{limit} files may be open at once, and at most {wanted} are needed for"
        f" --max_connections={max_connections} and the backend",
    )
