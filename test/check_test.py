"""`socketdock check` reports problems and their fixes, and sets the exit status."""

import asyncio
import datetime
import json
import re
import resource
import socket
import ssl
import sys
from contextlib import asynccontextmanager

import certificates
import pytest
import websockets
from certificates import Authority, self_signed
from faults import RESET_ON_CLOSE
from ports import free_ports
from service import DEADLINE, PROJECT, RecordingBackend, Service, tcp_server
from standardwebhooks import Webhook

from backends.commands import MEDIA_TYPE
from backends.http.check import tls_remedy

pytestmark = pytest.mark.gen_test(timeout=60)


async def check(*flags, status, **rest):
    """Run a check that exits with `status`, without a traceback; return its lines."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "socketdock.py",
        "check",
        *flags,
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **rest,
    )
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert err.decode() == "" or status == 2
    assert process.returncode == status, out.decode() + err.decode()
    return (out if status < 2 else err).decode().splitlines()


def only(level, lines):
    """Return the only line of that level, which must have a remedy."""
    (line,) = (line for line in lines if line.startswith(f"{level}:"))
    return line


def to(url):
    """The flags for a backend at `url`, with free ports for the relay."""
    return ("--bindport=0", "--backend=http", f"--messageuri={url}")


@asynccontextmanager
async def https(certificate, **context):
    """Run a TLS server that sends nothing; yields its URL."""

    async def serve(reader, writer):
        await reader.read()

    async with tcp_server(serve, ssl=certificate.server_context(**context)) as port:
        yield f"https://127.0.0.1:{port}/message"


# Without problems.


async def test_nothing_wrong_is_status_0_and_the_backend_gets_no_event(io_loop):
    """The check connects to the backend, but sends nothing. Options may follow."""
    async with RecordingBackend() as backend:
        lines = await check(f"--bindport={free_ports(1)}", *backend.flags(), status=0)
        assert backend.events == []
    assert all(line.startswith("ok: ") for line in lines)
    reached = f"http://127.0.0.1:{backend.port} is reached"
    # One line for one host.
    assert [line for line in lines if reached in line] == [
        f"ok:      --messageuri, --disconnecturi, --connecturi: {reached}"
    ]


async def test_check_of_loopback_needs_no_backend(io_loop):
    """A backend without a check of its own passes."""
    assert len(await check("--bindport=0", status=0)) == 2


async def test_no_option_is_needed(io_loop):
    """Neither the check nor the start needs an option."""
    assert len(await check(status=0, env={"SOCKETDOCK_BINDPORT": "0"})) == 2


async def test_check_reports_when_the_backend_certificate_expires(io_loop, tmp_path):
    """The test certificate expires within a day: a warning."""
    authority = Authority(tmp_path)
    async with https(authority.server()) as url:
        lines = await check(*to(url), f"--backend_ca={authority.path}", status=0)
    line = only("warning", lines)
    assert "is reached by TLS: its certificate expires on " in line
    assert line.endswith("; renew it")


async def test_unknown_variable_of_the_environment_is_a_warning(io_loop):
    """As at the start."""
    lines = await check("--bindport=0", status=0, env={"SOCKETDOCK_BIDPORT": "1"})
    assert "unknown variable SOCKETDOCK_BIDPORT" in only("warning", lines)


# Test events.


def sent(lines):
    """Return the findings about test events, by option."""
    rows = (re.fullmatch(r"(\w+): +--(\w+): (POST .*)", line) for line in lines)
    return {row[2]: (row[1], row[3]) for row in rows if row is not None}


def replies(content_type, reply, status=200):
    """Return the answer to an event."""

    async def answer(handler, event):
        handler.set_status(status)
        handler.set_header("Content-Type", content_type)
        handler.write(reply)

    return answer


async def test_check_sends_signed_test_events(io_loop):
    """A whole connection: one event to each URL, in order, each with the mark."""
    secret = "whsec_" + "a" * 32
    async with RecordingBackend() as backend:
        flags = [*backend.flags(), f"--webhook_secret={secret}", "--bindport=0"]
        found = sent(await check("--send", *flags, status=0))
        events = list(backend.events)
    assert [kind for kind, *_ in events] == ["connect", "message", "disconnect"]
    assert len({event["meta"]["connection_id"] for _, event, _ in events}) == 1
    for _, event, headers in events:
        assert event["meta"]["test"] is True
        assert event["meta"]["instance"].startswith("socketdock-check/")
        assert headers["Webhook-Id"].startswith(event["meta"]["connection_id"])
        body = json.dumps(event, separators=(",", ":"))
        assert Webhook(secret).verify(body, dict(headers)) == event
    for kind in ("connect", "message", "disconnect"):
        level, text = found[f"{kind}uri"]
        assert level == "ok"
        url = re.escape(backend.url(kind))
        assert re.fullmatch(rf"POST {url} answered 200 in \d+ ms", text)


async def test_check_shows_what_came_back(io_loop):
    """The commands that the relay would carry out, but neither frames nor secrets."""
    commands = {"commands": [{"send": "a frame"}, {"send": "b"}, {"state": "hidden"}]}
    async with RecordingBackend() as backend:
        backend.answers = {
            "connect": replies("text/plain", "not for these clients", status=403),
            "message": replies(MEDIA_TYPE, json.dumps(commands)),
            "disconnect": replies("text/html; charset=utf-8", "<p>a page"),
        }
        flags = (*backend.flags(), "--callback_token=0123456789abcdef")
        lines = await check("--bindport=0", "--send", *flags, status=0)
    found = sent(lines)
    assert found["connecturi"][0] == "ok"
    assert found["connecturi"][1].endswith("it refuses a client without credentials")
    assert found["messageuri"][1].endswith(" ms: commands: 2 send, 1 state")
    assert found["disconnecturi"][1].endswith(" ms: 9 bytes of text/html")
    for hidden in ("frame", "hidden", "these clients", "page", "0123456789abcdef"):
        assert hidden not in "\n".join(lines)


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (replies("text/html", "none", status=404), "check that this path exists"),
        (replies("text/html", "none", status=401), "check --backend_headers_file and"),
        (replies("text/html", "none", status=500), "see the backend's log"),
        (replies("application/json", '{"commands": []}'), f"Content-Type {MEDIA_TYPE}"),
        (replies(MEDIA_TYPE, '{"commands": {}}'), "commands must be a list; correct"),
        (replies(MEDIA_TYPE, "no JSON"), "it is not JSON in UTF-8; correct it"),
    ],
)
async def test_check_warns_of_an_answer_that_is_a_mistake(io_loop, answer, remedy):
    """The relay would go on, but the backend would not do what it means to."""
    async with RecordingBackend() as backend:
        backend.answers["message"] = answer
        flags = backend.flags("message")
        lines = await check("--bindport=0", "--send", *flags, status=0)
    level, text = sent(lines)["messageuri"]
    assert level == "warning" and remedy in text


@pytest.mark.parametrize(
    ("content_type", "flag", "level", "text"),
    [
        (MEDIA_TYPE, "commands", "ok", "without commands"),
        (MEDIA_TYPE, "off", "warning", "are ignored; set --reply=commands"),
        ("application/json", "off", "warning", "are ignored; set --reply=commands"),
        ("application/json", "commands", "warning", f"Content-Type {MEDIA_TYPE}"),
    ],
)
async def test_remedy_for_ignored_commands_works(
    io_loop, content_type, flag, level, text
):
    """An empty list of commands is right where commands are read."""
    async with RecordingBackend() as backend:
        backend.answers["message"] = replies(content_type, '{"commands": []}')
        flags = (*backend.flags("message"), f"--reply={flag}")
        lines = await check("--bindport=0", "--send", *flags, status=0)
    found = sent(lines)["messageuri"]
    assert found[0] == level and found[1].endswith(text)


@pytest.mark.parametrize("content_type", ["application/json", MEDIA_TYPE])
async def test_check_warns_of_a_subprotocol_that_was_not_offered(io_loop, content_type):
    """The relay would answer 503 to the client."""
    async with RecordingBackend() as backend:
        backend.answers["connect"] = replies(content_type, '{"subprotocol": "chat"}')
        lines = await check("--bindport=0", "--send", *backend.flags(), status=0)
    level, text = sent(lines)["connecturi"]
    assert level == "warning" and "subprotocol that was not offered" in text


async def test_check_sends_to_the_urls_of_batches_and_of_heartbeats(io_loop):
    """One batch with both events, and a heartbeat that ends its instance."""
    received = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
        received.append((head.split()[1], json.loads(await reader.readexactly(length))))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with tcp_server(serve) as port:
        url = f"http://127.0.0.1:{port}"
        flags = ("--backend=http", f"--batchuri={url}/b", f"--instanceuri={url}/i")
        lines = await check("--send", "--bindport=0", *flags, status=0)
    assert set(sent(lines)) == {"batchuri", "instanceuri"}
    (_, batch), (_, heartbeat) = received
    assert [event["event"] for event in batch["events"]] == ["message", "disconnect"]
    assert all(event["meta"]["test"] for event in batch["events"])
    assert heartbeat["meta"]["test"] is True and heartbeat["meta"]["ttl"] == 0


async def test_check_does_not_wait_for_an_answer_that_is_held(io_loop):
    """For at most --backend_timeout. Some backends answer when a session ends."""
    forever = asyncio.Event()

    async def hold(handler, event):
        await forever.wait()

    async with RecordingBackend() as backend:
        backend.answers["message"] = hold
        flags = (*backend.flags("message"), "--backend_timeout=0.2")
        lines = await check("--bindport=0", "--send", *flags, status=0)
        forever.set()
    level, text = sent(lines)["messageuri"]
    assert level == "warning" and "no response in 0.2 s" in text
    assert text.endswith("unless the backend holds answers")


async def test_check_cannot_send_to_loopback(io_loop):
    """It has no URL; other backends may have none, or no test events."""
    line = only("warning", await check("--send", "--bindport=0", status=0))
    assert line.endswith("--backend=loopback sends no test events; leave out --send")


# Problems.


async def test_bad_option_is_status_2(io_loop):
    """With the same line as at the start."""
    (line,) = await check("--bidport=1", status=2)
    assert line == "socketdock: there is no option --bidport; did you mean --bindport?"


async def test_check_reports_options_that_need_another_option(io_loop):
    """Together with all other findings."""
    line = only("error", await check("--bindport=0", "--backend=http", status=1))
    assert line == "error:   --backend=http needs --messageuri or --batchuri"


async def test_check_reports_unreachable_backend(io_loop):
    """Nothing listens at its port."""
    url = f"http://127.0.0.1:{free_ports(1)}/message"
    line = only("error", await check(*to(url), status=1))
    assert "Connection refused; start the backend there" in line


async def test_check_reports_unknown_backend_name(io_loop):
    """The test needs no DNS server."""
    line = only("error", await check(*to("http://no..name/"), status=1))
    assert "http://no..name:80: the name is unknown here" in line
    assert "correct it, or this machine's DNS" in line


async def test_check_reports_expired_backend_certificate(io_loop, tmp_path):
    """The remedy is to renew it."""
    authority = Authority(tmp_path)
    async with https(authority.server(expired=True)) as url:
        lines = await check(*to(url), f"--backend_ca={authority.path}", status=1)
    line = only("error", lines)
    assert "TLS: certificate has expired; renew the backend's certificate" in line


async def test_check_reports_untrusted_certificate(io_loop, tmp_path):
    """The remedy names --backend_ca."""
    async with https(self_signed(tmp_path)) as url:
        line = only("error", await check(*to(url), status=1))
    assert "TLS: self-signed certificate; put the CA" in line
    assert line.endswith("into --backend_ca")


async def test_check_reports_server_that_closes_during_tls(io_loop):
    """The server sends no alert, so the finding explains the end."""

    async def disconnect(reader, writer):
        await reader.read(1)

    async with tcp_server(disconnect) as port:
        lines = await check(*to(f"https://127.0.0.1:{port}/"), status=1)
    assert "TLS: the connection was closed in the handshake; " in only("error", lines)


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_check_reports_server_that_closes_after_the_handshake(
    io_loop, tmp_path, end
):
    """With TLS 1.3 this may be how it rejects a client without a certificate."""
    authority = Authority(tmp_path)

    async def leave(reader, writer):
        if end == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()

    context = authority.server().server_context()
    async with tcp_server(leave, ssl=context) as port:
        flags = (*to(f"https://127.0.0.1:{port}/"), f"--backend_ca={authority.path}")
        line = only("error", await check(*flags, status=1))
    assert f":{port}: TLS: the connection was closed after the handshake; " in line
    assert "give --backend_cert if it wants a client certificate" in line


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (20, "put the CA that issued it into --backend_ca"),
        (10, "renew the backend's certificate"),
        (92, "renew the backend's certificate without"),  # no key identifier
        (26, "renew the backend's certificate without"),  # not a server's
    ],
)
def test_tls_advice_fits_the_error(code, advice):
    """--backend_ca is recommended only if the CA is unknown."""
    error = ssl.SSLCertVerificationError()
    error.verify_code = code
    assert tls_remedy(error).startswith(advice)


async def test_check_reports_certificate_for_another_name(io_loop, tmp_path):
    """The URL's host name is not in the certificate."""
    authority = Authority(tmp_path)
    async with https(authority.server("elsewhere.example")) as url:
        lines = await check(*to(url), f"--backend_ca={authority.path}", status=1)
    assert only("error", lines).endswith("use a name that is in the certificate")


