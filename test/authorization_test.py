"""Authorization of callbacks and of operators' requests."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import websockets
from programs import leave_out
from service import (
    DEADLINE,
    DRAINS_SLOWLY,
    PROJECT,
    RecordingBackend,
    Service,
    draining,
    eventually,
    refusal,
)

pytestmark = pytest.mark.gen_test(timeout=60)

OLD, NEW, THIRD = "old-token-0123456789", "new/token+0123456789==", "third.token_0123~"
TOKENS = f"--callback_token={OLD},{NEW}"
BEARER = f"Authorization: Bearer {OLD}"
NO_TOKEN = 'Bearer realm="SocketDock"'
WRONG_TOKEN = 'Bearer realm="SocketDock", error="invalid_token"'
UNKNOWN = f"/socket/{'0' * 32}"
LIMIT = 4 * 2**20  # bytes, the default of --max_message_size


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """The sentence of a problem document."""
        assert self.headers["content-type"] == "application/problem+json"
        problem = json.loads(self.body)
        assert problem["status"] == self.status
        return problem["detail"]


class Caller:
    """A plain connection to the callback listener."""

    def __init__(self, service: Service, host: str | None = None) -> None:
        address, port = service.callback_url.removeprefix("http://").rsplit(":", 1)
        self.address, self.port = host or address.strip("[]"), int(port)
        self.host = f"Host: localhost:{port}"

    async def __aenter__(self) -> "Caller":
        self.reader, self.writer = await asyncio.open_connection(
            self.address, self.port
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    async def ask(
        self, method: str, path: str, *headers: str, body: bytes | None = None
    ) -> Response:
        """Send one request; adds a Host header if `headers` have none."""
        self.begin(method, path, *headers, length=None if body is None else len(body))
        self.writer.write(body or b"")
        return await self.answer(method)

    def begin(
        self, method: str, path: str, *headers: str, length: int | None = None
    ) -> None:
        """A request without its body."""
        lines = [f"{method} {path} HTTP/1.1", *headers]
        if not any(header.startswith("Host:") for header in headers):
            lines.append(self.host)
        if length is not None:
            lines.append(f"Content-Length: {length}")
        head = "".join(f"{line}\r\n" for line in [*lines, ""])
        self.writer.write(head.encode("latin-1"))

    async def answer(self, method: str = "GET") -> Response:
        """The next answer."""
        async with asyncio.timeout(DEADLINE):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.splitlines()
            pairs = (line.split(": ", 1) for line in lines if line)
            headers = {name.lower(): value for name, value in pairs}
            length = int(headers.get("content-length", 0)) if method != "HEAD" else 0
            body = await self.reader.readexactly(length)
        return Response(int(status.split()[1]), headers, body)


async def ask(service: Service, *request: str, host: str | None = None) -> Response:
    """The answer to one request on a connection of its own."""
    async with Caller(service, host) as caller:
        return await caller.ask(*request)


# Callbacks.


async def test_socket_routes_without_a_token_reveal_nothing(io_loop):
    """401 comes before 404, 405, 413, 400 and 410, with the prefix and without."""
    url = "--externalhostandport=http://relay.internal/sd"
    async with Service(TOKENS, url) as service:
        for path in ("/send", "/send?type=blob", "/disconnect", "", "/x", "/../x"):
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                for prefix in ("", "/sd"):
                    async with Caller(service) as caller:
                        answer = await caller.ask(
                            method, f"{prefix}{UNKNOWN}{path}", body=b"{"
                        )
                    assert answer.status == 401, (method, path)
                    assert answer.headers["www-authenticate"] == NO_TOKEN
                    assert method == "HEAD" or "--callback_token" in answer.detail
        for path in ("/socket/", "/socket/x", "/sd/socket/x/y"):
            assert (await ask(service, "GET", path)).status == 401


async def test_other_routes_need_no_callback_token(io_loop):
    """Clients and probes need no token, and an unknown path is 404."""
    async with Service(TOKENS) as service:
        for path, status in [
            ("/livez", 200), ("/readyz", 200), ("/ws", 426),
            ("/socket", 404), ("/socketx", 404), ("/x", 404), ("/x/socket/y", 404),
        ]:
            assert (await ask(service, "GET", path)).status == status, path
        async with websockets.connect(service.ws_url) as client:
            await client.send("x")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "x"


async def test_with_a_token_the_rest_is_checked_in_its_order(io_loop):
    """404 and 405, then 413, 400 and 410, as without tokens."""
    async with Service(TOKENS) as service:
        for method, path, size, status in [
            ("POST", f"{UNKNOWN}/x", LIMIT + 1, 404),
            ("PUT", f"{UNKNOWN}/send?type=blob", LIMIT + 1, 405),
            ("POST", UNKNOWN, LIMIT + 1, 405),
            ("POST", f"{UNKNOWN}/send?type=blob", LIMIT + 1, 413),
            ("POST", f"{UNKNOWN}/send?type=blob", 1, 400),
            ("POST", f"{UNKNOWN}/send", 1, 410),
        ]:
            request = (method, path, BEARER)
            async with Caller(service) as caller:
                answer = await caller.ask(*request, body=bytes(size))
            assert answer.status == status
            assert answer.detail
        for method, status in [("PUT", 405), ("POST", 413)]:
            async with Caller(service) as caller:
                caller.begin(method, f"{UNKNOWN}/send", BEARER, length=10**9)
                assert (await caller.answer()).status == status


CREDENTIALS = [
    ([f"Bearer {OLD}"], None),
    ([f"Bearer {NEW}"], None),
    ([f"bearer {OLD}"], None),
    ([f"BEARER    {OLD}  "], None),
    ([], NO_TOKEN),
    ([""], NO_TOKEN),
    ([OLD], NO_TOKEN),
    ([f"Basic {OLD}"], NO_TOKEN),
    (["Bearer"], WRONG_TOKEN),
    ([f"Bearer {THIRD}"], WRONG_TOKEN),
    ([f"Bearer {OLD[:-1]}"], WRONG_TOKEN),
    ([f"Bearer {OLD}x"], WRONG_TOKEN),
    ([f"Bearer {OLD.upper()}"], WRONG_TOKEN),
    ([f"Bearer {NEW[:-1]}"], WRONG_TOKEN),
    ([f"Bearer {OLD},{NEW}"], WRONG_TOKEN),
    ([f"Bearer {OLD} {NEW}"], WRONG_TOKEN),
    ([f'Bearer "{OLD}"'], WRONG_TOKEN),
    (["Bearer tökén-0123456789-0123"], WRONG_TOKEN),
    ([f"Bearer {'x' * 30_000}"], WRONG_TOKEN),
    # The field is single: several are rejected.
    ([f"Bearer {OLD}", f"Bearer {OLD}"], WRONG_TOKEN),
    ([f"Bearer {OLD}", "Basic eDp5"], WRONG_TOKEN),
    ([f"Bearer {THIRD}", f"Bearer {OLD}"], WRONG_TOKEN),
]


async def test_credentials_are_parsed_by_the_rfcs(io_loop):
    """RFC 9110, section 11.6.2, and RFC 6750, sections 2.1 and 3."""
    async with Service(TOKENS) as service, Caller(service) as caller:
        for values, challenge in CREDENTIALS:
            lines = [f"Authorization: {value}" for value in values]
            answer = await caller.ask("GET", UNKNOWN, *lines)
            assert answer.status == (410 if challenge is None else 401), values
            assert answer.headers.get("www-authenticate") == challenge, values


async def test_a_client_is_reached_with_a_token(io_loop):
    """Send, info and delete work with a token; without it the client gets nothing."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), TOKENS) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                send = event["meta"]["send"]
                url = send.removesuffix("/send")
                headers = {"Authorization": f"Bearer {NEW}"}
                assert (await backend.call(send, body=b"no")).code == 401
                assert (await backend.call(url, "DELETE")).code == 401
                answer = await backend.call(send, body=b"yes", headers=headers)
                assert (answer.code, answer.body) == (200, b"OK")
                assert await asyncio.wait_for(client.recv(), DEADLINE) == b"yes"
                info = await backend.call(url, "GET", headers=headers)
                assert json.loads(info.body)["messages_out"] == 1
                gone = await backend.call(url, "DELETE", headers=headers)
                assert gone.code == 204


