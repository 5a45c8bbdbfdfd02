"""Which pages may connect: origins of websites, apps and extensions."""

import pytest
from faults import send_raw
from service import DEADLINE, Service, refusal
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)

EXTENSION = "chrome-extension://cjpalhdlnbpafiamejdnhcphjbkeiagm"
PROXY = "127.0.0.2"


async def status(
    service: Service, origin: str, *more: str, host: str = "relay.example"
) -> int:
    """Return the status of a handshake with this Origin."""
    request = handshake(
        f"Host: {host}", f"Origin: {origin}", *more, without="Host"
    )
    received = await send_raw(service.ws_url, request, answers=1, deadline=DEADLINE)
    return received.statuses[0]


async def test_same_origin_only_without_the_option(io_loop):
    """The page's scheme, host and port must be those of the handshake."""
    async with Service() as service:
        for host, origin, expected in [
            ("relay.example", "http://relay.example", 101),
            ("relay.example", "https://relay.example", 101),
            ("relay.example", "ws://relay.example", 101),
            ("relay.example", "wss://relay.example", 101),
            ("relay.example", "HTTPS://Relay.Example", 101),
            ("relay.example:8443", "https://relay.example:8443", 101),
            ("relay.example:443", "https://relay.example", 101),
            ("relay.example:8443", "https://relay.example", 403),
            ("relay.example", "https://relay.example:8443", 403),
            ("[::1]:8765", "http://[::1]:8765", 101),
            ("my_service:8765", "http://my_service:8765", 101),
            ("localhost", "capacitor://localhost", 403),
            ("relay.example", "https://relay.example.evil.example", 403),
            ("relay.example", "https://evil.example", 403),
            ("relay.example", "http://relay.example:0", 403),
            ("relay.example", "null", 403),
            ("relay.example", "file://", 403),
        ]:
            answer = await status(service, origin, host=host)
            assert answer == expected, (host, origin)


async def test_any_serialized_origin_can_be_allowed(io_loop):
    """And no other origin is allowed."""
    named = [
        "https://app.example.com",
        "https://*.apps.example.com",
        "wss://socket.example:8443",
        "capacitor://localhost",
        "ionic://localhost",
        "tauri://localhost",
        "http://tauri.localhost",
        "app://.",
        "file://",
        "null",
        EXTENSION,
        "moz-extension://*",
    ]
    async with Service(f"--allowed_origins={','.join(named)}") as service:
        for origin, expected in [
            ("https://app.example.com", 101),
            ("https://app.example.com:443", 101),
            ("https://APP.example.com", 101),
            ("wss://app.example.com", 101),
            ("http://app.example.com", 403),
            ("ws://app.example.com", 403),
            ("https://app.example.com:444", 403),
            ("https://evil-app.example.com", 403),
            ("https://one.apps.example.com", 101),
            ("https://two.one.apps.example.com", 101),
            ("https://apps.example.com", 403),
            ("https://evilapps.example.com", 403),
            ("https://socket.example:8443", 101),
            ("wss://socket.example:8443", 101),
            ("capacitor://localhost", 101),
            ("capacitor://evil", 403),
            ("capacitor://localhost:80", 403),
            ("capacitor://", 403),
            ("ionic://localhost", 101),
            ("tauri://localhost", 101),
            ("http://tauri.localhost", 101),
            ("app://.", 101),
            ("file://", 101),
            ("file://host", 403),
            ("file:///", 403),
            ("null", 101),
            ("NULL", 403),
            (EXTENSION, 101),
            (EXTENSION[:-1], 403),
            ("moz-extension://1d1ba0e5-d4ec-4c1e-8ae8-fb4a7c4a7d2d", 101),
            ("moz-extension://", 403),
            ("http://relay.example", 403),  # the relay's own, which is not named
            ("https://", 403),
            ("", 403),
        ]:
            assert await status(service, origin) == expected, origin


async def test_asterisk_allows_every_origin(io_loop):
    """Including those without a host, and invalid ones."""
    async with Service("--allowed_origins=*") as service:
        for origin in ("null", "file://", "https://evil.example", "what ever"):
            assert await status(service, origin) == 101, origin


async def test_same_origin_uses_the_forwarded_host(io_loop):
    """A trusted proxy that changes Host sends the original in X-Forwarded-Host."""
    app = "https://app.example"
    async with Service(f"--trusted_proxies={PROXY},10.0.0.0/8") as service:
        for source, headers, expected in [
            (PROXY, ["X-Forwarded-Host: app.example"], 101),
            (PROXY, ["X-Forwarded-Host: App.Example"], 101),
            (PROXY, ["X-Forwarded-Host: app.example:443"], 101),
            (PROXY, ["X-Forwarded-Host: app.example:8443"], 403),
            (PROXY, ["X-Forwarded-Host: app.example", "X-Forwarded-Proto: http"], 403),
            (PROXY, ["X-Forwarded-Host: evil.example, app.example"], 101),
            (PROXY, ["X-Forwarded-Host: app.example, evil.example"], 403),
            (PROXY, ["X-Forwarded-Host: app.example",
                     "X-Forwarded-Host: evil.example"], 403),
            (PROXY, [], 403),
            (PROXY, ["X-Forwarded-Host:"], 403),
            # Of two, the first is the host that the client requested.
            (PROXY, ["X-Forwarded-Host: app.example, inner.example",
                     "X-Forwarded-Proto: https, http",
                     "X-Forwarded-For: 203.0.113.7, 10.0.0.9"], 101),
            (PROXY, ["X-Forwarded-Host: app.example",
                     "X-Forwarded-For: 203.0.113.7, 10.0.0.9"], 101),
            (PROXY, ["X-Forwarded-Host: evil.example, app.example, inner.example",
                     "X-Forwarded-For: 203.0.113.7, 10.0.0.9"], 101),
            (PROXY, ["Forwarded: host=app.example"], 403),
            ("127.0.0.1", ["X-Forwarded-Host: app.example"], 403),
        ]:
            request = handshake(f"Origin: {app}", *headers)
            received = await send_raw(
                service.ws_url, request, answers=1, source=source, deadline=DEADLINE
            )
            assert received.statuses[0] == expected, (source, headers)
        for said in ("", "a b", "x/y", "[::1", "relay.example:99999"):
            request = handshake(
                "Origin: http://relay.example", f"X-Forwarded-Host: {said}"
            )
            received = await send_raw(
                service.ws_url, request, answers=1, source=PROXY, deadline=DEADLINE
            )
            assert received.statuses[0] == 101, said  # an invalid host is ignored


@pytest.mark.parametrize(
    ("origin", "why"),
    [
        ("app.example.com", "is not an origin"),
        ("https://app.example.com/", "is not an origin"),
        ("https://app.example.com/path", "is not an origin"),
        ("https://user@app.example.com", "is not an origin"),
        ("https://", "is not an origin"),
        ("https://:443", "is not an origin"),
        ("https://app.example.com:99999", "is not an origin"),
        ("https://app.*.com", "is not an origin"),
        ("https://*app.example.com", "is not an origin"),
        ("https://*.", "is not an origin"),
        ("https://*.*.example.com", "is not an origin"),
        ("file:///", "is not an origin"),
        ("about:blank", "is not an origin"),
        ("https://bücher.example", "is not ASCII"),
    ],
)
def test_invalid_origin_is_rejected(origin, why):
    """One line names the option, the value, and a valid form."""
    line = refusal(f"--allowed_origins=https://good.example,{origin}")
    assert f"--allowed_origins: {origin} {why}" in line
