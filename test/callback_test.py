"""Callbacks of the backend: send, disconnect, info and delete."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
import websockets
from faults import RESET_ON_CLOSE, RawClient
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.ioloop import IOLoop
from tornado.web import RequestHandler
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)

UNKNOWN = "0" * 32


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once, by RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()


@contextlib.asynccontextmanager
async def open_connection(
    *flags: str, **options: object
) -> AsyncIterator[tuple[Service, RecordingBackend, websockets.ClientConnection, str]]:
    """A relay, its backend, a client, and the URL of the client's connection."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url, **options) as client:
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"].removesuffix("/send")
                yield service, backend, client, url


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests: some of them share a relay."""
    return module_io_loop


@pytest.fixture(scope="module")
def relay(io_loop, shared) -> tuple[Service, RecordingBackend]:
    """A relay and its backend for tests of many rows, each with a client of its own."""

    async def begin() -> tuple[Service, RecordingBackend]:
        backend = await shared.enter_async_context(RecordingBackend())
        return await shared.enter_async_context(Service(*backend.flags())), backend

    return io_loop.run_sync(begin)


@contextlib.asynccontextmanager
async def one_more(
    relay: tuple[Service, RecordingBackend],
) -> AsyncIterator[tuple[RecordingBackend, websockets.ClientConnection, str]]:
    """The backend, a new client of `relay`, and the URL of the client's connection."""
    service, backend = relay
    async with websockets.connect(service.ws_url) as client:
        event = backend.of("connect")[-1]  # told before the client was accepted
        yield backend, client, event["meta"]["send"].removesuffix("/send")


@pytest.mark.parametrize(
    ("query", "content_type", "body", "frame"),
    [
        ("", "text/plain", b"a", "a"),
        ("", "TEXT/html; x=y", "é".encode(), "é"),
        ("", "application/json", b"{}", "{}"),
        ("", "application/didcomm-plain+json", b"{}", "{}"),
        ("", "application/octet-stream", b"\xff", b"\xff"),
        ("", "application/jsonx", b"{}", b"{}"),
        ("", None, b"\x00", b"\x00"),
        ("", "text/plain", b"", ""),
        ("?type=binary", "text/plain", b"a", b"a"),
        ("?type=text", None, b"a", "a"),
    ],
)
async def test_send_makes_the_frame_of_its_type(
    relay, query, content_type, body, frame
):
    """The media type decides between text and binary; ?type= overrides it."""
    async with one_more(relay) as (backend, client, url):
        headers = {"Content-Type": content_type} if content_type else {}
        answer = await backend.call(f"{url}/send{query}", body=body, headers=headers)
        assert (answer.code, answer.body) == (200, b"OK")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == frame


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/send?type=text", b"\xff", {}, 400),
        ("POST", "/send?type=blob", b"x", {}, 400),
        ("POST", "/send", b"x" * (4 * 2**20 + 1), {}, 413),
        ("GET", "/send", None, {}, 405),
        ("POST", "", b"x", {}, 405),
        ("POST", "/sendx", b"x", {}, 404),
        ("PUT", "/send", b"x", {}, 405),
        ("POST", "/disconnect", b"{", {}, 400),
        ("POST", "/disconnect", b"[]", {}, 400),
        ("POST", "/disconnect", '{"code": 3000}'.encode("utf-16"), {}, 400),
        ("POST", "/disconnect", '{"code": 3000}'.encode("utf-32-be"), {}, 400),
        ("POST", "/disconnect", b'{"code": 1e999}', {}, 400),
        ("POST", "/disconnect", b'{"code": ' + b"9" * 5000 + b"}", {}, 400),
        ("POST", "/disconnect", b'{"code": NaN}', {}, 400),
        ("POST", "/disconnect", b"[" * 100_000, {}, 400),
        ("POST", "/disconnect", b'{"code": 1005}', {}, 400),
        ("POST", "/disconnect", b'{"code": 1006}', {}, 400),
        ("POST", "/disconnect", b'{"code": true}', {}, 400),
        ("POST", "/disconnect", b'{"code": "1000"}', {}, 400),
        ("POST", "/disconnect", b'{"reason": 7}', {}, 400),
        ("POST", "/disconnect", b'{"reason": "\\ud800"}', {}, 400),
        ("POST", "/disconnect", json.dumps({"reason": "é" * 62}).encode(), {}, 400),
    ],
)
async def test_bad_callback_is_a_problem(relay, method, path, body, headers, status):
    """Each error has its status and a problem document; the client stays."""
    async with one_more(relay) as (backend, client, url):
        for target in (url, url.replace(url[-32:], UNKNOWN)):
            # An unknown connection changes nothing: 410 is checked last.
            answer = await backend.call(target + path, method, body=body)
            assert answer.code == status
            assert answer.headers["Content-Type"] == "application/problem+json"
            problem = json.loads(answer.body)
            assert problem["status"] == status
            assert problem["title"] and problem["detail"]
            if status == 405:
                assert answer.headers["Allow"]
        assert (await backend.call(f"{url}/send", body=b"x")).code == 200
        assert await client.recv() == b"x"