# Bodies of unauthorized requests.


def peak_memory(service: Service) -> int:
    """The largest resident memory of the process, in bytes."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


async def test_body_without_a_token_is_dropped_and_then_answered(io_loop):
    """The sender gets 401, the body is discarded, and the connection stays open."""
    limit = "--max_message_size=100000000"
    async with Service(TOKENS, limit) as service, Caller(service) as caller:
        before = peak_memory(service)
        for size in (0, 1, LIMIT + 1, 50 * 2**20):
            answer = await caller.ask("POST", f"{UNKNOWN}/send", body=bytes(size))
            assert answer.status == 401
        caller.begin("POST", f"{UNKNOWN}/send", "Transfer-Encoding: chunked")
        caller.writer.write(b"5\r\nhello\r\n0\r\n\r\n")
        assert (await caller.answer()).status == 401
        assert peak_memory(service) - before < 25 * 2**20
        # With a token, on the same connection.
        answer = await caller.ask("POST", f"{UNKNOWN}/send", BEARER, body=b"x")
        assert answer.status == 410


async def test_request_is_rejected_before_its_expected_body(io_loop):
    """401 without a 100 (Continue); the body is not read, the connection closes."""
    cases = [
        ["Expect: 100-continue", "Content-Length: 10"],
        ["Content-Length: 1000000000"],
    ]
    async with Service(TOKENS) as service:
        for headers in cases:
            async with Caller(service) as caller:
                caller.begin("POST", f"{UNKNOWN}/send", *headers)
                answer = await caller.answer()
                assert answer.status == 401
                assert answer.headers["connection"] == "close"
                assert await asyncio.wait_for(caller.reader.read(), DEADLINE) == b""


async def test_body_that_never_ends_ends_the_connection(io_loop):
    """Without a token, or for an unknown path, after a few seconds."""
    async with Service(TOKENS) as service:
        async with Caller(service) as first, Caller(service) as second:
            for caller, path in [(first, f"{UNKNOWN}/send"), (second, "/nothing")]:
                caller.begin("POST", path, "Transfer-Encoding: chunked")
                caller.writer.write(b"5\r\nhello\r\n")
            for caller in (first, second):
                assert await asyncio.wait_for(caller.reader.read(), DEADLINE) == b""


async def test_length_that_is_not_ascii_digits_is_400(io_loop):
    """`int()` would accept other digits, or raise for a superscript two."""
    async with Service(TOKENS) as service:
        for header in ([BEARER], []):
            async with Caller(service) as caller:
                length = "Content-Length: \xb2"
                caller.begin("POST", f"{UNKNOWN}/send", *header, length)
                answer = await asyncio.wait_for(caller.reader.read(), DEADLINE)
                assert answer.startswith(b"HTTP/1.1 400 ")
    # At its end, Service has looked for tracebacks.


# Sources of tokens.


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it is empty"),
        ("\n# only a comment\n\n", "it is empty"),
        (f"{OLD}\n\nshort\n", "line 3: a token is 16 or more"),
        (f"{OLD} # mine\n", "line 1: a token is 16 or more"),
        ("tökén-0123456789-0123\n", "line 1: a token is 16 or more"),
        (b"\xff\xfe0123456789012345", "it is not UTF-8"),
        (f"{OLD}\n" * 5000, "it is larger than 65536 bytes"),
        (None, "No such file or directory"),
    ],
)
async def test_invalid_token_file_exits_with_an_error(
    io_loop, tmp_path, text, complaint
):
    """One line names file and line, and does not show the token."""
    path = tmp_path / "tokens"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = 1 if complaint in ("it is empty", "No such file or directory") else 2
    line = refusal(f"--callback_token_file={path}", status=status)
    assert line.startswith(f"socketdock: --callback_token_file={path}")
    assert complaint in line
    for secret in (OLD, "short", "mine", "tökén"):
        assert secret not in line


@pytest.mark.once
@pytest.mark.once
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("fifteen-letters", "number 1: a token is 16 or more"),
        (f"{OLD},with a space in it", "number 2: a token is 16 or more"),
        ("tökén-0123456789-0123", "number 1: a token is 16 or more"),
        ("=0123456789abcdef", "number 1: a token is 16 or more"),
        (f"{OLD},", "number 2: a token is 16 or more"),
    ],
)
async def test_invalid_token_exits_with_an_error(io_loop, value, complaint):
    """The error does not show the token."""
    line = refusal(f"--callback_token={value}")
    assert line.startswith("socketdock: --callback_token, ")
    assert complaint in line
    for secret in filter(None, value.split(",")):
        assert secret not in line


async def test_empty_token_is_rejected(io_loop, tmp_path):
    """The relay does not start: a value was probably forgotten."""
    conf = tmp_path / "conf"
    conf.write_text("callback_token = ['']\n")
    for line in (
        refusal(f"--config={conf}"),
        refusal("--callback_token="),
    ):
        assert "--callback_token, number 1: a token is 16 or more" in line
    assert "--callback_token_file" in refusal("--callback_token_file=", status=1)


@pytest.mark.once
@pytest.mark.parametrize(
    "given",
    [
        ["--callback_token", "first-token-0123456789", OLD],
        ["--callback_token=first-token-0123456789", OLD],
        "callback_token = ('x', {'OLD'})",
        "callback_token = [1, 'OLD']",
        "callback_token = {'OLD': 1}",
    ],
)
async def test_error_lines_show_no_token(io_loop, tmp_path, given):
    """For each way to pass an invalid token."""
    if isinstance(given, str):
        conf = tmp_path / "conf"
        conf.write_text(given.replace("OLD", OLD))
        given = [f"--config={conf}"]
    line = refusal(*given)
    assert line.startswith("socketdock: ")
    assert "token-0123456789" not in line


async def test_tokens_of_option_and_file_count_together(io_loop, tmp_path):
    """The file may have indentation, comments and Windows line ends."""
    path = tmp_path / "tokens"
    path.write_bytes(f"# the old one\r\n  {OLD}\r\n\r\n\t{NEW}".encode())
    flags = (f"--callback_token_file={path}", f"--callback_token={THIRD}")
    async with Service(*flags) as service:
        for token in (OLD, NEW, THIRD):
            header = f"Authorization: Bearer {token}"
            assert (await ask(service, "GET", UNKNOWN, header)).status == 410
        assert (await ask(service, "GET", UNKNOWN)).status == 401


async def test_tokens_change_on_sighup(io_loop, tmp_path):
    """At each moment the old or the new tokens are valid."""
    path = tmp_path / "tokens"
    path.write_text(f"{OLD}\n")

    async with Service(f"--callback_token_file={path}") as service:

        async def read_again(text: str) -> list[int]:
            """What OLD, NEW and no token get after a SIGHUP."""
            before = len(service.log)
            path.write_text(text)
            service.process.send_signal(signal.SIGHUP)
            await eventually(
                lambda: any("reloaded: " in line for line in service.log[before:])
            )
            lines = [[f"Authorization: Bearer {token}"] for token in (OLD, NEW)]
            return [
                (await ask(service, "GET", UNKNOWN, *line)).status
                for line in [*lines, []]
            ]

        assert await read_again(f"{OLD}\n{NEW}\n") == [410, 410, 401]
        assert await read_again(f"{NEW}\n") == [401, 410, 401]
        # An invalid file changes nothing.
        assert await read_again("") == [401, 410, 401]
        assert await read_again(f"{OLD}\nshort\n") == [401, 410, 401]
        errors = [line for line in service.log if "--callback_token_file" in line]
        assert len(errors) == 2
        assert "it is empty" in errors[0] and "line 2" in errors[1]
        assert await read_again(f"{OLD}\n") == [410, 401, 401]


async def test_no_token_is_ever_shown(io_loop):
    """Not in the debug log, /status, a response or --help."""
    tokens = f"--callback_token={OLD}"
    async with Service(tokens, "--logging=debug") as service:
        answers = b""
        for token in (OLD, NEW):
            for path in ("/status", f"{UNKNOWN}/send", "/nothing"):
                header = f"Authorization: Bearer {token}"
                answers += (await ask(service, "GET", path, header)).body
        await eventually(lambda: sum("/nothing" in line for line in service.log) == 2)
    text = subprocess.check_output(
        [sys.executable, "socketdock.py", tokens, "--help-all"], cwd=PROJECT, timeout=30
    )
    shown = answers + text + "\n".join(service.log).encode()
    assert OLD.encode() not in shown
    assert NEW.encode() not in shown


# The warning.


@pytest.mark.parametrize(
    ("flags", "warnings"),
    [
        (["--bindip=0.0.0.0"], 1),
        (["--bindip=::"], 1),
        (["--callbackip=0.0.0.0", "--callbackport=0"], 1),
        (["--bindip=0.0.0.0", "--callbackip=127.0.0.1", "--callbackport=0"], 0),
        (["--bindip=0.0.0.0", TOKENS], 0),
        (["--bindip=127.0.0.2"], 0),
        (["--bindip=localhost"], 0),
        ([], 0),
    ],
)
async def test_start_warns_of_callbacks_without_a_token(io_loop, flags, warnings):
    """One warning, if the callback listener is not on a loopback address."""
    if "--bindip=::" in flags and not has_ipv6():
        leave_out("this machine has no ::1")
    async with Service(*flags) as service:
        pass
    assert sum("callbacks need no token" in line for line in service.log) == warnings


# Operators.


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_status_describes_the_instance(io_loop, method):
    """Version, state, counts and limits; the response is not cacheable."""
    flags = ("--instance_name=relay-1", "--order_wait=inf", "--backend_timeout=9")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url):
                (event,) = await backend.wait_for("connect", 1)
                async with websockets.connect(service.ws_url):
                    pass
                await backend.wait_for("disconnect", 1)
                answer = await ask(service, method, "/status")
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        if method == "HEAD":
            assert answer.body == b""
            return
        status = json.loads(answer.body)
        assert status["instance"] == event["meta"]["instance"]
        assert status["instance"].startswith("relay-1/")
        assert re.fullmatch(r"\d+\.\d+\.\d+", status["version"])
        assert status["started_at"].endswith("+00:00")
        assert 0 <= status["uptime"] < 60
        assert (status["state"], status["ready"]) == ("serving", True)
        assert status["backend"].pop("connections") >= 1
        assert status["backend"] == {
            "name": "http", "away": None, "cause": None, "held": 0, "entries": 0
        }
        assert status["connections"] == {"open": 1, "total": 2}
        assert status["pending"] == {"events": 0, "bytes": 0, "oldest": 0.0}
        assert status["limits"]["max_message_size"] == LIMIT
        assert status["limits"]["order_wait"] == "inf"
        assert not {"messageuri", "callback_token"} & set(status["limits"])


async def test_status_shows_a_drain(io_loop):
    """From the stop signal on, the state is "draining"."""
    async with Service(DRAINS_SLOWLY) as service, Caller(service) as caller:
        assert json.loads((await caller.ask("GET", "/status")).body)["ready"]
        async with draining(service):
            status = json.loads((await caller.ask("GET", "/status")).body)
            assert (status["state"], status["ready"]) == ("draining", False)


async def test_status_is_not_on_a_separate_client_listener(io_loop):
    """With two listeners, /status is on the callbacks' only."""
    async with Service("--callbackport=0") as service:
        assert (await ask(service, "GET", "/status")).status == 200
        service.callback_url = service.ws_url.replace("ws:", "http:")[:-3]
        assert (await ask(service, "GET", "/status")).status == 404


