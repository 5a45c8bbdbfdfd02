"""Malformed HTTP requests, row by row; docs/bad-input.md is the table.

Requests come to both of the parsers that read callbacks: on a listener that
clients share, and on one of their own.
"""

import asyncio
import json
import os
import signal
import ssl
from dataclasses import dataclass

import pytest
import websockets
from faults import Received, ScriptedBackend, memory, send_raw
from service import DEADLINE, RecordingBackend, Service, eventually, refusal, withhold
from tornado.ioloop import IOLoop

pytestmark = pytest.mark.gen_test(timeout=60)

LISTENERS = {"one-listener": (), "two-listeners": ("--callbackport=0",)}


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all rows: they share processes, which must survive each row."""
    return module_io_loop


@dataclass
class Relay:
    """A relay with one well-behaved client, whose id is `id`."""

    service: Service
    backend: RecordingBackend
    client: websockets.ClientConnection
    id: str

    async def send_raw(self, *pieces: bytes, **options: object) -> Received:
        """Speak on a bare connection to the callbacks; {id} is the client's."""
        pieces = tuple(piece.replace(b"{id}", self.id.encode()) for piece in pieces)
        return await send_raw(self.service.callback_url, *pieces, **options)

    async def frames(self) -> list[str | bytes]:
        """Return the frames that the client has received so far.

        Sends a valid callback, which shows that the relay still works.
        """
        url = f"{self.service.callback_url}/socket/{self.id}/send"
        answer = await self.backend.call(url, body=b"mark")
        assert answer.code == 200
        frames = []
        async with asyncio.timeout(DEADLINE):
            while (frame := await self.client.recv()) != b"mark":
                frames.append(frame)
        assert not self.service.tracebacks, "\n".join(self.service.log)
        return frames


@pytest.fixture(scope="module", params=LISTENERS.values(), ids=LISTENERS.keys())
def relay(io_loop, shared, request) -> Relay:
    """One process for all rows."""

    async def begin() -> Relay:
        backend = await shared.enter_async_context(RecordingBackend())
        service = await shared.enter_async_context(
            Service(*backend.flags(), *request.param)
        )
        client = await shared.enter_async_context(
            websockets.connect(service.ws_url, ping_interval=None)
        )
        (event,) = await backend.wait_for("connect", 1)
        return Relay(service, backend, client, event["meta"]["connection_id"])

    return io_loop.run_sync(begin)


# Ambiguous callback requests.

LINE = b"POST /socket/{id}/send?type=text HTTP/1.1\r\n"
HOST = b"Host: relay\r\n"
SENT = b"Content-Length: 5\r\n\r\nhello"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
# What must never be read as a request: it stands where a body ends for a reader
# who believes the wrong length.
SMUGGLED = (
    b"POST /socket/{id}/send?type=text HTTP/1.1\r\nHost: relay\r\n"
    b"Content-Length: 8\r\n\r\nsmuggled"
)
LAST = b"0\r\n\r\n"


def lengths(*values: bytes) -> bytes:
    return b"".join(b"Content-Length: " + value + b"\r\n" for value in values)


