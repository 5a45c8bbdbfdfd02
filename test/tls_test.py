"""TLS of both listeners, callers' certificates, and reloading them."""

import asyncio
import shutil
import signal
import socket
import ssl
from functools import partial

import pytest
import websockets
from certificates import Authority, encrypted_key
from service import DEADLINE, RecordingBackend, Service, eventually, refusal
from slow import in_thread
from wire import handshake


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority):
    return authority.server()


def trusting(authority):
    return ssl.create_default_context(cafile=str(authority.path))


async def serial_number(url, context):
    """That of the certificate which a listener shows."""
    host, _, port = url.split("/")[2].rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
    writer.close()
    return shown


@pytest.mark.gen_test
async def test_one_listener_serves_wss_and_https(io_loop, authority, server):
    """The callback URL has https, and works."""
    context = trusting(authority)
    async with (
        RecordingBackend() as backend,
        Service(
            *backend.flags(), f"--tls_cert={server.cert}", f"--tls_key={server.key}"
        ) as service,
        websockets.connect(service.ws_url, ssl=context) as client,
    ):
        assert service.ws_url.startswith("wss://")
        await client.send("hello")
        meta = (await backend.wait_for("message", 1))[0]["meta"]
        assert meta["send"].startswith("https://127.0.0.1:")
        answer = await backend.call(
            meta["send"] + "?type=text", body=b"back", ssl_options=context
        )
        assert answer.code == 200
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "back"


@pytest.mark.gen_test
async def test_messages_of_every_size_pass_through_tls(io_loop, authority, server):
    """Up to the largest, both ways."""
    async with (
        Service(f"--tls_cert={server.both}", "--max_send_buffer=8388608") as service,
        websockets.connect(
            service.ws_url, ssl=trusting(authority), max_size=None
        ) as client,
    ):
        for size in (0, 1, 16_384, 65_536, 4 * 2**20):
            message = bytes(size)
            await client.send(message)
            assert await asyncio.wait_for(client.recv(), DEADLINE) == message


@pytest.mark.gen_test
async def test_each_listener_has_its_own_tls(io_loop, authority, server):
    """Here the clients' listener has none, and the callbacks' has TLS."""
    context = trusting(authority)
    async with (
        RecordingBackend() as backend,
        Service(
            *backend.flags("message"),
            "--callbackport=0",
            "--externalhostandport=localhost:1",
            f"--callback_tls_cert={server.both}",
        ) as service,
        websockets.connect(service.ws_url) as client,
    ):
        await client.send("hello")
        meta = (await backend.wait_for("message", 1))[0]["meta"]
        assert meta["send"].startswith("https://localhost:1/")
        path = meta["send"].split(":1/")[1]
        answer = await backend.call(
            f"{service.callback_url}/{path}", body=b"back", ssl_options=context
        )
        assert answer.code == 200
        assert await asyncio.wait_for(client.recv(), DEADLINE) == b"back"


@pytest.mark.gen_test
async def test_callers_need_a_certificate_of_the_ca(
    io_loop, authority, server, tmp_path
):
    """Mutual TLS: without it there is no HTTP."""
    ours = authority.client().client_context(authority.path)
    theirs = Authority(tmp_path).client().client_context(authority.path)
    async with (
        RecordingBackend() as backend,
        Service(
            "--callbackport=0",
            f"--callback_tls_cert={server.both}",
            f"--callback_client_ca={authority.path}",
        ) as service,
    ):
        url = f"{service.callback_url}/livez"
        assert (await backend.call(url, "GET", ssl_options=ours)).code == 200
        for context in (trusting(authority), theirs):
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await answer_of(service.callback_url, context)


