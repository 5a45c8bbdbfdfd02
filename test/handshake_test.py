"""Malformed handshakes, row by row; docs/bad-input.md is the table."""

import asyncio
import contextlib
import re
import socket
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import websockets
from faults import send_raw
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.ioloop import IOLoop
from wire import DEFLATE, KEY, TEXT, frame, handshake

pytestmark = pytest.mark.gen_test(timeout=60)

END = 0  # no answer, but the end of the connection


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all rows: they share a process, which must survive each row."""
    return module_io_loop


@dataclass
class Relay:
    """A relay that accepts compression, and the backend that it asks."""

    service: Service
    backend: RecordingBackend

    async def status(self, request: bytes) -> int:
        """Return the response's status, or END."""
        received = await send_raw(self.service.ws_url, request, answers=1)
        if received.data:
            return received.statuses[0]
        assert received.ended, "neither an answer nor the end"
        return END


@pytest.fixture(scope="module")
def relay(io_loop, shared) -> Relay:
    """One process for all rows."""

    async def begin() -> Relay:
        backend = await shared.enter_async_context(RecordingBackend())
        service = await shared.enter_async_context(
            Service(*backend.flags(), "--compression", "--header_timeout=3")
        )
        return Relay(service, backend)

    return io_loop.run_sync(begin)


def instead(header: str, *more: str) -> bytes:
    """A handshake in which this header replaces the one of the same name."""
    return handshake(header, *more, without=header.partition(":")[0])


def asking(target: str) -> bytes:
    return handshake(line=f"GET {target} HTTP/1.1")


def by(method: str) -> bytes:
    return handshake(line=f"{method} /ws HTTP/1.1")


def in_version(version: str) -> bytes:
    return handshake(line=f"GET /ws {version}")


def offering(protocols: str) -> bytes:
    return handshake(f"Sec-WebSocket-Protocol: {protocols}")


def extended_by(extensions: str) -> bytes:
    return handshake(f"Sec-WebSocket-Extensions: {extensions}")