async def test_check_reports_backend_that_requires_a_certificate(io_loop, tmp_path):
    """With TLS 1.3 the rejection comes only after the handshake."""
    authority = Authority(tmp_path)
    async with https(authority.server(), client_ca=authority.path) as url:
        lines = await check(*to(url), f"--backend_ca={authority.path}", status=1)
    assert "--backend_cert" in only("error", lines)


async def test_check_reports_backend_without_tls(io_loop):
    """The URL has https://, but the port serves http://."""
    async with RecordingBackend() as backend:
        url = backend.url("message").replace("http", "https")
        lines = await check(*to(url), "--backend_connect_timeout=1", status=1)
    line = only("error", lines)
    assert "; make it http://, or give the port that speaks TLS" in line


async def test_check_reports_port_in_use_and_leaves_its_relay_alone(io_loop):
    """For example, a running relay with the same options."""
    async with Service() as service:
        port = service.ws_url.split(":")[2].split("/")[0]
        async with websockets.connect(service.ws_url) as client:
            line = only("error", await check(f"--bindport={port}", status=1))
            await client.send("still here")
            assert await client.recv() == "still here"
    assert f"port {port} of 127.0.0.1: Address already in use; stop what" in line


async def test_check_reports_address_of_another_machine(io_loop):
    """192.0.2.1 is reserved for documentation (RFC 5737)."""
    lines = await check("--bindip=192.0.2.1", "--bindport=0", status=1)
    assert any("give an address that this machine has" in line for line in lines)