async def answer_of(url, context):
    host, _, port = url.split("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            return await reader.readexactly(1)
    finally:
        writer.close()


@pytest.mark.gen_test
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
async def test_old_versions_of_tls_are_rejected(io_loop, authority, server, version):
    """TLS 1.2 and 1.3 work."""
    async with Service(f"--tls_cert={server.both}") as service:
        for allowed in ("TLSv1_2", "TLSv1_3"):
            context = trusting(authority)
            context.minimum_version = ssl.TLSVersion[allowed]
            context.maximum_version = ssl.TLSVersion[allowed]
            assert await serial_number(service.ws_url, context)
        old = trusting(authority)
        old.set_ciphers("ALL:@SECLEVEL=0")  # or OpenSSL itself would not try
        with pytest.warns(DeprecationWarning):
            old.minimum_version = ssl.TLSVersion[version]
            old.maximum_version = ssl.TLSVersion[version]
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            await serial_number(service.ws_url, old)


@pytest.mark.gen_test
async def test_only_authenticated_encryption_is_negotiated(io_loop, authority, server):
    """With TLS 1.2, on both listeners: no CBC suite, and ECDHE only."""
    every = trusting(authority)
    every.set_ciphers("ALL:@SECLEVEL=0")
    suites = {
        suite["name"]
        for suite in every.get_ciphers()
        if suite["protocol"] == "TLSv1.2" and suite["auth"] == "auth-ecdsa"
    }
    good = {
        f"ECDHE-ECDSA-{cipher}"
        for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    }
    assert good < suites and "ECDHE-ECDSA-AES128-SHA256" in suites
    flags = (
        f"--tls_cert={server.both}",
        "--callbackport=0",
        f"--callback_tls_cert={server.both}",
    )
    async with Service(*flags) as service:
        for url in (service.ws_url, service.callback_url):
            taken = set()
            for suite in sorted(suites):
                one = trusting(authority)
                one.set_ciphers(f"{suite}:@SECLEVEL=0")
                one.maximum_version = ssl.TLSVersion.TLSv1_2
                try:
                    await serial_number(url, one)
                except (ssl.SSLError, ConnectionResetError):
                    continue
                else:
                    taken.add(suite)
            assert taken == good


@pytest.mark.gen_test
@pytest.mark.parametrize("group", ["X25519", "prime256v1", "secp384r1"])
async def test_usual_groups_are_negotiated(io_loop, authority, server, group):
    """Those of Mozilla's intermediate profile; each browser has one of them."""
    async with Service(f"--tls_cert={server.both}") as service:
        one = trusting(authority)
        one.set_ecdh_curve(group)
        one.minimum_version = ssl.TLSVersion.TLSv1_3
        assert await serial_number(service.ws_url, one)


@pytest.mark.gen_test
async def test_sighup_changes_the_certificate_and_drops_no_connection(
    io_loop, authority, tmp_path
):
    """On both listeners; an invalid file changes nothing."""
    paths = tmp_path / "clients.pem", tmp_path / "callbacks.pem"
    for path in paths:
        shutil.copy(authority.server().both, path)
    context = trusting(authority)
    async with (
        Service(
            f"--tls_cert={paths[0]}",
            "--callbackport=0",
            f"--callback_tls_cert={paths[1]}",
        ) as service,
        websockets.connect(service.ws_url, ssl=context) as client,
    ):
        urls = service.ws_url, service.callback_url
        before = [await serial_number(url, context) for url in urls]
        for path in paths:
            shutil.copy(authority.server().both, path)
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: any("reloaded: " in line for line in service.log))
        after = [await serial_number(url, context) for url in urls]
        assert not set(before) & set(after)

        paths[0].write_text("nonsense")
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: any("not PEM" in line for line in service.log))
        assert await serial_number(service.ws_url, context) == after[0]
        await client.send("still here")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "still here"


@pytest.mark.gen_test
async def test_plain_bytes_at_a_tls_port_end_the_connection(io_loop, authority, server):
    """Plain HTTP, garbage and silence, on a TLS listener."""
    async with Service(f"--tls_cert={server.both}", "--header_timeout=3") as service:
        host, _, port = service.ws_url.split("/")[2].rpartition(":")
        plain = b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n"
        for garbage in (plain, b"\x16\x03\x01\xff", b""):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(garbage)
            async with asyncio.timeout(DEADLINE):
                try:
                    await reader.read()
                except ConnectionResetError:
                    pass
            writer.close()
        async with websockets.connect(
            service.ws_url, ssl=trusting(authority)
        ) as client:
            await client.send("hello")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
