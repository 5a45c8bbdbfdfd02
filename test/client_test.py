"""The HTTP client, tested in process, which shows its state."""

import asyncio
import contextlib
import functools
import re
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from certificates import Authority
from ports import free_ports
from response_test import keep_beginning
from service import DEADLINE, eventually, tcp_server

from backends import BackendAway, BackendError
from backends.client import Client, NoConnection, Response
from backends.target import Target

pytestmark = pytest.mark.gen_test(timeout=60)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_name(request):
    """Every test here runs on both."""
    return request.param


@contextlib.asynccontextmanager
async def using(
    tls: ssl.SSLContext | None = None, **changes
) -> AsyncIterator[Client]:
    """A client; all its connections have ended at the end of the block."""
    settings = {"max_connections": 10, "connect_timeout": 2.0, "dead_after": 5.0}
    client = Client(**(settings | changes))
    client.trust(tls)
    try:
        yield client
    finally:
        await client.close()
        await eventually(lambda: client.open == 0)


async def post(client: Client, url: str, **options) -> Response:
    """Return the response to one request; raises its error."""
    done = asyncio.get_running_loop().create_future()
    client.post(Target.parse(url), lambda: REQUEST, done.set_result, **options)
    outcome = await asyncio.wait_for(done, DEADLINE)
    if isinstance(outcome, BackendError):
        raise outcome
    return outcome


async def answer_all(answer, reader, writer) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(answer)


def serving(serve=None, answer: bytes = OK, **options):
    """A server that gives each request the same response, or calls `serve`."""
    return tcp_server(serve or functools.partial(answer_all, answer), **options)


async def test_response_timeout_begins_when_the_request_is_sent(io_loop):
    """With a queue timeout, which each sent request of the queue restarts."""

    async def slowly(reader, writer) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(0.4)
            writer.write(OK)

    async with serving(slowly) as port, using(max_connections=1) as client:
        url = f"http://127.0.0.1:{port}/"
        limits = {"timeout": 2, "queue_timeout": 2}
        answers = await asyncio.gather(*(post(client, url, **limits) for _ in range(8)))
        assert [answer.status for answer in answers] == [200] * 8


async def test_stalled_queue_and_silent_server_have_timeouts(io_loop):
    """Each has its own; a request that times out in the queue was never sent."""
    async with serving(answer=b"") as port, using(max_connections=1) as client:
        url = f"http://127.0.0.1:{port}/"
        first = asyncio.ensure_future(post(client, url, timeout=3, queue_timeout=9))
        await eventually(lambda: client.open == 1)
        with pytest.raises(NoConnection, match="no connection became free"):
            await post(client, url, timeout=9, queue_timeout=0.2)
        with pytest.raises(BackendError, match="no response in 3 s"):
            await first


@pytest.mark.parametrize("limits", [{}, {"queue_timeout": 9}])
async def test_immediate_retry_keeps_its_time_limit(io_loop, limits):
    """408 ends a kept connection; on the next one there is no response."""
    connections = 0

    async def serve(reader, writer) -> None:
        nonlocal connections
        connections += 1
        for answer in (OK, OK.replace(b"200 OK", b"408 Late")):
            await reader.readuntil(b"\r\n\r\n")
            if connections == 1:
                writer.write(answer)

    async with serving(serve) as port, using() as client:
        url = f"http://127.0.0.1:{port}/"
        await post(client, url)
        with pytest.raises(BackendError, match="no response in 1 s"):
            await post(client, url, timeout=1, **limits)
        assert connections == 2


async def test_unreachable_ipv6_falls_back_to_ipv4(io_loop, monkeypatch):
    """Happy eyeballs: the first address is IPv6 and refuses, IPv4 answers."""

    stream = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")

    def look_up(host, port, *args, flags=0, **kwargs):
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no IP address")
        return [
            (socket.AF_INET6, *stream, ("::1", port, 0, 0)),
            (socket.AF_INET, *stream, ("127.0.0.1", port)),
        ]

    async with serving() as port, using() as client:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        answer = await post(client, f"http://backend.example:{port}/")
        assert answer.status == 200


