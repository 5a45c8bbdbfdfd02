"""The URL at which the backend reaches this instance's callbacks."""

import ipaddress
import re
from urllib.parse import urlsplit

from tornado.options import Error as OptionError
from tornado.options import define

from backends.hosts import encoded_host, is_host
from handlers.http.listener import Listener, is_wildcard

define("externalhostandport", type=str, metavar="HOST:PORT",
       help="how the backend reaches the callbacks of this instance: host:port, or a "
            "URL with scheme and optional path; none: the address of the callback "
            "listener")


def callback_url(external: str | None, listener: Listener) -> str | None:
    """Return the URL prefix of the callbacks, without a trailing slash.

    None if it is not configured and the listener has a wildcard address.
    """
    if not external:
        return None if listener.is_wildcard else listener.url("http")
    scheme = "https" if listener.has_tls else "http"
    url = external if "://" in external else f"{scheme}://{external}"
    # It may contain a password.
    what = "--externalhostandport" + ("" if "@" in external else f"={external}")
    try:
        parts = urlsplit(url)
        netloc = parts.netloc
        if netloc.count(":") > 1 and "[" not in netloc:
            netloc = in_brackets(netloc)
        if not netloc.isascii():
            netloc = with_encoded_host(netloc, what)
        if netloc != parts.netloc:  # geturl() would lose an empty query
            url = url.replace(parts.netloc, netloc, 1)
            parts = urlsplit(url)
        host = parts.hostname or ""
        wrong = (
            parts.scheme not in ("http", "https")
            or not is_host(host)
            or "%" in host  # a zone is valid on one machine only
            or parts.netloc.endswith(":")
            or parts.port == 0
            or re.search(r"[@?#\\]", url)
            or re.search(r"[^!-~]", url)
        )
    except ValueError:
        wrong = True
    if wrong:
        raise OptionError(
            f"{what} is neither host:port nor an http(s) URL; an IPv6 address needs"
            " brackets, [fd00::1]:8765"
        )
    if is_wildcard(host):
        raise OptionError(f"{what} is a wildcard address, which cannot be called")
    return url.rstrip("/")


def in_brackets(netloc: str) -> str:
    """Return `[fd00::1]:8765` for `fd00::1:8765`, which `$(POD_IP):8765` becomes.

    It might be an address without a port, but a port is required. Raises
    `ValueError` if the part before the last colon is not an IPv6 address.
    """
    address, _, port = netloc.rpartition(":")
    return f"[{ipaddress.IPv6Address(address)}]:{port}"


def with_encoded_host(netloc: str, what: str) -> str:
    """Return `xn--bcher-kva.example:80` for `b\u00fccher.example:80`.

    Raises `OptionError`, which begins with `what`, if the encoding is ambiguous.
    """
    host, colon, port = netloc.partition(":")
    try:
        return encoded_host(host) + colon + port
    except ValueError as error:
        raise OptionError(f"{what}: {error}") from None