ROWS = {
    # The WebSocket's own headers (RFC 6455, section 4.2.1).
    "no-upgrade": (handshake(without="Upgrade"), 426),
    "upgrade-to-h2c": (instead("Upgrade: h2c"), 426),
    "upgrade-to-a-list": (instead("Upgrade: h2c, websocket"), 426),
    "no-connection": (handshake(without="Connection"), 426),
    "connection-close": (instead("Connection: close"), 426),
    "no-version": (handshake(without="Sec-WebSocket-Version"), 426),
    "version-8": (instead("Sec-WebSocket-Version: 8"), 426),
    "version-not-a-number": (instead("Sec-WebSocket-Version: x"), 426),
    "two-versions": (handshake("Sec-WebSocket-Version: 13"), 426),
    "no-key": (handshake(without="Sec-WebSocket-Key"), 400),
    "empty-key": (instead("Sec-WebSocket-Key:"), 400),
    "short-key": (instead("Sec-WebSocket-Key: c2hvcnQ="), 400),
    "long-key": (instead(f"Sec-WebSocket-Key: {KEY[:-2]}{KEY}"), 400),
    "key-not-base64": (instead("Sec-WebSocket-Key: !!!!!!!!!!!!!!!!!!!!!!=="), 400),
    "two-keys": (handshake(f"Sec-WebSocket-Key: {KEY}"), 400),
    # Origin.
    "two-origins": (handshake(*["Origin: http://relay.example"] * 2), 403),
    "list-of-origins": (
        handshake("Origin: http://relay.example, http://relay.example"), 403,
    ),
    "empty-origin": (handshake("Origin:"), 403),
    "origin-with-path": (handshake("Origin: http://relay.example/"), 403),
    "origin-with-user": (handshake("Origin: http://relay.example@x"), 403),
    "origin-of-no-host": (handshake("Origin: http://["), 403),
    "origin-null": (handshake("Origin: null"), 403),
    # Offers.
    "subprotocol-with-space": (offering("a b"), 400),
    "subprotocol-with-semicolon": (offering("chat;v=1"), 400),
    "subprotocol-in-quotes": (offering('"chat"'), 400),
    "subprotocol-with-tab": (offering("a\tb"), 400),
    "subprotocol-not-ascii": (offering("caf\xe9"), 400),
    "good-and-bad-subprotocol": (offering("chat, b@d"), 400),
    "extension-without-name": (extended_by("; x"), 400),
    "extension-with-space": (extended_by("permessage deflate"), 400),
    "parameter-without-name": (extended_by("permessage-deflate; =1"), 400),
    "parameter-without-value": (extended_by("x; y="), 400),
    "parameter-in-open-quotes": (extended_by('x; y="1'), 400),
    "parameter-with-quoted-space": (extended_by('x; y="1 2"'), 400),
    "parameter-not-ascii": (extended_by("x; y=\xb2"), 400),
    "semicolons": (extended_by(";" * 50_000), 400),
    # The request.
    "method-post": (by("POST"), 405),
    "method-put": (by("PUT"), 405),
    "method-unknown": (by("BREW"), (400, 405)),
    "method-in-lower-case": (by("get"), (400, 405)),
    "method-connect": (by("CONNECT"), 405),
    "http-0.9": (b"GET /ws\r\n\r\n", 400),
    "http-1.0": (in_version("HTTP/1.0"), 400),
    "http-1.2": (in_version("HTTP/1.2"), 400),
    "http-2.0": (in_version("HTTP/2.0"), 400),
    "http-in-lower-case": (in_version("http/1.1"), 400),
    "no-version-number": (in_version("HTTP/"), 400),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "line-feeds-alone": (handshake(end=b"\n"), 400),
    "tabs": (handshake(line="GET\t/ws\tHTTP/1.1"), 400),
    "space-before-the-method": (b" " + handshake(), 400),
    "garbage": (b"\xff" * 500 + b"\r\n\r\n", 400),
    # Bodies.
    "body-with-length": (handshake("Content-Length: 5") + b"hello", 400),
    "body-of-a-frame": (
        handshake("Content-Length: 11") + frame(TEXT, b"hello"), 400,
    ),
    "chunked-body": (
        handshake("Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n", 400,
    ),
    "empty-chunked-body": (
        handshake("Transfer-Encoding: chunked") + b"0\r\n\r\n", 400,
    ),
    "unknown-transfer-coding": (handshake("Transfer-Encoding: gzip"), 400),
    "length-and-transfer-coding": (
        handshake("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        400,
    ),
    "different-lengths": (
        handshake("Content-Length: 5", "Content-Length: 6") + b"hello!", 400,
    ),
    "negative-length": (handshake("Content-Length: -1"), 400),
    "length-with-plus": (handshake("Content-Length: +5") + b"hello", 400),
    "huge-length": (handshake(f"Content-Length: 1{'0' * 30}"), 400),
    # Host.
    "no-host": (handshake(without="Host"), 400),
    "empty-host": (instead("Host:"), 400),
    "two-hosts": (handshake("Host: other.example"), 400),
    "the-same-host-twice": (handshake("Host: relay.example"), 400),
    "host-with-space": (instead("Host: a b"), 400),
    "host-with-path": (instead("Host: relay.example/x"), 400),
    "host-with-user": (instead("Host: user@relay.example"), 400),
    "host-with-open-bracket": (instead("Host: [::1"), 400),
    "host-with-huge-port": (instead("Host: relay.example:99999999"), 400),
    # Header lines.
    "folded-header": (handshake("X: a\r\n b"), 400),
    "header-without-colon": (handshake("oops"), 400),
    "header-without-name": (handshake(": a"), 400),
    "header-name-with-space": (handshake("X : a"), 400),
    "header-name-with-nul": (handshake("X\0: a"), 400),
    "nul-in-header": (handshake("X: a\0b"), 400),
    "control-in-header": (handshake("X: a\x01b"), 400),
    "carriage-return-in-header": (handshake("X: a\rY: b"), 400),
    "carriage-returns-alone": (handshake(end=b"\r"), (400, END)),
    "line-too-long": (asking("/ws?" + "a" * 70_000), (431, END)),
    "header-too-long": (handshake("X: " + "a" * 70_000), (431, END)),
    "ten-thousand-headers": (
        handshake(*(f"X{number}: a" for number in range(10_000))), (431, END),
    ),
    "endless-header": (b"GET /ws HTTP/1.1\r\nX: " + b"a" * 500_000, (431, END)),
    # Paths, which are compared unchanged.
    "two-slashes-behind": (asking("/ws//"), 404),
    "two-slashes": (asking("//ws"), 404),
    "dot-segment": (asking("/./ws"), 404),
    "dot-segments": (asking("/ws/../ws"), 404),
    "encoded-dot-segments": (asking("/ws/%2e%2e/ws"), 404),
    "encoded-letter": (asking("/%77s"), 404),
    "encoded-nul": (asking("/ws%00"), 404),
    "encoded-question-mark": (asking("/ws%3Fx=y"), 404),
    "capitals": (asking("/WS"), 404),
    "semicolon": (asking("/ws;x"), 404),
    "fragment": (asking("/ws#x"), 404),
    "backslashes": (asking("/x\\..\\ws"), 404),
    "no-slash": (asking("ws"), (400, 404)),
    "asterisk": (asking("*"), 404),
    "absolute-target": (asking("http://relay.example/ws"), 404),
    "absolute-target-elsewhere": (asking("http://evil.example/ws"), 404),
    "websocket-url-as-target": (asking("ws://relay.example/ws"), 404),
    "nul-in-target": (asking("/ws\0"), 400),
    "not-ascii-in-path": (asking("/ws\xe9"), 400),
    "not-ascii-in-query": (asking("/ws?name=J\xc3\xbcrgen"), 400),
    # Not HTTP requests.
    "tls-hello": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), (400, END)
    ),
    "frame-without-handshake": (frame(TEXT, b"hello"), (400, END)),
    "half-a-request": (handshake()[:-2], END),
    "silence": (b"", END),
}