LOCAL_HOSTS = [
    "localhost", "localhost:1", "LOCALHOST:80", "relay.localhost", "127.0.0.1",
    "127.255.3.4:99", "[::1]", "[::1]:8765", "[0:0:0:0:0:0:0:1]",
]
OTHER_HOSTS = [
    "relay.example", "localhost.example", "notlocalhost", "127.0.0.1.example",
    "127.1", "2130706433", "0177.0.0.1", "0.0.0.0", "10.0.0.1", "[::]", "[::2]",
    "localhost.", "[fe80::1]:80", "::1",
]


async def test_operator_routes_require_a_loopback_host(io_loop):
    """After DNS rebinding, a page's requests have the page's host name."""
    async with Service() as service:
        for host in LOCAL_HOSTS:
            answer = await ask(service, "GET", "/status", f"Host: {host}")
            assert answer.status == 200, host
        for host in OTHER_HOSTS:
            answer = await ask(service, "GET", "/status", f"Host: {host}")
            # Tornado rejects an invalid host before.
            assert answer.status in (400, 403), host
            if answer.status == 403:
                assert "--callback_token" in answer.detail
                assert answer.headers["connection"] == "close"
        async with Caller(service) as caller:  # HTTP/1.0 allowed requests without Host
            caller.writer.write(b"GET /status HTTP/1.0\r\n\r\n")
            assert (await caller.answer()).status == 403


