"""Which pages may connect: the Origin header that browsers send (RFC 6454)."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from tornado.options import define

define("allowed_origins", multiple=True, metavar="ORIGINS",
       help="origins whose pages may connect, as https://app.example.com or "
            "https://*.example.com, or * for all; none: the same origin only")
define("require_origin", default=False,
       help="refuse clients that send no Origin, as all but browsers do")

_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_origin_allowed(
    origin: str, allowed: Sequence[str], host: str, scheme: str | None = None
) -> bool:
    """Whether a page of `origin` may connect (RFC 6454, section 4).

    Without `allowed`, it must be the origin of the request itself: its `host`,
    and its `scheme` where that is known.
    """
    if "*" in allowed:
        return True
    given = split_origin(origin)
    if given is None:
        return False
    if not allowed:
        return given == split_origin(f"{scheme or given[0]}://{host}")
    for pattern in allowed:
        wanted, name, port = split_origin(pattern) or ("", "", 0)
        if (wanted, port) != (given[0], given[2]):
            continue
        if name == given[1] or (name.startswith("*.") and given[1].endswith(name[1:])):
            return True
    return False


def split_origin(origin: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin; None for anything else."""
    try:
        parts = urlsplit(origin.lower())
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme]