@pytest.mark.parametrize(("request_", "status"), ROWS.values(), ids=ROWS.keys())
async def test_bad_handshake_is_answered_or_closed(
    io_loop, relay, request_, status
):
    """The right status, or the end, within 3 s; the backend gets no event."""
    asked = len(relay.backend.of("connect"))
    received = await relay.status(request_)
    assert received in (status if isinstance(status, tuple) else (status,))
    assert len(relay.backend.of("connect")) == asked
    assert await relay.status(handshake()) == 101
    assert not relay.service.tracebacks, "\n".join(relay.service.log)


async def test_426_says_what_is_served(io_loop, relay):
    """The protocol and its version (RFC 9110, 15.5.22; RFC 6455, 4.4)."""
    for request, name, value in (
        (handshake(without="Upgrade"), "upgrade", "websocket"),
        (instead("Sec-WebSocket-Version: 8"), "sec-websocket-version", "13"),
    ):
        received = await send_raw(relay.service.ws_url, request, answers=1)
        ((status, headers, _),) = received.answers()
        assert (status, headers[name]) == (426, value)


async def test_accept_is_made_of_the_key(io_loop, relay):
    """As in the example of RFC 6455, section 1.3."""
    received = await send_raw(relay.service.ws_url, handshake(), answers=1)
    ((status, headers, _),) = received.answers()
    assert status == 101
    assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


