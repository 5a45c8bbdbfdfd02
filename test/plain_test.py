"""Requests that are read without httptools: never otherwise than httptools does."""

import random

import pytest

from handlers.http.parser import MalformedRequest, RequestParser
from handlers.http.plain import MAX_HEAD_SIZE, plain_handshake, plain_request
from handlers.http.request import Request

TARGET = b"/socket/" + b"0" * 32 + b"/send"
LINE = b"POST " + TARGET + b" HTTP/1.1\r\n"
HOST = b"Host: relay:8765\r\n"
LENGTH = b"Content-Length: 5\r\n"


class Heads:
    """The requests whose heads were parsed."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def on_head(self, request: Request) -> None:
        self.requests.append(request)


def parsed(data: bytes) -> Request | None:
    """The request that httptools reads; None unless it is complete and the only one."""
    heads = Heads()
    parser = RequestParser(heads, max_header_size=64 * 1024)
    try:
        rest = parser.feed(data)
    except MalformedRequest:
        return None
    is_one = not rest and parser.partial is None and len(heads.requests) == 1
    return heads.requests[0] if is_one else None


def assert_same(data: bytes, request: Request) -> None:
    """Both read the same."""
    other = parsed(data)
    assert other is not None, data
    for name in ("method", "target", "version", "declared", "length", "body",
                 "complete", "keep_alive", "upgrade", "chunked", "trailers"):
        assert getattr(request, name) == getattr(other, name), (name, data)
    rest = [each for each in other.headers if each[0] != b"content-length"]
    assert request.headers == rest, data
    assert len(other.headers) == len(rest) + 1, data


# As HTTP clients write them.
CLIENTS = {
    "aiohttp": b"Host: relay:8765\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
               b"User-Agent: Python/3.11 aiohttp/3.9.5\r\nContent-Length: 5\r\n"
               b"Content-Type: application/octet-stream\r\n",
    "go": b"Host: relay:8765\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 5\r\n"
          b"Content-Type: application/json\r\nAccept-Encoding: gzip\r\n",
    "reqwest": b"content-type: text/plain\r\naccept: */*\r\nhost: relay:8765\r\n"
               b"content-length: 5\r\n",
    "undici": b"host: 127.0.0.1:8765\r\nconnection: keep-alive\r\n"
              b"content-type: text/plain;charset=UTF-8\r\naccept: */*\r\n"
              b"accept-language: *\r\nsec-fetch-mode: cors\r\nuser-agent: node\r\n"
              b"accept-encoding: gzip, deflate\r\ncontent-length: 5\r\n",
    "curl": b"Host: [::1]:8765\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n"
            b"Authorization: Bearer a-token\r\nContent-Length: 5\r\n",
}


@pytest.mark.parametrize("client", CLIENTS)
def test_usual_clients_send_plain_requests(client):
    """Each is read here, and as httptools reads it."""
    data = LINE + CLIENTS[client] + b"\r\nhello"
    request = plain_request(data, MAX_HEAD_SIZE)
    assert request is not None and request.plain is not None
    assert_same(data, request)


OTHERS = {
    "get": b"GET / HTTP/1.1\r\n" + HOST + LENGTH + b"\r\nhello",
    "http-1.0": b"POST / HTTP/1.0\r\n" + HOST + LENGTH + b"\r\nhello",
    "space-in-target": b"POST /a b HTTP/1.1\r\n" + HOST + LENGTH + b"\r\nhello",
    "absolute-target": b"POST http://a/ HTTP/1.1\r\n" + HOST + LENGTH + b"\r\nhello",
    "no-length": LINE + HOST + b"\r\n",
    "two-lengths": LINE + HOST + LENGTH + LENGTH + b"\r\nhello",
    "unequal-lengths": LINE + HOST + LENGTH + b"content-LENGTH: 6\r\n\r\nhello",
    "sign": LINE + HOST + b"Content-Length: +5\r\n\r\nhello",
    "list": LINE + HOST + b"Content-Length: 5, 5\r\n\r\nhello",
    "long-number": LINE + HOST + b"Content-Length: %d\r\n\r\nhello" % (5 + 2**64),
    "space-before-colon": LINE + HOST + b"Content-Length : 5\r\n\r\nhello",
    "length-in-a-value": LINE + HOST + b"X: Content-Length: 5\r\n\r\nhello",
    "length-in-a-name": LINE + HOST + b"X-Content-Length: 5\r\n\r\nhello",
    "length-behind-the-head": LINE + HOST + b"\r\n" + LENGTH + b"\r\nhello",
    "chunked": LINE + HOST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\nhello",
    "chunked-first": LINE + b"transfer-encoding: x\r\n" + HOST + LENGTH + b"\r\nhello",
    "upgrade": LINE + HOST + b"Upgrade: h2c\r\n" + LENGTH + b"\r\nhello",
    "close": LINE + HOST + b"Connection: close\r\n" + LENGTH + b"\r\nhello",
    "proxy-close": LINE + HOST + b"Proxy-Connection: close\r\n" + LENGTH + b"\r\nhello",
    "line-feeds": (LINE + HOST + LENGTH).replace(b"\r\n", b"\n") + b"\nhello",
    "one-line-feed": LINE + b"Host: a\n" + LENGTH + b"\r\nhello",
    "return-in-a-value": LINE + b"Host: a\rX: b\r\n" + LENGTH + b"\r\nhello",
    "folded": LINE + HOST + b"X: a\r\n b\r\n" + LENGTH + b"\r\nhello",
    "no-name": LINE + HOST + b": a\r\n" + LENGTH + b"\r\nhello",
    "null": LINE + HOST + b"X: a\0b\r\n" + LENGTH + b"\r\nhello",
    "no-body-yet": LINE + HOST + LENGTH + b"\r\n",
    "body-too-short": LINE + HOST + LENGTH + b"\r\nhell",
    "another-request": LINE + HOST + LENGTH + b"\r\nhello" + LINE,
    "long-head": LINE + HOST + b"X: %b\r\n" % (b"x" * MAX_HEAD_SIZE) + LENGTH
                 + b"\r\nhello",
    "empty": b"",
}


@pytest.mark.parametrize("row", OTHERS)
def test_other_requests_are_left_to_the_parser(row):
    """Whether or not they are well-formed."""
    assert plain_request(OTHERS[row], MAX_HEAD_SIZE) is None


@pytest.mark.parametrize("header", [
    b"Expect: 100-continue",
    b"Content-Encoding: gzip",
    b"Idempotency-Key: a",
    b"Host: other",
    b"Content-Type: text/plain; charset=latin-1",
    b"Content-Type: a/b\r\nContent-Type: c/d",
])
def test_request_with_special_headers_has_no_plain_ones(header):
    """It is read, but needs more than its body."""
    data = LINE + HOST + header + b"\r\n" + LENGTH + b"\r\nhello"
    request = plain_request(data, MAX_HEAD_SIZE)
    assert request is not None and request.plain is None
    assert_same(data, request)


PIECES = (
    b"Content-Length: 5\r\n", b"content-length: 5\r\n", b"CONTENT-LENGTH: 05\r\n",
    b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"\n", b"\r",
    b"Connection: Keep-Alive\r\n", b"Connection: close, keep-alive\r\n", b": ", b":",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Proxy-Connection: close\r\n",
    b"X: a, b\r\n", b"X:\r\n", b"X: \tz \r\n", b"X-Y_Z: 1\r\n", b" ", b"\t", b"\0",
    b"Host: b\r\n", b"Keep-Alive: 5\r\n", b"Te: trailers\r\n", b"\x80", b"#", b"\x7f",
    b"HTTP2-Settings: a\r\n", b"Expect: 100-continue\r\n", b"POST / HTTP/1.1\r\n",
)


def test_no_request_is_read_otherwise_than_by_httptools():
    """Random heads: whatever is read here, httptools reads as the same request."""
    chance = random.Random(1)
    heads = [LINE + fields for fields in CLIENTS.values()]
    plain = 0
    for _ in range(20_000):
        data = bytearray(chance.choice(heads) + b"\r\nhello")
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data) + 1)
            if chance.random() < 0.5:  # before a line
                at = data.find(b"\r\n", at) + 2
            size = chance.choice((0, 0, 0, 1, 2))
            data[at : at + size] = chance.choice(PIECES)
        request = plain_request(bytes(data), MAX_HEAD_SIZE)
        if request is not None:
            plain += 1
            assert_same(bytes(data), request)
    assert plain > 1000  # the others are no evidence


# Handshakes.

GET = b"GET /ws?a=b HTTP/1.1\r\n"
ASKS = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
BROWSERS = {
    "chromium": GET + b"Host: relay:8765\r\nConnection: Upgrade\r\nPragma: no-cache\r\n"
                b"Cache-Control: no-cache\r\nUser-Agent: Mozilla/5.0 (X11)\r\n"
                b"Upgrade: websocket\r\nOrigin: https://relay\r\n"
                b"Sec-WebSocket-Version: 13\r\nAccept-Encoding: gzip, deflate, br\r\n"
                b"Accept-Language: en-US,en;q=0.9\r\nCookie: a=b; c=d\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-"
                b"Extensions: permessage-deflate; client_max_window_bits\r\n",
    "firefox": GET + b"Host: relay\r\nAccept: */*\r\nOrigin: http://relay\r\n"
               b"Sec-WebSocket-Version: 13\r\nConnection: keep-alive, Upgrade\r\n"
               b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nDNT: 1\r\n"
               b"Upgrade: websocket\r\n",
    "websockets": GET + b"Host: relay:8765\r\n" + ASKS,
}


def assert_same_handshake(data: bytes, request: Request) -> None:
    """Both read the same."""
    other = parsed(data)
    assert other is not None, data
    # A compiled class has no `__slots__`.
    members = [name for name in dir(Request) if not name.startswith("_")]
    attributes = {n for n in members if not callable(getattr(Request, n))}
    assert {"method", "headers"} < attributes
    for name in attributes:
        assert getattr(request, name) == getattr(other, name), (name, data)


@pytest.mark.parametrize("client", BROWSERS)
def test_usual_clients_send_plain_handshakes(client):
    """Each is read here, and as httptools reads it."""
    data = BROWSERS[client] + b"\r\n"
    request = plain_handshake(data, MAX_HEAD_SIZE)
    assert request is not None
    assert_same_handshake(data, request)


@pytest.mark.parametrize("data", [
    GET + HOST + b"\r\n",
    GET + HOST + ASKS + LENGTH + b"\r\nhello",
    GET + HOST + ASKS + b"Content-Length: 0\r\n\r\n",
    GET + HOST + ASKS + b"Transfer-Encoding: chunked\r\n\r\n",
    GET + HOST + ASKS + b"Upgrade: h2c\r\n\r\n",
    GET + HOST + ASKS + b"Connection: close\r\n\r\n",
    GET + HOST + ASKS + b"\r\n\x81\x80",
    GET + HOST + ASKS + b"X: %b\r\n\r\n" % (b"x" * MAX_HEAD_SIZE),
    GET.replace(b"GET", b"POST") + HOST + ASKS + b"\r\n",
    GET.replace(b"1.1", b"1.0") + HOST + ASKS + b"\r\n",
    GET + HOST + ASKS,
    b"",
])  # fmt: skip
def test_other_handshakes_are_left_to_the_parser(data):
    """Whether or not they are well-formed."""
    assert plain_handshake(data, MAX_HEAD_SIZE) is None


def test_no_handshake_is_read_otherwise_than_by_httptools():
    """Random heads: whatever is read here, httptools reads as the same request."""
    chance = random.Random(1)
    heads = list(BROWSERS.values())
    plain = 0
    for _ in range(10_000):
        data = bytearray(chance.choice(heads) + b"\r\n")
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data) + 1)
            if chance.random() < 0.5:  # before a line
                at = data.find(b"\r\n", at) + 2
            size = chance.choice((0, 0, 0, 1, 2))
            data[at : at + size] = chance.choice(PIECES)
        request = plain_handshake(bytes(data), MAX_HEAD_SIZE)
        if request is not None:
            plain += 1
            assert_same_handshake(bytes(data), request)
    assert plain > 500  # the others are no evidence