def client_hello() -> bytes:
    """What a TLS client says first."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="relay").do_handshake()
    return outgoing.read()


REFUSED = {
    # Both lengths (RFC 9112, section 6.3), each of the two believed.
    "length-then-chunked": HOST + lengths(b"5") + CHUNKED + LAST,
    "chunked-then-length": HOST + CHUNKED[:-2] + lengths(b"5") + b"\r\n" + LAST,
    "length-and-unknown-coding": HOST + lengths(b"5") + b"Transfer-Encoding: x\r\n\r\n",
    # Lengths.
    "different-lengths": HOST + lengths(b"5", b"6") + b"\r\nhello",
    "different-lengths-as-list": HOST + lengths(b"5, 6") + b"\r\nhello",
    "length-with-plus": HOST + lengths(b"+5") + b"\r\nhello",
    "negative-length": HOST + lengths(b"-1") + b"\r\nhello",
    "hexadecimal-length": HOST + lengths(b"0x5") + b"\r\nhello",
    "empty-length": HOST + lengths(b"") + b"\r\nhello",
    "length-with-space": HOST + lengths(b"5 5") + b"\r\nhello",
    "length-with-underscore": HOST + lengths(b"0_5") + b"\r\nhello",
    "length-in-other-digits": HOST + lengths("\u0665".encode()) + b"\r\nhello",
    "fractional-length": HOST + lengths(b"5.0") + b"\r\nhello",
    "huge-length": HOST + lengths(b"99999999999999") + b"\r\nhello",
    "length-above-64-bits": HOST + lengths(b"18446744073709551621") + b"\r\nhello",
    "length-of-31-digits": HOST + lengths(b"1" + b"0" * 30) + b"\r\nhello",
    # Transfer codings.
    "unknown-coding": HOST + b"Transfer-Encoding: xchunked\r\n\r\n" + LAST,
    "chunked-not-last": HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + LAST,
    "chunked-twice": HOST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + LAST,
    "chunked-after-vertical-tab": (
        HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + LAST
    ),
    "space-before-colon": HOST + b"Transfer-Encoding : chunked\r\n\r\n" + LAST,
    "space-before-colon-of-length": HOST + b"Content-Length : 5\r\n\r\nhello",
    # Chunks.
    "negative-chunk": HOST + CHUNKED + b"-5\r\nhello\r\n" + LAST,
    "chunk-with-plus": HOST + CHUNKED + b"+5\r\nhello\r\n" + LAST,
    "chunk-with-0x": HOST + CHUNKED + b"0x5\r\nhello\r\n" + LAST,
    "chunk-with-underscore": HOST + CHUNKED + b"0_5\r\nhello\r\n" + LAST,
    "chunk-without-size": HOST + CHUNKED + b"\r\nhello\r\n" + LAST,
    "chunk-size-no-number": HOST + CHUNKED + b"xyz\r\nhello\r\n" + LAST,
    "chunk-above-64-bits": HOST + CHUNKED + b"10000000000000005\r\nhello\r\n" + LAST,
    "chunk-of-31-digits": HOST + CHUNKED + b"1" + b"0" * 30 + b"\r\nhello\r\n" + LAST,
    "chunk-without-its-end": HOST + CHUNKED + b"5\r\nhelloX\r\n" + LAST,
    "chunk-longer-than-announced": HOST + CHUNKED + b"4\r\nhello\r\n" + LAST,
    "chunk-with-endless-extension": (
        HOST + CHUNKED + b"5;" + b"x" * 2_000_000 + b"\r\nhello\r\n" + LAST
    ),
    "endless-trailer": (
        HOST + CHUNKED + b"5\r\nhello\r\n0\r\nX: " + b"x" * 200_000 + b"\r\n\r\n"
    ),
    # Lines.
    "no-host": SENT,
    "two-hosts": HOST + b"Host: other\r\n" + SENT,
    "host-with-path": b"Host: relay/other\r\n" + SENT,
    "host-with-space": b"Host: relay other\r\n" + SENT,
    "carriage-return-alone": b"Host: relay\rContent-Length: 5\r\n\r\nhello",
    "header-without-colon": HOST + b"nothing\r\n" + SENT,
    "header-without-name": HOST + b": x\r\n" + SENT,
    "header-with-bad-name": HOST + b"(X): x\r\n" + SENT,
    "space-before-first-header": b" X: x\r\n" + HOST + SENT,
    "header-too-large": HOST + b"X: " + b"x" * 200_000 + b"\r\n" + SENT,
    "ten-thousand-headers": HOST + b"X-Header: value\r\n" * 10_000 + SENT,
}

REFUSED_LINES = {
    "http-0.9": b"POST /socket/{id}/send?type=text\r\n\r\n",
    "version-3": LINE.replace(b"1.1", b"3.0") + HOST + SENT,
    "version-of-no-number": LINE.replace(b"1.1", b"x.y") + HOST + SENT,
    "lower-case-version": LINE.replace(b"HTTP", b"http") + HOST + SENT,
    "two-spaces-and-more": b"POST  /socket/{id}/send HTTP/1.1 x\r\n" + HOST + SENT,
    "space-in-target": b"POST /socket/{id}/send?a b HTTP/1.1\r\n" + HOST + SENT,
    "nul-in-target": b"POST /socket/{id}/send?\0 HTTP/1.1\r\n" + HOST + SENT,
    "target-too-large": b"POST /" + b"x" * 200_000 + b" HTTP/1.1\r\n" + HOST + SENT,
    "http-2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "tls-hello": client_hello() + b"\r\n\r\n",
    "garbage": bytes(range(256)) + b"\r\n\r\n",
    "websocket-frames": b"\x81\x85\0\0\0\0hello\r\n\r\n",
}

# One error response, then the end, for a peer that does not use HTTP/1.1.
ERRORS = {400, 405, 411, 413, 414, 417, 431, 501, 505}


@pytest.mark.parametrize("row", [*REFUSED, *REFUSED_LINES])
async def test_ambiguous_request_is_rejected(relay, row):
    """At most one response, an error, then the end; no further request is read."""
    request = LINE + REFUSED[row] if row in REFUSED else REFUSED_LINES[row]
    received = await relay.send_raw(request + SMUGGLED)
    assert received.ended, received
    assert len(received.statuses) <= 1, received
    assert ERRORS.issuperset(received.statuses), received
    assert await relay.frames() == []


TOLERATED = {
    "equal-lengths": HOST + lengths(b"5", b"5") + b"\r\nhello",
    "equal-lengths-as-list": HOST + lengths(b"5, 5") + b"\r\nhello",
    "length-with-zeros": HOST + lengths(b"0" * 40 + b"5") + b"\r\nhello",
    "coding-in-capitals": HOST + b"Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n"
    + LAST,
    "chunk-with-extension": HOST + CHUNKED + b"5;a=b\r\nhello\r\n" + LAST,
    "chunk-with-zeros": HOST + CHUNKED + b"0" * 17 + b"5\r\nhello\r\n" + LAST,
    "chunk-with-line-feed": HOST + CHUNKED + b"5\nhello\r\n" + LAST,
    "trailer": HOST + CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n",
    "line-feeds-alone": HOST.replace(b"\r", b"") + SENT.replace(b"\r", b""),
    "folded-header": HOST + b"X: a\r\n b\r\n" + SENT,
    "folded-coding": HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n5\r\nhello\r\n"
    + LAST,
    "carriage-return-in-header": HOST + b"X: a\rb\r\n" + SENT,
    "nul-in-header": HOST + b"X: a\0b\r\n" + SENT,
    "control-character-in-header": HOST + b"X: a\x01b\r\n" + SENT,
    "header-of-any-bytes": HOST + b"X: \x80\xff\r\n" + SENT,
    "unknown-expectation": HOST + b"Expect: 200-ok\r\n" + SENT,
}


@pytest.mark.parametrize("row", TOLERATED)
async def test_request_with_one_interpretation_is_served_or_rejected(relay, row):
    """It is rejected, or read with the only length that it can have."""
    received = await relay.send_raw(LINE + TOLERATED[row] + SMUGGLED, answers=2)
    frames = await relay.frames()
    if frames:
        assert received.statuses == [200, 200], received
        assert frames == ["hello", "smuggled"]  # then the request was accepted
    else:
        assert received.ended, received
        assert len(received.statuses) <= 1, received
        assert ERRORS.issuperset(received.statuses), received


CUT = {
    "in-the-line": LINE[:20],
    "in-the-headers": LINE + HOST,
    "in-the-body": LINE + HOST + SENT[:-1],
    "in-a-chunk": LINE + HOST + CHUNKED + b"5\r\nhell",
    "before-the-last-chunk": LINE + HOST + CHUNKED + b"5\r\nhello\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("row", CUT)
async def test_incomplete_request_is_not_served(relay, row):
    """The connection is closed, and the client gets nothing."""
    received = await relay.send_raw(CUT[row], half_close=True)
    assert received.ended
    assert {400}.issuperset(received.statuses), received
    assert await relay.frames() == []


# Callback requests with an answer.

ANSWERED = {
    "percent-encoded-slash": (b"POST /socket%2F{id}/send HTTP/1.1", {404}),
    "percent-encoded-route": (b"POST /socket/{id}/%73end HTTP/1.1", {404}),
    "trailing-slash": (b"POST /socket/{id}/send/ HTTP/1.1", {404}),
    "two-slashes": (b"POST //socket/{id}/send HTTP/1.1", {404}),
    "two-slashes-within": (b"POST /socket//{id}/send HTTP/1.1", {404}),
    "dot-segments": (b"POST /socket/x/../{id}/send HTTP/1.1", {404}),
    "encoded-dot-segments": (b"POST /socket/%2e%2e/socket/{id}/send HTTP/1.1", {404}),
    "backslashes": (b"POST /socket\\{id}\\send HTTP/1.1", {400, 404}),
    "semicolon": (b"POST /socket/{id}/send;type=text HTTP/1.1", {404}),
    "newline-behind-the-path": (b"POST /socket/{id}/send%0A HTTP/1.1", {404}),
    "nul-behind-the-path": (b"POST /socket/{id}/send%00 HTTP/1.1", {404}),
    "id-too-long": (b"POST /socket/{id}0/send HTTP/1.1", {404}),
    "id-too-short": (b"POST /socket/0/send HTTP/1.1", {404}),
    "no-id": (b"POST /socket//send HTTP/1.1", {404}),
    "asterisk": (b"OPTIONS * HTTP/1.1", {400, 404}),
    "authority": (b"CONNECT relay:443 HTTP/1.1", {400, 404, 405, 501}),
    "unknown-method": (b"BREW /socket/{id}/send HTTP/1.1", {400, 405, 501}),
    "lower-case-method": (b"post /socket/{id}/send HTTP/1.1", {400, 405, 501}),
    "unknown-type": (b"POST /socket/{id}/send?type=blob HTTP/1.1", {400}),
    "empty-type": (b"POST /socket/{id}/send?type= HTTP/1.1", {400}),
    "type-with-newline": (b"POST /socket/{id}/send?type=text%0D%0A HTTP/1.1", {400}),
    "type-of-bad-utf-8": (b"POST /socket/{id}/send?type=%FF HTTP/1.1", {400}),
    "type-of-a-megabyte": (
        b"POST /socket/{id}/send?type=" + b"x" * 60_000 + b" HTTP/1.1", {400, 414}
    ),
}


@pytest.mark.parametrize("row", ANSWERED)
async def test_unusual_target_is_answered(relay, row):
    """Paths are not normalized; an unknown path reaches no client."""
    line, statuses = ANSWERED[row]
    received = await relay.send_raw(line + b"\r\n" + HOST + SENT, answers=1)
    ((status, *_),) = received.answers()
    assert status in statuses, received
    assert await relay.frames() == []


async def test_connection_id_in_capitals_is_rejected(relay):
    """An id has one spelling, in lower case."""
    for spelling in (relay.id.upper(), f"%{ord(relay.id[0]):02X}{relay.id[1:]}"):
        line = f"POST /socket/{spelling}/send HTTP/1.1\r\n".encode()
        received = await relay.send_raw(line + HOST + SENT, answers=1)
        # One id in some millions has no letter, and so no capitals.
        assert received.statuses == [404] or spelling == relay.id
    assert await relay.frames() == []


async def test_absolute_target_is_routed_by_its_path_or_rejected(relay):
    """Its host is ignored (RFC 9112, section 3.2.2), and nothing is fetched."""
    line = b"POST http://other.example/socket/{id}/send?type=text HTTP/1.1\r\n"
    received = await relay.send_raw(line + HOST + SENT, answers=1)
    if await relay.frames():
        assert received.statuses == [200]
    else:
        assert received.statuses in ([400], [404])


async def test_pipelined_requests_are_answered_in_order(relay):
    """Each is executed once, after the one before it."""
    requests = [
        LINE + HOST + b"Content-Length: 1\r\n\r\n%d" % number for number in range(9)
    ]
    requests.insert(3, b"POST /nothing HTTP/1.1\r\n" + HOST + SENT)
    requests.insert(6, LINE.replace(b"{id}", b"0" * 32) + HOST + SENT)
    received = await relay.send_raw(b"".join(requests), answers=11)
    assert received.statuses == [200, 200, 200, 404, 200, 200, 410, *[200] * 4]
    assert await relay.frames() == [str(number) for number in range(9)]


LAST_ONES = {
    "connection-close": (HOST + b"Connection: close\r\n" + SENT, 200),
    "connection-close-in-capitals": (HOST + b"Connection: CLOSE\r\n" + SENT, 200),
    "too-large": (HOST + lengths(b"99999999999999") + b"\r\n", 413),
    "too-large-and-expecting": (
        HOST + b"Expect: 100-continue\r\n" + lengths(b"5000000") + b"\r\n", 413
    ),
}


@pytest.mark.parametrize("row", LAST_ONES)
async def test_nothing_is_read_behind_the_last_request(relay, row):
    """After `Connection: close` no request is processed (RFC 9112, section 9.6)."""
    request, status = LAST_ONES[row]
    received = await relay.send_raw(LINE + request + SMUGGLED)
    assert received.ended
    assert received.statuses == [status]
    assert await relay.frames() == (["hello"] if status == 200 else [])


async def test_request_in_single_bytes_is_served(relay):
    """For every way to split it, the result is the same."""
    request = (LINE + HOST + SENT).replace(b"{id}", relay.id.encode())
    pieces = [request[index : index + 1] for index in range(len(request))]
    assert (await relay.send_raw(*pieces, answers=1)).statuses == [200]
    assert await relay.frames() == ["hello"]


async def test_half_closed_connection_gets_its_response(relay):
    """A peer may shut down its writing side after the request."""
    received = await relay.send_raw(LINE + HOST + SENT, half_close=True)
    assert received.statuses == [200]
    assert await relay.frames() == ["hello"]


async def test_upgrade_to_http_2_is_ignored(relay):
    """The request is served as HTTP/1.1 (RFC 9110, section 7.8)."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    settings = b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    received = await relay.send_raw(LINE + HOST + upgrade + settings + SENT, answers=1)
    assert received.statuses == [200]
    assert await relay.frames() == ["hello"]


