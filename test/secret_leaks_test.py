"""No secret, and nothing that may be one, is logged or shown.

Marks go through every path, at `--logging=debug`; afterwards none is found.
What stands on the command line is the operator's own, and in /proc for all to
read: so secrets here come from the environment and from files.
"""

import asyncio
import base64
import contextlib
import json
import signal
from pathlib import Path

import pytest
import websockets
from certificates import Authority
from faults import ScriptedBackend, send_raw
from service import Service, ended, eventually, refusal

pytestmark = pytest.mark.gen_test(timeout=60)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"


class Marks:
    """Makes marks, of letters and digits, which fit in everywhere; and finds them."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, name: str) -> str:
        self.made.append(f"leak0leak0{name}0leak")
        return self.made[-1]

    def found_in(self, text: str) -> set[str]:
        """In plain, in capitals, or as base64."""
        text = text.lower()
        return {
            mark
            for mark in self.made
            if mark in text or base64.b64encode(mark.encode())[:-4].decode() in text
        }


def as_webhook_secret(mark: str) -> str:
    """A secret whose text holds the mark."""
    return "whsec_" + (mark + "A" * 40)[:40]


@contextlib.contextmanager
def ignoring_disconnects():
    """Of connections that the relay ends, as it should."""
    with contextlib.suppress(websockets.WebSocketException, OSError):
        yield


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_no_log_at_any_level_holds_a_secret(io_loop, tmp_path, log_format):
    """No body, header, query, token or key; nor do /status and the process title."""
    mark = Marks()
    token, other_token = mark("token"), mark("tokenfile")
    (tmp_path / "tokens").write_text(f"{other_token}\n")
    (tmp_path / "secrets").write_text(as_webhook_secret(mark("webhookfile")))
    (tmp_path / "headers").write_text(f"X-Gateway: {mark('gateway')}\n")
    environment = {
        "SOCKETDOCK_CALLBACK_TOKEN": token,
        "SOCKETDOCK_CALLBACK_TOKEN_FILE": str(tmp_path / "tokens"),
        "SOCKETDOCK_WEBHOOK_SECRET": as_webhook_secret(mark("webhook")),
        "SOCKETDOCK_WEBHOOK_SECRET_FILE": str(tmp_path / "secrets"),
        "SOCKETDOCK_BACKEND_HEADERS_FILE": str(tmp_path / "headers"),
        "SOCKETDOCK_SUBPROTOCOLS": mark("ours"),
    }
    flags = (
        "--logging=debug",
        f"--log_format={log_format}",
        "--delivery_timeout=0.3",
        "--disconnect_timeout=0.3",
        "--max_message_size=5000",
        "--breaker_attempts=1000000",
        "--handshake_timeout=3",
        "--compression",
        "--trusted_proxies=127.0.0.0/8",
        "--callback_capability",
    )
    async with ScriptedBackend(lambda kind: OK) as backend:
        for kind in ("connect", "message", "disconnect"):
            # A query is where some gateways want their key.
            url = f"{backend.url(kind)}?key={mark(f'uri{kind}')}"
            environment[f"SOCKETDOCK_{kind.upper()}URI"] = url
        async with Service(
            "--backend=http", *flags, environment=environment
        ) as service:
            await by_the_book(service, backend, mark, token)
            await against_the_book(service, backend, mark, token)
            await answered_badly(service, backend, mark)
            await by_signal(service, tmp_path, mark)
            authorization = f"Authorization: Bearer {other_token}\r\n\r\n".encode()
            received = await send_raw(
                service.callback_url,
                b"GET /status HTTP/1.1\r\nHost: x\r\n" + authorization,
                answers=1,
            )
            ((status, _, body),) = received.answers()
            assert status == 200
            assert json.loads(body)["limits"]
            assert mark.found_in(body.decode()) == set()
            process = Path(f"/proc/{service.process.pid}")
            assert mark.found_in((process / "comm").read_text()) == set()
            assert mark.found_in((process / "cmdline").read_text()) == set()
    assert len(service.log) > 50  # each failure was logged
    assert mark.found_in("\n".join(service.log)) == set()


def headers(mark: Marks, name: str) -> dict[str, str]:
    """Header lines that hold marks, for requests of clients and backends."""
    return {
        "Authorization": f"Bearer {mark(f'{name}authorization')}",
        "Cookie": f"session={mark(f'{name}cookie')}",
        "X-Forwarded-For": mark(f"{name}forwarded"),
        f"X-{mark(f'{name}header')}": mark(f"{name}value"),
    }


async def by_the_book(
    service: Service, backend: ScriptedBackend, mark: Marks, token: str
) -> None:
    """A visit with messages both ways, closed by each side."""
    for closer in ("client", "backend"):
        before = len(backend.of("connect"))
        async with websockets.connect(
            f"{service.ws_url}?{mark('query')}={mark('queryvalue')}",
            additional_headers=headers(mark, closer),
            subprotocols=[mark("subprotocol")],
            user_agent_header=mark("agent"),
        ) as client:
            await client.send(mark("text"))
            await client.send(mark("binary").encode())
            await client.send(b"\xff" + mark("base64").encode())
            await client.ping(mark("ping"))
            await backend.wait_for("connect", before + 1)
            meta = backend.of("connect")[-1]["meta"]
            path = meta["send"].removeprefix(service.callback_url)
            mark.made.append(path.partition("?key=")[2].lower())
            sent = await callback(
                service, token, f"{path}&type=text&{mark('sendquery')}", mark("pushed")
            )
            assert sent == 200
            assert await client.recv() == mark.made[-1]
            if closer == "backend":
                reason = json.dumps({"code": 3000, "reason": mark("reason")})
                path = meta["disconnect"].removeprefix(service.callback_url)
                assert await callback(service, token, path, reason) == 200
                await client.wait_closed()
            else:
                await client.close(3000, mark("closereason"))
        await backend.wait_for("disconnect", before + 1)


async def callback(service: Service, token: str, path: str, body: str) -> int:
    """The status of a callback."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    received = await send_raw(service.callback_url, request, answers=1)
    return received.statuses[0]