async def test_check_reports_own_expiring_certificate(io_loop, tmp_path, monkeypatch):
    """A warning within 14 days, an error after the expiry."""
    authority = Authority(tmp_path)
    expired = authority.server(expired=True).both
    flags = ("--bindport=0", f"--tls_cert={expired}")
    line = only("error", await check(*flags, status=1))
    assert line.startswith(f"error:   {expired} has expired on ")
    flags = ("--bindport=0", f"--tls_cert={authority.server().both}")
    assert "; renew it" in only("warning", await check(*flags, status=0))
    # 24 of these are good for 720 days.
    monkeypatch.setattr(certificates, "HOUR", datetime.timedelta(days=30))
    flags = ("--bindport=0", f"--tls_cert={authority.server().both}")
    assert any("is good until 20" in line for line in await check(*flags, status=0))


async def test_check_reports_file_that_is_not_a_certificate(io_loop):
    """With the same text as at the start."""
    flags = ("--bindport=0", "--tls_cert=README.md")
    assert "can't use README.md for TLS" in only("error", await check(*flags, status=1))


async def test_check_reports_callbacks_without_a_token_on_a_public_address(io_loop):
    """An error; at the start it is only a warning."""
    flags = ("--bindport=0", "--bindip=0.0.0.0")
    line = only("error", await check(*flags, status=1))
    assert "callbacks need no token" in line and "--callback_token_file" in line
    await check(*flags, "--callback_token=0123456789abcdef", status=0)
    await check(*flags, "--callback_capability", status=0)