async def test_100_continue_is_sent_on_request(relay):
    """Then the body is read, and one response follows."""
    head, end, body = (LINE + HOST + b"Expect: 100-continue\r\n" + SENT).rpartition(
        b"\r\n\r\n"
    )
    host, port = relay.service.callback_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.replace(b"{id}", relay.id.encode()) + end)
    interim = await asyncio.wait_for(reader.readuntil(end), DEADLINE)
    assert interim.startswith(b"HTTP/1.1 100 ")
    writer.write(body)
    answer = await asyncio.wait_for(reader.readuntil(end), DEADLINE)
    assert answer.startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert await relay.frames() == ["hello"]


NO_CLOSING = {
    "not-json": b"{",
    "not-an-object": b"[1000]",
    "deeply-nested": b"[" * 200_000,
    "deeply-nested-objects": b'{"a":' * 200_000,
    "code-of-5000-digits": b'{"code": 1' + b"0" * 5000 + b"}",
    "code-as-fraction": b'{"code": 1000.5}',
    "code-of-a-whole-fraction": b'{"code": 1006.0}',
    "code-as-exponent": b'{"code": 1e400}',
    "code-not-a-number": b'{"code": NaN}',
    "code-as-list": b'{"code": [1000]}',
    "code-null": b'{"code": null}',
    "second-code-forbidden": b'{"code": 1000, "code": 1006}',
    "lone-surrogate": rb'{"reason": "\ud800"}',
    "reason-too-long": b'{"reason": "' + b"x" * 124 + b'"}',
    "reason-as-object": b'{"reason": {}}',
    "bad-utf-8": b'{"reason": "\xff"}',
    "nul": b"\0",
}