FORWARDED = [
    "Forwarded: for=10.0.0.1", "X-Forwarded-For: 127.0.0.1", "x-forwarded-proto: h",
    "X-Forwarded-Host: localhost", "X-Forwarded: 1", "X-Real-IP: 127.0.0.1",
    "Via: 1.1 proxy", "CF-Connecting-IP: ::1", "True-Client-IP: ::1",
    "X_Forwarded_For: 10.0.0.1", "Client-IP: 127.0.0.1", "Forwarded:",
]


async def test_operator_routes_reject_proxied_requests(io_loop):
    """The client of a proxy need not be on this machine."""
    async with Service() as service:
        for header in FORWARDED:
            answer = await ask(service, "GET", "/status", header)
            assert answer.status == 403, header
            assert "proxy" in answer.detail and "--callback_token" in answer.detail


@pytest.mark.parametrize(
    ("flags", "host", "status"),
    [
        (["--bindip=0.0.0.0"], "127.0.0.1", 403),
        (["--callbackip=0.0.0.0", "--callbackport=0"], "127.0.0.1", 403),
        (["--bindip=0.0.0.0", "--callbackip=127.0.0.1", "--callbackport=0"], None, 200),
        (["--bindip=127.0.0.2"], None, 200),
        (["--bindip=localhost"], None, 200),
        (["--bindip=::1"], None, 200),
        (["--bindip=::"], "::1", 403),
    ],
)
async def test_operators_need_a_listener_on_loopback(io_loop, flags, host, status):
    """A wildcard address does not count, even for a request to 127.0.0.1."""
    if "::" in flags[0] and not has_ipv6():
        leave_out("this machine has no ::1")
    async with Service(*flags) as service:
        answer = await ask(service, "GET", "/status", host=host)
        assert answer.status == status
        if status == 403:
            assert "--callback_token" in answer.detail
            assert "loopback" in answer.detail


