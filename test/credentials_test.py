"""Secrets, headers and certificates for the backend: valid and invalid files."""

import base64
import contextlib
import signal
import ssl
from pathlib import Path

import pytest
import websockets
from certificates import Authority, encrypted_key
from service import RecordingBackend, Service, eventually, refusal
from tornado.options import Error as OptionError

from backends.http.credentials import CredentialSources

SECRET = f"whsec_{base64.b64encode(b'32 bytes that nobody must read..').decode()}"


@pytest.mark.gen_test
async def test_headers_of_a_file_are_on_every_event(io_loop, tmp_path):
    """Exactly as in the file; the log contains none of their values."""
    path = tmp_path / "headers"
    path.write_bytes(
        b"\xef\xbb\xbf# for the gateway\r\n\r\n  Authorization:Bearer s3cr3t=\t \r\n"
        b"X-Colons: a:b: #c\td\r\nX-Empty:\r\n"
    )
    async with RecordingBackend() as backend:
        flags = (f"--backend_headers_file={path}", "--logging=debug")
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
            await backend.wait_for("disconnect", 1)
    assert [kind for kind, _, _ in backend.events] == [
        "connect", "message", "disconnect"
    ]
    for _, _, headers in backend.events:
        assert headers["Authorization"] == "Bearer s3cr3t="
        assert headers["X-Colons"] == "a:b: #c\td"
        assert headers["X-Empty"] == ""
        assert headers["User-Agent"].startswith("SocketDock/")
    assert "s3cr3t" not in "\n".join(service.log)


@pytest.mark.gen_test
async def test_all_files_are_read_again_or_none(io_loop, tmp_path):
    """On SIGHUP; if one is invalid, the log names it, and all keep their values."""
    headers, secrets = tmp_path / "headers", tmp_path / "secrets"
    headers.write_text("X-Key: first")
    secrets.write_text(SECRET)
    async with RecordingBackend() as backend:
        async with Service(
            *backend.flags("message"),
            f"--backend_headers_file={headers}",
            f"--webhook_secret_file={secrets}",
        ) as service:
            async with websockets.connect(service.ws_url) as client:

                async def seen_after(new_headers: str, new_secrets: str):
                    """Return the key and the number of signatures of the next event."""
                    headers.write_text(new_headers)
                    secrets.write_text(new_secrets)
                    service.process.send_signal(signal.SIGHUP)
                    number = len(backend.events) + 1
                    await eventually(
                        lambda: len(reads(service)) == number
                    )
                    await client.send("hello")
                    await backend.wait_for("message", number)
                    seen = backend.events[-1][2]
                    return seen["X-Key"], len(seen["Webhook-Signature"].split(" "))

                two = f"{SECRET}\n{SECRET}"
                assert await seen_after("X-Key: first", SECRET) == ("first", 1)
                assert await seen_after("X-Key: second", two) == ("second", 2)
                assert await seen_after("Host: third", SECRET) == ("second", 2)
                assert await seen_after("X-Key: fourth", "short") == ("second", 2)
                assert await seen_after("X-Key: fifth", SECRET) == ("fifth", 1)
        errors = [line for line in service.log if "values stay" in line]
    assert len(errors) == 2
    assert f"{headers}, line 1: Host" in errors[0]
    assert f"{secrets}, line 1: a secret" in errors[1]


def reads(service: Service) -> list[str]:
    """Return the log's lines about SIGHUP."""
    return [line for line in service.log if "reloaded: " in line]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"# only this\n\n", "empty"),
        (b"X-Key: s3cr3t\nBearer s3cr3t\n", "line 2: not Name: value"),
        (b"s3cr3t", "line 1: not Name: value"),
        (b"X Key: s3cr3t", "line 1: not Name: value"),
        (b"X-Key : s3cr3t", "line 1: not Name: value"),
        (b": s3cr3t", "line 1: not Name: value"),
        ("Schlüssel: s3cr3t".encode(), "line 1: not Name: value"),
        (b"X-Key: s3cr3t\0", "line 1: X-Key has control characters"),
        (b"X-Key: s3cr3t\rHost: evil", "line 1: X-Key has control characters"),
        (b"X-Key: s3cr3t\x0bHost: evil", "line 1: X-Key has control characters"),
        (b"X-Key: s3cr3t\x7f", "line 1: X-Key has control characters"),
        ("X-Key: s3cr3t é".encode(), "others than ASCII"),
        ("X-Key: s3cr3t\u2028Host: evil".encode(), "others than ASCII"),
        (b"X-Key: s3cr3t \xff", "not UTF-8"),
        (b"X-Key: 1\nx-key: s3cr3t", "line 2: x-key is there twice"),
        (b"X-Key: " + b"s3cr3t" * 2731, "larger than 16384 bytes"),
        *(
            (f"{name}: s3cr3t".encode(), f"line 1: {name} is set by the relay")
            for name in (
                "host", "Content-Length", "Transfer-Encoding", "CONNECTION", "Expect",
                "Content-Type", "Content-Encoding", "Upgrade", "TE", "Trailer",
                "Keep-Alive", "Accept", "Accept-Encoding", "User-Agent", "Range",
                "traceparent", "webhook-id", "Webhook-Signature", "webhook-",
            )
        ),
    ],
)
def test_invalid_headers_file_is_explained(tmp_path, content, why):
    """With line and name, never with a value."""
    path = tmp_path / "headers"
    path.write_bytes(content)
    check_refused(why, headers_file=str(path))