@pytest.mark.parametrize("row", NO_CLOSING)
async def test_bad_closing_is_400(relay, row):
    """The error does not quote the input, and the client stays connected."""
    head = b"POST /socket/{id}/disconnect HTTP/1.1\r\n" + HOST
    head += lengths(b"%d" % len(NO_CLOSING[row])) + b"\r\n"
    received = await relay.send_raw(head + NO_CLOSING[row], answers=1)
    ((status, headers, document),) = received.answers()
    assert status == 400
    assert headers["content-type"] == "application/problem+json"
    assert len(json.loads(document)["detail"]) < 100
    assert await relay.frames() == []


async def test_line_breaks_in_a_reason_stay_in_the_close_frame(relay):
    """They start no header in the callback's response, nor in an event."""
    reason = "a\r\nX-Injected: b\r\n\r\n\0"
    before = len(relay.backend.of("disconnect"))
    async with websockets.connect(relay.service.ws_url) as client:
        event = (await relay.backend.wait_for("connect", 2))[-1]
        path = event["meta"]["disconnect"].removeprefix(relay.service.callback_url)
        body = json.dumps({"code": 3000, "reason": reason}).encode()
        head = f"POST {path} HTTP/1.1\r\n".encode() + HOST
        received = await relay.send_raw(
            head + lengths(b"%d" % len(body)) + b"\r\n" + body, answers=1
        )
        ((status, headers, document),) = received.answers()
        assert (status, document) == (200, b"OK")
        assert "x-injected" not in headers
        with pytest.raises(websockets.ConnectionClosed):
            await asyncio.wait_for(client.recv(), DEADLINE)
        assert (client.close_code, client.close_reason) == (3000, reason)
    await relay.backend.wait_for("disconnect", before + 1)
    kind, event, headers = relay.backend.events[-1]
    assert (kind, event["meta"]["reason"]) == ("disconnect", reason)
    assert "X-Injected" not in headers
    assert await relay.frames() == []