ODD = """
    import asyncio
    import sys

    from backends import Backend, ConnectionRefused

    REFUSALS = {
        "refuse": ({"WWW-Authenticate": "a\\x01b", "Retry-After": "7"}, b"no"),
        # All headers of a response that was received.
        "refuse-all": (
            {
                "Content-Length": "99",
                "Transfer-Encoding": "chunked",
                "Connection": "keep-alive",
                "Retry-After": "7",
            },
            b"no",
        ),
        "refuse-number": ({"Retry-After": 7}, b"no"),
        "refuse-name": ({"Retry\\r\\nAfter": "7"}, b"no"),
        "refuse-text": ({}, "no"),
    }

    class Unspeakable(str):
        \"\"\"Equals whatever was offered, and can be in no header.\"\"\"

        __hash__ = str.__hash__

        def __eq__(self, other):
            return True

    class OddBackend(Backend):
        def connect(self, connection, handshake):
            if handshake.query == "accept":
                return None
            if handshake.query == "cancelled":
                raise asyncio.CancelledError
            return self.decide(connection, handshake)

        async def decide(self, connection, handshake):
            if handshake.query in REFUSALS:
                raise ConnectionRefused(401, *REFUSALS[handshake.query])
            if handshake.query == "not-modified":
                raise ConnectionRefused(304, {}, b"no")
            if handshake.query == "close-float":
                connection.close(1000.0)
            if handshake.query == "close-by-nobody":
                connection.close(1000, "", "nobody")
            if handshake.query == "refuse-oddly":
                raise ConnectionRefused("403")
            if handshake.query == "close-oddly":
                connection.close(1005)
            if handshake.query == "long":
                connection.close(1000, "é" * 62)
            if handshake.query == "fail":
                raise KeyError(1)
            return Unspeakable("a\\nb")

        def message(self, connection, message):
            raise asyncio.CancelledError

        def called_back(self, connection):
            raise KeyError(connection.id)

        async def disconnect(self, connection, closure):
            print("end", closure.code, closure.initiator, file=sys.stderr)

    def make_backend(relay):
        return OddBackend()
"""


