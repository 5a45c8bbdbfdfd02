"""Capability URLs: keys in the callback URLs of events (`--callback_capability`)."""

import asyncio
import json
import re
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest
import websockets
from authorization_test import NO_TOKEN, WRONG_TOKEN, Caller, ask
from service import DEADLINE, RecordingBackend, Service, eventually

from backends import Closure, Handshake, Relay
from backends.events import Ended, EventWriter
from handlers.callbacks.capabilities import Capabilities

pytestmark = pytest.mark.gen_test(timeout=60)

ON = "--callback_capability"
TOKEN = "0123456789abcdef"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
METHODS = {"get", "head", "post", "delete"}
UNKNOWN = "0" * 32
KEY = re.compile(r"[A-Za-z0-9_-]{22}")
# A request with another header leaves the path without a handler.
SLOWLY = {"Content-Encoding": "identity"}

servers = pytest.mark.parametrize("server", ["fast", "tornado"])


@asynccontextmanager
async def opened(*flags):
    """A relay with keys, its backend, a client, and `meta` of its connect event."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), ON, *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                yield service, backend, client, event["meta"]


async def received(client):
    """The next frame."""
    return await asyncio.wait_for(client.recv(), DEADLINE)


def without_key(url):
    return url.partition("?")[0]


def key_of(meta):
    """The key in the URLs of an event."""
    ((key,),) = parse_qs(urlsplit(meta["send"]).query).values()
    assert meta["disconnect"].endswith(f"/disconnect?key={key}")
    assert meta["send"].endswith(f"/send?key={key}")
    assert KEY.fullmatch(key)
    return key


@servers
async def test_backend_that_posts_to_the_url_as_given_is_authorized(io_loop, server):
    """Without a token, as the backends of the existing SocketDock do it."""
    async with opened(f"--http_server={server}") as (_, backend, client, meta):
        key_of(meta)
        for body in (b"one", b"two"):
            answer = await backend.call(meta["send"], body=body)
            assert (answer.code, answer.body) == (200, b"OK")
            assert await received(client) == body
        assert (await backend.call(meta["disconnect"])).code == 200
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 1000


@servers
async def test_events_of_one_connection_have_the_same_key(io_loop, server):
    """Connect and message events; another connection has another key."""
    flag = f"--http_server={server}"
    async with opened(flag) as (service, backend, client, meta):
        await client.send("hello")
        (event,) = await backend.wait_for("message", 1)
        assert event["meta"]["send"] == meta["send"]
        assert event["meta"]["disconnect"] == meta["disconnect"]
        async with websockets.connect(service.ws_url):
            (_, other) = await backend.wait_for("connect", 2)
        assert key_of(other["meta"]) != key_of(meta)


async def test_each_run_has_other_keys(io_loop):
    """The secret is new at each start."""
    first, second = (Capabilities(bytes([number]) * 32) for number in (1, 2))
    assert first.key_of(UNKNOWN) != second.key_of(UNKNOWN)
    assert first.opens(first.key_of(UNKNOWN), UNKNOWN)
    assert not second.opens(first.key_of(UNKNOWN), UNKNOWN)
    async with Service(ON) as service:
        path = f"/socket/{UNKNOWN}?key={first.key_of(UNKNOWN)}"
        assert (await ask(service, "GET", path)).status == 401


@servers
@pytest.mark.parametrize("tokens", [(), (f"--callback_token={TOKEN}",)])
async def test_each_callback_needs_the_key_of_its_connection(io_loop, server, tokens):
    """Else it is 401, and has no effect: send, disconnect, GET, HEAD and DELETE."""
    flags = (f"--http_server={server}", *tokens)
    async with opened(*flags) as (service, backend, client, meta):
        async with websockets.connect(service.ws_url):
            (_, other) = await backend.wait_for("connect", 2)
        key = key_of(meta)
        flipped = key[:-1] + ("A" if key[-1] != "A" else "Q")
        url = without_key(meta["send"]).removesuffix("/send")
        for query in (
            "",
            "?key=",
            "?key",
            f"?key={key_of(other['meta'])}",
            f"?key={flipped}",
            f"?key={key[:-1]}",
            f"?key={key}A",
            f"?key={key}==",
            f"?key={key.swapcase()}",
            f"?Key={key}",
            f"?key={key}&key={key}",
            f"?key={flipped}&key={key}",
            f"?type=text&key={flipped}",
            "?key=%C3%A9",
            f"?token={TOKEN}",
        ):
            for method, path in (
                ("POST", "/send"),
                ("POST", "/disconnect"),
                ("GET", ""),
                ("HEAD", ""),
                ("DELETE", ""),
            ):
                answer = await backend.call(f"{url}{path}{query}", method)
                assert answer.code == 401, (method, path, query)
                assert answer.headers["WWW-Authenticate"] == NO_TOKEN
        refused = await backend.call(f"{url}/send", body=b"no")
        detail = json.loads(refused.body)["detail"]
        assert "key" in detail and "--callback_token" in detail
        assert (await backend.call(meta["send"], body=b"yes")).code == 200
        assert await received(client) == b"yes"
        info = await backend.call(f"{url}?key={key}", "GET")
        assert json.loads(info.body)["messages_out"] == 1
        assert (await backend.call(f"{url}?key={key}", "DELETE")).code == 204


@servers
async def test_bearer_token_is_as_good_as_a_key(io_loop, server):
    """Either is sufficient; the other may then be wrong or missing."""
    flags = (f"--http_server={server}", f"--callback_token={TOKEN}")
    wrong = {"Authorization": f"Bearer {TOKEN}x"}
    async with opened(*flags) as (_, backend, client, meta):
        plain = without_key(meta["send"])
        for url, headers, status in (
            (plain, WITH_TOKEN, 200),
            (f"{plain}?key={'A' * 22}", WITH_TOKEN, 200),
            (meta["send"], WITH_TOKEN, 200),
            (meta["send"], wrong, 200),
            (meta["send"], {}, 200),
            (plain, wrong, 401),
            (plain, {}, 401),
        ):
            for more in ({}, SLOWLY):
                answer = await backend.call(url, body=b"x", headers={**headers, **more})
                assert answer.code == status, (url, headers, more)
                if status == 200:
                    assert await received(client) == b"x"
        refused = await backend.call(plain, headers=wrong)
        assert refused.headers["WWW-Authenticate"] == WRONG_TOKEN


async def test_without_tokens_no_bearer_token_is_accepted(io_loop):
    """Keys alone open the callbacks."""
    async with opened() as (_, backend, _, meta):
        answer = await backend.call(without_key(meta["send"]), headers=WITH_TOKEN)
        assert answer.code == 401


@servers
async def test_type_may_stand_beside_the_key(io_loop, server):
    """Before and behind it, with and without a handler."""
    async with opened(f"--http_server={server}") as (_, backend, client, meta):
        plain, key = without_key(meta["send"]), key_of(meta)
        for query, frame in (
            (f"key={key}&type=text", "x"),
            (f"type=text&key={key}", "x"),
            (f"key={key}&type=binary", b"x"),
            (f"type=binary&key={key}", b"x"),
            (f"other=1&key={key}&type=text&more", "x"),
            (f"&key={key}&", b"x"),
        ):
            for headers in ({}, SLOWLY):
                answer = await backend.call(
                    f"{plain}?{query}", body=b"x", headers=headers
                )
                assert answer.code == 200, query
                assert await received(client) == frame, query
        for query in (f"key={key}type=text", f"key={key}&type=blob"):
            answer = await backend.call(f"{plain}?{query}", body=b"x")
            assert answer.code == (400 if "&" in query else 401)


@servers
async def test_keys_work_below_a_path_prefix(io_loop, server):
    """With the prefix of --externalhostandport, and without it."""
    url = "--externalhostandport=http://relay.internal/sd"
    async with opened(url, f"--http_server={server}") as (
        service, _, client, meta
    ):
        assert meta["send"].startswith("http://relay.internal/sd/socket/")
        path = meta["send"].removeprefix("http://relay.internal")
        for target in (path, path.removeprefix("/sd")):
            for method, end, status in (("POST", "/send", 200), ("GET", "", 200)):
                asked = target.replace("/send", end)
                async with Caller(service) as caller:
                    answer = await caller.ask(method, asked, body=b"x")
                assert answer.status == status, asked
                plain = without_key(asked)
                assert (await ask(service, method, plain)).status == 401, plain
            assert await received(client) == b"x"


async def test_401_comes_first_and_the_rest_keeps_its_order(io_loop):
    """404, 405, 413, 415 and 400 need the key; then 410."""
    async with opened("--max_message_size=1000") as (_, backend, client, meta):
        url, key = without_key(meta["send"]).removesuffix("/send"), key_of(meta)
        await client.close()
        await backend.wait_for("disconnect", 1)
        for method, path, body, headers, status in (
            ("POST", "/x", b"", {}, 404),
            ("PUT", "/send", b"", {}, 405),
            ("POST", "/send", bytes(1001), {}, 413),
            ("POST", "/send", b"x", {"Content-Encoding": "gzip"}, 415),
            ("POST", "/send?type=blob", b"x", {}, 400),
            ("POST", "/disconnect", b"{", {}, 400),
            ("POST", "/send", b"x", {}, 410),
            ("POST", "/disconnect", b"", {}, 410),
            ("GET", "", None, {}, 410),
            ("DELETE", "", None, {}, 410),
        ):
            joint = "&" if "?" in path else "?"
            for query, expected in (("", 401), (f"{joint}key={key}", status)):
                answer = await backend.call(
                    f"{url}{path}{query}", method, body=body, headers=headers
                )
                assert answer.code == expected, (method, path, query)


async def test_callback_from_within_the_connect_event_needs_the_key(io_loop):
    """Its key is known before the handshake is decided."""
    statuses = []

    async def call_back(handler, event):
        send = event["meta"]["send"]
        for url in (without_key(send), send):
            statuses.append((await backend.call(url, body=b"early")).code)

    async with RecordingBackend() as backend:
        backend.answers["connect"] = call_back
        async with Service(*backend.flags(), ON) as service:
            async with websockets.connect(service.ws_url) as client:
                assert await received(client) == b"early"
    assert statuses == [401, 202]


async def test_other_routes_need_no_key(io_loop):
    """A key opens no route of operators, and they need none on this machine."""
    async with opened() as (service, _, _, meta):
        query = f"?key={key_of(meta)}"
        for path in ("/livez", "/readyz", "/openapi.json", "/status", "/metrics", "/"):
            assert (await ask(service, "GET", path)).status == 200, path
            assert (await ask(service, "GET", path + query)).status == 200, path
    async with opened(f"--callback_token={TOKEN}") as (service, _, _, meta):
        for path in ("/status", "/metrics"):
            answer = await ask(service, "GET", f"{path}?key={key_of(meta)}")
            assert answer.status == 401, path


@pytest.mark.parametrize("flags", [(), (f"--callback_token={TOKEN}",)])
async def test_without_the_option_nothing_changes(io_loop, flags):
    """URLs have no key, and a key from elsewhere does not matter."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                send = event["meta"]["send"]
                assert "?" not in send + event["meta"]["disconnect"]
                headers = WITH_TOKEN if flags else {}
                for url in (send, f"{send}?key={'A' * 22}"):
                    answer = await backend.call(url, body=b"x", headers=headers)
                    assert answer.code == 200
                    assert await received(client) == b"x"
                if flags:
                    answer = await backend.call(f"{send}?key={'A' * 22}", body=b"x")
                    assert answer.code == 401