# Responses of the backend.

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
EMPTY = b"Content-Length: 0\r\n\r\n"
CUT_OFF = ScriptedBackend.CUT

# Malformed responses: the event is retried, and a handshake gets 503.
NO_ANSWER = {
    "nothing": b"",
    "no-http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "http-0.9": b"OK" + CUT_OFF,
    "tls-alert": b"\x15\x03\x01\x00\x02\x02\x16" + CUT_OFF,
    "garbage": bytes(range(256)),
    "no-status": b"HTTP/1.1 OK\r\n" + EMPTY,
    "status-000": b"HTTP/1.1 000 No\r\n" + EMPTY,
    "status-099": b"HTTP/1.1 099 No\r\n" + EMPTY,
    "status-999": b"HTTP/1.1 999 No\r\n" + EMPTY,
    "status-of-four-digits": b"HTTP/1.1 2000 OK\r\n" + EMPTY,
    "status-of-letters": b"HTTP/1.1 abc OK\r\n" + EMPTY,
    "negative-status": b"HTTP/1.1 -200 OK\r\n" + EMPTY,
    "interim-answers-only": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000,
    "cut-in-the-status": b"HTTP/1.1 20" + CUT_OFF,
    "cut-in-the-headers": b"HTTP/1.1 200 OK\r\nContent-Le" + CUT_OFF,
    "retry-after-negative": b"HTTP/1.1 503 No\r\nRetry-After: -1\r\n" + EMPTY,
    "retry-after-garbage": b"HTTP/1.1 503 No\r\nRetry-After: 1e9, soon\r\n" + EMPTY,
    "retry-after-empty": b"HTTP/1.1 503 No\r\nRetry-After:\r\n" + EMPTY,
    "retry-after-other-digits": (
        "HTTP/1.1 503 No\r\nRetry-After: \u0661\r\n".encode() + EMPTY
    ),
    "retry-after-year-0": (
        b"HTTP/1.1 503 No\r\nRetry-After: Mon, 01 Jan 0000 00:00:00 GMT\r\n" + EMPTY
    ),
    "retry-after-year-1": (
        b"HTTP/1.1 503 No\r\nRetry-After: Mon, 01 Jan 0001 00:00:00 +2359\r\n" + EMPTY
    ),
    "retry-after-far-zone": (
        b"HTTP/1.1 503 No\r\nRetry-After: Mon, 01 Jan 2001 00:00:00 +999999999999\r\n"
        + EMPTY
    ),
}