async def test_check_reports_too_few_descriptors(io_loop):
    """The remedy says where to raise the limit."""
    lines = await check(
        "--bindport=0",
        status=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)),
    )
    line = only("error", lines)
    assert "at most 512 files may be open here" in line and "LimitNOFILE=" in line


async def test_check_names_the_limit_of_files_and_the_need(io_loop):
    """Of this process, which a shell or a unit may have limited."""
    limit = (4_000, 4_000)
    lines = await check(
        "--bindport=0",
        "--max_connections=1000",
        status=0,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
    )
    assert lines[-1] == (
        "ok:      4000 files may be open at once, and at most 1256 are needed for"
        " --max_connections=1000 and the backend"
    )


async def test_check_reports_state_dir_that_is_not_a_folder(io_loop):
    """The check creates nothing, and takes no lock of a running relay."""
    async with RecordingBackend() as backend:
        url = backend.url("message")
        disconnects = f"--disconnecturi={url}"
        lines = await check(*to(url), disconnects, "--state_dir=README.md/x", status=1)
    assert "README.md is no folder" in only("error", lines)


async def test_errors_set_the_exit_status_if_the_output_is_closed(io_loop):
    """`| head` may close the pipe before the first line, or between two."""
    check = f'"{sys.executable}" -u socketdock.py check --bindport=0 --bindip=192.0.2.1'
    piped = await asyncio.create_subprocess_exec(
        "bash", "-c", f'{check} | true; exit "${{PIPESTATUS[0]}}"',
        cwd=PROJECT, stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(piped.communicate(), DEADLINE)
    assert (piped.returncode, said) == (1, b"")


async def test_check_reports_state_dir_without_disconnecturi(io_loop, tmp_path):
    """The log reports it, too. The directory's content is not deleted."""
    (tmp_path / "a.journal").write_bytes(b"socketdock journal 1 a\n+" + b"1" * 32)
    said = "--state_dir has no effect without --disconnecturi"
    async with RecordingBackend() as backend:
        flags = (*to(backend.url("message")), f"--state_dir={tmp_path}")
        assert said in only("warning", await check(*flags, status=0))
        async with Service(*flags) as service:
            pass
    assert [line for line in service.log if line.endswith(said)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.journal"]
