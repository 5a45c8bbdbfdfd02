"""Bulk callbacks: `POST /commands`, for many connections in one request."""

import asyncio
import base64
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets
from metrics_test import samples
from service import DEADLINE, RecordingBackend, Service, withhold
from slow import SlowClient, in_thread
from tornado.httpclient import HTTPResponse
from turns_test import DELAY, Peer, delays

from handlers.websocket.deflate import Compression
from handlers.websocket.frames import MessageFrame

pytestmark = pytest.mark.gen_test(timeout=120)

TOKEN = "0123456789abcdef"
OTHER_TOKEN = "fedcba9876543210"
UNKNOWN = "0" * 32
LARGEST = 400_000  # bytes of a bulk callback
LARGEST_FRAME = 100_000  # bytes
FLAGS = (
    f"--callback_token={TOKEN},{OTHER_TOKEN}",
    f"--max_bulk_size={LARGEST}",
    f"--max_message_size={LARGEST_FRAME}",
    "--max_state_size=100",
    "--compression",
)
# What answers: without a handler if the connection is kept, a handler of either server.
KINDS = {
    "fast": ("keep-alive", ()),
    "handler": ("close", ("--callbackport=0",)),
    "tornado": ("close", ("--http_server=tornado",)),
}
numbers = itertools.count()