# The status counts, whatever follows it.
ACCEPTED = {
    "no-reason": b"HTTP/1.1 200\r\n" + EMPTY,
    "http-1.0": b"HTTP/1.0 200 OK\r\n\r\nOK" + CUT_OFF,
    "both-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + CHUNKED + LAST,
    "header-without-colon": b"HTTP/1.1 200 OK\r\nnothing\r\n" + EMPTY,
    "header-with-bad-name": b"HTTP/1.1 200 OK\r\n(X): x\r\n" + EMPTY,
    "nul-in-header": b"HTTP/1.1 200 OK\r\nX: a\0b\r\n" + EMPTY,
    "unknown-2xx": b"HTTP/1.1 299 Fine\r\n" + EMPTY,
    "interim-answers-first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK
    ),
    "different-lengths": b"HTTP/1.1 200 OK\r\n" + lengths(b"2", b"3") + b"\r\nOK",
    "negative-length": b"HTTP/1.1 200 OK\r\n" + lengths(b"-1") + b"\r\nOK",
    "length-with-plus": b"HTTP/1.1 200 OK\r\n" + lengths(b"+2") + b"\r\nOK",
    "length-no-number": b"HTTP/1.1 200 OK\r\n" + lengths(b"two") + b"\r\nOK",
    "length-of-31-digits": (
        b"HTTP/1.1 200 OK\r\n" + lengths(b"1" + b"0" * 30) + b"\r\nOK"
    ),
    "endless-header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20,
    "endless-headers": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 100_000,
    "end-without-an-empty-line": b"HTTP/1.1 200 OK\r\nX: y\r\n" + CUT_OFF,
    "bad-chunk": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"xyz\r\nOK\r\n" + LAST,
    "huge-chunk": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"1" + b"0" * 30 + b"\r\nOK",
    "chunk-without-its-end": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"2\r\nOKOKOK" + LAST,
    "endless-trailer": (
        b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"0\r\n" + b"X: x\r\n" * 1_000_000
    ),
    "body-cut-short": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nOK" + CUT_OFF,
    "body-longer-than-announced": OK + b"OK",
    "second-answer": OK + b"HTTP/1.1 500 No\r\n" + EMPTY,
    "body-without-length": b"HTTP/1.1 200 OK\r\n\r\nOK" + CUT_OFF,
    "gigantic-body": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n" + b"x" * 2**26
    ),
    "204-with-body": b"HTTP/1.1 204 No\r\nContent-Length: 2\r\n\r\nOK",
    "compressed-garbage": (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nOK"
    ),
}

# Not retried.
NOT_WANTED = {
    "switching-protocols": (
        b"HTTP/1.1 101 Yes\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    ),
    "redirect": b"HTTP/1.1 302 There\r\nLocation: /message\r\n" + EMPTY,
    "permanent-redirect": b"HTTP/1.1 308 There\r\nLocation: /message\r\n" + EMPTY,
    "not-modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "unknown-4xx": b"HTTP/1.1 499 No\r\n" + EMPTY,
}

ANSWERS = NO_ANSWER | ACCEPTED | NOT_WANTED


@dataclass
class Answered:
    """A relay whose backend answers as a script says."""

    service: Service
    backend: ScriptedBackend

    def answer(self, kind: str, answer: bytes, times: int = 1) -> None:
        """The next events of that kind get `answer`; all others are accepted."""
        answers = [answer] * times
        self.backend.events.clear()
        self.backend.script = lambda asked: (
            answers.pop() if asked == kind and answers else OK
        )

    def is_well(self) -> None:
        assert not self.service.tracebacks, "\n".join(self.service.log)
        assert memory(self.service.process.pid, "VmHWM") < 150 * 2**20


@pytest.fixture(scope="module")
def answered(io_loop, shared) -> Answered:
    """One process for all rows, without an effect of the breaker."""

    async def begin() -> Answered:
        backend = await shared.enter_async_context(ScriptedBackend(lambda kind: OK))
        flags = ("--breaker_attempts=1000000", "--delivery_timeout=3")
        service = await shared.enter_async_context(Service(*backend.flags(), *flags))
        return Answered(service, backend)

    return io_loop.run_sync(begin)


@pytest.mark.parametrize("row", ANSWERS)
async def test_bad_response_to_a_message(answered, row):
    """The message is retried or refused, and the next one is sent."""
    answered.answer("message", ANSWERS[row])
    async with websockets.connect(answered.service.ws_url) as client:
        await client.send("one")
        await client.send("two")
    (event,) = await answered.backend.wait_for("disconnect", 1)
    came = [event["message"] for event in answered.backend.of("message")]
    assert came == (["one", "one", "two"] if row in NO_ANSWER else ["one", "two"])
    assert event["meta"]["refused"] == (1 if row in NOT_WANTED else 0)
    assert event["meta"]["undelivered"] == 0
    answered.is_well()


@pytest.mark.parametrize("row", ANSWERS)
async def test_bad_response_to_a_disconnect_event(answered, row):
    """The event is retried, or refused finally, which is logged."""
    answered.answer("disconnect", ANSWERS[row])
    before = len(answered.service.log)
    async with websockets.connect(answered.service.ws_url):
        pass
    attempts = 2 if row in NO_ANSWER else 1
    await answered.backend.wait_for("disconnect", attempts)
    if row in NOT_WANTED:
        await eventually(
            lambda: any(
                "disconnect notification failed" in line
                for line in answered.service.log[before:]
            )
        )
    async with websockets.connect(answered.service.ws_url) as client:  # a barrier
        await client.send("hello")
    await answered.backend.wait_for("disconnect", attempts + 1)
    assert len(answered.backend.of("disconnect")) == attempts + 1
    answered.is_well()


HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
    b"Sec-WebSocket-Protocol: a, b\r\n\r\n"
)