async def test_unknown_name_is_a_backend_error(io_loop):
    """The error of a name that does not resolve is one line."""
    async with using() as client:
        with pytest.raises(BackendError, match="cannot connect"):
            await post(client, "http://backend.invalid/")


async def test_refused_connection_is_named_so(io_loop):
    """The error does not repeat the address, which the URL has."""
    async with using() as client:
        with pytest.raises(BackendError, match=r"cannot connect: Connection refused$"):
            await post(client, f"http://127.0.0.1:{free_ports(1)}/")


async def test_connections_are_reused_and_bounded(io_loop):
    """A hundred requests at once share ten connections."""
    async with serving() as port, using() as client:
        most = 0

        async def one() -> None:
            nonlocal most
            await post(client, f"http://127.0.0.1:{port}/")
            most = max(most, client.open)

        await asyncio.gather(*(one() for _ in range(100)))
        assert 0 < most <= 10


async def test_timed_out_request_frees_its_connection(io_loop):
    """Another origin gets the only connection afterwards."""
    async with (
        serving(answer=b"") as port,
        serving() as other,
        using(max_connections=1) as client,
    ):
        url = f"http://127.0.0.1:{port}/"
        outcomes = await asyncio.gather(
            *(post(client, url, timeout=0.3) for _ in range(5)), return_exceptions=True
        )
        assert all(isinstance(outcome, BackendError) for outcome in outcomes)
        got = await post(client, f"http://127.0.0.1:{other}/", timeout=DEADLINE)
        assert got.status == 200
        assert not client.starved


@pytest.mark.parametrize("size", [100, 64 * 1024, 1024 * 1024])
async def test_kept_body_is_bounded(io_loop, size):
    """With `keep`, up to 64 KiB of a body are stored."""
    answer = b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    async with serving(answer=answer) as port, using() as client:
        got = await post(client, f"http://127.0.0.1:{port}/", keep=keep_beginning)
        assert (got.status, len(got.body)) == (403, min(size, 64 * 1024))