class Relay:
    """A relay with its backend, which makes bulk callbacks."""

    def __init__(
        self,
        backend: RecordingBackend,
        service: Service,
        connection: str = "keep-alive",
    ) -> None:
        self.backend = backend
        self.service = service
        self.connection = connection  # the header
        self.url = f"{service.callback_url}/commands"

    async def post(self, body: bytes | str, **headers: str | None) -> HTTPResponse:
        """Send a body; `None` leaves a header out."""
        given = {
            "Authorization": f"Bearer {TOKEN}",
            "Content-Type": "application/json",
            "Connection": self.connection,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return await self.backend.call(
            self.url,
            body=body,
            headers={n: v for n, v in given.items() if v is not None},
            request_timeout=DEADLINE,
        )

    async def bulk(self, *commands: dict[str, Any]) -> list[tuple[str, int]]:
        """Send commands; return connection and status of each result."""
        answer = await self.post(json.dumps({"commands": commands}))
        assert answer.code == 200, answer.body
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        return pairs_of(answer)

    @contextlib.asynccontextmanager
    async def client(
        self, **options: Any
    ) -> AsyncIterator[tuple[websockets.ClientConnection, str]]:
        """A client and the id of its connection."""
        async with websockets.connect(self.service.ws_url, **options) as client:
            name = f"client {next(numbers)}"
            await client.send(name)
            yield client, await self.id_of(name)

    async def id_of(self, message: str) -> str:
        """Wait for the event of a message, and return its connection."""
        found: list[str] = []

        def is_found() -> bool:
            found[:] = [
                event["meta"]["connection_id"]
                for event in self.backend.of("message")
                if event["message"] == message
            ]
            return bool(found)

        async with asyncio.timeout(DEADLINE), self.backend.changed:
            await self.backend.changed.wait_for(is_found)
        return found[0]


def pairs_of(answer: HTTPResponse) -> list[tuple[str, int]]:
    results = json.loads(answer.body)["results"]
    return [(result["connection_id"], result["status"]) for result in results]


async def received(client: websockets.ClientConnection, number: int) -> list[Any]:
    return [await asyncio.wait_for(client.recv(), DEADLINE) for _ in range(number)]


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module", params=KINDS)
def each_relay(io_loop, shared, request) -> Relay:
    """Each HTTP server, with and without a handler, on a shared and an own listener."""
    connection, more = KINDS[request.param]

    async def begin() -> Relay:
        backend = await shared.enter_async_context(RecordingBackend())
        flags = (*backend.flags("message", "disconnect"), *FLAGS, *more)
        service = await shared.enter_async_context(Service(*flags))
        return Relay(backend, service, connection)

    return io_loop.run_sync(begin)


@contextlib.asynccontextmanager
async def running(*flags: str, kinds: tuple[str, ...] = ("message",)):
    """A relay for one test, without compression."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(*kinds), f"--callback_token={TOKEN}", *flags)
        async with Service(*flags) as service:
            yield Relay(backend, service)


async def test_results_have_the_order_of_the_commands(each_relay):
    """A result for each command and each of its connections; unknown ones are 410."""
    relay = each_relay
    async with relay.client() as (first, a), relay.client() as (second, b):
        got = await relay.bulk(
            {"send": "to both", "connection_ids": [b, UNKNOWN, a]},
            {"send": "été", "connection_id": a, "type": "binary", "unknown": []},
            {"send": base64.b64encode(b"\xff").decode(), "type": "binary",
             "encoding": "base64", "connection_ids": [a, a]},
            {"state": {"n": 1}, "connection_id": "no id"},
            {"send": "nobody", "connection_ids": []},
        )
        assert got == [(b, 200), (UNKNOWN, 410), (a, 200), (a, 200), (a, 200), (a, 200),
                       ("no id", 410)]
        assert await received(first, 4) == ["to both", "été".encode(), b"\xff", b"\xff"]
        assert await received(second, 1) == ["to both"]
    assert await relay.bulk() == []


async def test_commands_for_one_connection_keep_their_order(each_relay):
    """Frames, then the close; what follows it is 410."""
    relay = each_relay
    async with relay.client() as (client, one):
        sends = [{"send": str(n), "connection_id": one} for n in range(500)]
        closing = {"close": {"code": 4001, "reason": "done"}, "connection_id": one}
        late = {"send": "late", "connection_id": one}
        again = {"close": True, "connection_id": one}
        state = {"state": 1, "connection_id": one}
        got = await relay.bulk(*sends, closing, late, again, state)
        assert got == [(one, 200)] * 501 + [(one, 410)] * 3
        assert await received(client, 500) == [str(n) for n in range(500)]
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), DEADLINE)
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "done")


async def test_frame_reaches_compressed_and_plain_clients(each_relay):
    """With their own windows, from one command."""
    relay = each_relay
    message = "é" * 1000
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(relay.client(compression=compression))
            for compression in (None, "deflate", None, "deflate")
        ]
        ids = [one for _, one in clients]
        got = await relay.bulk({"send": message, "connection_ids": ids})
        assert got == [(one, 200) for one in ids]
        for client, _ in clients:
            assert await received(client, 1) == [message]


def test_frame_is_built_once_for_each_window():
    """Not for each client."""
    compressed = []

    class Counting(Compression):
        def compress(self, message: bytes) -> bytes:
            compressed.append(self.window_bits)
            return super().compress(message)

    frame = MessageFrame("x" * 1000)
    built = [
        frame.compressed(settings)
        for _ in range(10)
        for settings in (Counting(), Counting(window_bits=9))
    ]
    assert compressed == [15, 9]
    assert len({id(each) for each in built}) == 2


async def test_state_is_kept_and_413_if_it_is_too_large(each_relay):
    """As a frame above --max_message_size; the other commands are carried out."""
    relay = each_relay
    async with relay.client() as (client, one):
        got = await relay.bulk(
            {"state": {"user": 7}, "connection_id": one},
            {"send": "x" * (LARGEST_FRAME + 1), "connection_ids": [one, UNKNOWN]},
            {"state": "x" * 99, "connection_id": one},
            {"send": "x" * LARGEST_FRAME, "connection_id": one},
        )
        assert got == [(one, 200), (one, 413), (UNKNOWN, 413), (one, 413), (one, 200)]
        assert await received(client, 1) == ["x" * LARGEST_FRAME]
        name = f"after {one}"
        await client.send(name)
        await relay.id_of(name)
        (event,) = [e for e in relay.backend.of("message") if e["message"] == name]
        assert event["meta"]["state"] == {"user": 7}


GOOD = {"send": "x", "connection_id": "{id}"}
# The index of the first bad command, if one is, and what the detail says.
MALFORMED = {
    "empty": (b"", None, "JSON"),
    "not-json": (b'{"commands": [', None, "JSON"),
    "not-utf8": (b'{"commands": [{"send": "\xff"}]}', None, "JSON"),
    "lone-surrogate": (b'{"commands": [{"send": "\\ud800"}]}', None, "JSON"),
    "utf-16": ('{"commands": []}'.encode("utf-16"), None, "JSON"),
    "list": (b"[]", None, "object"),
    "null": (b"null", None, "object"),
    "no-commands": (b"{}", None, "commands"),
    "object": ({"send": "x"}, None, "list"),
    "number": ([GOOD, 1], 1, "object"),
    "nothing": ([GOOD, {"connection_id": "a"}], 1, "exactly one"),
    "two": ([{**GOOD, "close": True}], 0, "exactly one"),
    "send-number": ([GOOD, GOOD, {**GOOD, "send": 1}], 2, "send"),
    "send-null": ([{**GOOD, "send": None}], 0, "send"),
    "type": ([{**GOOD, "type": "ping"}], 0, "type"),
    "text-base64": ([{**GOOD, "encoding": "base64"}], 0, "encoding"),
    "encoding": ([{**GOOD, "type": "binary", "encoding": "hex"}], 0, "encoding"),
    "base64": ([{**GOOD, "type": "binary", "encoding": "base64"}], 0, "base64"),
    "close-false": ([GOOD, {"close": False, "connection_id": "a"}], 1, "close"),
    "close-code": ([{"close": {"code": 1005}, "connection_id": "a"}], 0, "code"),
    "close-reason": (
        [{"close": {"reason": "é" * 62}, "connection_id": "a"}], 0, "reason"
    ),
    "deep-state": (
        b'{"commands": [{"connection_id": "a", "state": %b}]}'
        % (b"[" * 300 + b"]" * 300), 0, "state"
    ),
    "no-id": ([GOOD, {"send": "x"}], 1, "connection_id"),
    "null-id": ([{"send": "x", "connection_id": None}], 0, "string"),
    "number-id": ([{"send": "x", "connection_ids": ["a", 1]}], 0, "string"),
    "string-ids": ([{"send": "x", "connection_ids": "a"}], 0, "list"),
    "both-ids": ([{**GOOD, "connection_ids": ["a"]}], 0, "exclude"),
    "pairs": ([GOOD, {"send": "x", "connection_ids": ["a"] * 10_000}], None, "10000"),
    "ids": ([GOOD, {"send": "x", "connection_ids": ["a"] * 10_001}], 1, "10000"),
    "none": ([GOOD, *[{"send": "", "connection_ids": []}] * 10_000], None, "10000"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_command_is_400_before_anything_is_done(each_relay, name):
    """The detail says which command is wrong, and why."""
    relay = each_relay
    body, index, why = MALFORMED[name]
    async with relay.client() as (client, one):
        if not isinstance(body, bytes):
            document = json.dumps({"commands": body})
            body = document.replace("{id}", one).encode()
        answer = await relay.post(body)
        assert answer.code == 400, answer.body
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem = json.loads(answer.body)
        assert (problem["title"], problem["status"]) == ("Bad Request", 400)
        assert why in problem["detail"]
        assert (f"commands[{index}]" in problem["detail"]) == (index is not None)
        assert await relay.bulk({"send": "ok", "connection_id": one}) == [(one, 200)]
        assert await received(client, 1) == ["ok"]


async def test_document_may_begin_with_a_byte_order_mark(each_relay):
    """A parser may ignore it (RFC 8259, section 8.1)."""
    answer = await each_relay.post(b'\xef\xbb\xbf{"commands": [], "more": 1}')
    assert (answer.code, pairs_of(answer)) == (200, [])


async def test_requests_are_checked_in_order(each_relay):
    """401, 404, 405, 413, 415, 400."""
    relay = each_relay
    large = b" " * (LARGEST + 1)
    wrong = "Bearer 0123456789abcdeF"
    latin1 = "application/json; charset=latin-1"
    for body, headers, status in (
        (large, {"Authorization": None, "Content_Type": "text/plain"}, 401),
        (b"{", {"Authorization": wrong}, 401),
        (large, {"Content_Type": "text/plain"}, 413),
        (b"{", {"Content_Type": "text/plain"}, 415),
        (b"{", {"Content_Type": None}, 415),
        (b"{", {"Content_Type": latin1}, 415),
        (b"{", {"Content_Encoding": "gzip"}, 415),
        (b"{", {}, 400),
        (b'{"commands": []}', {"Content_Type": "Application/JSON; charset=UTF-8"}, 200),
        (b'{"commands": []}', {"Authorization": f"bearer {OTHER_TOKEN}"}, 200),
        (b'{"commands": []}'.ljust(LARGEST), {}, 200),
    ):
        answer = await relay.post(body, **headers)
        assert answer.code == status, (headers, answer.body)
        if status != 200:
            assert json.loads(answer.body)["status"] == status
        if status == 401:
            assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        body = b"{}" if method == "PUT" else None
        assert (await relay.backend.call(relay.url, method, body=body)).code == 401
        answer = await relay.backend.call(relay.url, method, body=body, headers=allowed)
        assert (answer.code, answer.headers["Allow"]) == (405, "POST")
    for path in ("/commands/", "/commands/x", "/commandsx"):
        url = relay.service.callback_url + path
        answer = await relay.backend.call(url, body=b"{}", headers=allowed)
        assert answer.code == 404


async def test_only_the_callback_listener_has_bulk_callbacks(io_loop):
    """Clients do not reach them."""
    async with running("--callbackport=0") as relay:
        url = relay.service.ws_url.replace("ws:", "http:").replace("/ws", "/commands")
        allowed = {"Authorization": f"Bearer {TOKEN}"}
        assert (await relay.backend.call(url, body=b"{}", headers=allowed)).code == 404


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_without_tokens_there_is_no_bulk_callback(io_loop, server):
    """404, whatever is asked."""
    flag = f"--http_server={server}"
    async with RecordingBackend() as backend, Service(flag) as service:
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}"}):
            answer = await backend.call(
                f"{service.callback_url}/commands", body=b"{}", headers=headers
            )
            assert (answer.code, json.loads(answer.body)["status"]) == (404, 404)


async def test_token_file_and_prefix(io_loop, tmp_path):
    """Tokens may be in a file; the path prefix is optional."""
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    flags = (f"--callback_token_file={file}", "--externalhostandport=http://x.test/sd")
    async with RecordingBackend() as backend, Service(*flags) as service:
        paths = {"/sd/commands": 200, "/commands": 200, "/x/commands": 404}
        for path, status in paths.items():
            relay = Relay(backend, service)
            relay.url = service.callback_url + path
            assert (await relay.post(b'{"commands": []}')).code == status
            anonymous = await relay.post(b'{"commands": []}', Authorization=None)
            assert anonymous.code == (401 if status == 200 else 404)


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_bulk_callback_may_be_larger_than_a_discarded_body(io_loop, server):
    """If --max_bulk_size says so; a message may not."""
    size = 66 * 2**20
    async with running(f"--max_bulk_size={size}", f"--http_server={server}") as relay:
        assert (await relay.post(b'{"commands": []}'.ljust(size))).code == 200
        async with relay.client() as (_, one):
            url = f"{relay.service.callback_url}/socket/{one}/send"
            headers = {"Authorization": f"Bearer {TOKEN}"}
            body = bytes(5 * 2**20)
            answer = await relay.backend.call(url, body=body, headers=headers)
            assert answer.code == 413


async def test_connecting_client_gets_its_commands_after_the_handshake(io_loop):
    """202; a state is set at once."""
    async with running(kinds=("connect", "message", "disconnect")) as relay:
        release = withhold(relay.backend, "connect")
        opening = asyncio.ensure_future(websockets.connect(relay.service.ws_url))
        (event,) = await relay.backend.wait_for("connect", 1)
        one = event["meta"]["connection_id"]
        got = await relay.bulk(
            {"send": "early", "connection_id": one},
            {"state": "kept", "connection_id": one},
            {"send": "too", "connection_ids": [one, UNKNOWN, one]},
            {"close": {"code": 4000}, "connection_id": one},
            {"send": "late", "connection_id": one},
        )
        assert got == [(one, 202), (one, 200), (one, 202), (UNKNOWN, 410), (one, 202),
                       (one, 202), (one, 410)]
        release.set()
        client = await asyncio.wait_for(opening, DEADLINE)
        assert await received(client, 3) == ["early", "too", "too"]
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), DEADLINE)
        assert closed.value.rcvd.code == 4000
        (event,) = await relay.backend.wait_for("disconnect", 1)
        assert event["meta"]["state"] == "kept"


async def slow_client(relay: Relay) -> tuple[SlowClient, str]:
    """A client that reads nothing yet, and the id of its connection."""
    client = await SlowClient.connect(relay.service.ws_url, receive_buffer=4096)
    (event,) = await relay.backend.wait_for("connect", 1)
    return client, event["meta"]["connection_id"]


async def test_slow_client_is_429_and_410_and_delays_no_other(io_loop):
    """The response comes when its send has timed out; others have their frames."""
    flags = ("--send_timeout=2", "--max_send_buffer=100000", "--max_bulk_size=20000000")
    async with running(*flags, kinds=("connect", "message")) as relay:
        slow, one = await slow_client(relay)
        with slow:
            async with relay.client() as (client, other):
                large = "x" * (4 * 2**20)
                waiting = asyncio.ensure_future(
                    relay.bulk(
                        # One frame is always taken; those behind it find no room.
                        *[{"send": large, "connection_id": one}] * 4,
                        {"send": "hello", "connection_ids": [one, other]},
                        {"close": True, "connection_id": UNKNOWN},
                    )
                )
                assert await received(client, 1) == ["hello"]
                assert not waiting.done()
                got = await asyncio.wait_for(waiting, DEADLINE)
                assert [pair for pair in got if pair[0] != one] == [
                    (other, 200), (UNKNOWN, 410)
                ]
                statuses = [status for to, status in got if to == one]
                # The kernel may take some; one waits, and the last ones are refused.
                assert statuses == sorted(statuses)
                assert set(statuses) <= {200, 410, 429}
                assert statuses.count(410) == 1
                assert statuses.count(429) >= 1


async def test_response_waits_until_the_kernel_has_the_frame(io_loop):
    """A client that reads late is answered with 200 when it has read."""
    async with running("--send_timeout=60", kinds=("connect", "message")) as relay:
        slow, one = await slow_client(relay)
        with slow:
            async with relay.client() as (client, other):
                size = 3 * 2**20
                waiting = asyncio.ensure_future(
                    relay.bulk(
                        {"send": "x" * size, "connection_id": one},
                        {"send": "after", "connection_ids": [other, one]},
                    )
                )
                assert await received(client, 1) == ["after"]
                assert not waiting.done()
                await slow.read(lambda data: len(data) >= size + 10, seconds=DEADLINE)
                got = await asyncio.wait_for(waiting, DEADLINE)
                assert got == [(one, 200), (other, 200), (one, 200)]


@pytest.mark.parametrize("target", ["/commands", "/commands?handler"])
@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_request_goes_on_without_its_caller(io_loop, server, target):
    """All commands are carried out, though the caller has left."""
    async with running(f"--http_server={server}") as relay:
        async with relay.client() as (client, one):
            sends = [{"send": str(n), "connection_id": one} for n in range(9000)]
            body = json.dumps({"commands": sends}).encode()
            head = (
                f"POST {target} HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {TOKEN}\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            port = int(relay.url.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port)) as caller:
                await in_thread(caller.sendall, head.encode() + body)
                assert await received(client, 1) == ["0"]
            assert await received(client, 8999) == [str(n) for n in range(1, 9000)]


async def test_bulk_callbacks_are_counted(io_loop):
    """Each pair by its outcome; a malformed request once."""
    async with running() as relay:
        async with relay.client() as (client, one):
            await relay.bulk(
                {"send": "x", "connection_ids": [one, one, UNKNOWN]},
                {"state": "x" * 5000, "connection_id": one},
                {"state": None, "connection_id": one},
                {"close": True, "connection_id": one},
            )
            assert (await relay.post(b'{"commands": [1, 2]}')).code == 400
            assert (await relay.post(b"{")).code == 400
            assert await received(client, 2) == ["x", "x"]
        answer = await relay.backend.call(
            f"{relay.service.callback_url}/metrics",
            "GET",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
    begin = "commands_total{"
    counted = {
        name.removeprefix(begin): value
        for name, value in samples(answer.body.decode()).items()
        if name.startswith(begin) and value
    }
    assert counted == {
        'command="send",outcome="done",source="callback"}': 2,
        'command="send",outcome="gone",source="callback"}': 1,
        'command="state",outcome="invalid",source="callback"}': 1,
        'command="state",outcome="done",source="callback"}': 1,
        'command="close",outcome="done",source="callback"}': 1,
        'command="none",outcome="invalid",source="callback"}': 2,
    }


async def test_command_is_a_sign_of_life(io_loop):
    """A held message makes room for the next one, as after a callback."""
    flags = ("--order_wait=0.1", "--max_unanswered=1", "--delivery_timeout=60")
    async with running(*flags) as relay:
        async with relay.client() as (client, one):
            release = withhold(relay.backend, "message")
            await client.send("held")
            await relay.id_of("held")
            await client.send("next")
            assert await relay.bulk({"state": 1, "connection_id": one}) == [(one, 200)]
            assert await relay.id_of("next") == one
            release.set()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_fan_out_to_ten_thousand_delays_no_other_client(io_loop, loop):
    """The relay does little between another client's message and its echo."""
    count = 250
    flags = (f"--callback_token={TOKEN}", f"--event_loop={loop}")
    async with RecordingBackend() as backend, Service(*flags) as service:
        relay = Relay(backend, service)
        peers = [await in_thread(Peer, service) for _ in range(count)]
        other = await in_thread(Peer, service)
        ids: list[str] = []
        async with asyncio.timeout(DEADLINE):
            while len(ids) <= count:
                opened = [line for line in service.log if " opened by " in line]
                ids = [line.split()[-4] for line in opened]
                await asyncio.sleep(0.01)  # until the next look
        found: list[float] = []
        commands = {"send": "x" * 50, "connection_ids": ids[:count] * (10_000 // count)}
        fan_out = asyncio.ensure_future(relay.bulk(commands))
        while not fan_out.done():
            found += await in_thread(delays, service, other, 1)
        got = await fan_out
        assert len(got) == 10_000
        assert {status for _, status in got} == {200}
        for peer in (*peers, other):
            peer.sock.close()
    assert max(found) < 2 * DELAY, sorted(found)[-10:]