async def handshake_answer(answered: Answered) -> tuple[int, dict[str, str], bytes]:
    """The one answer to a handshake, from its first byte to its last."""
    url = answered.service.ws_url
    received = await send_raw(url, HANDSHAKE, answers=1, deadline=DEADLINE)
    (answer,) = received.answers()
    return answer


@pytest.mark.parametrize("row", ANSWERS)
async def test_bad_response_to_a_connect_event(answered, row):
    """The client gets 503, and the backend a disconnect event."""
    # Of a kept connection that closes without a byte, it is likely that it was
    # closed before the event came: that one may come twice.
    times = 2 if row == "nothing" else 1
    answered.answer("connect", ANSWERS[row], times)
    status, *_ = await handshake_answer(answered)
    # A body that cannot be decoded is not a decision, in spite of its status.
    is_decision = row in ACCEPTED and row != "compressed-garbage"
    assert status == (101 if is_decision else 503)
    (event,) = await answered.backend.wait_for("disconnect", 1)
    assert event["meta"]["code"] == 1006
    assert len(answered.backend.of("connect")) <= times
    answered.is_well()


VERDICTS = {
    "not-json": (b"yes", 101),
    "json-that-is-cut": (b'{"subprotocol": "a', 101),
    "bad-utf-8": (b'{"subprotocol": "\xff"}', 101),
    "lone-surrogate": (rb'{"subprotocol": "\ud800"}', 101),
    "list": (b'["a"]', 101),
    "number": (b"1" + b"0" * 5000, 101),
    "deeply-nested": (b"[" * 60_000, 101),
    "longer-than-is-read": (b'{"subprotocol": "a", "x": "' + b"x" * 2**17 + b'"}', 101),
    "null": (b'{"subprotocol": null}', 101),
    "number-as-subprotocol": (b'{"subprotocol": 7}', 503),
    "list-as-subprotocol": (b'{"subprotocol": ["a"]}', 503),
    "empty-subprotocol": (b'{"subprotocol": ""}', 503),
    "subprotocol-not-offered": (b'{"subprotocol": "c"}', 503),
    "both-subprotocols": (b'{"subprotocol": "a, b"}', 503),
    "subprotocol-with-line-break": (
        rb'{"subprotocol": "a\r\nX-Injected: 1"}', 503
    ),
    "subprotocol-with-nul": (rb'{"subprotocol": "a\u0000"}', 503),
}


@pytest.mark.parametrize("row", VERDICTS)
async def test_bad_body_of_an_accepting_response(answered, row):
    """2xx accepts the client, but selects only a subprotocol that it offered."""
    body, expected = VERDICTS[row]
    head = b"HTTP/1.1 200 OK\r\n" + lengths(b"%d" % len(body)) + b"\r\n"
    answered.answer("connect", head + body)
    status, headers, _ = await handshake_answer(answered)
    assert status == expected
    assert "sec-websocket-protocol" not in headers
    assert "x-injected" not in headers
    await answered.backend.wait_for("disconnect", 1)
    answered.is_well()


# In the value of a header that a refusal passes on.
INJECTIONS = {
    "line-break": b"a\r\nX-Injected: 1",
    "line-feed": b"a\nX-Injected: 1",
    "carriage-return": b"a\rX-Injected: 1",
    "nul": b"a\0X-Injected: 1",
    "folded": b"a\r\n X-Injected: 1",
    "folded-twice": b"a\r\n\t\r\n X-Injected: 1",
    "control-character": b"a\x01\x08\x1b[2J\x7f",
    "any-bytes": bytes(range(0x80, 0x100)),
    "utf-8": "\u010d\u010a\u2028".encode(),  # bytes that end in CR and LF, cut short
    "escaped": b"a%0d%0aX-Injected: 1",
    "long": b"x" * 60_000,
    "empty": b"",
    "end-of-headers": b"a\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK",
}