async def test_endless_body_ends_with_its_status(io_loop):
    """The connection of an endless response is closed; its status counts."""
    cut = asyncio.Event()

    async def on_client(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await writer.drain()
        except ConnectionError:
            cut.set()

    async with serving(on_client) as port, using() as client:
        assert (await post(client, f"http://127.0.0.1:{port}/")).status == 200
        await asyncio.wait_for(cut.wait(), DEADLINE)


SECOND_ANSWERS = {
    "whole": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    "begun": b"HTTP/1.",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("second", SECOND_ANSWERS)
async def test_second_response_is_ignored(io_loop, second):
    """In the same segment: it belongs neither to this request nor to the next."""
    made = 0

    async def on_client(reader, writer) -> None:
        nonlocal made
        made += 1
        await answer_all(OK + SECOND_ANSWERS[second], reader, writer)

    async with serving(on_client) as port, using() as client:
        for number in range(1, 4):
            answer = await post(client, f"http://127.0.0.1:{port}/", timeout=5)
            assert answer.status == 200
            assert made == number  # the rest on a connection is not read


async def test_trailers_are_ignored(io_loop):
    """They add no header to the response, and change none."""
    answer = (
        b"HTTP/1.1 429 Later\r\nContent-Type: text/plain\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n"
        b"Content-Type: text/html\r\nRetry-After: 86400\r\n\r\n"
    )
    async with serving(answer=answer) as port, using() as client:
        for _ in range(2):
            got = await post(client, f"http://127.0.0.1:{port}/", keep=keep_beginning)
            assert (got.status, got.body) == (429, b"OK")
            assert got.headers == {
                "content-type": "text/plain",
                "transfer-encoding": "chunked",
            }
        assert client.open == 1  # a complete response: the connection is kept


async def test_request_is_sent_when_the_kernel_has_all_of_it(io_loop):
    """`on_sent` waits for the last byte, not for the return of write()."""
    size = 16 * 2**20
    body = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    sent, read = asyncio.Event(), asyncio.Event()
    done = asyncio.get_running_loop().create_future()

    async def on_client(reader, writer) -> None:
        await read.wait()
        await reader.readexactly(len(body))
        await sent.wait()
        writer.write(OK)

    async with serving(on_client) as port, using() as client:
        target = Target.parse(f"http://127.0.0.1:{port}/")
        client.post(target, lambda: body, done.set_result, sent.set)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sent.wait(), 0.5)
        read.set()
        assert (await asyncio.wait_for(done, DEADLINE)).status == 200


HEADS = {
    "several-lines": (b"X: one;\n two\r\n", True),
    "control-character": (b"X: \1\r\n", True),
    "bad-name": (b"X Y: z\r\n", False),
    "no-colon": (b"nonsense\r\n", False),
    "same-length-twice": (b"Content-Length: 2\r\n", False),
}


@pytest.mark.parametrize("row", HEADS)
async def test_malformed_header_keeps_the_status(io_loop, row):
    """Its connection is reused only if the response's end is unambiguous."""
    line, is_kept = HEADS[row]
    answer = OK.replace(b"\r\n", b"\r\n" + line, 1)
    made = 0

    async def on_client(reader, writer) -> None:
        nonlocal made
        made += 1
        await answer_all(answer, reader, writer)

    async with serving(on_client) as port, using() as client:
        for number in range(1, 4):
            got = await post(client, f"http://127.0.0.1:{port}/", keep=keep_beginning)
            assert (got.status, got.body) == (200, b"OK")
            assert made == (1 if is_kept else number)


async def test_bytes_after_an_ambiguous_response_are_discarded(io_loop):
    """With two lengths, the body may contain bytes like another response."""
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nHTTP/1.1 500 Smuggled\r\nContent-Length: 0\r\n\r\n"
    )
    async with serving(answer=answer) as port, using(max_connections=1) as client:
        outcomes = await asyncio.gather(
            *(post(client, f"http://127.0.0.1:{port}/") for _ in range(5))
        )
        assert [outcome.status for outcome in outcomes] == [200] * 5