async def test_keys_count_as_protection_at_the_start(io_loop):
    """No warning that callbacks need no token, though others can reach them."""
    for flags, warnings in (((), 1), ((ON,), 0)):
        async with Service("--bindip=0.0.0.0", *flags) as service:
            pass
        warned = [line for line in service.log if "callbacks need no token" in line]
        assert len(warned) == warnings


def test_events_have_the_key_in_both_urls():
    """Byte for byte as the other members, and none in a disconnect event."""
    capabilities = Capabilities(b"s" * 32)
    relay = Relay("http://h/sd", "relay/1", "0.1", key_of=capabilities.key_of)
    writer, key = EventWriter(relay), capabilities.key_of(UNKNOWN)
    handshake = Handshake({}, "/ws", "", "127.0.0.1", ())
    for event in (
        writer.connect(UNKNOWN, handshake), writer.message(UNKNOWN, 1, "x", None)
    ):
        meta = orjson.loads(event.body)["meta"]
        assert meta["send"] == f"http://h/sd/socket/{UNKNOWN}/send?key={key}"
        assert meta["disconnect"] == f"http://h/sd/socket/{UNKNOWN}/disconnect?key={key}"
    ended = Ended(UNKNOWN, Closure(1000, "", "client", 1.0))
    assert key.encode() not in writer.disconnect(ended, 0, 0).body