async def against_the_book(
    service: Service, backend: ScriptedBackend, mark: Marks, token: str
) -> None:
    """Handshakes, frames and callbacks that are refused."""
    key = b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    version = b"Sec-WebSocket-Version: 13\r\n"
    shake = b"GET /ws?%b HTTP/1.1\r\n" % mark("shakequery").encode()
    host = b"Host: x\r\n"

    def line(name: str, mark_name: str) -> bytes:
        return f"{name}: {mark(mark_name)}\r\n".encode()

    for request in (
        # Handshakes.
        shake + host + upgrade + key + line("Sec-WebSocket-Version", "version"),
        shake + host + upgrade + version + line("Sec-WebSocket-Key", "key"),
        shake + host + key + version + line("Upgrade", "upgrade"),
        shake + host + upgrade + key + version + line("Origin", "badorigin"),
        shake + host + upgrade + key + version
        + f"Origin: https://{mark('origin')}.example\r\n".encode(),
        shake + line("Host", "host") + upgrade + key + version
        + line("Sec-WebSocket-Extensions", "extension"),
        shake + f"Host: x@{mark('badhost')}/\r\n".encode() + upgrade + key + version,
        shake + host + host + line("Host", "twohosts"),
        # Invalid requests.
        mark("garbage").encode() + b"\r\n",
        f"GET /ws?{mark('linequery')} {mark('lineend')} HTTP/1.1\r\n".encode() + host,
        f"GET /ws?{mark('version9')} HTTP/9.9\r\n".encode() + host,
        f"GET http://u:{mark('userinfo')}@x/ws HTTP/1.1\r\n".encode() + host,
        f"CONNECT u:{mark('connectuserinfo')}@x:1 HTTP/1.1\r\n".encode() + host,
        shake + host + f"X: {mark('control')}\x01\r\n".encode(),
        shake + host + f"X: \0{mark('nul')}\r\n".encode(),
        shake + host + f"({mark('badname')}): x\r\n".encode(),
        shake + host + f"{mark('nocolon')}\r\n".encode(),
        shake + host + f"X: a\r\n {mark('folded')}\r\n".encode(),
        shake + host + line("Content-Length", "length"),
        shake + host + f"Content-Length: 1, {mark('lengths')}\r\n".encode(),
        shake + host + line("Transfer-Encoding", "coding"),
        shake + host + f"X: {mark('large')}{'x' * 200_000}\r\n".encode(),
        shake + host + line("Expect", "expect"),
    ):
        await send_raw(service.ws_url, request + b"\r\n", half_close=True)
    good = f"Authorization: Bearer {token}\r\n".encode()
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    send = b"POST /socket/" + b"0" * 32 + b"/send?%b HTTP/1.1\r\n" + host
    for request in (
        # Bad tokens, with headers and bodies.
        send % mark("c1").encode() + line("Authorization", "scheme"),
        send % mark("c2").encode() + line("Authorization", "a1") + good,
        send % mark("c3").encode()
        + f"Authorization: Bearer {mark('badtoken')}\r\n".encode(),
        send % mark("c4").encode()
        + f"Authorization: Basic {mark('basic')}\r\n".encode(),
        send % f"access_token={mark('c5')}".encode(),
        f"GET /status?{mark('c6')} HTTP/1.1\r\n".encode() + host,
        f"GET /nothing?{mark('c7')} HTTP/1.1\r\n".encode() + host,
        # Bad bodies.
        send % b"" + good + chunked + mark("chunk").encode() + b"\r\n",
        send % b"" + good + chunked + f"5;{mark('extension2')}\r\nhello\r\n".encode(),
        send % b"" + good + chunked + b"1\r\n" + mark("chunkdata").encode() + b"\r\n",
        send % b"type=" + good,
        send % f"type={mark('type')}".encode() + good,
        send % b"type=text" + good
        + b"Content-Length: 30\r\n\r\n\xff" + mark("badtext").encode() + b"x" * 30,
        send % b"" + good
        + b"Content-Length: 9000\r\n\r\n" + mark("toolarge").encode() + b"x" * 9000,
        send.replace(b"send", b"disconnect") % b"" + good
        + b"Content-Length: 30\r\n\r\n{" + mark("badjson").encode() + b"x" * 30,
    ):
        await send_raw(service.callback_url, request + b"\r\n", half_close=True)
    for frame in (
        f"x{mark('largetext')}" * 1000,
        b"x" * 6000 + mark("largebinary").encode(),
    ):
        with ignoring_disconnects():
            async with websockets.connect(service.ws_url) as client:
                await client.send(frame)
                await client.recv()
    for frames in (
        b"\x81\xa0\0\0\0\0\xff" + mark("notutf8").encode() + b"x" * 32,
        b"\x88\xa0\0\0\0\0\x03\xe8\xff" + mark("badreason").encode() + b"x" * 32,
        b"\x88\xa0\0\0\0\0\x03\xee" + mark("badcode").encode() + b"x" * 32,
        b"\x8f\xa0\0\0\0\0" + mark("badopcode").encode() + b"x" * 32,
        b"\x81\x20" + mark("unmasked").encode() + b"x" * 32,
    ):
        request = shake + host + upgrade + key + version + b"\r\n" + frames
        await send_raw(service.ws_url, request, half_close=True)