@contextlib.asynccontextmanager
async def odd_relay(tmp_path: Path, *flags: str) -> AsyncIterator[Service]:
    """A relay with the backend `ODD`."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "__init__.py").touch()
    (tmp_path / "odd" / "backend.py").write_text(textwrap.dedent(ODD))
    environment = {"PYTHONPATH": str(tmp_path)}
    async with Service(
        "--backend=odd.backend", *flags, environment=environment
    ) as service:
        yield service
        service.log.clear()  # of the bugs


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_bug_in_a_handshake_leaves_nothing(io_loop, tmp_path, server):
    """500, and a disconnect event, since the backend may have said yes.

    The connection counts no more: where one may be open, the next is not refused.
    """
    flags = (f"--http_server={server}", "--max_connections=1")
    async with odd_relay(tmp_path, *flags) as service:
        offer = "Sec-WebSocket-Protocol: a"
        odd = (
            "fail", "refuse-oddly", "refuse-number", "refuse-name", "refuse-text",
            "cancelled", "close-oddly", "close-float", "close-by-nobody", "long",
        )  # fmt: skip
        for number, target in enumerate(("/ws", *(f"/ws?{q}" for q in odd), "/ws"), 1):
            request = handshake(offer, line=f"GET {target} HTTP/1.1")
            received = await send_raw(
                service.ws_url, request, answers=1, deadline=DEADLINE
            )
            ((status, headers, _),) = received.answers()
            assert status == 500
            assert headers["content-type"] == "application/problem+json"
            await eventually(lambda n=number: service.log.count("end 1006 relay") == n)
            assert len(service.tracebacks) == number
        # The valid parts of a refusal are passed on.
        for query in ("refuse", "refuse-all"):
            request = handshake(line=f"GET /ws?{query} HTTP/1.1")
            received = await send_raw(service.ws_url, request, deadline=DEADLINE)
            ((status, headers, body),) = received.answers()
            assert (status, headers["retry-after"], body) == (401, "7", b"no")
            assert headers["connection"] == "close"
            assert {"www-authenticate", "transfer-encoding"}.isdisjoint(headers)
        request = handshake(line="GET /ws?not-modified HTTP/1.1")
        received = await send_raw(service.ws_url, request, deadline=DEADLINE)
        ((status, _, body),) = received.answers()
        assert (status, body) == (304, b"")


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_bug_of_a_backend_leaves_nobody_without_an_answer(
    io_loop, tmp_path, server
):
    """Neither the client whose message it was, nor who sends to it."""
    async with odd_relay(tmp_path, f"--http_server={server}") as service:
        async with websockets.connect(f"{service.ws_url}?accept") as client:
            await eventually(lambda: any(" opened by" in line for line in service.log))
            (opened,) = (line for line in service.log if " opened by" in line)
            path = f"/socket/{re.search('[0-9a-f]{32}', opened)[0]}/send"
            request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
            for pieces in ([request], request.partition("Host")):
                received = await send_raw(
                    service.callback_url,
                    *(piece.encode() for piece in pieces),
                    answers=1,
                    deadline=DEADLINE,
                )
                assert received.statuses == [500]
            await client.send("x")
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(client.recv(), DEADLINE)
            assert client.close_code == 1011


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_client_that_left_before_its_turn_is_not_logged(io_loop, server):
    """Many clients disconnect right after their handshakes."""
    async with Service(f"--http_server={server}") as service:
        parts = urlsplit(service.ws_url)
        for _ in range(200):
            with socket.create_connection((parts.hostname, parts.port)) as sock:
                sock.sendall(handshake())
        async with websockets.connect(service.ws_url):
            pass
    assert not [line for line in service.log if "bug" in line]


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_headers_are_spelt_as_in_their_standards(io_loop, server):
    """Some clients compare names case-sensitively, against the standard."""
    flags = (
        f"--http_server={server}", "--compression", "--callback_token=0123456789abcdef",
    )
    async with Service(*flags) as service:
        received = await send_raw(
            service.ws_url,
            handshake("Sec-WebSocket-Protocol: a", *DEFLATE),
            answers=1,
            deadline=DEADLINE,
        )
        for name in ("Accept", "Protocol", "Extensions"):
            assert f"\r\nSec-WebSocket-{name}: ".encode() in received.data
        assert received.data.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"\r\nUpgrade: websocket\r\n" in received.data
        assert b"\r\nConnection: Upgrade\r\n" in received.data
        received = await send_raw(
            service.ws_url,
            instead("Sec-WebSocket-Version: 8"),
            answers=1,
            deadline=DEADLINE,
        )
        assert b"\r\nSec-WebSocket-Version: 13\r\n" in received.data
        get = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
        received = await send_raw(
            service.callback_url, get, answers=1, deadline=DEADLINE
        )
        assert b"\r\nWWW-Authenticate: Bearer" in received.data


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_query_is_passed_on_unchanged(io_loop, server):
    """With any number of fields."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), f"--http_server={server}")
        async with Service(*flags) as service:
            for query in ("a=b&" * 5000, "&" * 60_000, "a=%zz&b=%00;c", "?a?"):
                received = await send_raw(
                    service.ws_url, asking(f"/ws?{query}"), answers=1, deadline=DEADLINE
                )
                assert received.statuses == [101], query[:20]
                assert backend.of("connect")[-1]["meta"]["query"] == query
            many = "&x" * 20_000
            for method, target, status in [
                ("GET", "/livez", 200),
                ("GET", "/readyz", 200),
                ("GET", "/openapi.json", 200),
                ("GET", "/nowhere", 404),
                ("GET", f"/socket/{'0' * 32}", 410),
                ("POST", f"/socket/{'0' * 32}/send", 410),
                ("GET", "/console/connections", 200),
            ]:
                url = f"{service.callback_url}{target}?type=text{many}"
                assert (await backend.call(url, method)).code == status, target


async def test_cookie_headers_are_joined_with_semicolons(io_loop, relay):
    """Several Cookie headers, as from HTTP/2, are one list of cookies."""
    request = handshake("Cookie: a=1; b=2,3", "X-Other: 1", "cookie: c=4", "X-Other: 2")
    assert await relay.status(request) == 101
    headers = relay.backend.of("connect")[-1]["meta"]["headers"]
    assert headers["cookie"] == "a=1; b=2,3; c=4"
    assert headers["x-other"] == "1, 2"