ORIGINS = [
    ("GET", [], True),
    ("GET", ["Origin: http://HOST"], True),
    ("GET", ["Origin: http://evil.example"], False),  # a WebSocket's handshake is a GET
    ("GET", ["Origin: null"], False),
    ("OPTIONS", ["Origin: http://evil.example"], False),
    ("POST", [], False),
    ("POST", ["Origin: http://HOST"], True),
    ("POST", ["Origin: https://HOST"], False),
    ("POST", ["Origin: http://localhost:1"], False),
    ("POST", ["Origin: http://evil.example", "Sec-Fetch-Site: same-origin"], False),
    ("POST", ["Origin: http://HOST", "Origin: http://evil.example"], False),
    ("POST", ["Sec-Fetch-Site: same-origin"], True),
    ("POST", ["Sec-Fetch-Site: same-site"], False),
    ("POST", ["Sec-Fetch-Site: none"], False),
    ("DELETE", [], False),
    ("PUT", ["Origin: http://HOST"], True),
]


async def test_operator_routes_reject_other_origins(io_loop):
    """A browser on this machine may show any site's page."""
    async with Service() as service:
        for method, headers, passes in ORIGINS:
            async with Caller(service) as caller:
                own = caller.host.removeprefix("Host: ")
                lines = [header.replace("HOST", own) for header in headers]
                answer = await caller.ask(method, "/status", *lines)
            # If the guard accepts them, /status answers 405: it has only GET and HEAD.
            passed = 200 if method == "GET" else 405
            assert answer.status == (passed if passes else 403), (method, headers)
            if not passes:
                assert "Origin" in answer.detail
                assert "--callback_token" in answer.detail


async def test_operators_with_a_token_may_come_from_anywhere(io_loop):
    """Without a token, no request is accepted, from any address."""
    far = ["Host: relay.example", "Via: 1.1 proxy", "Origin: https://console.example"]
    for flags in ([TOKENS], [TOKENS, "--bindip=0.0.0.0"]):
        async with Service(*flags) as service:
            for more in ([], far):
                request = ("GET", "/status", *more)
                answer = await ask(service, *request, BEARER, host="127.0.0.1")
                assert answer.status == 200
                answer = await ask(service, *request, host="127.0.0.1")
                assert answer.status == 401
                assert answer.headers["www-authenticate"] == NO_TOKEN
                wrong = f"Authorization: Bearer {THIRD}"
                answer = await ask(service, *request, wrong, host="127.0.0.1")
                assert answer.headers["www-authenticate"] == WRONG_TOKEN