async def test_send_of_exactly_the_limit_arrives(io_loop):
    """A body of 4 MiB is accepted."""
    async with open_connection(max_size=None) as (_, backend, client, url):
        body = b"x" * (4 * 2**20)
        answer, frame = await asyncio.gather(
            backend.call(f"{url}/send", body=body), client.recv()
        )
        assert answer.code == 200
        assert frame == body


async def test_oversized_chunked_body_is_413(io_loop):
    """A body without a declared length is measured while it arrives."""

    async def chunks(write) -> None:
        for _ in range(5):
            await write(b"x" * 2**20)

    async with open_connection() as (_, backend, client, url):
        answer = await backend.call(f"{url}/send", body=None, body_producer=chunks)
        assert answer.code == 413
        answer = await backend.call(
            f"{url}/send", body=None, body_producer=lambda write: write(b"small")
        )
        assert answer.code == 200
        assert await client.recv() == b"small"


UTF8 = ("utf-8", "UTF-8", '"utf-8"', "'UTF-8'", "utf8", "US-ASCII", "ascii")
LATIN1 = "text/plain; charset=iso-8859-1"
# Content-Type and Content-Encoding of a body "é" in UTF-8.
TAKEN = [
    *((f"text/plain; charset={charset}", None) for charset in UTF8),
    ("text/plain;charset=utf-8", None),
    ("text/plain ; Charset = utf-8 ; format=flowed", None),
    ('text/plain; x="; charset=latin1"; charset=utf-8', None),
    ("text/plain;", None),
    ("text/charset", None),
    ("application/json; charset=UTF-8", None),
    ("application/octet-stream; charset=iso-8859-1", None),  # no text: no charset
    (None, None),
    ("text/plain", "identity"),
    ("text/plain", ""),
]
NOT_TAKEN = [
    (LATIN1, None),
    ("text/plain; charset=utf-16le", None),
    ("text/plain; charset=utf-16", None),
    ("text/html; x=y; CHARSET=windows-1252", None),
    ("text/plain; charset=utf-8; charset=latin1", None),
    ("text/plain; charset=", None),
    ('text/plain; charset="', None),
    ("text/plain; charset=utf-80", None),
    ("application/json; charset=latin1", None),
    ("application/ld+json;charset=utf-32", None),
    ("text/plain", "gzip"),
    ("text/plain", "GZIP"),
    ("text/plain", "deflate, identity"),
    ("text/plain", "unknown"),
    ("application/octet-stream", "br"),
    (None, "zstd"),
]


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_body_that_would_have_to_be_decoded_is_415(io_loop, server):
    """A Content-Encoding, or a charset other than UTF-8; nothing is sent."""
    flag = f"--http_server={server}"
    async with open_connection(flag) as (_, backend, client, url):
        for expected, rows in ((200, TAKEN), (415, NOT_TAKEN)):
            for content_type, coding in rows:
                headers = {"Content-Type": content_type, "Content-Encoding": coding}
                headers = {n: v for n, v in headers.items() if v is not None}
                answer = await backend.call(
                    f"{url}/send?type=text", body="é".encode(), headers=headers
                )
                assert answer.code == expected, headers
                if expected == 200:
                    assert await asyncio.wait_for(client.recv(), DEADLINE) == "é"
                    continue
                assert json.loads(answer.body)["status"] == 415
                if coding is not None:
                    assert answer.headers["Accept-Encoding"] == "identity"
                closing = await backend.call(f"{url}/disconnect", headers=headers)
                assert closing.code == 415, headers
        assert (await backend.call(f"{url}/send", body=b"last")).code == 200
        assert await asyncio.wait_for(client.recv(), DEADLINE) == b"last"


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_415_comes_after_413_and_before_400(io_loop, server):
    """The order is 401, 404, 405, 413, 415, 400, 410."""
    token = "0123456789abcdef"
    flags = (f"--http_server={server}", f"--callback_token={token}")
    async with open_connection(*flags) as (_, backend, _, url):
        unknown = url.replace(url[-32:], UNKNOWN)
        latin1 = {"Content-Type": LATIN1}
        gzip = {"Content-Encoding": "gzip"}
        allowed = {"Authorization": f"Bearer {token}"}
        for headers in (latin1, gzip):
            for target, method, body, more, expected in [
                (f"{url}/send", "POST", b"x", {}, 401),
                (f"{url}/sent", "POST", b"x", allowed, 404),
                (f"{url}/send", "PUT", b"x", allowed, 405),
                (f"{url}/send", "POST", bytes(4 * 2**20 + 1), allowed, 413),
                (f"{url}/send", "POST", b"x", allowed, 415),
                (f"{url}/send?type=blob", "POST", b"x", allowed, 415),
                (f"{url}/send?type=text", "POST", b"\xff", allowed, 415),
                (f"{unknown}/send", "POST", b"x", allowed, 415),
                (f"{unknown}/disconnect", "POST", b"{", allowed, 415),
                (f"{unknown}/send", "POST", b"x", {**allowed, "Content-Type": "x/y",
                                                   "Content-Encoding": ""}, 410),
            ]:
                answer = await backend.call(
                    target, method, body=body, headers={**headers, **more}
                )
                assert answer.code == expected, (target, headers)


