"""TLS to the backend: its certificate's verification, and the relay's certificate."""

import re
import signal
import ssl
from collections.abc import Callable

import pytest
import websockets
from certificates import Authority, Certificate, self_signed
from service import RecordingBackend, Service, eventually
from tornado.web import RequestHandler

pytestmark = pytest.mark.gen_test(timeout=60)

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


class TLSBackend(RecordingBackend):
    """A backend that serves https; `context` is the server's."""

    def __init__(self, context: ssl.SSLContext, host: str = "localhost") -> None:
        super().__init__()
        self.host = host
        self.handshakes = 0  # number of TLS handshakes that have begun
        self.context = context

    async def __aenter__(self):
        await super().__aenter__()
        self.use(self.context)
        return self

    def use(self, context: ssl.SSLContext) -> None:
        """Use `context` for connections that are accepted from now on."""

        def count(*hello: object) -> None:
            self.handshakes += 1

        context.sni_callback = count
        self.server.ssl_options = context

    def url(self, kind: str) -> str:
        return f"https://{self.host}:{self.port}/{kind}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    """The context of a certificate by the CA of --backend_ca."""
    return Authority(tmp_path_factory.mktemp("tls"))


def limited(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A context that allows this version only."""
    context.minimum_version = context.maximum_version = version
    return context


