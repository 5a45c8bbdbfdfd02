"""Who a client is, and what it asked, where proxies stand before the relay.

Anyone can write X-Forwarded-For; it is believed only from proxies that are
named, and only as far back as one of them wrote it. Forwarded (RFC 7239) is not
read: a proxy that writes the X-Forwarded-* headers passes on whatever Forwarded
its client sent.
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

from tornado.httputil import HTTPHeaders
from tornado.options import define

from handlers.clients.origins import is_host

define("trusted_proxies", multiple=True, metavar="NETWORKS",
       help="addresses and networks (10.0.0.0/8) of proxies whose X-Forwarded-For, "
            "X-Forwarded-Proto and X-Forwarded-Host are trusted; none: no proxy is "
            "trusted")

# What proxies write into X-Forwarded-Proto, some of them ws and wss.
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}

# An address as proxies write it: some add a port, and brackets, and the zone of a
# link-local one, which means nothing on this machine (RFC 4007, section 11.2).
_HOP = re.compile(
    r"\[([\da-f:.]+)(?:%[^\s\]]+)?\](?::\d+)?|([\d.]+)(?::\d+)?"
    r"|([\da-f:.]+)(?:%[^\s:]+)?",
    re.IGNORECASE,
)

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, section 2.5.5.2


class Forwarded(NamedTuple):
    """What a client asked, and who it is, as far as that can be known.

    `remote_ip` is its address. `scheme` is http or https, None where that isn't
    known: without TLS here, it may end at a proxy that is not listed. `host` is
    what it asked for, with the port if it named one.
    """

    remote_ip: str
    scheme: str | None
    host: str


class TrustedProxies:
    """The proxies that are believed: addresses and CIDR networks.

    Raises `ValueError` with one sentence where one is neither.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [_network(text) for text in networks]

    def read(self, peer: str, headers: HTTPHeaders, host: str, tls: bool) -> Forwarded:
        """What a request says that came from `peer`, to `host`, by TLS or not.

        Each trusted proxy in a row may have added to X-Forwarded-Proto and -Host
        as it adds to X-Forwarded-For; what counts is what the first of them wrote,
        whom the client asked.
        """
        scheme = "https" if tls else None
        address = _address(peer)
        if address is None or not self._trusts(address):
            return Forwarded(peer if address is None else str(address), scheme, host)
        row = 1  # trusted proxies, from here to the client
        for hop in reversed(_members(headers, "X-Forwarded-For")):
            named = _hop(hop)
            if named is None:
                break
            address = named
            if not self._trusts(address):
                break
            row += 1
        said_scheme = _said(headers, "X-Forwarded-Proto", row).lower()
        said_host = _said(headers, "X-Forwarded-Host", row)
        return Forwarded(
            str(address),
            _SCHEMES.get(said_scheme, scheme),
            said_host if is_host(said_host) else host,
        )

    def _trusts(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _members(headers: HTTPHeaders, name: str) -> list[str]:
    """Of a header to which each proxy adds one; at least one, which may be empty."""
    return ",".join(headers.get_list(name)).split(",")


def _said(headers: HTTPHeaders, name: str, row: int) -> str:
    """What the first of `row` proxies added to a header.

    Where fewer members are there than proxies, some of these wrote it anew.
    """
    members = _members(headers, name)
    return members[-min(row, len(members))].strip()


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
    """An address; an IPv4 one where IPv6 only wraps it (RFC 4291, 2.5.5.2)."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _hop(text: str) -> IPv4Address | IPv6Address | None:
    found = _HOP.fullmatch(text.strip())
    return _address(next(filter(None, found.groups()), "")) if found else None
