"""Handshakes without a handler of Tornado are answered as those with one."""

import asyncio
import random
import re
from dataclasses import dataclass

import pytest
from faults import send_raw
from service import DEADLINE, RecordingBackend, Service, eventually
from tornado.ioloop import IOLoop
from wire import KEY, handshake

pytestmark = pytest.mark.gen_test(timeout=120)

SERVERS = ("fast", "tornado")


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    return module_io_loop


@dataclass
class Relay:
    """A relay, and its backend, which refuses some of the handshakes."""

    service: Service
    backend: RecordingBackend

    async def ask(self, number: int, head: bytes) -> tuple[object, object]:
        """Return the response to a handshake, and the connect event if there is one."""
        received = await send_raw(
            self.service.ws_url, head, answers=1, deadline=DEADLINE
        )
        asked = [
            {name: event["meta"].get(name) for name in
             ("headers", "path", "query", "remote_ip", "subprotocols")}
            for event in self.backend.of("connect")
            if event["meta"]["query"].startswith(f"{number}&")
        ]
        head, _, body = received.data.partition(b"\r\n\r\n")
        status, *lines = re.sub(rb"\r\nDate: [^\r]*", b"", head).split(b"\r\n")
        if not body and b" 400 " in status:  # the servers' own answers are not compared
            lines = []
        return (status, sorted(lines), body, received.ended), asked


async def decide(handler, event) -> None:
    """Refuse those that say so."""
    status = event["meta"]["headers"].get("x-answer")
    if status is not None:
        handler.set_status(int(status[:3]))
        handler.set_header("Retry-After", "7")
        handler.set_header("WWW-Authenticate", "Bearer")
        handler.finish(b"no")


@pytest.fixture(scope="module")
def relays(io_loop, shared) -> dict[str, Relay]:
    """One relay with each server."""

    async def begin(server: str) -> Relay:
        backend = await shared.enter_async_context(RecordingBackend())
        backend.answers["connect"] = decide
        service = await shared.enter_async_context(
            Service(
                *backend.flags(),
                f"--http_server={server}",
                "--compression",
                "--logging=debug",
                "--subprotocols=b",
                "--trusted_proxies=127.0.0.1",
            )
        )
        return Relay(service, backend)

    return {server: io_loop.run_sync(lambda s=server: begin(s)) for server in SERVERS}


def accesses(service: Service) -> list[str]:
    """The lines of the access log."""
    lines = (line.partition("access_log] ")[2] for line in service.log)
    return [line for line in lines if line]


TARGETS = ("/ws", "/ws", "/ws/", "/other", "http://relay/ws", "/ws#", "//ws")
REQUIRED = {
    "Host": ("relay.example", "relay.example:80", "RELAY", "[::1]:80", "a_b", "", "a b",
             "a,b", "relay:99999", "\xe4"),
    "Upgrade": ("websocket", "WebSocket", "websocket, x", "h2c", ""),
    "Connection": ("Upgrade", "keep-alive, Upgrade", "upgrade,X-One", "close", ""),
    "Sec-WebSocket-Version": ("13", "13", "8", "13, 13"),
    "Sec-WebSocket-Key": (KEY, KEY, "x", f"{KEY}, {KEY}", "\xe4"),
}
MORE = (
    "Host: other", "host: relay.example", "Upgrade: websocket", "Content-Length: 0",
    "Expect: 100-Continue", "Origin: http://relay.example",
    "Origin: http://relay.example", "Origin: https://elsewhere.example", "Origin:",
    "Origin: null", "Cookie: a=b", "cookie: c=d,e", "User-Agent: test/1 (\xe4)",
    "X-One: 1", "X-One: 2", "x-two:", "X-Answer: 401", "X-Answer: 404", "X-Answer: 500",
    "Sec-WebSocket-Protocol: a, b", "Sec-WebSocket-Protocol: c",
    "Sec-WebSocket-Protocol: b@d", "Sec-WebSocket-Extensions: permessage-deflate",
    "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=9",
    "Sec-WebSocket-Extensions: ; x", "X-Forwarded-For: 192.0.2.7",
    "X-Forwarded-For: 192.0.2.8, 127.0.0.1", "X-Forwarded-For: x",
    "X-Forwarded-Proto: https", "X-Forwarded-Host: elsewhere.example",
    "Authorization: Basic x", "Proxy-Authorization: x", "TE: trailers",
)


def anything(dice: random.Random, number: int) -> bytes:
    """A handshake, mostly a valid one."""
    odd = dice.choice((*REQUIRED, "", "", "", ""))
    headers = [
        f"{name}: {dice.choice(values) if name == odd else values[0]}"
        for name, values in REQUIRED.items()
        if name != odd or dice.random() < 0.8
    ]
    headers += dice.choices(MORE, k=dice.randint(0, 5))
    dice.shuffle(headers)
    method = dice.choice(("GET",) * 12 + ("PUT",))
    target = dice.choice(TARGETS) if dice.random() < 0.2 else "/ws"
    version = "1.0" if dice.random() < 0.05 else "1.1"
    line = f"{method} {target}?{number}&x=%20&y HTTP/{version}"
    return "\r\n".join((line, *headers, "", "")).encode("latin-1")


async def test_handlers_and_their_shortcut_answer_the_same(relays):
    """To random heads; backend and log get the same."""
    services = [relays[server].service for server in SERVERS]
    logged = [len(accesses(service)) for service in services]
    dice = random.Random(17)
    heads = [anything(dice, number) for number in range(400)]
    differing = []
    opened = 0

    async def ask(number: int) -> None:
        nonlocal opened
        got = [await relays[server].ask(number, heads[number]) for server in SERVERS]
        opened += got[0][0][0] == b"HTTP/1.1 101 Switching Protocols"
        if got[0] != got[1]:
            differing.append((heads[number], *got))

    for start in range(0, len(heads), 20):
        await asyncio.gather(*map(ask, range(start, start + 20)))
    assert opened > 50
    assert not differing, f"{len(differing)}: {differing[:3]}"
    for service in services:
        await send_raw(service.ws_url, handshake(line="GET /end HTTP/1.1"), answers=1)
        await eventually(lambda s=service: accesses(s)[-1:] == ["GET /end: 404"])
    fast, slow = (
        sorted(accesses(service)[start:])
        for service, start in zip(services, logged, strict=True)
    )
    assert fast == slow


@pytest.mark.parametrize("server", SERVERS)
async def test_client_that_leaves_while_the_backend_decides_is_abandoned(
    relays, server
):
    """It gets no 101; its disconnect event has the code 1006."""
    service, backend = relays[server].service, relays[server].backend
    asked, answer = asyncio.Event(), asyncio.Event()

    async def hold(handler, event) -> None:
        asked.set()
        await answer.wait()

    backend.answers["connect"] = hold
    try:
        before = len(backend.of("disconnect"))
        leaving = asyncio.create_task(
            send_raw(service.ws_url, handshake(), half_close=True)
        )
        async with asyncio.timeout(DEADLINE):
            await asked.wait()
            received = await leaving
        assert received.data == b""
        answer.set()
        events = await backend.wait_for("disconnect", before + 1)
        assert events[-1]["meta"]["code"] == 1006
        await eventually(lambda: "GET /ws: 499" in accesses(service))
        assert "GET /ws: 200" not in accesses(service)
    finally:
        backend.answers["connect"] = decide