async def documented(*flags):
    """What /openapi.json says of a relay with `flags`."""
    async with Service(*flags) as service:
        return json.loads((await ask(service, "GET", "/openapi.json")).body)


async def test_document_has_the_security_schemes_in_use(io_loop):
    """For callbacks keys, tokens or both; for operators tokens alone."""
    token = f"--callback_token={TOKEN}"
    for flags, of_callbacks, of_operators in (
        ((), None, None),
        ((ON,), [{"key": []}], None),
        ((token,), [{"token": []}], [{"token": []}]),
        ((ON, token), [{"token": []}, {"key": []}], [{"token": []}]),
    ):
        spoken = await documented(*flags)
        schemes = spoken["components"].get("securitySchemes", {})
        assert list(schemes) == [name for each in of_callbacks or () for name in each]
        if "key" in schemes:
            assert schemes["key"]["in"] == "query"
            assert schemes["key"]["name"] == "key"
        for path, security in (
            ("/socket/{connection_id}/send", of_callbacks),
            ("/socket/{connection_id}/disconnect", of_callbacks),
            ("/socket/{connection_id}", of_callbacks),
            ("/status", of_operators),
        ):
            operations = spoken["paths"][path]
            for method in METHODS & operations.keys():
                operation = operations[method]
                assert operation.get("security") == security, (flags, path)
                assert ("401" in operation["responses"]) == (security is not None)