async def test_head_of_a_connection_is_get_without_a_body(io_loop):
    """Same status and headers as GET, for an open and for an unknown connection."""
    async with open_connection() as (_, backend, _, url):
        for target, status in ((url, 200), (url.replace(url[-32:], UNKNOWN), 410)):
            got, head = [await backend.call(target, m) for m in ("GET", "HEAD")]
            assert (got.code, head.code, head.body) == (status, status, b"")
            for name in ("Content-Type", "Cache-Control"):
                assert head.headers.get(name) == got.headers.get(name)
            assert int(head.headers["Content-Length"]) > 0


@pytest.mark.parametrize("identifier", ["0f6c2f", UNKNOWN + "0", "F" * 32, "x" * 32])
async def test_malformed_connection_id_gets_an_explanation(relay, identifier):
    """404, with the reason in the detail."""
    service, backend = relay
    for path in ("", "/send", "/disconnect", "/sent"):
        url = f"{service.callback_url}/socket/{identifier}{path}"
        for method in ("GET", "POST", "DELETE"):
            answer = await backend.call(url, method)
            assert answer.code == 404
            detail = json.loads(answer.body)["detail"]
            assert ("Invalid connection id" in detail) == (path != "/sent")


@pytest.mark.parametrize("path", ["/send", "/disconnect", ""])
async def test_unknown_and_closed_connections_are_410(io_loop, path):
    """For an id that never existed, and for one that has disconnected."""
    async with open_connection() as (_, backend, client, url):
        method = "POST" if path else "GET"
        unknown = url.replace(url[-32:], UNKNOWN)
        assert (await backend.call(unknown + path, method)).code == 410
        await client.close()
        await backend.wait_for("disconnect", 1)
        assert (await backend.call(url + path, method)).code == 410
        assert (await backend.call(url, "DELETE")).code == 410


