"""Reads usual callbacks and handshakes without httptools, if they arrive at once.

Their form is so strict that there is only one way to read them, and a test compares
each result with that of `handlers.http.parser`, which reads all other requests.
"""

import re
from functools import lru_cache

from backends.media_types import has_text_charset
from handlers.http.request import Fields, PlainHeaders, Request

# Cached headers. Backends send few, each many times: all but the length of the body.
MAX_REMEMBERED = 64
MAX_HEAD_SIZE = 2048  # bytes of a head that is read here

EMPTY_LINE = b"\r\n\r\n"

# Target, headers before Content-Length, its value, and the headers behind it.
HEAD = re.compile(
    rb"POST (/[!-~]*) HTTP/1\.1\r\n((?:.+\n)*?)[Cc]ontent-[Ll]ength: ([0-9]{1,9})\r\n"
    rb"((?:.+\n)*?)\r\n"
)
FIELD = re.compile(rb"([A-Za-z0-9-]+): ([!-~](?:[ -~]*[!-~])?)\r\n")
# A request for another protocol: its target and its headers.
HANDSHAKE = re.compile(
    rb"GET (/[!-~]*) HTTP/1\.1\r\n"
    rb"([A-Za-z0-9-]++: (?! )[ -~]++(?<! )(?:\r\n[A-Za-z0-9-]++: (?! )[ -~]++(?<! ))*+)"
    rb"\r\n\r\n"
)
# The values of `Connection` in it, in lower case.
UPGRADES = frozenset({b"upgrade", b"keep-alive, upgrade"})
HOST = re.compile(rb"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")
# These change where the request ends, or what follows it on the connection. llhttp
# takes the last one for `Connection`.
FRAMING = frozenset({
    b"content-length", b"transfer-encoding", b"upgrade", b"proxy-connection"
})
# These need more than the body.
SPECIAL = frozenset({b"expect", b"content-encoding", b"idempotency-key"})


def plain_request(data: bytes, max_head_size: int) -> Request | None:
    """Return the request if `data` is a plain one and no more; None: parse it.

    Its `headers` are without Content-Length. `max_head_size` is in bytes.
    """
    if data.endswith(EMPTY_LINE):
        return None  # usually its body has not arrived
    head = HEAD.match(data, 0, max_head_size)
    if head is None:
        return None
    target, before, size, after = head.groups()
    length = int(size)
    end = head.end()
    if length != len(data) - end:
        return None
    headers = _read(before, after)
    if headers is None:
        return None
    request = Request()
    request.method, request.target, request.version = "POST", target, "1.1"
    request.headers, request.plain = headers
    request.declared = request.length = length
    request.body = data[end:]
    request.keep_alive = request.complete = True
    return request


def plain_handshake(data: bytes, max_head_size: int) -> Request | None:
    """Return the request if `data` is a plain handshake and no more; None: parse it.

    `max_head_size` is in bytes.
    """
    head = HANDSHAKE.fullmatch(data) if len(data) <= max_head_size else None
    if head is None:
        return None
    fields = []
    for line in head[2].split(b"\r\n"):
        name, _, value = line.partition(b": ")
        fields.append((name.lower(), value))
    upgrades = connections = 0
    for name, value in fields:
        if name == b"upgrade":
            upgrades += 1
        elif name == b"connection":
            connections += 1
            if value.lower() not in UPGRADES:
                return None
        elif name in FRAMING:
            return None
    if upgrades != 1 or connections != 1:
        return None
    request = Request()
    request.method, request.target, request.version = "GET", head[1], "1.1"
    request.headers = fields
    request.upgrade = request.complete = True
    return request


@lru_cache(MAX_REMEMBERED)
def _read(before: bytes, after: bytes) -> tuple[Fields, PlainHeaders | None] | None:
    """Return the headers before and behind Content-Length; None: not in plain form."""
    fields = []
    for block in (before, after):
        end = 0
        for field in FIELD.finditer(block):
            if field.start() != end:
                return None
            end = field.end()
            name, value = field[1].lower(), field[2]
            if name in FRAMING:
                return None
            if name == b"connection" and value.lower() != b"keep-alive":
                return None
            fields.append((name, value))
        if end != len(block):
            return None
    return fields, plain_headers(fields)


def plain_headers(fields: Fields) -> PlainHeaders | None:
    """Return `Content-Type` and `Authorization` headers.

    None if others ask for more than usual, or may mean several things.
    """
    content_type = host = None
    credentials = []
    for name, value in fields:
        if name == b"content-type":
            if content_type is not None:
                return None
            content_type = value.decode("latin-1")
            if ";" in content_type and not has_text_charset(content_type):
                return None
        elif name == b"host":
            if host is not None or not is_plain_host(value):
                return None
            host = value
        elif name == b"authorization":
            credentials.append(value.decode("latin-1"))
        elif name in SPECIAL:
            return None
    return None if host is None else (content_type or "", credentials)


@lru_cache(MAX_REMEMBERED)
def is_plain_host(value: bytes) -> bool:
    """Return whether a Host header has the usual form."""
    return HOST.fullmatch(value) is not None
