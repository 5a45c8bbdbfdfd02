"""Trusted proxies, and the parts of a handshake that the backend gets."""

import asyncio
import json
import ssl

import pytest
import websockets
from certificates import Authority
from service import RecordingBackend, Service, refusal

pytestmark = pytest.mark.gen_test(timeout=60)

PROXY, STRANGER = "127.0.0.2", "127.0.0.1"
TRUSTED = f"--trusted_proxies={PROXY},10.0.0.0/8,fd00::/8,::ffff:127.0.0.8/125"
CLIENT = "203.0.113.7"


def connect(
    url: str, source: str, *headers: tuple[str, str], **options: object
) -> websockets.connect:
    """A client whose TCP connection comes from `source`."""
    return websockets.connect(
        url,
        local_addr=(source, 0),
        additional_headers=list(headers),
        compression=None,
        **options,
    )


async def status(url: str, source: str, *headers: tuple[str, str]) -> int:
    """The response to a handshake from `source`."""
    try:
        async with connect(url, source, *headers):
            return 101
    except websockets.InvalidStatus as refused:
        return refused.response.status_code


async def test_client_address_is_the_last_untrusted_one(io_loop):
    """Addresses before it in X-Forwarded-For are ignored; garbage ends the list."""
    cases = [
        (PROXY, [], PROXY),
        (PROXY, [CLIENT], CLIENT),
        (PROXY, [f"1.1.1.1, {CLIENT}"], CLIENT),
        (PROXY, [f"{CLIENT}, 10.0.0.9"], CLIENT),
        (PROXY, [f"1.1.1.1, {CLIENT}", "10.0.0.9,fd00::9"], CLIENT),
        (PROXY, ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        (PROXY, [f"{CLIENT}:4711"], CLIENT),
        (PROXY, ["2001:db8::7"], "2001:db8::7"),
        (PROXY, ["[2001:DB8::7]:4711"], "2001:db8::7"),
        (PROXY, ["[2001:db8::7]"], "2001:db8::7"),
        (PROXY, [f"::ffff:{CLIENT}"], CLIENT),
        (PROXY, [f"{CLIENT}, ::ffff:10.0.0.9"], CLIENT),
        (PROXY, [f"{CLIENT}, unknown"], PROXY),
        (PROXY, [f"{CLIENT}, , 10.0.0.9"], "10.0.0.9"),
        (PROXY, ["999.0.0.1"], PROXY),
        (PROXY, ["fe80::1%eth0"], "fe80::1"),  # as Go writes it
        (PROXY, ["[fe80::1%eth0]:4711"], "fe80::1"),
        (PROXY, [f"{CLIENT}, fd00::9%eth0"], CLIENT),
        (PROXY, ["fe80::1%"], PROXY),
        (PROXY, [f"{CLIENT}:"], PROXY),
        (PROXY, ["\t2001:db8::7 "], "2001:db8::7"),
        (PROXY, [f"{CLIENT}, ::ffff:127.0.0.9"], CLIENT),
        (PROXY, ["[2001:db8::7"], PROXY),
        (STRANGER, [CLIENT], STRANGER),
        (STRANGER, [f"{CLIENT}, 10.0.0.9"], STRANGER),
    ]
    async with RecordingBackend() as backend:
        async with Service(*backend.flags("message", "connect"), TRUSTED) as service:
            for number, (source, forwarded, expected) in enumerate(cases):
                headers = [("X-Forwarded-For", value) for value in forwarded]
                async with connect(service.ws_url, source, *headers):
                    meta = backend.of("connect")[number]["meta"]
                    url = meta["send"].removesuffix("/send")
                    info = json.loads((await backend.call(url, "GET")).body)
                assert (meta["remote_ip"], info["remote_ip"]) == (
                    expected,
                    expected,
                ), (source, forwarded)


async def test_no_proxy_is_trusted_by_default(io_loop):
    """Without --trusted_proxies the address is that of the connection."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags("message", "connect")) as service:
            async with connect(service.ws_url, PROXY, ("X-Forwarded-For", CLIENT)):
                (event,) = backend.of("connect")
    assert event["meta"]["remote_ip"] == PROXY


async def test_origin_scheme_is_compared_behind_a_trusted_proxy(io_loop):
    """X-Forwarded-Proto of others is ignored, and both schemes are allowed."""
    async with Service(TRUSTED) as service:
        host = service.ws_url.removeprefix("ws://").removesuffix("/ws")
        for source, said, of_http, of_https in [
            (PROXY, ["https"], 403, 101),
            (PROXY, ["wss"], 403, 101),
            (PROXY, ["http"], 101, 403),
            (PROXY, ["http, https"], 403, 101),
            (PROXY, ["http", "https"], 403, 101),
            (PROXY, ["gopher"], 101, 101),
            (PROXY, [], 101, 101),
            (STRANGER, ["https"], 101, 101),
            (STRANGER, ["http"], 101, 101),
        ]:
            headers = [("X-Forwarded-Proto", value) for value in said]
            for scheme, expected in (("http", of_http), ("https", of_https)):
                origin = ("Origin", f"{scheme}://{host}")
                answer = await status(service.ws_url, source, origin, *headers)
                assert answer == expected, (source, said, scheme)


async def test_origin_scheme_is_https_on_a_tls_listener(io_loop, tmp_path):
    """A page loaded by http is then of another origin."""
    authority = Authority(tmp_path)
    context = ssl.create_default_context(cafile=str(authority.path))
    certificate = authority.server().both
    async with Service(f"--tls_cert={certificate}", TRUSTED) as service:
        host = service.ws_url.removeprefix("wss://").removesuffix("/ws")
        for origin, said, expected in [
            (f"https://{host}", None, 101),
            (f"http://{host}", None, 403),
            (f"http://{host}", "http", 403),  # by a peer that is not trusted
        ]:
            headers = {"Origin": origin}
            if said is not None:
                headers["X-Forwarded-Proto"] = said
            try:
                async with websockets.connect(
                    service.ws_url, additional_headers=headers, ssl=context
                ):
                    answer = 101
            except websockets.InvalidStatus as refused:
                answer = refused.response.status_code
            assert answer == expected, (origin, said)


async def test_connect_event_omits_internal_headers(io_loop):
    """Hop-by-hop headers, the WebSocket's own, and those that an option names."""
    sent = [
        ("Authorization", "Bearer x"),
        ("Cookie", "a=b"),
        ("X-Mine", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authorization", "Basic x"),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "trailers"),
        ("Trailer", "X-Mine"),
        ("X-One-Hop", "2"),
        ("X-Secret", "3"),
        ("Sec-WebSocket-Accept", "x"),
    ]
    for names, withheld in (("", set()), ("COOKIE,x-secret", {"cookie", "x-secret"})):
        async with RecordingBackend() as backend:
            async with Service(
                *backend.flags("message", "connect"),
                f"--withhold_headers={names}",
            ) as service:
                host, port = service.ws_url[5:-3].split(":")
                lines = [
                    "GET /ws HTTP/1.1",
                    f"Host: {host}:{port}",
                    "Connection: Upgrade, X-One-Hop",
                    "Connection: close",
                    "Upgrade: websocket",
                    "Sec-WebSocket-Version: 13",
                    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                    "Sec-WebSocket-Protocol: a",
                    "Sec-WebSocket-Extensions: b",
                    *(f"{name}: {value}" for name, value in sent),
                ]
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
                assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
                writer.close()
                (event,) = backend.of("connect")
        forwarded = {"host", "authorization", "cookie", "x-mine", "x-secret"}
        assert set(event["meta"]["headers"]) == forwarded - withheld
        assert event["meta"]["subprotocols"] == ["a"]


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--trusted_proxies=10.0.0.0/33", "neither an address nor a network"),
        ("--trusted_proxies=10.0.0.1/8", "neither an address nor a network"),
        ("--trusted_proxies=proxy.example.com", "neither an address nor a network"),
        ("--withhold_headers=Cookie:", "'Cookie:' is not a header name"),
    ],
)
def test_invalid_option_values_are_rejected(flag, why):
    """One sentence names the option and what is wrong with it."""
    line = refusal(flag)
    assert flag.partition("=")[0] in line and why in line