def outdated(certificate: Certificate) -> ssl.SSLContext:
    """A context of TLS 1.1 only, which OpenSSL's security levels forbid."""
    context = certificate.server_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    return limited(context, ssl.TLSVersion.TLSv1_1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_certificate_of_backend_ca_is_trusted(io_loop, authority, host, version):
    """By its name or its IP address, with TLS 1.2 and 1.3, for every event."""
    context = limited(authority.server(host).server_context(), version)
    async with TLSBackend(context, host) as backend:
        flags = (*backend.flags(), f"--backend_ca={authority.path}")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
            await backend.wait_for("disconnect", 1)
    kinds = [kind for kind, _, _ in backend.events]
    assert kinds == ["connect", "message", "disconnect"]


def expired(authority: Authority) -> ssl.SSLContext:
    return authority.server(expired=True).server_context()


def of_another_host(authority: Authority) -> ssl.SSLContext:
    return authority.server("backend.example", "127.0.0.2").server_context()


def self_signed_context(authority: Authority) -> ssl.SSLContext:
    return self_signed(authority.folder).server_context()


def of_another_authority(authority: Authority) -> ssl.SSLContext:
    return Authority(authority.folder / "another").server().server_context()


def a_client(authority: Authority) -> ssl.SSLContext:
    return authority.client("localhost").server_context()


def tls_1_1_context(authority: Authority) -> ssl.SSLContext:
    return outdated(authority.server())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
@pytest.mark.parametrize(
    ("bad", "host", "why"),
    [
        (expired, "localhost", "certificate has expired"),
        (of_another_host, "localhost",
         "Hostname mismatch, certificate is not valid for 'localhost'"),
        (of_another_host, "127.0.0.1",
         "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        (self_signed_context, "localhost", "self-signed certificate"),
        (of_another_authority, "localhost", "unable to get local issuer certificate"),
        (a_client, "localhost", "unsuitable certificate purpose"),
        (tls_1_1_context, "localhost", "alert protocol version"),
    ],
)
async def test_untrusted_backend_certificate_counts_as_unreachable(
    io_loop, authority, bad: Callable[[Authority], ssl.SSLContext], host, why
):
    """One warning has the reason; the message waits until the certificate is valid."""
    good = authority.server(host).server_context()
    async with TLSBackend(bad(authority), host) as backend:
        flags = (f"--backend_ca={authority.path}", "--logging=debug")
        async with Service(
            *backend.flags("message", "disconnect"), *flags
        ) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                await eventually(lambda: len(retries(service)) >= 2)
                assert not backend.events
                backend.use(good)
                (event,) = await backend.wait_for("message", 1)
                assert event["message"] == "hello"
            await backend.wait_for("disconnect", 1)
        (warning,) = warnings_of(service)
        assert f"POST {backend.url('message')}: TLS: " in warning
        assert why in warning


def retries(service: Service) -> list[str]:
    """Return the log's lines about messages that are retried."""
    return [line for line in service.log if "is retried" in line]


def warnings_of(service: Service) -> list[str]:
    """Those of them that are logged at the default level."""
    return [line for line in retries(service) if line.startswith("[W ")]


async def test_untrusted_backend_certificate_is_503(io_loop, authority):
    """The log says why."""
    async with TLSBackend(expired(authority)) as backend:
        async with Service(
            *backend.flags("message", "connect"), f"--backend_ca={authority.path}"
        ) as service:
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(service.ws_url)
            assert refused.value.response.status_code == 503
            why = f"POST {backend.url('connect')}: TLS: certificate has expired"
            await eventually(lambda: any(why in line for line in service.log))
        assert not backend.events


async def test_without_a_ca_only_the_systems_authorities_count(io_loop, authority):
    """The test's own CA is not one of the system's."""
    async with TLSBackend(authority.server().server_context()) as backend:
        async with Service(*backend.flags("message", "connect")) as service:
            with pytest.raises(websockets.InvalidStatus):
                await websockets.connect(service.ws_url)
        assert not backend.events


@pytest.mark.parametrize("version", VERSIONS)
async def test_certificate_is_shown_to_a_backend_that_asks(
    io_loop, authority, version
):
    """Mutual TLS, with certificate and key in one file or in two."""
    ours, shown = authority.client("relay-1"), []
    context = limited(authority.server().server_context(authority.path), version)

    async def look(handler: RequestHandler, event: dict) -> None:
        shown.append(client_of(handler))

    async with TLSBackend(context) as backend:
        backend.answers["message"] = look
        for files in (
            [f"--backend_cert={ours.both}"],
            [f"--backend_cert={ours.cert}", f"--backend_key={ours.key}"],
        ):
            flags = (*backend.flags("message"), f"--backend_ca={authority.path}")
            async with Service(*flags, *files) as service:
                async with websockets.connect(service.ws_url) as client:
                    await client.send("hello")
                    await eventually(lambda: bool(shown))
            assert shown == ["relay-1"]
            shown.clear()


def client_of(handler: RequestHandler) -> str:
    """The common name in the client certificate of a request's connection."""
    subject = handler.request.get_ssl_certificate()["subject"]
    return dict(pair for parts in subject for pair in parts)["commonName"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_certificate_that_is_missing_is_a_failure_like_others(
    io_loop, authority, version
):
    """Also with TLS 1.3, where the alert arrives later: retried with backoff."""
    context = limited(authority.server().server_context(authority.path), version)
    async with TLSBackend(context) as backend:
        async with Service(
            *backend.flags("message"),
            f"--backend_ca={authority.path}",
            "--delivery_timeout=1",
        ) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                await client.wait_closed()
            assert client.close_code == 1013
        assert not backend.events
        assert 1 < backend.handshakes < 20
        (warning,) = warnings_of(service)
        # Where the alert was lost with the connection, the log can only guess.
        assert re.search("TLS: .*(alert|client certificate)", warning)


async def test_files_are_read_again_on_sighup(io_loop, authority, tmp_path):
    """The next request uses the new ones; idle connections are closed."""
    ca, cert = tmp_path / "ca.pem", tmp_path / "relay.pem"
    ca.write_bytes(authority.path.read_bytes())
    cert.write_bytes(authority.client("first").both.read_bytes())
    shown = []

    async def look(handler: RequestHandler, event: dict) -> None:
        shown.append((event["message"], client_of(handler)))

    def reads() -> int:
        return sum("reloaded: " in line for line in service.log)

    async def reload() -> None:
        before = reads()
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: reads() > before)

    context = authority.server().server_context(authority.path)
    async with TLSBackend(context) as backend:
        backend.answers["message"] = look
        flags = (f"--backend_ca={ca}", f"--backend_cert={cert}")
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:

                async def send(message: str) -> None:
                    await client.send(message)
                    await backend.wait_for("message", len(shown) + 1)

                await send("1")
                await send("2")
                assert backend.handshakes == 1
                cert.write_bytes(authority.client("second").both.read_bytes())
                await reload()
                await send("3")
                assert backend.handshakes == 2
                cert.write_text("no certificate")
                await reload()
                assert any("values stay" in line for line in service.log)
                await send("4")
                assert backend.handshakes == 2  # nothing has changed
                cert.write_bytes(authority.client("third").both.read_bytes())
                other = Authority(tmp_path / "other")
                ca.write_bytes(other.path.read_bytes())
                await reload()
                await client.send("5")  # while the old CA is not trusted any more
                await eventually(lambda: bool(warnings_of(service)))
                backend.use(other.server().server_context(authority.path))
                await backend.wait_for("message", 5)
    assert shown == [
        ("1", "first"), ("2", "first"), ("3", "second"), ("4", "second"), ("5", "third")
    ]
    (warning,) = warnings_of(service)
    assert "self-signed certificate in certificate chain" in warning