async def answered_badly(
    service: Service, backend: ScriptedBackend, mark: Marks
) -> None:
    """Failures of the backend, whose responses hold marks."""

    def answers(name: str) -> list[bytes]:
        head = f"X-A: {mark(f'{name}header')}\r\n".encode()
        refusal = f'WWW-Authenticate: Basic realm="{mark(f"{name}realm")}"\r\n'.encode()
        retry = f"Retry-After: {mark(f'{name}retry')}\r\n".encode()
        body = mark(f"{name}body").encode()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        location = f"Location: http://{mark(f'{name}location')}/\r\n".encode()
        return [
            f"HTTP/1.1 200 {mark(f'{name}reason')}\r\n".encode() + head + length + body,
            b"HTTP/1.1 401 No\r\n" + head + refusal + length + body,
            b"HTTP/1.1 400 No\r\n" + head + length + body,
            b"HTTP/1.1 302 No\r\n" + head + location + length + body,
            b"HTTP/1.1 500 No\r\n" + head + length + body,
            b"HTTP/1.1 503 No\r\n" + head + retry + length + body,
            mark(f"{name}garbage").encode() + ScriptedBackend.CUT,
            f"HTTP/1.1 {mark(f'{name}status')}\r\n\r\n".encode() + ScriptedBackend.CUT,
            b"HTTP/1.1 200 OK\r\n" + f"X: \0{mark(f'{name}nul')}\r\n\r\n".encode()
            + ScriptedBackend.CUT,
            b"HTTP/1.1 200 OK\r\n" + head + b"Content-Length: 99\r\n\r\n" + body
            + ScriptedBackend.CUT,
            b"HTTP/1.1 200 OK\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\n" + body
            + b"\r\n" + ScriptedBackend.CUT,
            b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{"subprotocol": "%b"}'
            % (len(body) + 19, body),
        ]

    for kind in ("connect", "message", "disconnect"):
        for answer in answers(kind):
            backend.script = lambda asked, kind=kind, answer=answer: (
                answer if asked == kind else OK
            )
            backend.events.clear()
            with ignoring_disconnects():
                async with websockets.connect(
                    service.ws_url, additional_headers=headers(mark, kind)
                ) as client:
                    await client.send(mark("message"))
                    await backend.wait_for("message", 1)
                    if kind == "message" and not answer.startswith(b"HTTP/1.1 2"):
                        await asyncio.wait_for(client.recv(), 0.5)  # its 1013
            if kind != "connect":
                await backend.wait_for("disconnect", 1)
    backend.script = lambda kind: OK