async def test_idle_connection_makes_room_for_another_origin(io_loop):
    """The request for the other origin waited before the connection was idle."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def held(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await go_on.wait()
        await answer_one(reader, writer)

    async def answer_one(reader, writer) -> None:
        writer.write(OK)
        await reader.read()

    async with serving(held) as one, serving() as other:
        async with using(max_connections=1) as client:
            first = asyncio.create_task(post(client, f"http://127.0.0.1:{one}/"))
            await asyncio.wait_for(asked.wait(), DEADLINE)
            second = asyncio.create_task(post(client, f"http://127.0.0.1:{other}/"))
            await eventually(lambda: client.starved)
            go_on.set()
            assert (await first).status == (await second).status == 200


@pytest.mark.parametrize("most", [1, 3])
async def test_busy_origin_leaves_room_for_another(io_loop, most):
    """However many requests wait for the first origin."""
    async with serving() as one, serving() as other, using(max_connections=most) as c:
        answers = 0

        def count(outcome: object) -> None:
            nonlocal answers
            if isinstance(outcome, Response):  # otherwise it is being closed
                answers += 1
                go_on()

        def go_on() -> None:
            c.post(Target.parse(f"http://127.0.0.1:{one}/"), lambda: REQUEST, count)

        for _ in range(20):
            go_on()
        for _ in range(3):
            assert (await post(c, f"http://127.0.0.1:{other}/")).status == 200
        assert answers > 0


async def test_408_on_a_kept_connection_ends_it(io_loop):
    """The request is sent again at once; on a new connection 408 is its response."""
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"
    made = 0

    async def on_client(reader, writer) -> None:
        nonlocal made
        made += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK if made < 3 else late)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(late)

    async with serving(on_client) as port, using() as client:
        url = f"http://127.0.0.1:{port}/"
        assert (await post(client, url)).status == 200
        assert (await post(client, url)).status == 200
        assert made == 2
        assert (await post(client, url)).status == 408  # on the second and the third
        assert made == 3


async def test_connection_is_not_used_beyond_its_age(io_loop):
    """A pending response is still received."""
    made, asked, go_on = 0, asyncio.Event(), asyncio.Event()

    async def on_client(reader, writer) -> None:
        nonlocal made
        made += 1
        if made == 2:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await go_on.wait()
            writer.write(OK)
        await answer_all(OK, reader, writer)

    async with serving(on_client) as port, using(connection_age=1.0) as client:
        url = f"http://127.0.0.1:{port}/"
        loop = asyncio.get_running_loop()
        began = loop.time()
        while made < 2:
            held = asyncio.create_task(post(client, url))
            await asyncio.wait({held, asyncio.ensure_future(asked.wait())},
                               return_when=asyncio.FIRST_COMPLETED)
        assert loop.time() - began >= 0.8  # it was used until then
        began = loop.time()
        await eventually(lambda: loop.time() > began + 1)  # the second one's age
        go_on.set()
        assert (await held).status == 200
        await eventually(lambda: client.open == 0)


async def test_ping_timeout_spares_slow_reader(io_loop):
    """A write may take any time, while the peer accepts some bytes."""
    size = 32 * 2**20  # more than the kernels' buffers hold
    body = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    loop = asyncio.get_running_loop()
    took = 0.0

    async def on_client(reader, writer) -> None:
        nonlocal took
        began, left = loop.time(), len(body)
        while left:
            left -= len(await reader.readexactly(min(left, 2**20)))
            if left > size // 2:
                await asyncio.sleep(0.2)  # however slow it is
        took = loop.time() - began
        writer.write(OK)

    async with serving(on_client, limit=2**20) as port, using(dead_after=1) as client:
        done = loop.create_future()
        target = Target.parse(f"http://127.0.0.1:{port}/")
        client.post(target, lambda: body, done.set_result)
        outcome = await asyncio.wait_for(done, 25)
        assert isinstance(outcome, Response), outcome
        assert took > 2


async def test_ping_timeout_closes_client_that_stopped_reading(io_loop):
    """Its kernel accepts bytes until its buffer is full, then none."""
    body = b"POST / HTTP/1.1\r\nContent-Length: 67108864\r\n\r\n" + bytes(2**26)
    go_on = asyncio.Event()

    async def on_client(reader, writer) -> None:
        await go_on.wait()
        writer.transport.abort()

    async with serving(on_client) as port, using(dead_after=0.5) as client:
        done = asyncio.get_running_loop().create_future()
        target = Target.parse(f"http://127.0.0.1:{port}/")
        client.post(target, lambda: body, done.set_result)
        outcome = await asyncio.wait_for(done, DEADLINE)
        go_on.set()
        # The kernel's clock of the same length may be the first.
        assert isinstance(outcome, BackendAway)
        assert re.search("no bytes accepted in 0.5 s|connection lost", str(outcome))


async def test_exception_in_a_callback_does_not_affect_others(io_loop, caplog):
    """Neither the next request on its connection, nor those that wait."""

    def fail(outcome: object) -> None:
        raise RuntimeError("a fault of ours")

    async with serving() as port, using(max_connections=1) as client:
        url = f"http://127.0.0.1:{port}/"
        target = Target.parse(url)
        for on_done, on_sent in ((fail, None), (lambda outcome: None, lambda: fail(0))):
            client.post(target, lambda: REQUEST, on_done, on_sent)
        client.on_starved = lambda: fail(0)
        others = await asyncio.gather(*(post(client, url) for _ in range(3)))
        assert [outcome.status for outcome in others] == [200] * 3
        client.post(target, lambda: REQUEST, fail)
        assert client.open == 1
    failed = [record for record in caplog.records if record.exc_info]
    assert len(failed) > 3


async def test_request_that_cannot_be_made_is_an_error(io_loop, caplog):
    """The requests behind it are sent."""

    def broken() -> bytes:
        raise RuntimeError("a fault of ours")

    async with serving() as port, using(max_connections=1) as client:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(2):  # on a new connection, and on a kept one
            done = asyncio.get_running_loop().create_future()
            client.post(Target.parse(url), broken, done.set_result)
            outcomes = await asyncio.gather(
                asyncio.wait_for(done, DEADLINE), post(client, url)
            )
            assert "no request could be made" in str(outcomes[0])
            assert outcomes[1].status == 200


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """The CA of the servers of these tests."""
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_https_backend_is_verified(io_loop, authority):
    """A trusted certificate works; an untrusted one is rejected."""
    context = authority.server("localhost").server_context()
    trust = ssl.create_default_context(cafile=authority.path)
    async with serving(ssl=context) as port, using(tls=trust) as client:
        for _ in range(2):
            answer = await post(client, f"https://localhost:{port}/")
            assert answer.status == 200
        assert client.open == 1
        with pytest.raises(BackendAway, match="TLS: IP address mismatch"):
            await post(client, f"https://127.0.0.1:{port}/")
        async with using(tls=ssl.create_default_context()) as wary:
            with pytest.raises(BackendAway, match="TLS: unable to get local issuer"):
                await post(wary, f"https://localhost:{port}/")


async def test_plain_http_server_is_explained(io_loop):
    """The error says that the server speaks another protocol than TLS."""
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"

    async def on_client(reader, writer) -> None:
        await reader.read(1)
        writer.write(answer)

    async with (
        serving(on_client) as port,
        using(tls=ssl.create_default_context()) as client,
    ):
        with pytest.raises(BackendAway, match="TLS: the backend speaks another"):
            await post(client, f"https://localhost:{port}/")


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_tls_handshake_that_the_server_ends_is_explained(io_loop, how):
    """The server closes the connection after the client's first message."""

    async def on_client(reader, writer) -> None:
        await reader.read(1)
        if how == "reset":
            writer.transport.abort()

    async with (
        serving(on_client) as port,
        using(tls=ssl.create_default_context()) as client,
    ):
        with pytest.raises(BackendAway, match="TLS: the connection was closed in the"):
            await post(client, f"https://localhost:{port}/")


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_413_before_the_body_is_the_response(io_loop, authority, version):
    """On a new connection, its end must not count as a failure of TLS."""
    context = authority.server("localhost").server_context()
    context.maximum_version = ssl.TLSVersion[version]
    size = 2**23
    body = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    answer = b"HTTP/1.1 413 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    async def on_client(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    trust = ssl.create_default_context(cafile=authority.path)
    async with serving(on_client, ssl=context) as port, using(tls=trust) as client:
        for _ in range(5):
            done = asyncio.get_running_loop().create_future()
            target = Target.parse(f"https://localhost:{port}/")
            client.post(target, lambda: body, done.set_result)
            outcome = await asyncio.wait_for(done, DEADLINE)
            assert isinstance(outcome, Response), outcome
            assert outcome.status == 413


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_reset_during_a_large_request_does_not_blame_the_certificate(
    io_loop, authority, version
):
    """A server that closes before it has read all may lose its 413."""
    context = authority.server("localhost").server_context()
    context.maximum_version = ssl.TLSVersion[version]
    request = REQUEST.replace(b": 0", b": 100000") + bytes(100000)

    async def on_client(reader, writer) -> None:
        await reader.read(1)
        writer.transport.abort()

    trust = ssl.create_default_context(cafile=authority.path)
    async with serving(on_client, ssl=context) as port, using(tls=trust) as client:
        for _ in range(5):
            done = asyncio.get_running_loop().create_future()
            target = Target.parse(f"https://localhost:{port}/")
            client.post(target, lambda: request, done.set_result)
            outcome = await asyncio.wait_for(done, 10)
            assert isinstance(outcome, BackendAway)
            assert str(outcome).endswith(": connection lost before the response")