async def test_closing_connection_is_410(io_loop):
    """After the close frame, no send is accepted."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags()) as service:
            host, port = service.ws_url[5:-3].split(":")
            deaf = socket.create_connection((host, int(port)))
            deaf.sendall(handshake())
            (event,) = await backend.wait_for("connect", 1)
            url = event["meta"]["send"].removesuffix("/send")
            async with asyncio.timeout(DEADLINE):
                while json.loads((await backend.call(url, "GET")).body)["state"] != (
                    "open"
                ):
                    pass
            body = b'{"code": 3001, "reason": "enough"}'
            assert (await backend.call(f"{url}/disconnect", body=body)).code == 200
            assert (await backend.call(f"{url}/send", body=b"x")).code == 410
            assert (await backend.call(f"{url}/disconnect")).code == 410
            # The peer never answers: the socket is closed after two seconds.
            (event,) = await backend.wait_for("disconnect", 1)
            assert event["meta"]["code"] == 3001
            assert event["meta"]["reason"] == "enough"
            assert event["meta"]["initiator"] == "backend"
            assert 1.5 < event["meta"]["duration"] < 8
            deaf.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "reason"),
    [
        ("POST", "/disconnect", b"", 200, 1000, ""),
        ("POST", "/disconnect", b'{"code": 4999, "reason": "x"}', 200, 4999, "x"),
        # JSON has one kind of number (RFC 8259, section 6).
        ("POST", "/disconnect", b'{"code": 3000.0}', 200, 3000, ""),
        ("POST", "/disconnect", b'{"code": 4e3}', 200, 4000, ""),
        # A byte order mark (RFC 8259, section 8.1: parsers may ignore it).
        ("POST", "/disconnect", b'\xef\xbb\xbf{"code": 3001}', 200, 3001, ""),
        ("DELETE", "", None, 204, 1000, ""),
    ],
)
async def test_disconnect_closes_with_code_and_reason(
    io_loop, method, path, body, status, code, reason
):
    """The client gets the code and the reason of the callback."""
    async with open_connection() as (_, backend, client, url):
        assert (await backend.call(url + path, method, body=body)).code == status
        with pytest.raises(websockets.ConnectionClosed):
            await asyncio.wait_for(client.recv(), DEADLINE)
        assert (client.close_code, client.close_reason) == (code, reason)
        (event,) = await backend.wait_for("disconnect", 1)
        assert (event["meta"]["code"], event["meta"]["initiator"]) == (code, "backend")
        assert isinstance(event["meta"]["code"], int)


async def test_info_describes_the_connection(io_loop):
    """State, times, peer and counts."""
    agent = {"user_agent_header": "Agent/1"}
    async with open_connection(**agent) as (_, backend, client, url):
        await client.send("é")
        await backend.wait_for("message", 1)
        await backend.call(f"{url}/send", body=b"123")
        info = json.loads((await backend.call(url, "GET")).body)
        assert info["state"] == "open"
        assert info["connected_at"] <= info["last_active_at"]
        assert (info["remote_ip"], info["user_agent"]) == ("127.0.0.1", "Agent/1")
        assert info["subprotocol"] is None
        assert (info["messages_in"], info["bytes_in"]) == (1, 2)
        assert (info["messages_out"], info["bytes_out"]) == (1, 3)


async def test_send_before_the_decision_follows_the_101(io_loop):
    """A send from the connect handler is 202, and its frame is the first one."""
    async with RecordingBackend() as backend:

        async def push(handler: RequestHandler, event: dict) -> None:
            for number in range(3):
                answer = await backend.call(event["meta"]["send"], body=b"%d" % number)
                assert answer.code == 202

        async with Service(*backend.flags()) as service:
            backend.answers["connect"] = push
            async with websockets.connect(service.ws_url) as client:
                frames = [
                    await asyncio.wait_for(client.recv(), DEADLINE) for _ in range(3)
                ]
                assert frames == [b"0", b"1", b"2"]


async def test_disconnect_before_the_decision_closes_after_the_101(io_loop):
    """The client is closed right after the handshake, with the requested code."""
    async with RecordingBackend() as backend:

        async def close(handler: RequestHandler, event: dict) -> None:
            answer = await backend.call(
                event["meta"]["disconnect"], body=b'{"code": 3000}'
            )
            assert answer.code == 202

        async with Service(*backend.flags()) as service:
            backend.answers["connect"] = close
            async with websockets.connect(service.ws_url) as client:
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(client.recv(), DEADLINE)
                assert client.close_code == 3000
            (event,) = await backend.wait_for("disconnect", 1)
            assert event["meta"]["code"] == 3000


async def test_concurrent_sends_arrive_complete(io_loop):
    """Each of many sends at once becomes one frame."""
    roomy = "--max_send_buffer=100000000"
    async with open_connection(roomy) as (_, backend, client, url):
        bodies = [bytes([n]) * (1000 * n + 1) for n in range(200)]
        calls = asyncio.gather(
            *(backend.call(f"{url}/send", body=body) for body in bodies)
        )
        frames = [await asyncio.wait_for(client.recv(), DEADLINE) for _ in bodies]
        assert sorted(frames) == sorted(bodies)
        assert {answer.code for answer in await calls} == {200}


async def test_prefix_is_optional(io_loop):
    """Callbacks work behind a proxy that strips the prefix, or keeps it."""
    async with RecordingBackend() as backend:
        flags = ("--externalhostandport=https://relay-3.internal/sd/",)
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"]
                assert url.startswith("https://relay-3.internal/sd/socket/")
                for prefix in ("/sd", ""):
                    path = prefix + url[url.index("/socket/") :]
                    answer = await backend.call(service.callback_url + path, body=b"x")
                    assert answer.code == 200
                    assert await client.recv() == b"x"


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_caller_that_leaves_before_the_answer_got_none(io_loop, server):
    """The access log says 499, and the send is not counted as answered."""
    flags = (
        f"--http_server={server}", "--logging=debug", "--max_send_buffer=1000",
        "--send_timeout=60",
    )  # fmt: skip
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await RawClient.connect(service.ws_url, receive_buffer=4096) as deaf:
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"]
                parts = urlsplit(url)
                _, leaving = await asyncio.open_connection(parts.hostname, parts.port)
                head = f"POST {parts.path} HTTP/1.1\r\nHost: relay\r\n"
                body = bytes(4 * 2**20)  # more than the kernel takes for the client
                leaving.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
                leaving.write(body)
                await leaving.drain()
                statuses = []
                async with asyncio.timeout(DEADLINE):
                    while 429 not in statuses:
                        answer = await backend.call(url, body=bytes(9))
                        statuses.append(answer.code)
                reset(leaving)
                for _ in range(2):  # the relay notices it meanwhile
                    statuses.append((await backend.call(url, body=bytes(9))).code)
                deaf.close()
                left = f"POST {parts.path}: 499"
                await eventually(lambda: any(left in line for line in service.log))
                metrics = await backend.call(f"{service.callback_url}/metrics", "GET")
                sends = re.findall(
                    r"^socketdock_sends_total\S* (\S+)", metrics.body.decode(), re.M
                )
                assert sum(map(float, sends)) == len(statuses)


async def test_slow_client_is_429_then_1008_and_410(io_loop):
    """A send to a full queue is 429; a client that reads nothing is closed."""
    async with RecordingBackend() as backend:
        flags = ("--send_timeout=1.5", "--max_send_buffer=100000")
        async with Service(*backend.flags(), *flags) as service:
            host, port = service.ws_url[5:-3].split(":")
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            deaf.sendall(handshake())
            (event,) = await backend.wait_for("connect", 1)
            url = event["meta"]["send"]
            # One frame is always accepted, of any size, and waits.
            first = asyncio.ensure_future(backend.call(url, body=bytes(4 * 2**20)))
            async with asyncio.timeout(DEADLINE):
                while (answer := await backend.call(url, body=bytes(1000))).code != 429:
                    assert answer.code in (200, 202)
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await asyncio.wait_for(first, DEADLINE)).code == 410
            (event,) = await backend.wait_for("disconnect", 1)
            meta = event["meta"]
            assert (meta["code"], meta["initiator"]) == (1008, "relay")
            deaf.close()
