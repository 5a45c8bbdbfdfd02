"""Where clients connect: --ws_path, with and without a slash, beside other routes."""

import json

import pytest
from faults import send_raw
from service import DEADLINE, RecordingBackend, Service, refusal
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)

TOKEN = "0123456789abcdef"


async def status(url: str, target: str, *more: str, upgrade: bool = True) -> int:
    """The response to a handshake at `target`, or to a plain GET of it."""
    line = f"GET {target} HTTP/1.1"
    plain = f"{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    request = handshake(*more, line=line) if upgrade else plain
    return (await send_raw(url, request, answers=1, deadline=DEADLINE)).statuses[0]


async def test_trailing_slash_and_query_are_accepted(io_loop):
    """As in the existing SocketDock; the event has the path unchanged."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags()) as service:
            for target in ("/ws", "/ws/", "/ws?token=x", "/ws/?token=x"):
                assert await status(service.ws_url, target) == 101, target
                meta = backend.of("connect")[-1]["meta"]
                path, _, query = target.partition("?")
                assert (meta["path"], meta["query"]) == (path, query)
            for target in ("/ws//", "//ws", "/w", "/wsx", "/ws/x", "/%77s"):
                assert await status(service.ws_url, target) == 404, target
            assert await status(service.ws_url, "/ws/", upgrade=False) == 426


@pytest.mark.parametrize("server", ["fast", "tornado"])
@pytest.mark.parametrize("apart", [False, True], ids=["one-listener", "two"])
async def test_clients_may_connect_at_every_configured_path(io_loop, server, apart):
    """Also at paths of other routes, which still serve other requests."""
    paths = "/,/chat/v1/,/socket,/status,/livez,/a%20b"
    flags = [f"--ws_path={paths}", f"--http_server={server}"]
    if apart:
        flags.append("--callbackport=0")
    async with Service(*flags) as service:
        assert service.ws_url.endswith("/")
        for target in ("/", "/?x=y", "/chat/v1", "/chat/v1/", "/socket", "/socket/",
                       "/status", "/status/", "/livez", "/a%20b"):
            assert await status(service.ws_url, target) == 101, target
        for target in ("/ws", "/chat", "//", "/a+b"):
            assert await status(service.ws_url, target) == 404, target
        for target, expected in [
            ("/", 426 if apart else 200),  # else the console's page
            ("/chat/v1", 426),
            ("/socket", 426),
            ("/status", 426 if apart else 200),
            ("/livez", 200),
        ]:
            answer = await status(service.ws_url, target, upgrade=False)
            assert answer == expected, target
        assert await status(service.callback_url, "/", upgrade=False) == 200
        assert await status(service.callback_url, "/livez", upgrade=False) == 200


async def test_public_path_does_not_skip_the_token_check(io_loop):
    """Below /socket/ all requests except handshakes need a token."""
    flags = ("--ws_path=/socket", f"--callback_token={TOKEN}")
    async with Service(*flags) as service:
        assert await status(service.ws_url, "/socket/") == 101
        assert await status(service.ws_url, "/socket/", upgrade=False) == 401
        assert await status(service.ws_url, f"/socket/{'0' * 32}") == 401


async def test_console_knows_where_clients_connect(io_loop):
    """The page gets the path, for its playground and its example."""
    async with RecordingBackend() as backend, Service("--ws_path=/a/b/,/c") as service:
        answer = await backend.call(
            f"{service.callback_url}/console/playground",
            headers={"Origin": service.callback_url},
        )
        permission = json.loads(answer.body)
        assert permission["path"] == "/a/b"
        target = f"{permission['path']}?console={permission['ticket']}"
        origin = f"Origin: {service.callback_url}"
        assert await status(service.ws_url, target, origin) == 101


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        ("ws", "ws is not a path"),
        ("/ws,chat", "chat is not a path"),
        ("ws://relay.example/ws", "ws://relay.example/ws is not a path"),
        ("/ws?x=y", "/ws?x=y is not a path"),
        ("/ws#x", "/ws#x is not a path"),
        ("/a b", "/a b is not a path"),
        ("/é", "/é is not a path"),
        ("/a%2", "/a%2 is not a path"),
        ("/a/../ws", "has a dot segment, which clients remove"),
        ("/.", "has a dot segment, which clients remove"),
        ("/%2E%2e/ws", "has a dot segment, which clients remove"),
        ("", "at least one path is required"),
    ],
)
def test_invalid_ws_path_is_rejected(paths, why):
    """One line names the option and the reason."""
    line = refusal(f"--ws_path={paths}")
    assert "--ws_path: " in line and why in line