async def by_signal(service: Service, folder: Path, mark: Marks) -> None:
    """Files that are invalid when SIGHUP re-reads them."""
    for name, text in (
        ("tokens", f"{mark('newtoken')} {mark('secondtoken')}\n"),
        ("secrets", f"whsec_{mark('newsecret')}!\n"),
        ("headers", f"{mark('newname')} {mark('newvalue')}\n"),
        ("headers", f"X-Name: {mark('newcontrol')}\x01\n"),
    ):
        good = (folder / name).read_text()
        (folder / name).write_text(text)
        before = len(service.log)
        service.process.send_signal(signal.SIGHUP)
        await eventually(
            lambda before=before: any(
                "reloaded: " in line for line in service.log[before:]
            )
        )
        (folder / name).write_text(good)


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_path_cannot_forge_a_log_line(io_loop, server):
    """For any bytes, it gives at most one line, without terminal controls."""
    odd = (b"/\x85[I]", b"/\x9b2J\xc2\x9b2J\xe2\x80\xa8", b"/%0a%1b[2J", b"/%85[I]")
    async with Service("--logging=debug", f"--http_server={server}") as service:
        statuses = []
        for path in odd:
            request = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path
            received = await send_raw(service.callback_url, request, answers=1)
            statuses += received.statuses
        await eventually(lambda: sum(": 404" in line for line in service.log) == 2)
        lines = [line for line in service.log if " at http:" not in line]  # the start's
    assert statuses == [400, 400, 404, 404]
    assert len(lines) <= len(odd)
    assert all(line.isascii() and line.isprintable() for line in lines)


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_bad_peers_do_not_flood_the_log(io_loop, tmp_path, server):
    """Malformed requests and failed TLS give few lines, for any number."""
    certificate = Authority(tmp_path).server().both
    flags = (f"--tls_cert={certificate}", "--callbackport=0", f"--http_server={server}")
    bad = b"GET / HTTP/9.9\r\nHost: x\r\n\r\n"
    async with Service(*flags) as service:
        before = len(service.log)
        for url in (service.ws_url, service.callback_url):
            for _ in range(10):
                await asyncio.gather(*(send_raw(url, bad) for _ in range(10)))
        # Its line follows all lines about them.
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "reloaded: " in service.log[-1])
        assert len(service.log) - before <= 5


# Before there is a log.

WRONG = {
    "password-of-a-url": "--messageuri=http://user:{}@127.0.0.1/",
    "password-of-a-bad-url": "--messageuri=htp://user:{}@127.0.0.1/",
    "query-of-a-bad-url": "--messageuri=htp://127.0.0.1/?key={}",
    "password-of-another-url": "--connecturi=http://user:{}@127.0.0.1/",
    "password-of-our-own-url": "--externalhostandport=http://user:{}@127.0.0.1",
    "token": "--callback_token={}!",
    "second-token": "--callback_token=0123456789abcdef,{} x",
    "webhook-secret": "--webhook_secret=whsec_{}!",
    "short-webhook-secret": "--webhook_secret=whsec_{}",
    "webhook-secret-before-another": "--webhook_secret={},whsec_x",
    "unknown-option": "--callback_tokn={}",
}


@pytest.mark.parametrize("row", WRONG)
def test_invalid_option_error_shows_no_secret(row):
    """The line names the option and the reason, not the value."""
    mark = Marks()
    line = refusal(
        "--backend=http", "--messageuri=http://127.0.0.1/", WRONG[row].format(mark("x"))
    )
    assert WRONG[row].partition("=")[0].strip("-").partition("_")[0] in line
    assert mark.found_in(line) == set()


@pytest.mark.parametrize(
    "text",
    [
        "callback_token = '{}",
        "callback_token = {{'{}'}}",
        "callback_token = ['0123456789abcdef', 7, '{}']",
        "callback_token = '{} x'",
        "webhook_secret = 'whsec_{}!'",
        "webhook_secret = '{}' + 'x'",
        "messageuri = 'http://user:{}@127.0.0.1/'",
        "{}",
    ],
)
def test_invalid_options_file_error_shows_no_secret(tmp_path, text):
    """At any place of a line."""
    mark = Marks()
    (tmp_path / "conf").write_text(text.format(mark("x")) + "\n")
    line = refusal("--backend=http", f"--config={tmp_path / 'conf'}")
    assert mark.found_in(line) == set()


def test_help_shows_no_secret(tmp_path):
    """It shows the defaults, not the values that are set."""
    mark = Marks()
    conf = tmp_path / "conf"
    conf.write_text(f"callback_token = '{mark('file')}'\n")
    shown = ended(
        "--help-all",
        f"--config={conf}",
        SOCKETDOCK_CALLBACK_TOKEN=mark("environment"),
        SOCKETDOCK_WEBHOOK_SECRET=as_webhook_secret(mark("secret")),
    )
    assert shown.returncode == 0
    assert mark.found_in(shown.stdout + shown.stderr) == set()