@pytest.mark.parametrize(
    ("secret", "why"),
    [
        ("s3cr3t", "not base64"),
        ("whsec_", "0 bytes long, not 24 to 64"),
        (base64.b64encode(b"s" * 23).decode(), "23 bytes long"),
        (f"whsec_{base64.b64encode(b's' * 65).decode()}", "65 bytes long"),
        (SECRET.rstrip("="), "not base64"),
        (SECRET.replace("_", "-"), "not base64"),
        (SECRET.replace("whsec", "whsk"), "not base64"),
        (f"{SECRET}{SECRET}", "not base64"),
        (SECRET[:12] + " " + SECRET[12:], "not base64"),
        (base64.urlsafe_b64encode(b"\xff" * 32).decode(), "not base64"),
        (SECRET.replace("b", "ß"), "not base64"),
    ],
)
def test_invalid_secret_is_explained(tmp_path, secret, why):
    """For each source, and never with the secret."""
    path = tmp_path / "secrets"
    path.write_text(f"{SECRET}\n\n{secret}\n")
    for message in (
        check_refused(f"number 2: a secret that is {why}", [SECRET, secret]),
        check_refused(f"line 3: a secret that is {why}", webhook_secret_file=str(path)),
    ):
        assert secret.removeprefix("whsec_") == "" or secret not in message


def test_secrets_are_bounded():
    """Each one makes every event longer."""
    check_refused("at most 16 secrets", [SECRET] * 17)


@pytest.mark.parametrize("option", ["webhook_secret_file", "backend_headers_file"])
def test_unreadable_file_is_explained(tmp_path, option):
    """If it is missing or not a regular file, the error names the option."""
    name = option.removeprefix("backend_")
    for path, why in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "it is not a regular file"),
    ):
        message = check_refused(f"{path}: .*{why}", **{name: str(path)})
        assert message.startswith(f"--{option}=")


def test_unusable_certificate_is_explained(tmp_path):
    """A wrong key, a key with a password, and files that are not PEM."""
    authority = Authority(tmp_path)
    one, another = authority.client(), authority.client()
    encrypted = encrypted_key(one)
    junk = tmp_path / "junk"
    junk.write_bytes(b"-----BEGIN nonsense\xff")
    none = tmp_path / "none"
    for files, why in (
        ({"cert": one.cert, "key": another.key}, "the key is not the certificate's"),
        ({"cert": one.cert, "key": encrypted}, "the key has a password"),
        ({"cert": one.cert}, "the certificate or key is missing"),
        ({"cert": one.key}, "the certificate or key is missing"),
        ({"cert": junk}, "not PEM"),
        ({"cert": one.cert, "key": junk}, "not PEM"),
        ({"cert": one.cert, "key": none}, "No such file"),
        ({"cert": none}, "No such file"),
        ({"cert": tmp_path}, "Is a directory"),
        ({"key": one.key}, "--backend_key needs --backend_cert"),
        ({"ca": junk}, "no PEM certificate"),
        ({"ca": one.key}, "no PEM certificate"),
        ({"ca": none}, "No such file"),
        ({"ca": tmp_path}, "Is a directory"),
    ):
        paths = {name: str(path) for name, path in files.items()}
        message = check_refused(why, **paths)
        assert any(f"--backend_{name}" in message for name in files)
        assert encrypted.read_text() not in message


def test_invalid_files_exit_with_an_error(tmp_path):
    """With one line each, which contains no secret."""
    headers = tmp_path / "headers"
    headers.write_text("Host: s3cr3t")
    http = ("--backend=http", "--messageuri=http://127.0.0.1:9/")
    for flag, why, status in (
        (f"--backend_headers_file={headers}", "Host is set by the relay", 2),
        ("--webhook_secret=whsec_s3cr3t", "--webhook_secret, number 1", 2),
        (f"--backend_ca={headers}", "no PEM certificate", 1),
    ):
        message = refusal(*http, flag, status=status)
        assert why in message
        assert "s3cr3t" not in message


def check_refused(why: str, secrets: list[str] | None = None, **files: str) -> str:
    """The error says `why` these are rejected."""
    sources = CredentialSources(https=False, webhook_secrets=secrets or [], **files)
    with pytest.raises(OptionError, match=why) as caught:
        sources.read()
    message = str(caught.value)
    assert "s3cr3t" not in message
    assert "\n" not in message
    return message


def test_certificates_are_verified_equally_on_every_python(tmp_path, monkeypatch):
    """Python 3.13 rejects one without an authority key id; curl and Go do not."""
    usual = ssl.create_default_context

    def strict(**rest) -> ssl.SSLContext:  # as in Python 3.13
        context = usual(**rest)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    authority = Authority(tmp_path)
    sources = CredentialSources(https=True, ca=str(authority.path))
    ours = sources.read().tls
    assert ours is not None
    theirs = authority.server(names_signer=False).server_context()
    tls_handshake(ours, theirs, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        tls_handshake(ours, theirs, "elsewhere.example")


def tls_handshake(ours: ssl.SSLContext, theirs: ssl.SSLContext, name: str) -> None:
    """Perform a handshake between a client and a server, in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ours.wrap_bio(down, up, server_hostname=name)
    server = theirs.wrap_bio(up, down, server_side=True)
    for _ in range(3):
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert client.version()
