"""Any instance takes any callback: owners in ids, one hop, and its failures."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import signal
import socket
import time
from array import array

import pytest
import websockets
from authorization_test import BEARER, TOKENS
from console_test import live
from faults import send_raw
from metrics_test import scrape
from ports import free_ports
from service import DEADLINE, RecordingBackend, Service, eventually, tcp_server

from handlers.callbacks.actions import OK
from handlers.callbacks.bulk import Statuses
from handlers.callbacks.peers import recent
from handlers.callbacks.peers.hops import Hops, digest_of_body
from handlers.owners import Address, SharedOwners

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

SECRET = "the secret of all instances"
PATIENT = "--peer_timeout=20"  # also on a busy machine
OTHER = "a secret that nobody shares"
PLAIN = {"Content-Type": "text/plain"}
AUTHORIZED = {"Authorization": BEARER.partition(": ")[2], **PLAIN}


@pytest.fixture(scope="module")
def io_loop(module_io_loop):
    return module_io_loop


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "secret"
    path.write_text(f"{SECRET}\n")
    return path


def peer_flags(secret_file, port, host="127.0.0.1"):
    return (
        f"--bindip={host.strip('[]')}",
        f"--bindport={port}",
        f"--peer_address={host}:{port}",
        f"--peer_secret_file={secret_file}",
        PATIENT,
    )


@contextlib.asynccontextmanager
async def relays(number, secret_file, *flags, host="127.0.0.1"):
    """`number` relays with one backend; yields it and them."""
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(RecordingBackend())
        first = free_ports(number)
        running = [
            stack.enter_async_context(
                Service(
                    *backend.flags("message", "disconnect"),
                    *peer_flags(secret_file, first + at, host),
                    *flags,
                )
            )
            for at in range(number)
        ]
        yield backend, await asyncio.gather(*running)


@pytest.fixture(scope="module")
def trio(module_io_loop, shared, secret_file):
    """Three relays with a token, which no test stops, and their backend."""
    return module_io_loop.run_sync(
        lambda: shared.enter_async_context(relays(3, secret_file, TOKENS))
    )


@contextlib.asynccontextmanager
async def joined(backend, service):
    """A client of `service`, and the meta of its first event."""
    name = secrets.token_hex(8)
    async with websockets.connect(service.ws_url) as client:
        await client.send(name)

        def found():
            return [e["meta"] for e in backend.of("message") if e["message"] == name]

        await eventually(found)
        yield client, found()[0]


def at(service, meta, action="send"):
    """The callback URL of a connection at `service`, which may be any instance."""
    path = f"/socket/{meta['connection_id']}"
    return service.callback_url + path + (f"/{action}" if action else "")


async def received(client):
    return await asyncio.wait_for(client.recv(), DEADLINE)


async def call(backend, url, **rest):
    rest.setdefault("headers", AUTHORIZED)
    return await backend.call(url, **rest)


# Ids.


def test_ids_have_owner_and_mac():
    """In hex digits only; each instance with the secret finds the owner."""
    own, other = Address.parse("10.0.0.3:8765"), Address.parse("[fd00::3]:80")
    owners = SharedOwners(own, [SECRET.encode()])
    others = SharedOwners(other, [OTHER.encode(), SECRET.encode()])
    made = owners.new_id()
    assert len(made) == 60 and len(others.new_id()) == 84
    assert set(made) <= set("0123456789abcdef")
    assert made[32:44] == "0a000003" + "223d"
    assert str(others.elsewhere(made)) == "10.0.0.3:8765"
    assert owners.elsewhere(made) is None
    # Made with a secret that the other does not have.
    assert owners.elsewhere(others.new_id()) is None
    for wrong in (
        made[:-1] + "0123456789abcdef"[int(made[-1], 16) - 1],
        "0" + made[1:] if made[0] != "0" else "1" + made[1:],
        made[:32] + "0a000004223d" + made[44:],
        made[:32],
        made.upper(),
        "",
        "\u00e9" * 60,
    ):
        assert others.elsewhere(wrong) is None


@pytest.mark.parametrize(
    "text",
    ["10.0.0.3", "10.0.0.3:0", "10.0.0.3:65536", "0.0.0.0:80", "[::]:80", "host:80",
     "[fe80::1%eth0]:80", "224.0.0.1:80", "[10.0.0.3]:80", ":80", "10.0.0.3:+8"],
)
def test_invalid_peer_addresses(text):
    with pytest.raises(ValueError):
        Address.parse(text)


def test_one_address_has_one_text():
    for text in ("[fd00:0::3]:80", "fd00::3:80"):
        assert str(Address.parse(text)) == "[fd00::3]:80"
    assert str(Address.parse("[::ffff:10.0.0.3]:80")) == "10.0.0.3:80"


# Forwarding.


async def test_each_instance_takes_each_callback(io_loop, trio):
    """Send, info, disconnect and delete; the answer is that of the owner."""
    backend, services = trio
    first, second, third = services
    before = await forwarded(first)
    async with joined(backend, second) as (client, meta):
        for number, service in enumerate(services):
            answer = await call(backend, at(service, meta), body=f"{number}")
            assert (answer.code, answer.body) == (200, b"OK")
            assert await received(client) == f"{number}"
        binary = await backend.call(
            at(first, meta),
            body=b"\xff\x00",
            headers={"Authorization": AUTHORIZED["Authorization"]},
        )
        assert binary.code == 200
        assert await received(client) == b"\xff\x00"
        text = await call(backend, at(first, meta) + "?type=text", body=b"text")
        assert text.code == 200
        assert await received(client) == "text"
        # With a receipt, which a handler answers.
        url = at(third, meta) + "?receipt=pong&timeout=20"
        assert (await call(backend, url, body="pong")).code == 200
        info = await call(backend, at(first, meta, ""), method="GET")
        assert json.loads(info.body)["connection_id"] == meta["connection_id"]
        assert info.headers["Cache-Control"] == "no-store"
        head = await call(backend, at(first, meta, ""), method="HEAD")
        assert head.code == 200
        # What the instance that takes the callback rejects itself.
        assert (await call(backend, at(first, meta), body=b"\xff")).code == 400
        body = json.dumps({"code": 4000, "reason": "enough"})
        url = at(first, meta, "disconnect")
        assert (await call(backend, url, body=body)).code == 200
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert (client.close_code, client.close_reason) == (4000, "enough")
        for service in services:
            gone = await call(backend, at(service, meta), body="x")
            assert gone.code == 410
            assert "type" not in json.loads(gone.body)
    async with joined(backend, second) as (client, meta):
        url = at(third, meta, "")
        assert (await call(backend, url, method="DELETE")).code == 204
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
    assert await forwarded(first) - before >= 7
    assert await forwarded(first, "gone") == 0


async def test_forged_owners_and_hops_reach_nobody(io_loop, trio):
    """A wrong MAC is 410 without a hint, a wrong hop 401; no connection is made."""
    connected = []

    async def serve(reader, writer):
        connected.append(writer)

    backend, (first, second, _) = trio
    before = [await forwarded(service) for service in (first, second)]
    async with tcp_server(serve) as port:
        address = Address.parse(f"127.0.0.1:{port}")
        forged = SharedOwners(address, [OTHER.encode()]).new_id()
        answer = await call(backend, at(first, {"connection_id": forged}), body="x")
        assert answer.code == 410
        known = await call(
            backend, at(first, {"connection_id": "0" * 32}), body="x"
        )
        assert known.body == answer.body
        # A valid id of an instance, and a hop that no instance has signed.
        valid = SharedOwners(address, [SECRET.encode()]).new_id()
        url = at(first, {"connection_id": valid})
        path = url.removeprefix(first.callback_url)
        now = int(time.time())
        for hop in (
            "", "x", f"x;t={now};v1=", f"x;t={now};v1={'0' * 64}",
            signed_hop(path, key="k", secret=OTHER),
            signed_hop(path, key="another"),
            signed_hop(path + "x", key="k"),
            signed_hop(path, key="k", body=b"y"),
            signed_hop(path, key="k", method=b"PUT"),
            signed_hop(path, key="k", content_type=b"text/html"),
            signed_hop(path, key="k", seconds=now - 70),
            signed_hop(path, key="k", seconds=now + 70),
        ):
            headers = hop_headers(hop)
            assert (await call(backend, url, body="x", headers=headers)).code == 401
        # A good one is never forwarded again.
        headers = hop_headers(signed_hop(path, key="k"))
        assert (await call(backend, url, body="x", headers=headers)).code == 410
        assert not connected
        assert [await forwarded(service) for service in (first, second)] == before


def signed_hop(
    path, key, secret=SECRET, body=b"x", method=b"POST", content_type=b"text/plain",
    seconds=None,
):
    """The header of a hop, by default of a plain send."""
    clock = time.time if seconds is None else lambda: seconds
    hops = Hops("tester", [secret.encode()], clock)
    parts = method, path.encode(), content_type, key.encode(), digest_of_body(body)
    return hops.sign(parts).decode()


def hop_headers(hop, key="k"):
    return {
        "Content-Type": "text/plain",
        "Idempotency-Key": key,
        "SocketDock-Hop": hop,
    }


REFUSED_HOPS = {
    "charset": (415, "text/plain; charset=latin-1", ("Host: relay",)),
    "coding": (415, "text/plain", ("Host: relay", "Content-Encoding: gzip")),
    "no-host": (400, "text/plain", ()),
    "odd-host": (400, "text/plain", ("Host: a b",)),
}


@pytest.mark.parametrize("row", REFUSED_HOPS)
async def test_hop_is_refused_as_any_callback_is(io_loop, trio, row):
    """Although its signature is good, and its header comes first."""
    backend, (service, *_) = trio
    status, kind, more = REFUSED_HOPS[row]
    async with joined(backend, service) as (client, meta):
        path = at(service, meta).removeprefix(service.callback_url)
        key = f"hop {row}"
        hop = signed_hop(path, key, content_type=kind.encode())
        lines = (
            f"POST {path} HTTP/1.1", f"SocketDock-Hop: {hop}", f"Content-Type: {kind}",
            f"Idempotency-Key: {key}", "Content-Length: 1", *more, "", "x",
        )  # fmt: skip
        request = "\r\n".join(lines).encode()
        refused = await send_raw(service.callback_url, request, answers=1)
        assert refused.statuses == [status]
        await call(backend, at(service, meta), body="last", headers=AUTHORIZED)
        assert await received(client) == "last"


async def test_hop_needs_no_token_and_is_carried_out_once(io_loop, trio):
    """A hop that was recorded cannot be replayed."""
    backend, (service, *_) = trio
    async with joined(backend, service) as (client, meta):
        url = at(service, meta)
        path = url.removeprefix(service.callback_url)
        for key in ("hop recorded", "of-the-backend"):
            headers = hop_headers(signed_hop(path, key=key), key)
            for _ in range(2):
                answer = await call(backend, url, body="x", headers=headers)
                assert answer.code == 200
        # Without a hop the token counts.
        assert (await backend.call(url, body="x")).code == 401
        await call(backend, url, body="last", headers=AUTHORIZED)
        # Two keys, each carried out once.
        frames = [await received(client) for _ in range(3)]
        assert frames == ["x", "x", "last"]


async def test_token_and_key_are_checked_before_forwarding(io_loop, secret_file):
    """The instance that takes a callback authorizes it, and strips the key."""
    flags = (TOKENS, "--callback_capability=on")
    async with relays(2, secret_file, *flags) as (backend, (first, second)):
        async with joined(backend, second) as (client, meta):
            url = at(first, meta)
            assert (await backend.call(url, body="x")).code == 401
            assert (await call(backend, url, body="1", headers=AUTHORIZED)).code == 200
            query = meta["send"].partition("?")[2]
            assert query.startswith("key=")
            wrong = query[:-1] + ("A" if query[-1] != "A" else "B")
            for parts, body, status in (
                (wrong, "x", 401),
                (query, "2", 200),
                (f"type=binary&{query}&receipt=pong", "3", 200),
            ):
                answer = await call(
                    backend, f"{url}?{parts}", body=body, headers=PLAIN
                )
                assert answer.code == status
            assert [await received(client) for _ in range(3)] == ["1", "2", b"3"]
            assert await forwarded(first) == 3


async def forwarded(service, outcome="answered"):
    """How many callbacks a relay has forwarded with that outcome."""
    found = await scrape(service, BEARER)
    return found[f'forwarded_total{{outcome="{outcome}"}}']


async def test_forwarded_request_is_what_the_contract_says(io_loop, secret_file):
    """Its parts, and a signature that others can verify."""
    requests = []

    async def serve(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = dict(line.split(": ", 1) for line in lines[1:])
            body = await reader.readexactly(int(headers["Content-Length"]))
            requests.append((lines[0], headers, body))
            writer.write(b"HTTP/1.1 429 X\r\nRetry-After: 7\r\nX-Y: z\r\n"
                         b"Content-Length: 5\r\nContent-Type: text/a\r\n\r\nlater")

    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    async with (
        tcp_server(serve) as port,
        relays(1, secret_file, "--externalhostandport=http://x/sd") as (
            backend,
            (relay,),
        ),
    ):
        owner = Address.parse(f"127.0.0.1:{port}")
        made = SharedOwners(owner, [SECRET.encode()]).new_id()
        for action, query, key, kept in (
            ("send", "?type=text&key=k&receipt=pong", "", "?type=text&receipt=pong"),
            ("send", "?key=" + "k" * 22, "", ""),
            ("disconnect", "", "the-key", ""),
            ("", "?key=k", "", ""),
        ):
            path = f"/sd/socket/{made}/{action}".rstrip("/")
            headers = {
                "Content-Type": "text/plain; charset=utf-8",
                "traceparent": trace,
            }
            if key:
                headers["Idempotency-Key"] = key
            body = "{}" if action else None
            answer = await backend.call(
                relay.callback_url + path + query,
                method="POST" if action else "DELETE",
                body=body,
                headers=headers,
            )
            # The answer comes back as it is.
            assert (answer.code, answer.body) == (429, b"later")
            assert answer.headers["Retry-After"] == "7"
            assert answer.headers["Content-Type"] == "text/a"
            line, headers, sent = requests.pop()
            method = "POST" if action else "DELETE"
            assert line == f"{method} {path}{kept} HTTP/1.1"
            assert headers["traceparent"] == trace
            assert headers["Content-Type"] == "text/plain; charset=utf-8"
            assert headers["Idempotency-Key"] == key or not key
            assert "Authorization" not in headers
            assert sent == (body or "").encode()
            instance, seconds, signature = headers["SocketDock-Hop"].split(";")
            assert "/" in instance
            assert abs(int(seconds.removeprefix("t=")) - time.time()) < 60
            text = "\n".join((
                "hop", method, path + kept, seconds.removeprefix("t="),
                headers["Content-Type"], headers["Idempotency-Key"],
                hashlib.sha256(sent).hexdigest(),
            ))
            expected = hmac.new(SECRET.encode(), text.encode(), "sha256").hexdigest()
            assert signature == f"v1={expected}"


async def test_forwarded_bulk_callback_keeps_its_trace(io_loop, secret_file):
    """It is one request for each owner, with the trace of the whole."""
    heads = []

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2]))
        await reader.readexactly(int(heads[-1]["Content-Length"]))
        writer.write(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")

    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    async with (
        tcp_server(serve) as port,
        relays(1, secret_file, TOKENS) as (backend, (relay,)),
    ):
        owners = SharedOwners(Address.parse(f"127.0.0.1:{port}"), [SECRET.encode()])
        command = {"send": "x", "connection_ids": [owners.new_id(), owners.new_id()]}
        for key in ({}, {"Idempotency-Key": "k"}):
            _, results = await bulk(
                backend, relay, command, command, traceparent=trace, **key
            )
            assert [each["status"] for each in results] == [503] * 4
            head = heads.pop()
            assert not heads
            assert head["traceparent"] == trace
            assert head["Idempotency-Key"] == "k" or not key


@pytest.mark.parametrize("key", ["a-key", "hop-1", "hop"])
async def test_repeat_at_another_instance_is_carried_out_once(io_loop, trio, key):
    """Each owner remembers the keys of its connections, whatever they are."""
    backend, services = trio
    async with joined(backend, services[0]) as (client, meta):
        headers = AUTHORIZED | {"Idempotency-Key": key}
        answers = [
            await call(backend, at(service, meta), body="x", headers=headers)
            for service in (*services[1:], services[0])
        ]
        assert [answer.code for answer in answers] == [200, 200, 200]
        replayed = ["Idempotent-Replayed" in a.headers for a in answers]
        assert replayed == [False, True, True]
        other = await call(
            backend, at(services[2], meta), body="y", headers=headers
        )
        assert other.code == 422
        await call(backend, at(services[2], meta), body="last")
        assert [await received(client) for _ in range(2)] == ["x", "last"]


# Owners that do not answer.


async def test_dead_owner_is_410_at_once(io_loop, secret_file):
    """Its port refuses: the instance is gone, with all its connections."""
    async with relays(2, secret_file) as (backend, services):
        first, second = services
        async with joined(backend, second) as (_, meta):
            assert (await call(backend, at(first, meta), body="x")).code == 200
            second.process.send_signal(signal.SIGKILL)
            await asyncio.wait_for(second.process.wait(), DEADLINE)
            began = time.monotonic()
            for action in ("send", "disconnect"):
                answer = await call(backend, at(first, meta, action), body="")
                assert answer.code == 410
                assert json.loads(answer.body)["type"] == "instance-gone"
            assert time.monotonic() - began < 15
            found = await scrape(first)
            assert found['forwarded_total{outcome="gone"}'] == 2


@contextlib.contextmanager
def silent_host():
    """An address whose connections are never established: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        stack.enter_context(listener)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(listener.getsockname())
        yield listener.getsockname()[1]


