"""The address, scheme and host of a client behind proxies.

Anyone can send X-Forwarded-For. It is trusted only from the configured proxies, and
only as far back as one of them wrote it. Forwarded (RFC 7239) is not read: a proxy
that sets the X-Forwarded-* headers passes on a Forwarded header of its client.
"""

import re
from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import NamedTuple

from tornado.options import define

from handlers.clients.origins import is_host_header
from handlers.clients.request import HandshakeRequest

define("trusted_proxies", multiple=True, group=__name__, metavar="NETWORKS",
       help="addresses and networks (10.0.0.0/8) of proxies whose X-Forwarded-For, "
            "X-Forwarded-Proto and X-Forwarded-Host are trusted; none: no proxy is "
            "trusted")

# Values of X-Forwarded-Proto; some proxies write ws and wss.
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}

# An address as proxies write it. Some add a port, brackets, and the zone of a
# link-local address, which has no meaning on this machine (RFC 4007, section 11.2).
_HOP = re.compile(
    r"\[([\da-f:.]+)(?:%[^\s\]]+)?\](?::\d+)?|([\d.]+)(?::\d+)?"
    r"|([\da-f:.]+)(?:%[^\s:]+)?",
    re.IGNORECASE,
)

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, section 2.5.5.2


class Forwarded(NamedTuple):
    """The address of a client, and the origin that it requested.

    `scheme` is http or https, or None if unknown: without TLS here, TLS may end at a
    proxy that is not listed. `host` includes the port if the client sent one.
    """

    remote_ip: str
    scheme: str | None
    host: str


class TrustedProxies:
    """The trusted proxies: addresses and CIDR networks.

    Raises `ValueError` for any other value.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [_network(text) for text in networks]

    def read(self, request: HandshakeRequest) -> Forwarded:
        """Return where a handshake comes from, and what it requested.

        Each trusted proxy in a chain may append to X-Forwarded-Proto and -Host, as
        it does to X-Forwarded-For. The value of the first one counts, because the
        client sent its request to it.
        """
        peer, host = request.peer, request.text("host")
        scheme = "https" if request.has_tls else None
        if not self._networks and ":" not in peer:
            return Forwarded(peer, scheme, host)  # as most come, and nothing to parse
        address = _address(peer)
        if address is None or not self._trusts(address):
            return Forwarded(peer if address is None else str(address), scheme, host)
        chain = 1  # number of trusted proxies between the relay and the client
        for hop in reversed(_members(request, "x-forwarded-for")):
            named = _hop(hop)
            if named is None:
                break
            address = named
            if not self._trusts(address):
                break
            chain += 1
        forwarded_scheme = _first_value(request, "x-forwarded-proto", chain).lower()
        forwarded_host = _first_value(request, "x-forwarded-host", chain)
        return Forwarded(
            str(address),
            _SCHEMES.get(forwarded_scheme, scheme),
            forwarded_host if is_host_header(forwarded_host) else host,
        )

    def _trusts(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _members(request: HandshakeRequest, name: str) -> list[str]:
    """Return the members of a list header: at least one, which may be empty."""
    return request.text(name).split(",")


def _first_value(request: HandshakeRequest, name: str, chain: int) -> str:
    """Return what the first of `chain` proxies added to a header.

    If there are fewer members than proxies, some proxies have replaced the header.
    """
    members = _members(request, name)
    return members[-min(chain, len(members))].strip()


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(text)
    except ValueError:
        raise ValueError(
            f"{text} is neither an address nor a network, such as 10.0.0.0/8"
        ) from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        address = network.network_address.ipv4_mapped
        assert address is not None
        return IPv4Network((address, network.prefixlen - _MAPPED.prefixlen))
    return network


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an address; IPv4 for an IPv4-mapped one (RFC 4291, 2.5.5.2)."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _hop(text: str) -> IPv4Address | IPv6Address | None:
    found = _HOP.fullmatch(text.strip())
    return _address(next(filter(None, found.groups()), "")) if found else None
