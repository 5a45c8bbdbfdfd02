"""The console's routes: who may use them, and what they cost."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import websockets
from authorization_test import Caller, Response, ask
from faults import ScriptedBackend, memory
from programs import program
from project import installation, library
from reply_backends import ReplyBackend
from service import (
    DEADLINE,
    DRAINS_SLOWLY,
    PROJECT,
    RecordingBackend,
    Service,
    draining,
    withhold,
)

from backends.loopback import make_backend
from handlers.clients.tickets import MAX_TICKETS, TICKET_LIFETIME, Tickets
from handlers.connections import ConnectionMap
from handlers.operators.console.connections import ORDERS, search
from handlers.operators.console.live import parse_filter
from handlers.operators.console.tail import (
    EVENTS_PER_BATCH,
    FOLLOWED_PER_BATCH,
    MAX_VIEWERS,
    SHOWN_OF_BODY,
    Tail,
    Viewer,
    ViewerFilter,
)
from handlers.telemetry.observers import Observers

pytestmark = pytest.mark.gen_test(timeout=60)

TOKEN = "a-token-of-the-console-0123"
TOKENS = f"--callback_token={TOKEN}"
BEARER = f"Authorization: Bearer {TOKEN}"
JSON = "Content-Type: application/json"
UNKNOWN = "0" * 32
SLOW_READING = 9.0  # seconds; the kernel alone has room for some 4 MB of each stream
PAGE = PROJECT / "handlers" / "operators" / "console" / "page"

DATA = [
    ("GET", "/console/live"),
    ("GET", "/console/connections"),
    ("POST", f"/console/viewers/{UNKNOWN}"),
    ("POST", f"/console/connections/{UNKNOWN}/send"),
    ("POST", f"/console/connections/{UNKNOWN}/close"),
    ("POST", "/console/playground"),
]


def origin_of(service: Service) -> str:
    """The header that browsers send for the console's own page."""
    return f"Origin: {service.callback_url}"


class Stream:
    """An open `/console/live`, read line by line."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.seen: list[dict[str, Any]] = []
        self.ended = False

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """Read each line until the stream ends."""
        buffer = b""
        while True:
            size = int(await self.caller.reader.readuntil(b"\r\n"), 16)
            buffer += (await self.caller.reader.readexactly(size + 2))[:-2]
            if size == 0:
                self.ended = True
                return
            *whole, buffer = buffer.split(b"\n")
            for line in whole:
                self.seen.append(json.loads(line))
                yield self.seen[-1]

    async def until(self, kind: str, **wanted: Any) -> dict[str, Any]:
        """The next line of that kind, or the next such event in one."""
        async with asyncio.timeout(DEADLINE):
            async for line in self.lines():
                for item in [line, *line.get("events", ())]:
                    if item["kind"] == kind and wanted.items() <= item.items():
                        return item
        raise AssertionError(f"the stream ended without {kind} {wanted}")

    def events(self) -> list[dict[str, Any]]:
        """Return all events that have arrived so far."""
        return [event for line in self.seen for event in line.get("events", ())]


@contextlib.asynccontextmanager
async def live(service: Service, *headers: str) -> AsyncIterator[tuple[Stream, Any]]:
    """A stream, and its hello."""
    async with Caller(service) as caller:
        caller.begin("GET", "/console/live", *headers)
        head = (await caller.reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200"), head
        stream = Stream(caller)
        yield stream, await stream.until("hello")


async def post(
    service: Service, path: str, body: bytes | dict[str, Any], *headers: str
) -> Response:
    """POST like the page."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    async with Caller(service) as caller:
        own = f"Origin: http://localhost:{caller.port}"
        return await caller.ask("POST", path, own, *headers, body=body)


# Authorization.