GOOD = {
    "by-the-book": handshake(),
    "same-origin": handshake("Origin: http://relay.example"),
    "several-connection-tokens": instead("Connection: keep-alive, UPGRADE"),
    "other-case": instead("upgrade: WebSocket").replace(b"Upgrade: websocket\r\n", b""),
    "slash-behind": asking("/ws/"),
    "slash-and-query-behind": asking("/ws/?token=x"),
    "empty-query": asking("/ws?"),
    "very-long-query": asking("/ws?" + "a" * 60_000),
    "many-headers": handshake(*(f"X{number}: a" for number in range(900))),
    "latin-1-in-header": handshake("X: \xe9\xff"),
    "length-of-0": handshake("Content-Length: 0"),
    "expect-continue": handshake("Expect: 100-continue"),
    "empty-offers": handshake("Sec-WebSocket-Protocol:", "Sec-WebSocket-Extensions:"),
    "commas": handshake("Sec-WebSocket-Protocol: ,,a,,", "Sec-WebSocket-Extensions: ,"),
    "unknown-extension": extended_by('x-frames; y=1; z="2"'),
    "ipv6-host": instead("Host: [::1]:8765"),
    "empty-line-before": b"\r\n" + handshake(),
}


@pytest.mark.parametrize("request_", GOOD.values(), ids=GOOD.keys())
async def test_unusual_valid_handshake_is_accepted(io_loop, relay, request_):
    """What the standards allow is not malformed."""
    assert await relay.status(request_) == 101


async def test_repeated_subprotocol_is_offered_once(io_loop, relay):
    """The backend gets each name once, in the client's order."""
    lines = [f"Sec-WebSocket-Protocol: {names}" for names in ("b, a", "b,, c,a")]
    assert await relay.status(handshake(*lines)) == 101
    assert relay.backend.of("connect")[-1]["meta"]["subprotocols"] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("offers", "answer"),
    [
        ("permessage-deflate", ""),
        ("permessage-deflate; client_max_window_bits", ""),
        ("permessage-deflate; client_max_window_bits=8", ""),
        ("permessage-deflate ; server_max_window_bits = 10", "10"),
        ('permessage-deflate; server_max_window_bits="9"', "9"),
        ("permessage-deflate; server_max_window_bits=15", "15"),
        ("permessage-deflate; unknown, permessage-deflate", ""),
        ('permessage-deflate; server_max_window_bits="\\1\\0"', "10"),
        (
            "permessage-deflate; client_max_window_bits; client_max_window_bits,"
            " permessage-deflate; server_max_window_bits=11",
            "11",
        ),
        (
            "permessage-deflate; server_max_window_bits=10; server_max_window_bits=10,"
            " permessage-deflate; server_max_window_bits=16, permessage-deflate",
            "",
        ),
        ("x; y; y=1, permessage-deflate", ""),
        ("permessage-deflate; client_max_window_bits; client_max_window_bits=9", None),
        ("permessage-deflate; server_no_context_takeover", ""),
        ("permessage-deflate; client_no_context_takeover" + "; x" * 20_000, None),
        ("permessage-deflate; server_max_window_bits=8", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; server_max_window_bits=010", None),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; client_max_window_bits=7", None),
        ("permessage-deflate; server_no_context_takeover=1", None),
        ("Permessage-Deflate", None),
        ("x-webkit-deflate-frame", None),
    ],
)
async def test_compression_is_negotiated_for_a_valid_offer(
    io_loop, relay, offers, answer
):
    """The first acceptable offer is accepted; without one there is none."""
    received = await send_raw(relay.service.ws_url, extended_by(offers), answers=1)
    ((status, headers, _),) = received.answers()
    assert status == 101
    extension = headers.get("sec-websocket-extensions")
    if answer is None:
        assert extension is None
        return
    agreed = re.fullmatch(
        r"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        r"(?:; server_max_window_bits=(\d+))?",
        extension or "",
    )
    assert agreed is not None, extension
    assert (agreed[1] or "") == answer