@pytest.mark.parametrize("name", ["WWW-Authenticate", "Retry-After", "Content-Type"])
@pytest.mark.parametrize("row", INJECTIONS)
async def test_refusal_injects_nothing(answered, row, name):
    """The client gets one response, with the three permitted headers."""
    head = f"HTTP/1.1 401 No\r\nSet-Cookie: a=b\r\n{name}: ".encode()
    answered.answer(
        "connect", head + INJECTIONS[row] + b"\r\nContent-Length: 2\r\n\r\nno"
    )
    status, headers, body = await handshake_answer(answered)
    assert status in (401, 503)
    ours = {"content-type", "date", "content-length", "connection",
            "www-authenticate", "retry-after"}
    assert ours.issuperset(headers)
    assert body in (b"no", b"") or status == 503
    answered.is_well()


async def test_body_of_a_refusal_is_cut(answered):
    """The client gets at most its first 4 KiB."""
    for body, length in ((b"x" * 2**23, b"8388608"), (b"x" * 5000, b"5000")):
        head = b"HTTP/1.1 403 No\r\n" + lengths(length) + b"\r\n"
        answered.answer("connect", head + body)
        status, headers, got = await handshake_answer(answered)
        assert (status, headers["content-length"], got) == (403, "4096", b"x" * 4096)
    answered.is_well()


# Options and files; what is missing here is in socketdock_test.py, and beside the
# tests of each option.

NO_FILES = {
    "null-bytes": (b"\0\1\2", "not name = value"),
    "random-bytes": (bytes(range(256)), "it is not UTF-8"),
    "byte-order-mark-of-utf-16": ("bindport = 1".encode("utf-16"), "it is not UTF-8"),
    "many-parentheses": (b"bindport = " + b"(" * 1000, "not name = value"),
    "many-signs": (b"bindport = " + b"-" * 100_000 + b"1", "not name = value"),
    "number-of-5000-digits": (b"bindport = " + b"9" * 5000, "not name = value"),
    "number-above-any-float": (b"drain_timeout = 1" + b"0" * 400, "not that large"),
    "number-above-the-systems": (b"max_message_size = 1" + b"0" * 30, "at most"),
    "null-byte-in-a-path": (rb"state_dir = 'a\0b'", "control characters"),
    "line-break-in-a-name": (rb"instance_name = 'a\nb'", "control characters"),
    "lone-surrogate-in-a-name": (rb"instance_name = '\ud800'", "UTF-8"),
    "call": (b"bindport = print(1)", "not a plain value"),
    "attribute": (b"options.bindport = 1", "not name = value"),
}


@pytest.mark.once
@pytest.mark.once
@pytest.mark.parametrize("row", NO_FILES)
def test_bad_options_file_is_one_line(tmp_path, row):
    """The file is not executed, and the relay does not start."""
    content, said = NO_FILES[row]
    (tmp_path / "conf").write_bytes(content)
    assert said in refusal(f"--config={tmp_path / 'conf'}")


def test_bad_environment_is_one_line():
    """Bytes that are not UTF-8 become surrogates, which no event can contain."""
    line = refusal(SOCKETDOCK_INSTANCE_NAME=os.fsdecode(b"\xff"))
    assert "SOCKETDOCK_INSTANCE_NAME must be text in UTF-8" in line


async def test_largest_values_work(io_loop):
    """The largest value of each option causes no overflow."""
    flags = [
        f"--{name}={2**48}"
        for name in ("max_message_size", "max_send_buffer", "max_queued_bytes",
                     "max_pending", "connection_queue_messages", "max_connections",
                     "max_backend_connections", "max_unanswered")
    ]
    flags += [
        f"--{name}=1e308"
        for name in ("ping_interval", "ping_timeout", "send_timeout", "header_timeout",
                     "handshake_timeout", "order_wait", "backend_timeout",
                     "delivery_timeout", "backend_connect_timeout",
                     "backend_dead_after", "idle_timeout", "max_lifetime")
    ]
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags, "--compression") as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("up")
                (event,) = await backend.wait_for("message", 1)
                answer = await backend.call(event["meta"]["send"], body=b"down")
                assert answer.code == 200
                assert await client.recv() == b"down"
            await backend.wait_for("disconnect", 1)


# Signals.


@pytest.mark.parametrize("number", [signal.SIGPIPE, signal.SIGHUP])
async def test_ignored_signals_change_nothing(io_loop, number):
    """One or many, also during a drain."""
    async with RecordingBackend() as backend:
        answered = withhold(backend, "disconnect")
        async with Service(*backend.flags("message", "disconnect")) as service:
            async with websockets.connect(service.ws_url) as client:
                for _ in range(100):
                    service.process.send_signal(number)
                await client.send("hello")
                await backend.wait_for("message", 1)
                service.process.send_signal(signal.SIGTERM)
                await backend.wait_for("disconnect", 1)
                service.process.send_signal(number)
            answered.set()
            assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGALRM])
async def test_unhandled_signals_end_the_process(io_loop, number):
    """At once; with `--state_dir` the next start sends disconnect events."""
    async with Service() as service:
        service.process.send_signal(number)
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == -number
