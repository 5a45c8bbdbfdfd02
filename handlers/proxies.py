"""Who a client is, and how it came, where proxies stand before the relay.

Anyone can write X-Forwarded-For; it is believed only from proxies that are
named, and only as far back as one of them wrote it.
"""

import re
from collections.abc import Iterable, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

from tornado.options import define

define("trusted_proxies", multiple=True, metavar="NETWORKS",
       help="addresses and networks (10.0.0.0/8) of proxies whose X-Forwarded-For "
            "and X-Forwarded-Proto are believed; none: nobody's are")

# What proxies write into X-Forwarded-Proto, some of them ws and wss.
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}

# An address as proxies write it: some add a port, and brackets.
_HOP = re.compile(r"\[([\da-f:.]+)\](?::\d+)?|([\d.]+)(?::\d+)?|([\da-f:.]+)", re.I)


class TrustedProxies:
    """The proxies that are believed: addresses and CIDR networks.

    Raises `ValueError` with one sentence where one is neither.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [_network(text) for text in networks]

    def remote_ip(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The client's address: the last one that a trusted proxy names.

        `peer` is who connected; `forwarded_for` are the X-Forwarded-For
        headers, to which each proxy has added whom it served.
        """
        address = _address(peer)
        if address is None:
            return peer
        if self._networks:
            for hop in reversed(",".join(forwarded_for).split(",")):
                named = _hop(hop) if self._trusts(address) else None
                if named is None:
                    break
                address = named
        return str(address)

    def scheme(
        self, peer: str, forwarded_proto: Sequence[str], tls: bool
    ) -> str | None:
        """How the client came, http or https; None where that isn't known.

        Without TLS here nobody knows: it may end at a proxy that is not listed.
        """
        if self._networks and forwarded_proto and self._trusts(_address(peer)):
            # The last one, which is that of the proxy itself.
            said = forwarded_proto[-1].rpartition(",")[2].strip().lower()
            if said in _SCHEMES:
                return _SCHEMES[said]
        return "https" if tls else None

    def _trusts(self, address: IPv4Address | IPv6Address | None) -> bool:
        return address is not None and any(
            address in network for network in self._networks
        )


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError(
            f"{text} is neither an address nor a network, such as 10.0.0.0/8"
        ) from None


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
