"""URLs of Redis in options: one server, Sentinels, or a Cluster.

    redis://[user:password@]host[:6379][/db]        rediss:// with TLS
    unix:///path/of/socket[?db=0]
    redis+sentinel://[…@]host[:26379][,host…]/service[/db]
    redis+cluster://[…@]host[:6379][,host…]

`backends.redis_client` connects to what they name.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from tornado.options import Error as OptionError

from backends.files import read_lines

Kind = Literal["single", "sentinel", "cluster"]

# Scheme: what it names, and whether it uses TLS.
SCHEMES: Mapping[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
PORTS: Mapping[Kind, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
# Parameters of the query, as in redis-py's URLs.
TLS_PARAMETERS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
SENTINEL_PARAMETERS = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is, and how to log in. `str()` of it has no secret.

    `hosts` are pairs of host and port: one server, the Sentinels, or some nodes of a
    Cluster; empty for the Unix socket `path`. `service` is what Sentinels call the
    master. `parameters` are those of the query.
    """

    kind: Kind
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    path: str
    service: str
    db: int
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)
    parameters: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        plus = "" if self.kind == "single" else f"+{self.kind}"
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            for host, port in self.hosts
        )
        service = f"/{self.service}" if self.service else ""
        return f"redis{'s' if self.tls else ''}{plus}://{hosts}{service}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine is meant: a Unix socket, or loopback addresses."""
        return all(_is_loopback(host) for host, _ in self.hosts)


def read_address(option: str, url: str | None, url_file: str | None) -> RedisAddress:
    """Return what `--<option>` or `--<option>_file` names.

    Raises `OptionError` with one sentence, which contains no secret: neither or both
    are given, or the URL is invalid; `Unavailable` if the file cannot be read.
    """
    if url and url_file:
        raise OptionError(f"--{option} and --{option}_file exclude each other")
    if url:
        return parse_address(url, f"--{option}")
    if not url_file:
        raise OptionError(f"--{option} is missing: the URL of Redis")
    where = f"--{option}_file={url_file}"
    lines = [line for _, line in read_lines(url_file, where)]
    if len(lines) > 1:
        raise OptionError(f"{where}: it must have one line, the URL")
    return parse_address(lines[0], where)


def parse_address(url: str, where: str) -> RedisAddress:
    """Parse a URL. Raises `OptionError`; its text begins with `where`."""
    try:
        parts = urlsplit(url)
        return _address(parts)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from None


def _address(parts: SplitResult) -> RedisAddress:
    """Raises `ValueError` with a reason that contains no secret."""
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"the URL of Redis begins with one of {', '.join(SCHEMES)}, and ://"
        )
    kind, tls = SCHEMES[parts.scheme]
    login, _, places = parts.netloc.rpartition("@")
    username, has_password, password = login.partition(":")
    words = [unquote(word) for word in parts.path.split("/")[1:] if word]
    parameters = _parameters(parts, kind, tls)
    hosts: tuple[tuple[str, int], ...] = ()
    path = service = ""
    if parts.scheme == "unix":
        path = unquote(parts.path)
        if not path or places:
            raise ValueError("a Unix socket is named as unix:///path/of/socket")
        words = []
    else:
        hosts = tuple(_host(place, PORTS[kind]) for place in places.split(","))
        if kind == "single" and len(hosts) > 1:
            raise ValueError(
                "several hosts need redis+sentinel:// or redis+cluster://"
            )
    if kind == "sentinel":
        if not words:
            raise ValueError("the name of the Sentinels' service is missing: /service")
        service = words.pop(0)
    if "db" in parameters:
        words.append(parameters.pop("db"))
    if len(words) > 1 or (words and not words[0].isdecimal()):
        raise ValueError("the number of the database is invalid")
    db = int(words[0]) if words else 0
    if kind == "cluster" and db:
        raise ValueError("a Cluster has no database but 0")
    return RedisAddress(
        kind,
        tls,
        hosts,
        path,
        service,
        db,
        unquote(username) or None,
        unquote(password) if has_password else None,
        parameters,
    )


def _parameters(parts: SplitResult, kind: Kind, tls: bool) -> dict[str, str]:
    allowed = {"db"}
    if tls:
        allowed |= set(TLS_PARAMETERS)
    if kind == "sentinel":
        allowed |= set(SENTINEL_PARAMETERS)
    found = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in found:
        if name not in allowed:
            raise ValueError(
                f"its query may have {', '.join(sorted(allowed))}, and nothing else"
            )
    if parts.fragment:
        raise ValueError("encode # in it as %23")
    return found


def _host(place: str, port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place}")
        host, given = parts.hostname, parts.port
    except ValueError:
        raise ValueError("its host or port is invalid") from None
    if not host:
        raise ValueError("its host is missing")
    return host, given or port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