@servers
async def test_no_log_or_page_shows_a_key(io_loop, server):
    """At any level; /status, the description and the console's events neither."""
    flags = ("--logging=debug", f"--http_server={server}")
    async with opened(*flags) as (service, backend, client, meta):
        key = key_of(meta)
        url = without_key(meta["send"]).removesuffix("/send")
        await client.send("hello")
        await backend.wait_for("message", 1)
        async with Caller(service) as viewer:
            viewer.begin("GET", "/console/live")
            seen = b""
            calls = (
                ("POST", f"{url}/send?key={key}"),
                ("POST", f"{url}/send?key={key[:-1]}"),
                ("POST", f"{url}/send?key={key}&type=blob"),
                ("POST", f"{url}/nothing?key={key}"),
                # A mistake in the backend has made the key a part of the path.
                ("POST", f"{url}/send%3Fkey={key}"),
                ("POST", f"{url}/send%253Fkey%253D{key}"),
                ("POST", f"{url}/send&Key={key}"),
                ("GET", f"{url}?key={key}"),
                ("DELETE", f"{url}?key={key}"),
            )
            shown = b""
            for method, target in calls:
                shown += (await backend.call(target, method)).body
            async with asyncio.timeout(DEADLINE):
                while b'"close' not in seen:
                    seen += await viewer.reader.read(65536)
        shown += seen + (await ask(service, "GET", "/status")).body
        await eventually(lambda: any("DELETE /socket" in line for line in service.log))
    assert key[:-1] not in shown.decode()
    assert key[:-1] not in "\n".join(service.log)