async def test_silent_owner_is_503_within_the_timeout(io_loop, secret_file):
    """Many callbacks at once do not wait for each other."""
    with silent_host() as port:
        address = Address.parse(f"127.0.0.1:{port}")
        owners = SharedOwners(address, [SECRET.encode()])
        async with relays(1, secret_file, "--peer_timeout=1") as (backend, (service,)):
            urls = [
                at(service, {"connection_id": owners.new_id()}) for _ in range(200)
            ]
            async with asyncio.timeout(DEADLINE):
                answers = await asyncio.gather(
                    *(call(backend, url, body="x") for url in urls)
                )
            assert {answer.code for answer in answers} == {503}
            assert {answer.headers["Retry-After"] for answer in answers} == {"2"}


async def test_unanswered_callback_is_504(io_loop, secret_file):
    """The owner has taken it and says nothing, ends the connection, or is another.

    What listens there now may not be a relay.
    """
    async def hold(reader, writer):
        await reader.read()

    async def end(reader, writer):
        await reader.readuntil(b"\r\n\r\n")

    def answering(answer):
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

        return serve

    upgrade = b"Upgrade: x\r\nConnection: upgrade\r\n\r\n"
    switching = answering(b"HTTP/1.1 101 Go\r\n" + upgrade)
    unknown = answering(b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n")
    flags = ("--peer_timeout=2", "--send_timeout=0.3")
    async with relays(1, secret_file, *flags) as (backend, (service,)):
        for serve in (hold, end, switching, unknown):
            async with tcp_server(serve) as port:
                address = Address.parse(f"127.0.0.1:{port}")
                forged = SharedOwners(address, [SECRET.encode()]).new_id()
                url = at(service, {"connection_id": forged})
                assert (await call(backend, url, body="x")).code == 504


async def test_answer_with_odd_headers_is_passed_on_without_them(io_loop, secret_file):
    """They are no reason for a 500."""
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Slow\r\nRetry-After: 1\x012\r\n"
                     b"Content-Type: a\xffb\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()

    async with relays(1, secret_file) as (backend, (service,)):
        async with tcp_server(serve) as port:
            address = Address.parse(f"127.0.0.1:{port}")
            forged = SharedOwners(address, [SECRET.encode()]).new_id()
            url = at(service, {"connection_id": forged})
            answer = await call(backend, url, body="x")
            assert (answer.code, answer.body) == (429, b"no")
            assert "Retry-After" not in answer.headers
        assert "Traceback" not in str(service.log)


# Bulk callbacks, and commands in responses.


async def bulk(backend, service, *commands, status=200, **headers):
    """The answer of a bulk callback, and its results."""
    headers = AUTHORIZED | {"Content-Type": "application/json"} | headers
    body = json.dumps({"commands": commands})
    answer = await backend.call(
        f"{service.callback_url}/commands", body=body, headers=headers
    )
    assert answer.code == status, answer.body
    return answer, json.loads(answer.body).get("results")


@contextlib.asynccontextmanager
async def one_client_each(backend, services):
    """A client of each relay, and the ids of their connections."""
    async with contextlib.AsyncExitStack() as stack:
        clients, ids = [], []
        for service in services:
            client, meta = await stack.enter_async_context(joined(backend, service))
            clients.append(client)
            ids.append(meta["connection_id"])
        yield clients, ids


async def test_bulk_callback_reaches_the_clients_of_all_instances(
    io_loop, secret_file
):
    """Results have the order of the request; those of a dead owner are 410."""
    async with relays(3, secret_file, TOKENS) as (backend, services):
        async with one_client_each(backend, services) as (clients, ids):
            unknown = "0" * 32
            odd = "\x00\U0001f986\"\\\u2028"
            commands = (
                {"send": "a", "connection_ids": [ids[2], unknown, ids[0], ids[1]]},
                {"send": "/wA=", "type": "binary", "encoding": "base64",
                 "connection_id": ids[1]},
                {"send": odd, "type": "binary", "connection_id": ids[2]},
                {"send": odd, "receipt": "pong", "timeout": 20,
                 "connection_ids": ids[::-1]},
                {"state": {"n": 1}, "connection_ids": ids},
                {"close": True, "connection_id": ids[0]},
                {"close": {"code": 4001, "reason": "r"}, "connection_id": ids[1]},
            )
            _, results = await bulk(backend, services[0], *commands)
            named = [ids[2], unknown, ids[0], ids[1], ids[1], ids[2], *ids[::-1], *ids,
                     ids[0], ids[1]]
            assert [each["connection_id"] for each in results] == named
            assert [each["status"] for each in results] == [
                410 if each == unknown else 200 for each in named
            ]
            assert [await received(client) for client in clients] == ["a"] * 3
            assert await received(clients[1]) == b"\xff\x00"
            assert await received(clients[2]) == odd.encode()
            assert [await received(client) for client in clients] == [odd] * 3
            for client in clients[:2]:
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert [c.close_code for c in clients[:2]] == [1000, 4001]
            before = len(backend.of("message"))
            await clients[2].send("what is the state?")
            await backend.wait_for("message", before + 1)
            assert backend.of("message")[-1]["meta"]["state"] == {"n": 1}
            services[1].process.send_signal(signal.SIGKILL)
            await asyncio.wait_for(services[1].process.wait(), DEADLINE)
            _, results = await bulk(
                backend, services[0],
                {"send": "b", "connection_ids": [ids[1], ids[2], ids[1]]},
            )
            assert [each["status"] for each in results] == [410, 200, 410]
            assert await received(clients[2]) == "b"


async def test_bulk_callback_is_repeated_at_another_instance(io_loop, trio):
    """Each owner remembers its part; another body is 422, and nothing is done."""
    backend, services = trio
    async with one_client_each(backend, services) as (clients, ids):
        key = {"Idempotency-Key": "once"}
        command = {"send": "x", "connection_ids": ids}
        first, results = await bulk(backend, services[0], command, **key)
        assert "Idempotent-Replayed" not in first.headers
        for service in services[::-1]:
            again, repeated = await bulk(backend, service, command, **key)
            assert repeated == results
            assert again.headers["Idempotent-Replayed"] == "true"
        for changed in (
            {"send": "y", "connection_ids": ids},
            {"send": "x", "connection_ids": ids[:1]},
            {"send": "x", "connection_ids": ids[1:]},
        ):
            for service in services:
                await bulk(backend, service, changed, status=422, **key)
        await bulk(backend, services[1], command | {"send": "last"})
        for client in clients:
            assert [await received(client) for _ in range(2)] == ["x", "last"]


async def test_forwarded_bulk_callback_is_not_forwarded_again(io_loop, trio):
    """Its connections are here, or gone."""
    backend, (*services, _) = trio
    async with one_client_each(backend, services) as (clients, ids):
        body = json.dumps({"commands": [{"send": "x", "connection_ids": ids}]})
        hop = signed_hop(
            "/commands", "hop-1", body=body.encode(),
            content_type=b"application/json",
        )
        headers = hop_headers(hop, "hop-1") | {"Content-Type": "application/json"}
        url = f"{services[0].callback_url}/commands"
        answer = await backend.call(url, body=body, headers=headers)
        statuses = [each["status"] for each in json.loads(answer.body)["results"]]
        assert statuses == [200, 410]
        assert await received(clients[0]) == "x"


async def test_commands_in_responses_reach_other_instances(io_loop, secret_file):
    """They are forwarded, in order, and the event does not wait for them."""
    async with relays(2, secret_file) as (backend, services):
        async with one_client_each(backend, services) as (clients, ids):

            async def reply(handler, event):
                handler.set_header("Content-Type", "application/vnd.socketdock+json")
                commands = [
                    {"send": f"{number}", "connection_ids": [*ids, "0" * 32]}
                    for number in range(100)
                ]
                handler.finish(json.dumps({"commands": commands}))

            backend.answers["message"] = reply
            await clients[0].send("to all")
            for client in clients:
                frames = [await received(client) for _ in range(100)]
                assert frames == [f"{number}" for number in range(100)]
            services[1].process.send_signal(signal.SIGKILL)
            await asyncio.wait_for(services[1].process.wait(), DEADLINE)
            await clients[0].send("to all")
            frames = [await received(clients[0]) for _ in range(100)]
            gone = 'commands_total{command="send",outcome="gone",source="response"}'
            async with asyncio.timeout(DEADLINE):
                # The unknown connection twice, and the dead instance's once.
                while (await scrape(services[0]))[gone] < 300:
                    await asyncio.sleep(0.01)


async def test_console_shows_callbacks_that_are_forwarded(io_loop, trio):
    """Where they were received; with their owner and their answer."""
    backend, (first, second, _) = trio
    owner = second.callback_url.removeprefix("http://")
    async with live(first, BEARER) as (stream, _):
        async with joined(backend, second) as (client, meta):
            answer = await call(backend, at(first, meta), body=b"hello")
            assert answer.code == 200
            assert await received(client) == "hello"
            event = await stream.until("forwarded", id=meta["connection_id"])
            assert (event["owner"], event["outcome"]) == (owner, "answered")
            assert event["status"] == 200


async def test_forwarded_callbacks_are_forgotten_before_they_take_too_much(
    io_loop, monkeypatch
):
    """Two generations are known; the statuses of each are limited, too."""
    monkeypatch.setattr(recent, "MAX_STATUSES", 100)
    monkeypatch.setattr(recent, "MAX_IN_GENERATION", 5)
    known = recent.Recent(asyncio.get_running_loop())

    async def act() -> Statuses:
        return Statuses(array("H", [200] * 50))

    for key in "abcd":  # "c" begins the second generation
        await known.once(key, act)
    assert "a" in known
    await known.once("e", act)
    assert "b" not in known and "c" in known
    for key in "fghijk":  # "j" is the sixth of this generation
        known.add(key, OK)
    assert "d" not in known and "e" in known