async def test_trailing_dot_of_a_name_is_used_for_dns_only(
    io_loop, authority, monkeypatch
):
    """Host, SNI and certificate have no trailing dot."""
    context = authority.server("backend.example").server_context()
    heads, greeted, asked = [], [], []

    def look_up(host, port, *args, flags=0, **kwargs):
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no IP address")
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def on_client(reader, writer) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)

    context.sni_callback = lambda _, name, __: greeted.append(name)
    trust = ssl.create_default_context(cafile=authority.path)
    async with serving(on_client, ssl=context) as port, using(tls=trust) as client:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        target = Target.parse(f"https://backend.example.:{port}/")
        request = f"POST / HTTP/1.1\r\nHost: {target.authority}\r\n\r\n".encode()
        done = asyncio.get_running_loop().create_future()
        client.post(target, lambda: request, done.set_result)
        outcome = await asyncio.wait_for(done, DEADLINE)
        assert isinstance(outcome, Response), outcome
        assert (asked, greeted) == (["backend.example."], ["backend.example"])
        assert f"Host: backend.example:{port}\r\n".encode() in heads[0]


async def test_abandoned_request_frees_its_connection(io_loop, authority):
    """Also over TLS, to a server that sends no close_notify."""
    context = authority.server("localhost").server_context()
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def on_client(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        asked.set()
        await go_on.wait()
        writer.transport.abort()

    trust = ssl.create_default_context(cafile=authority.path)
    async with serving(on_client, ssl=context) as port, using(tls=trust) as client:
        target = Target.parse(f"https://localhost:{port}/")
        exchange = client.post(target, lambda: REQUEST, lambda outcome: None)
        await asyncio.wait_for(asked.wait(), DEADLINE)
        exchange.abandon()
        await eventually(lambda: client.open == 0)
        go_on.set()


async def test_new_tls_context_replaces_connections(io_loop, authority):
    """Pending responses still arrive; idle connections are closed."""
    context = authority.server("localhost").server_context()
    held, asked, go_on = 0, asyncio.Event(), asyncio.Event()

    async def on_client(reader, writer) -> None:
        nonlocal held
        while await reader.readuntil(b"\r\n\r\n"):
            held += 1
            if held == 2:
                asked.set()
                await go_on.wait()
            writer.write(OK)

    def trust() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=authority.path)

    async with serving(on_client, ssl=context) as port, using(tls=trust()) as client:
        url = f"https://localhost:{port}/"
        await post(client, url)
        client.trust(trust())
        await eventually(lambda: client.open == 0)  # the idle connection
        under_way = asyncio.create_task(post(client, url))
        await asyncio.wait_for(asked.wait(), DEADLINE)
        client.trust(trust())
        go_on.set()
        assert (await under_way).status == 200
        await eventually(lambda: client.open == 0)
        assert (await post(client, url)).status == 200
        assert client.open == 1


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://x/", "not an http"),
        ("backend:8000/message", "not an http"),
        ("http:///message", "no host"),
        ("http://user:pass@x/", "user name"),
        ("http://x:99999/", "port"),
        ("http://x:0/", "port"),
        ("http://x:00/", "port"),
        ("http://./", "no host"),
        ("http://stra\u00dfe.example/", "give the one with xn--"),
        ("http://" + "\u00fc" * 70 + ".example/", "give it with xn--"),
        ("http://x/\u00e9", "percent-encode"),
        ("http://x/a b", "percent-encode"),
        ("http://x/\r\nEvil: 1", "percent-encode"),
        ("http://x/é", "percent-encode"),
    ],
)
async def test_invalid_url_is_explained(io_loop, url, why):
    """Each error has its own text."""
    with pytest.raises(ValueError, match=why):
        Target.parse(url)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://B\u00dcCHER.example/", "xn--bcher-kva.example"),
        ("http://\u4f8b\u3048\u3002\u30c6\u30b9\u30c8/", "xn--r8jz45g.xn--zckzah"),
        ("http://xn--strae-oqa.example:80/", "xn--strae-oqa.example"),
        ("http://[2001:DB8::1]/", "[2001:db8::1]"),
        ("http://name./", "name"),
        ("http://name:/", "name"),
        ("https://name:443/", "name"),
        ("https://name:80/", "name:80"),
    ],
)
async def test_host_is_encoded_as_in_dns(io_loop, url, host):
    """International names are encoded; a trailing dot is removed from Host."""
    assert Target.parse(url).authority == host