ENDS = {  # what a client sends, until it closes or waits for the end
    "closing answer": LIVEZ + b"Connection: close\r\n\r\n",
    "rejected handshake": handshake().replace(b"Version: 13", b"Version: 12"),
    "no HTTP": b"no HTTP\r\n\r\n",
    "half a head": LIVEZ,  # until --header_timeout
    "nothing": b"",
    "half a body": b"POST /socket/%b/send HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 2\r\n\r\na" % (b"0" * 32),
    "client closes": LIVEZ + b"\r\n",
    "stop": LIVEZ + b"\r\n",
}


def tls_end(port, context, how, answered=None):
    """Connect, send, and return how TLS ends: empty, or the error."""
    with (
        socket.create_connection(("127.0.0.1", port), DEADLINE) as plain,
        context.wrap_socket(
            plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False
        ) as sock,
    ):
        try:
            sock.sendall(ENDS[how])
            if how in ("client closes", "stop"):
                assert b" 200 OK" in sock.recv(65536)
            if how == "client closes":
                sock.unwrap()  # waits for the relay's close_notify
                return ""
            if how == "stop":
                answered()
            while sock.recv(65536):
                pass
        except OSError as error:
            return repr(error)
    return ""


@pytest.mark.gen_test(timeout=90)
@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_https_ends_with_close_notify(io_loop, authority, server):
    """However it ends, so that the peer can distinguish the end from a cut."""
    flags = (f"--http_server={server}", "--header_timeout=3", "--body_timeout=3")
    certificate = f"--tls_cert={authority.server().both}"
    loop = asyncio.get_running_loop()
    async with Service(*flags, certificate) as service:
        stop = partial(service.process.send_signal, signal.SIGTERM)
        found = {
            how: await in_thread(
                tls_end,
                int(service.ws_url.split(":")[2].partition("/")[0]),
                trusting(authority),
                how,
                partial(loop.call_soon_threadsafe, stop),
            )
            for how in ENDS
        }
        assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
    assert found == dict.fromkeys(ENDS, "")


@pytest.mark.once
@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--tls_cert={folder}/none.pem", "No such file"),
        ("--tls_cert={folder}", "Is a directory"),
        ("--tls_cert={nonsense}", "not PEM"),
        ("--tls_cert={cert}", "or the certificate or key is missing"),
        ("--tls_cert={cert} --tls_key={other}", "the key is not the certificate's"),
        ("--tls_cert={cert} --tls_key={encrypted}", "the key has a password"),
        (
            "--callbackport=0 --callback_tls_cert={both}"
            " --callback_client_ca={nonsense}",
            "can't use {nonsense}",
        ),
        ("--tls_key={key}", "--tls_key needs --tls_cert"),
        (
            "--callbackport=0 --callback_client_ca={ca}",
            "--callback_client_ca needs --callback_tls_cert",
        ),
        ("--callback_tls_cert={both}", "--callback_tls_cert needs --callbackport"),
    ],
)
def test_bad_file_stops_the_start(authority, server, tmp_path, flags, sentence):
    """With a one-line error; never with a prompt for a password.

    Options that don't fit together stay wrong, a file may become right.
    """
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    paths = {
        "folder": tmp_path,
        "nonsense": nonsense,
        "cert": server.cert,
        "key": server.key,
        "both": server.both,
        "ca": authority.path,
        "other": authority.server().key,
        "encrypted": encrypted_key(server),
    }
    status = 2 if " needs --" in sentence else 1
    said = refusal(*(flag.format(**paths) for flag in flags.split()), status=status)
    assert sentence.format(**paths) in said