async def test_page_has_a_policy_with_both_listeners(io_loop):
    """Only its own files, no inline script; it may connect to both listeners."""
    async with Service("--callbackport=0") as service:
        answer = await ask(service, "GET", "/")
        assert answer.status == 200
        policy = answer.headers["content-security-policy"].split("; ")
        clients = service.ws_url.removesuffix("/ws")
        assert f"connect-src 'self' {clients}" in policy
        for directive in (
            "default-src 'none'", "script-src 'self'", "style-src 'self'",
            "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        ):
            assert directive in policy
        assert "unsafe" not in str(policy) and "*" not in str(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        # It is not on the client listener.
        service.callback_url = service.ws_url.replace("ws:", "http:")[:-3]
        for _, path in [("", "/"), *DATA]:
            assert (await ask(service, "GET", path)).status == 404, path


async def test_policy_contains_only_a_valid_host(io_loop):
    """With one listener: the page's own host, by ws and wss."""
    async with Service(TOKENS) as service:
        answer = await ask(service, "GET", "/", "Host: relay.example:99")
        assert "connect-src 'self' ws://relay.example:99 wss://relay.example:99;" in (
            answer.headers["content-security-policy"]
        )
        for host in ("x;script-src", "x y", "a,b"):
            answer = await ask(service, "GET", "/", f"Host: {host}")
            assert answer.status == 400 or "connect-src 'self';" in (
                answer.headers["content-security-policy"]
            ), host


def test_page_has_nothing_inline_and_nothing_from_elsewhere():
    """As its policy requires; and the page uses each of its files.

    It only links to the documentation.
    """
    setup = (PROJECT / "setup.py").read_text("utf-8")
    (repository,) = re.findall(r'^REPOSITORY = "(.+)"$', setup, flags=re.MULTILINE)
    texts = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    assert len(texts) > 8
    for name, content in texts.items():
        text = content.replace(f'<a href="{repository}/blob/main/docs/', "<a ")
        addresses = re.findall(r"(?:https?:)?//[a-z][\w.-]*", text)
        assert set(addresses) <= {"http://www.w3.org"}, name  # SVG's namespace
        assert not re.search(r"\bon\w+=|style=|innerHTML|eval\(|javascript:", text)
    index = texts["index.html"]
    assert not re.search(r"<script(?![^>]*src=)|<style", index)
    named = set(re.findall(r'"(?:console/|\./)([a-z]+\.\w+)"', "".join(texts.values())))
    assert named == set(texts) - {"index.html"}


def test_scripts_are_well_formed():
    """According to Node's parser, if Node is installed."""
    node = program("nodejs", "node")
    for script in PAGE.glob("*.js"):
        source = script.read_bytes()
        subprocess.run(
            [node, "--input-type=module", "--check"], input=source, check=True,
            timeout=DEADLINE,
        )


async def test_with_tokens_only_the_page_needs_none(io_loop):
    """It contains no data, and a browser sends no token when it opens it."""
    async with Service(TOKENS) as service:
        for path in ("/", "/console/main.js", "/console/console.css"):
            assert (await ask(service, "GET", path)).status == 200
        for method, path in DATA:
            for headers in ((), ("Authorization: Bearer wrong-token-0123456789",)):
                async with Caller(service) as caller:
                    body = b"{}" if method == "POST" else None
                    answer = await caller.ask(method, path, *headers, body=body)
                    assert answer.status == 401, path
        answer = await ask(service, "GET", "/console/connections", BEARER)
        assert answer.status == 200
        assert answer.headers["cache-control"] == "no-store"


REFUSED = [
    ("Host: relay.example",),  # rebound to 127.0.0.1
    ("X-Forwarded-For: 10.0.0.1",),
    ("Origin: http://elsewhere.example",),
]


@pytest.mark.parametrize("headers", REFUSED, ids=lambda headers: headers[0])
async def test_without_tokens_only_this_machine_may_use_it(io_loop, headers):
    """This includes the page, as for all operators' routes."""
    async with Service() as service:
        for method, path in [("GET", "/"), *DATA]:
            async with Caller(service) as caller:
                body = b"{}" if method == "POST" else None
                answer = await caller.ask(method, path, *headers, body=body)
                assert answer.status == 403, path


async def test_changes_need_the_pages_own_origin(io_loop):
    """Without a token; and no other site can use up the viewers."""
    async with Service() as service:
        for method, path in DATA:
            if method == "POST":
                async with Caller(service) as caller:
                    answer = await caller.ask(method, path, body=b"{}")
                    assert answer.status == 403, path
            for site in ("cross-site", "same-site"):
                async with Caller(service) as caller:
                    own = f"Origin: http://localhost:{caller.port}"
                    answer = await caller.ask(
                        method, path, own, f"Sec-Fetch-Site: {site}",
                        body=b"{}" if method == "POST" else None,
                    )
                    assert answer.status == 403, path
        # Another site may link to the page.
        answer = await ask(service, "GET", "/", "Sec-Fetch-Site: cross-site")
        assert answer.status == 200


async def test_console_can_be_turned_off(io_loop):
    """Then none of its routes exist, and its page may not connect."""
    async with Service("--console=off") as service:
        for method, path in [("GET", "/"), ("GET", "/console/main.js"), *DATA]:
            async with Caller(service) as caller:
                body = b"{}" if method == "POST" else None
                assert (await caller.ask(method, path, body=body)).status == 404


async def test_unknown_methods_and_files_are_rejected(io_loop):
    """405 and 404, as on other routes."""
    async with Service() as service:
        assert (await ask(service, "HEAD", "/")).status == 200
        assert (await post(service, "/", b"")).status == 405
        assert (await post(service, "/console/live", b"")).status == 405
        assert (await ask(service, "GET", "/console/playground")).status == 405
        for path in ("/console", "/console/", "/console/nothing.js", "/console/x.py"):
            assert (await ask(service, "GET", path)).status == 404
        tag = (await ask(service, "GET", "/console/main.js")).headers["etag"]
        again = await ask(service, "GET", "/console/main.js", f"If-None-Match: {tag}")
        assert again.status == 304


async def test_installed_relay_has_the_page(io_loop, tmp_path_factory):
    """The wheel contains each of its files."""
    prefix = installation(tmp_path_factory.getbasetemp())
    async with Service(
        command=[str(prefix / "bin" / "socketdock")],
        environment={"PYTHONPATH": library(prefix)},
        cwd=prefix,
    ) as service:
        for file in PAGE.iterdir():
            path = "/" if file.name == "index.html" else f"/console/{file.name}"
            answer = await ask(service, "GET", path)
            assert (answer.status, answer.body) == (200, file.read_bytes())


# The stream.


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_stream_has_each_kind_of_event(io_loop, server):
    """With its connection and numbers, and without bodies."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), f"--http_server={server}")
        async with Service(*flags) as service, live(service) as (stream, hello):
            assert hello["backend"] == "http"
            assert hello["snapshot"]["open"] == 0
            async with websockets.connect(service.ws_url) as client:
                await client.send("marked-body")
                (event,) = await backend.wait_for("message", 1)
                await backend.call(
                    event["meta"]["send"], body=b"marked-answer",
                )
                await client.recv()
            await backend.wait_for("disconnect", 1)
            await stream.until("attempt", event="disconnect")
            closed = await stream.until("snapshot", open=0)
            events = stream.events()
            by_kind = {(e["kind"], e.get("event")): e for e in events}
            assert len(by_kind) == len(events)
            assert set(by_kind) == {
                ("attempt", "connect"), ("opened", None), ("received", None),
                ("attempt", "message"), ("sent", None), ("closed", None),
                ("attempt", "disconnect"),
            }
            connection_id = event["meta"]["connection_id"]
            assert {e["id"] for e in events} == {connection_id}
            assert by_kind["received", None]["size"] == len("marked-body")
            assert by_kind["received", None]["number"] == 1
            assert by_kind["sent", None]["type"] == "binary"
            attempt = by_kind["attempt", "message"]
            assert (attempt["outcome"], attempt["status"]) == ("delivered", 200)
            assert attempt["event_id"] == f"{connection_id}-1"
            assert by_kind["closed", None]["code"] == 1000
            counts = closed["counts"]
            assert (counts["messages_in"], counts["messages_out"]) == (1, 1)
            assert (counts["opened"], counts["closed"]) == (1, 1)
            assert "marked" not in json.dumps(stream.seen)


async def test_stream_has_failures(io_loop):
    """A rejected handshake, and attempts that do not reach the backend."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        flags = ("--backend=http", f"--messageuri={url}", "--delivery_timeout=1")
        async with Service(*flags) as service, live(service) as (stream, _):
            with pytest.raises(websockets.InvalidStatus):
                await websockets.connect(service.ws_url, origin="http://x.example")
            refused = await stream.until("handshake")
            assert (refused["outcome"], refused["status"]) == ("rejected", 403)
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                attempt = await stream.until("attempt", event="message")
                assert (attempt["outcome"], attempt["status"]) == ("unreachable", None)
                await client.wait_closed()
            await stream.until("snapshot", open=0)
            attempts = [e["attempt"] for e in stream.events() if "attempt" in e]
            assert attempts == [*range(1, len(attempts) + 1)] != [1]
            given_up = [e for e in stream.events() if e["kind"] == "given_up"]
            assert [e["count"] for e in given_up] == [1]
            counts = stream.seen[-1]["counts"]
            assert counts["failed_attempts"] >= 1
            assert (counts["rejected"], counts["given_up"]) == (1, 1)
            snapshots = [line for line in stream.seen if line["kind"] == "snapshot"]
            assert {snapshot["latency"]["p50"] for snapshot in snapshots} == {None}


async def test_bodies_of_one_connection_are_sent_on_request(io_loop):
    """To that viewer only, shortened, from the request on."""
    async with Service() as service, live(service) as (stream, hello):
        assert hello["bodies"] is True
        async with live(service) as (other, _):
            first = await websockets.connect(service.ws_url)
            one = (await stream.until("opened"))["id"]
            second = await websockets.connect(service.ws_url)
            await stream.until("opened")
            await first.send("before")
            await stream.until("sent")
            viewer = f"/console/viewers/{hello['viewer']}"
            answer = await post(service, viewer, {"bodies": one}, JSON)
            assert answer.status == 204
            await second.send("of the other")
            await stream.until("sent")
            await first.send("x" * (SHOWN_OF_BODY + 1))
            text = await stream.until("received", id=one)
            assert text["body"] == "x" * SHOWN_OF_BODY and text["cut"] is True
            await first.send(b"\x00\xff")
            binary = await stream.until("received", id=one)
            assert binary["body"] == "00 ff" and binary["cut"] is False
            bodies = [e["body"] for e in stream.events() if "body" in e]
            assert "before" not in bodies and "of the other" not in bodies
            await post(service, viewer, {"bodies": None}, JSON)
            await first.send("after")
            assert "body" not in await stream.until("received", id=one)
            await first.close()
            await other.until("closed", id=one)
            assert not any("body" in event for event in other.events())
            await second.close()


async def test_bodies_are_never_shown_when_console_bodies_is_off(io_loop):
    """The relay rejects the request, independent of the page."""
    async with Service("--console_bodies=off") as service:
        async with live(service) as (stream, hello):
            assert hello["bodies"] is False
            async with websockets.connect(service.ws_url) as client:
                one = (await stream.until("opened"))["id"]
                viewer = f"/console/viewers/{hello['viewer']}"
                answer = await post(service, viewer, {"bodies": one}, JSON)
                assert answer.status == 403
                assert "--console_bodies" in answer.detail
                await client.send("secret")
                assert "body" not in await stream.until("received", id=one)


async def test_viewer_filters_are_validated(io_loop):
    """400 describes each valid value; an unknown viewer is 404."""
    async with Service() as service, live(service) as (_, hello):
        viewer = f"/console/viewers/{hello['viewer']}"
        for wrong in (
            b"", b"x", b"[]", b"[" * 4000, {"kinds": ["x"]}, {"kinds": "opened"},
            {"kinds": [[]]}, {"connection": "x"}, {"connection": 1}, {"failures": 1},
            {"followed": ["x"]}, {"followed": [UNKNOWN] * 5}, {"followed": UNKNOWN},
            {"bodies": "x"}, {"bodies": [UNKNOWN]},
        ):
            answer = await post(service, viewer, wrong, JSON)
            assert answer.status == 400, wrong
        assert (await post(service, viewer, b" " * 5000, JSON)).status == 413
        answer = await post(service, f"/console/viewers/{UNKNOWN}", {}, JSON)
        assert answer.status == 404


def test_slow_viewer_gets_fewer_events():
    """A batch is limited, the rest is counted. Followed connections count apart."""
    viewer = Viewer(lambda viewer: None)
    one, other = "a" * 32, "b" * 32
    viewer.filter = parse_filter({"followed": [one]})
    wanted = 0
    for _ in range(10_000):
        for connection in (one, other):
            if viewer.wants("received", connection):
                viewer.add({})
                wanted += 1
    assert wanted == EVENTS_PER_BATCH + FOLLOWED_PER_BATCH
    viewer.wake(None)
    (batch,) = asyncio.run(viewer.next()).splitlines()
    batch = json.loads(batch)
    assert len(batch["events"]) == wanted
    assert batch["skipped"] == 20_000 - wanted
    assert viewer.wants("received", other)


def test_viewer_gets_the_events_that_match_its_filter():
    """Kinds, the beginning of an id, failures; and followed connections."""
    viewer = Viewer(lambda viewer: None)
    one = "a" * 32
    viewer.filter = ViewerFilter(frozenset({"attempt"}), "bb", True, frozenset({one}))
    assert viewer.wants("opened", one)
    assert not viewer.wants("attempt", "bb00")
    assert viewer.wants("attempt", "bb00", failed=True)
    assert not viewer.wants("attempt", "b0", failed=True)
    assert not viewer.wants("given_up", "bb00", failed=True)


async def test_viewers_are_bounded(io_loop):
    """One more gets 503 until another one leaves."""
    async with Service() as service, contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        await first.enter_async_context(live(service))
        for _ in range(MAX_VIEWERS - 1):
            await stack.enter_async_context(live(service))
        answer = await ask(service, "GET", "/console/live")
        assert answer.status == 503
        assert answer.headers["retry-after"]
        await first.aclose()

        async def is_free() -> bool:
            async with Caller(service) as caller:
                caller.begin("GET", "/console/live")
                head = await caller.reader.readuntil(b"\r\n\r\n")
                return head.startswith(b"HTTP/1.1 200")

        async with asyncio.timeout(DEADLINE):
            while not await is_free():
                pass


@pytest.mark.long
@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_viewer_that_reads_nothing_costs_no_memory(io_loop, server):
    """One batch waits for it, and the relay is not delayed."""
    flags = (f"--http_server={server}",)
    async with Service(*flags) as service, contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(websockets.connect(service.ws_url))
        answer = await ask(service, "GET", "/console/connections")
        one = json.loads(answer.body)["connections"][0]["connection_id"]
        for _ in range(4):
            stream, hello = await stack.enter_async_context(live(service))
            viewer = f"/console/viewers/{hello['viewer']}"
            wishes = {"followed": [one], "bodies": one}
            assert (await post(service, viewer, wishes, JSON)).status == 204
            stream.caller.writer.transport.pause_reading()
        async with live(service) as (stream, _):
            before = memory(service.process.pid)
            end = time.monotonic() + SLOW_READING
            sent = 0
            while time.monotonic() < end:
                for _ in range(50):
                    await client.send("x" * SHOWN_OF_BODY)
                for _ in range(50):
                    await client.recv()
                sent += 50
            last = await stream.until("snapshot")
            while last["counts"]["messages_in"] < sent:
                last = await stream.until("snapshot")
            assert memory(service.process.pid) < before + 8 * 2**20


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_open_page_does_not_delay_the_stop(io_loop, server):
    """Its stream reports the drain, and ends by itself."""
    flags = (f"--http_server={server}", DRAINS_SLOWLY)
    async with Service(*flags) as service, live(service) as (stream, _):
        async with draining(service):
            await stream.until("snapshot", state="draining")
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                async for _ in stream.lines():
                    pass
        assert stream.ended


async def test_stream_ends_with_its_token(io_loop, tmp_path):
    """When the token is removed from the file."""
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    async with Service(f"--callback_token_file={file}") as service:
        async with live(service, BEARER) as (stream, _):
            await stream.until("snapshot")
            file.write_text("another-token-0123456789\n")
            service.process.send_signal(1)
            async with asyncio.timeout(DEADLINE):
                async for _ in stream.lines():
                    pass
            assert stream.ended


# Connections.


async def test_connections_are_searched_and_sorted(io_loop):
    """By id, client, subprotocol and address; omitted ones are counted."""
    async with Service() as service, contextlib.AsyncExitStack() as stack:
        for name in ("Alpha/1.0", "beta", "beta gamma"):
            client = await stack.enter_async_context(
                websockets.connect(
                    service.ws_url, user_agent_header=name, subprotocols=[name[:4]]
                )
            )
            await client.send("x" * len(name))
            await client.recv()

        async def found(query: str) -> Any:
            answer = await ask(service, "GET", f"/console/connections?{query}")
            assert answer.status == 200
            return json.loads(answer.body)

        every = await found("")
        assert (every["found"], every["total"]) == (3, 3)
        agents = [c["user_agent"] for c in every["connections"]]
        assert agents == ["beta gamma", "beta", "Alpha/1.0"]
        for query, expected in {
            "search=alpha": ["Alpha/1.0"],
            "search=beta&limit=1": ["beta gamma"],
            "search=beta%20gam": ["beta gamma"],
            "search=127.0.0.1&sort=oldest": ["Alpha/1.0", "beta", "beta gamma"],
            f"search={every['connections'][1]['connection_id'][:9].upper()}": ["beta"],
            "sort=bytes&limit=2": ["beta gamma", "Alpha/1.0"],
            "search=nobody": [],
        }.items():
            answer = await found(query)
            assert [c["user_agent"] for c in answer["connections"]] == expected, query
        assert (await found("search=beta&limit=1"))["found"] == 2
        for query in (
            "sort=x", "limit=0", "limit=101", "limit=x", "limit=-1", "limit=%C2%B2",
            "search=%FF", f"search={'x' * 101}",
        ):
            answer = await ask(service, "GET", f"/console/connections?{query}")
            assert answer.status == 400, query


def test_search_does_not_block_the_loop():
    """With 10,000 connections it takes a few milliseconds per turn."""

    def connection(number: int) -> Any:
        return SimpleNamespace(
            id=f"{number:032x}", remote_ip=f"10.0.0.{number % 256}",
            user_agent=f"client/{number}", subprotocol=None,
            connected_at=datetime.now(UTC),
        )

    async def run() -> tuple[int, int]:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        found = await search(map(connection, range(10_000)), "client/99 10.0.0.")
        task.cancel()
        return len(found), turns

    found, turns = asyncio.run(run())
    assert found == 1 + 10 + 100
    assert turns >= 10
    assert set(ORDERS) == {"newest", "oldest", "active", "received", "sent", "bytes"}


async def test_operator_sends_and_closes(io_loop):
    """Like a callback, with the same limits; the event names the initiator."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), "--max_message_size=100")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                one = f"/console/connections/{event['meta']['connection_id']}"
                for query, body in (("?type=text", "hi"), ("", b"\xff")):
                    data = body.encode() if isinstance(body, str) else body
                    answer = await post(service, f"{one}/send{query}", data)
                    assert answer.status == 200
                    assert await client.recv() == body
                for path, body, status in (
                    ("/send?type=text", b"\xff", 400), ("/send?type=x", b"", 400),
                    ("/send", b"x" * 101, 413), ("/close", b'{"code": 1005}', 400),
                    ("/close", b"x", 400),
                ):
                    assert (await post(service, one + path, body)).status == status
                closing = {"code": 4001, "reason": "by hand"}
                assert (await post(service, f"{one}/close", closing)).status == 200
                await client.wait_closed()
                assert (client.close_code, client.close_reason) == (4001, "by hand")
            (event,) = await backend.wait_for("disconnect", 1)
            assert event["meta"]["initiator"] == "relay"
            assert event["meta"]["code"] == 4001
            assert (await post(service, f"{one}/send", b"x")).status == 410
            assert (await post(service, f"{one}/close", b"")).status == 410


async def test_operator_actions_are_not_signs_of_life(io_loop):
    """They must not make the relay abandon a held response."""
    async with RecordingBackend() as backend:
        held = withhold(backend, "message")
        flags = (*backend.flags(), "--order_wait=0.05", "--max_unanswered=1",
                 "--delivery_timeout=1")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("1")
                (event,) = await backend.wait_for("message", 1)
                one = f"/console/connections/{event['meta']['connection_id']}"
                await client.send("2")
                await post(service, f"{one}/send", b"x")
                await ask(service, "GET", "/console/connections")
                # No sign of life: the second message waits until its client is closed.
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
                assert client.close_code == 1013
            held.set()


# The playground.


async def ticket(service: Service, origin: str | None = None) -> Any:
    """Return the permission that the page gets."""
    async with Caller(service) as caller:
        own = f"http://localhost:{caller.port}"
        answer = await caller.ask(
            "POST", "/console/playground", f"Origin: {origin or own}", body=b""
        )
    assert answer.status == 200
    return {**json.loads(answer.body), "page": origin or own}


async def test_playground_may_connect_once_from_its_own_origin(io_loop):
    """With two listeners its origin is not allowed otherwise, nor permanently."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), "--callbackport=0")
        async with Service(*flags) as service:
            pass_ = await ticket(service)
            assert pass_["origin"] == service.ws_url.removesuffix("/ws")
            url = f"{service.ws_url}?console={pass_['ticket']}"
            refused = pytest.raises(websockets.InvalidStatus)
            with refused:  # without the ticket the origin is not allowed
                await websockets.connect(service.ws_url, origin=pass_["page"])
            with refused:
                await websockets.connect(
                    f"{service.ws_url}?console={'0' * 32}", origin=pass_["page"]
                )
            async with websockets.connect(f"{url}&room=7", origin=pass_["page"]):
                (event,) = await backend.wait_for("connect", 1)
                # Its id is known before; no event contains the ticket.
                assert event["meta"]["connection_id"] == pass_["connection_id"]
                assert event["meta"]["query"] == "room=7"
            with refused:  # it is used
                await websockets.connect(url, origin=pass_["page"])
            pass_ = await ticket(service)
            url = f"{service.ws_url}?console={pass_['ticket']}"
            with refused:
                await websockets.connect(url, origin="http://elsewhere.example")
            with refused:  # it is invalid now
                await websockets.connect(url, origin=pass_["page"])


async def test_playground_needs_an_origin(io_loop):
    """Only browsers send one; other programs connect directly."""
    async with Service(TOKENS) as service:
        async with Caller(service) as caller:
            answer = await caller.ask("POST", "/console/playground", BEARER, body=b"")
            assert answer.status == 400


def test_tickets_expire():
    """By age, and if too many are unused."""
    now = [0.0]
    tickets = Tickets(lambda: now[0])
    old = tickets.issue("http://a")
    now[0] = TICKET_LIFETIME + 1
    assert tickets.claim(f"console={old.secret}", ["http://a"]) is None
    first = tickets.issue("http://a")
    for _ in range(MAX_TICKETS):
        last = tickets.issue("http://a")
    assert tickets.claim(f"console={first.secret}", ["http://a"]) is None
    assert tickets.claim(f"x=1&console={last.secret}", ["http://a"]) is None
    assert tickets.claim(f"console={last.secret}", ["http://a", "http://a"]) is None
    last = tickets.issue("http://a")
    claim = tickets.claim(f"console={last.secret}", ["http://a"])
    assert claim is not None and claim.connection_id == last.connection_id


# Costs.


def test_no_events_are_collected_without_viewers():
    """The tail observes while at least one page is open."""

    async def run() -> list[int]:
        observers = Observers()
        tail = Tail(
            observers, ConnectionMap(observer=observers), make_backend(None), True, {}
        )
        connection = SimpleNamespace(id=UNKNOWN, messages_in=1)
        counted = []

        def receive() -> None:
            observers.received(connection, "x", 1)
            counted.append(tail.snapshot()["counts"]["messages_in"])

        receive()
        first, second = tail.join(), tail.join()
        receive()
        first.leave()
        first.leave()
        receive()
        second.leave()
        receive()
        await tail.close()
        assert tail.join() is None
        return counted

    assert asyncio.run(run()) == [0, 1, 2, 2]


async def test_commands_of_a_batch_follow_its_events(io_loop):
    """Each event has the status of the response."""
    def answer(kind: str) -> bytes:
        (event,) = backend.events[-1][1]["events"]
        command = {"send": "x", "connection_id": event["meta"]["connection_id"]}
        body = json.dumps({"commands": [command]}).encode()
        if event.get("message") == "unusable":
            body = b"no JSON"
        return (
            b"HTTP/1.1 202 Accepted\r\nContent-Type: application/vnd.socketdock+json"
            b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async with ScriptedBackend(answer) as backend:
        flags = ("--backend=http", f"--batchuri={backend.url('batch')}")
        async with (
            Service(*flags) as service,
            live(service) as (stream, _),
            websockets.connect(service.ws_url) as client,
        ):
            await client.send("unusable")
            await stream.until("command", command="none")
            await client.send("one")
            await stream.until("command", command="send")
            shown = [each["kind"] for each in stream.events()]
            statuses = [e["status"] for e in stream.events() if e["kind"] == "attempt"]
    assert shown[-6:] == [
        "attempt", "command", "received", "attempt", "sent", "command"
    ]
    assert statuses == [202, 202]


@pytest.mark.parametrize("bodies", [True, False])
async def test_commands_and_state_are_shown(io_loop, bodies):
    """Beside the frames that they caused; the state only where bodies may be shown."""
    async with ReplyBackend() as backend:
        backend.commands({"state": {"secret": "é"}}, {"send": "marked"})
        flags = (*backend.flags("message"), f"--console_bodies={bodies}")
        async with (
            Service(*flags) as service,
            live(service) as (stream, _),
            websockets.connect(service.ws_url) as client,
        ):
            await client.send("one")
            await client.recv()
            (event,) = backend.of("message")
            backend.reply = lambda event: b"not JSON"
            await client.send("two")
            await stream.until("command", command="none")
            shown = [e for e in stream.events() if e["kind"] in ("sent", "command")]
            connection_id = event["meta"]["connection_id"]
            assert {e["id"] for e in shown} == {connection_id}
            assert [(e["kind"], e.get("command"), e.get("outcome")) for e in shown] == [
                ("command", "state", "done"), ("sent", None, None),
                ("command", "send", "done"), ("command", "none", "invalid"),
            ]
            path = f"/console/connections?search={connection_id}"
            for query, is_shown in (("", False), ("&state=1", bodies)):
                answer = await ask(service, "GET", path + query)
                (described,) = json.loads(answer.body)["connections"]
                assert described["backend_state_size"] == len('{"secret":"é"}'.encode())
                assert ("backend_state" in described) == is_shown
            if bodies:
                assert json.loads(described["backend_state"]) == {"secret": "é"}
            assert "marked" not in json.dumps(stream.seen)
