"""The HTTP client, in process, where a process would hide what it does."""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from certificates import Authority
from service import eventually, tcp_server

from backends import BackendAway, BackendError
from backends.http.client import Answer, Client, Target

pytestmark = pytest.mark.gen_test(timeout=30)

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
    """A client, whose connections have all ended when the block has."""
    settings = {"max_connections": 10, "connect_timeout": 2.0, "dead_after": 5.0}
    client = Client(**(settings | changes))
    client.trust(tls)
    try:
        yield client
    finally:
        await client.close()
        await eventually(lambda: client.open == 0)


async def post(client: Client, url: str, **options) -> Answer:
    """One request's answer; raises what went wrong."""
    done = asyncio.get_running_loop().create_future()
    client.post(Target.parse(url), lambda: REQUEST, done.set_result, **options)
    outcome = await asyncio.wait_for(done, 10)
    if isinstance(outcome, BackendError):
        raise outcome
    return outcome


async def answer_all(answer, reader, writer) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(answer)


def serving(serve=None, answer: bytes = OK, **options):
    """A server that answers every request alike, or by `serve`."""
    return tcp_server(serve or functools.partial(answer_all, answer), **options)


async def test_name_with_a_dead_family_is_reached_by_the_other(io_loop, monkeypatch):
    """Happy eyeballs: IPv6 is named first and refuses, IPv4 answers."""

    async def resolve(host, port, family=0, **kwargs):
        stream = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        addresses = [
            (socket.AF_INET6, *stream, ("::1", port, 0, 0)),
            (socket.AF_INET, *stream, ("127.0.0.1", port)),
        ]
        # uvloop asks once more, for the one that it connects to.
        return [address for address in addresses if family in (0, address[0])]

    async with serving() as port, using() as client:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        answer = await post(client, f"http://backend.example:{port}/")
        assert answer.status == 200


async def test_unknown_name_is_a_backend_error(io_loop):
    """A name that does not resolve is one sentence."""
    async with using() as client:
        with pytest.raises(BackendError, match="cannot connect"):
            await post(client, "http://backend.invalid/")


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


async def test_timed_out_request_gives_its_place_back(io_loop):
    """After timeouts no connection and no waiter is left."""
    async with serving(answer=b"") as port, using(max_connections=1) as client:
        url = f"http://127.0.0.1:{port}/"
        outcomes = await asyncio.gather(
            *(post(client, url, timeout=0.3) for _ in range(5)), return_exceptions=True
        )
        assert all(isinstance(outcome, BackendError) for outcome in outcomes)
        await eventually(lambda: client.open == 0)
        assert not client.starved


@pytest.mark.parametrize("size", [100, 64 * 1024, 1024 * 1024])
async def test_kept_body_is_bounded(io_loop, size):
    """A body that is asked for is kept up to 64 KiB."""
    answer = b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    async with serving(answer=answer) as port, using() as client:
        got = await post(client, f"http://127.0.0.1:{port}/", keep=True)
        assert (got.status, len(got.body)) == (403, min(size, 64 * 1024))


async def test_endless_body_ends_with_its_status(io_loop):
    """An answer that never ends is cut, and counts as what it said."""
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
        await asyncio.wait_for(cut.wait(), 10)


SECOND_ANSWERS = {
    "whole": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    "begun": b"HTTP/1.",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("second", SECOND_ANSWERS)
async def test_second_answer_counts_for_nobody(io_loop, second):
    """In one segment with the first: neither for its request nor for the next."""
    made = 0

    async def on_client(reader, writer) -> None:
        nonlocal made
        made += 1
        await answer_all(OK + SECOND_ANSWERS[second], reader, writer)

    async with serving(on_client) as port, using() as client:
        for number in range(1, 4):
            answer = await post(client, f"http://127.0.0.1:{port}/", timeout=5)
            assert answer.status == 200
            assert made == number  # what is left on a connection is not read


async def test_trailers_are_no_headers(io_loop):
    """What comes behind the body adds nothing to the answer, nor changes it."""
    answer = (
        b"HTTP/1.1 429 Later\r\nContent-Type: text/plain\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n"
        b"Content-Type: text/html\r\nRetry-After: 86400\r\n\r\n"
    )
    async with serving(answer=answer) as port, using() as client:
        for _ in range(2):
            got = await post(client, f"http://127.0.0.1:{port}/", keep=True)
            assert (got.status, got.body) == (429, b"OK")
            assert got.headers == {
                "content-type": "text/plain",
                "transfer-encoding": "chunked",
            }
        assert client.open == 1  # a whole answer: the connection is kept


async def test_request_is_sent_when_the_kernel_has_all_of_it(io_loop):
    """on_sent waits for the last byte, not for write() to return."""
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
        assert (await asyncio.wait_for(done, 10)).status == 200


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Vouches for the servers of these tests."""
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_https_backend_is_verified(io_loop, authority):
    """A certificate that is trusted answers; one that is not is refused."""
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


async def test_plain_http_server_is_no_https_backend(io_loop):
    """Its answer to the handshake is told in words that help."""
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


async def test_request_that_is_let_go_gives_its_place_back(io_loop, authority):
    """Also over TLS, to a server that does not say goodbye."""
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
        await asyncio.wait_for(asked.wait(), 10)
        exchange.let_go()
        await eventually(lambda: client.open == 0, 10)
        go_on.set()


async def test_connections_of_before_are_used_no_more(io_loop, authority):
    """Where TLS is made anew: an answer under way comes, idle ones are closed."""
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
        await eventually(lambda: client.open == 0)  # it was idle
        under_way = asyncio.create_task(post(client, url))
        await asyncio.wait_for(asked.wait(), 10)
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
        ("http://x/a b", "percent-encode"),
        ("http://x/\r\nEvil: 1", "percent-encode"),
        ("http://x/é", "percent-encode"),
    ],
)
async def test_bad_url_says_why(io_loop, url, why):
    """Each has its own sentence."""
    with pytest.raises(ValueError, match=why):
        Target.parse(url)
