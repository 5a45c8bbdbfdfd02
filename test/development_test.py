"""The certificates of `socketdock dev`."""

import asyncio
import ssl
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from functions import RecordingFunction, developing
from ports import free_ports
from programs import program
from service import ended, tcp_server

from handlers.http.development import DevelopmentAuthority

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]


def make(
    folder: Path,
    hosts: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> DevelopmentAuthority:
    program("openssl", "openssl")
    return DevelopmentAuthority(folder, hosts, environ or {})


async def accepted(
    authority: DevelopmentAuthority, host: str, trusted: Path | None = None
) -> bool:
    """Return whether a client that trusts the authority accepts its server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server)
    client = ssl.create_default_context(cafile=str(trusted or authority.certificate))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # as from Python 3.13 on

    async def end(reader, writer) -> None:
        await reader.read()

    async with tcp_server(end, ssl=context) as port:
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client, server_hostname=host
            )
        except ssl.SSLCertVerificationError:
            return False
        writer.close()
        return True


async def test_server_is_accepted_by_each_name(io_loop, tmp_path):
    """This machine's names, those that containers use, and those of options."""
    hosts = (
        "relay.example:8765", "https://other.example/sd", "[fd00::1]:1", "[127.0.0.2]",
        "b\u00fccher.example:80", "invalid, name", "[fe80::1%eth0]",
    )
    authority = make(tmp_path, hosts)
    for host in (
        "localhost", "127.0.0.1", "::1", "host.docker.internal", "relay.example",
        "other.example", "fd00::1", "127.0.0.2", "xn--bcher-kva.example",
    ):
        assert await accepted(authority, host), host
    assert not await accepted(authority, "unknown.example")


async def test_authority_is_kept(io_loop, tmp_path):
    """What trusts it must not change with each start."""
    first = make(tmp_path)
    trusted = tmp_path / "copy"
    trusted.write_bytes(first.certificate.read_bytes())
    second = make(tmp_path, ["new.example"])
    assert second.certificate.read_bytes() == trusted.read_bytes()
    assert second.variables == first.variables
    assert await accepted(second, "new.example", trusted)


def test_keys_are_for_their_user_only(tmp_path):
    """Whoever has the key can pretend to be any server.

    What to trust is for all: a container that mounts it may have another user.
    """
    folder = tmp_path / "a" / "b"
    make(folder)
    for path in (folder, *folder.rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o600
        if path.name in ("ca.pem", "ca-bundle.pem"):
            wanted = 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert sorted(path.name for path in folder.rglob("*")) == [
        "authority", "ca-bundle.pem", "ca.key", "ca.pem", "server.pem"
    ]


async def test_bundle_has_what_was_trusted_before(io_loop, tmp_path):
    """AWS_CA_BUNDLE takes the place of the SDK's own: other services stay trusted."""
    company = make(tmp_path / "company")
    environ = {"AWS_CA_BUNDLE": str(company.certificate)}
    authority = make(tmp_path / "user", environ=environ)
    assert f"AWS_CA_BUNDLE={authority.bundle}" in authority.variables
    assert f"NODE_EXTRA_CA_CERTS={authority.certificate}" in authority.variables
    assert await accepted(authority, "localhost", authority.bundle)
    assert await accepted(company, "localhost", authority.bundle)
    # What the user has exported from an earlier start is not taken as its own base.
    again = make(tmp_path / "user", environ={"AWS_CA_BUNDLE": str(authority.bundle)})
    assert again.bundle.read_text().count(again.certificate.read_text()) == 1


@pytest.mark.parametrize("damage", ["expired", "empty", "without key"])
async def test_unusable_authority_is_replaced(io_loop, tmp_path, damage):
    """By a new one."""
    first = make(tmp_path)
    key = first.certificate.with_name("ca.key")
    if damage == "expired":
        subprocess.run(
            ["openssl", "req", "-x509", "-new", "-key", key, "-days", "1", "-subj",
             "/CN=old", "-out", first.certificate],
            check=True,
        )
    elif damage == "empty":
        first.certificate.write_bytes(b"")
    else:
        key.unlink()
    assert await accepted(make(tmp_path), "localhost")


async def test_relays_may_start_at_the_same_time(io_loop, tmp_path):
    """They have the same authority."""
    makers = [asyncio.to_thread(make, tmp_path) for _ in range(4)]
    authorities = await asyncio.gather(*makers)
    assert len({each.certificate.read_bytes() for each in authorities}) == 1
    assert await accepted(make(tmp_path), "localhost")


def test_missing_openssl_is_reported(tmp_path):
    """In one line that says what to do."""
    relay = ended(
        "dev", "--bindport=0", "--functionuri=http://127.0.0.1:1/f",
        PATH=str(tmp_path), XDG_STATE_HOME=str(tmp_path),
    )
    assert relay.returncode == 1
    (line,) = relay.stderr.splitlines()
    assert "openssl" in line and "--tls_cert" in line


@pytest.mark.parametrize("flags", [(), ("--callbackport={1}",)])
async def test_containers_have_a_name_for_this_machine(io_loop, tmp_path, flags):
    """A relay on all addresses is `host.docker.internal` in events."""
    first = free_ports(2)
    more = [flag.format(first, first + 1) for flag in flags]
    async with RecordingFunction() as function:
        given = (
            f"--functionuri={function.url}", "--bindip=0.0.0.0", f"--bindport={first}"
        )
        async with developing(tmp_path, *given, *more) as relay:
            assert relay.url == f"wss://localhost:{first}/local"
            async with relay.connect():
                event = await function.event("CONNECT")
            port = first + len(more)
            domain = event["requestContext"]["domainName"]
            assert domain == f"host.docker.internal:{port}"
            assert relay.service.callback_url == f"https://0.0.0.0:{port}"


async def test_functions_reach_the_address_of_the_relay(io_loop, tmp_path):
    """It is the `domainName` of events, and so a name of the certificate."""
    async with RecordingFunction() as function:
        given = (f"--functionuri={function.url}", "--bindip=127.0.0.2", "--bindport=0")
        async with developing(tmp_path, *given) as relay, relay.connect():
            event = await function.event("CONNECT")
            domain = event["requestContext"]["domainName"]
            assert relay.url == f"wss://{domain}/local"
            assert domain.startswith("127.0.0.2:")


async def test_health_asks_a_relay_for_development(io_loop, tmp_path):
    """By TLS, though its flags do not say so."""
    flags = ("--functionuri=http://127.0.0.1:1/", f"--bindport={free_ports(1)}")
    async with developing(tmp_path, *flags) as relay:
        pid = relay.service.process.pid
        health = await asyncio.to_thread(ended, "health", f"--pid={pid}")
        assert health.stdout.endswith(": ok\n") and health.returncode == 0
