"""Requests with an `Idempotency-Key` are carried out once."""

import asyncio
import contextlib
import json
from array import array
from http import HTTPStatus

import pytest
import websockets
from authorization_test import Caller
from service import DEADLINE, RecordingBackend, Service, eventually, withhold
from slow import SlowClient

from handlers.callbacks import repeats
from handlers.callbacks.actions import ACCEPTED, FULL, GONE, OK, Outcome
from handlers.callbacks.bulk import Statuses
from handlers.callbacks.repeats import Keyed, KeyReused, Repeats, digest_of

pytestmark = pytest.mark.gen_test(timeout=60)

ROOM = "--max_send_buffer=100000000"
LARGE = 16 * 2**20  # bytes, more than the kernel takes for a client that does not read

servers = pytest.mark.parametrize("server", ["fast", "tornado"])


@contextlib.asynccontextmanager
async def opened(*flags):
    """A relay, its backend, a client, and the URL of its connection."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"].removesuffix("/send")
                yield service, backend, client, url


@contextlib.asynccontextmanager
async def deaf(*flags):
    """The same with a client that has not read its first, large frame.

    Also yields the task of this frame's send.
    """
    flags = (ROOM, f"--max_message_size={LARGE}", "--send_timeout=60", *flags)
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url, 4096) as client:
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"].removesuffix("/send")
                first = asyncio.create_task(
                    backend.call(f"{url}/send", body=bytes(LARGE))
                )
                await bytes_out(backend, url, LARGE)
                yield backend, client, url, first
                await asyncio.wait_for(first, DEADLINE)


async def bytes_out(backend, url, number, **headers):
    """Wait until `number` bytes are being sent to the client."""
    async with asyncio.timeout(DEADLINE):
        while True:
            answer = await backend.call(url, "GET", headers=headers)
            if answer.code == 200 and json.loads(answer.body)["bytes_out"] >= number:
                return


async def call(backend, url, key, body=b"x", **headers):
    """The answer to a request with a key."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await backend.call(
        url, body=body, headers={"Idempotency-Key": key, **names}
    )


def replayed(answer):
    return answer.headers.get("Idempotent-Replayed")


async def frames_until(client, last):
    """All frames up to one that is `last`."""
    frames = []
    async with asyncio.timeout(DEADLINE):
        while not frames or frames[-1] != last:
            frames.append(await client.recv())
    return frames


# Over HTTP.


@servers
async def test_send_is_carried_out_once(io_loop, server):
    """A repeat gets the same answer, with a header; each key is its own request."""
    async with opened(f"--http_server={server}") as (_, backend, client, url):
        first = await call(backend, f"{url}/send", "one")
        assert (first.code, first.body, replayed(first)) == (200, b"OK", None)
        for _ in range(3):
            again = await call(backend, f"{url}/send", "one")
            assert (again.code, again.body, replayed(again)) == (200, b"OK", "true")
            assert again.headers["Content-Type"] == first.headers["Content-Type"]
        for key in ("two", "One", "!" * 255, "~"):
            assert replayed(await call(backend, f"{url}/send", key)) is None
        for _ in range(2):  # without a key each is carried out
            assert (await backend.call(f"{url}/send", body=b"y")).code == 200
        await backend.call(f"{url}/send", body=b"last")
        frames = await frames_until(client, b"last")
        assert frames == [b"x"] * 5 + [b"y"] * 2 + [b"last"]


@servers
async def test_a_hundred_concurrent_repeats_send_one_frame(io_loop, server):
    """All wait for the answer of the first, and get it."""
    async with deaf(f"--http_server={server}") as (backend, client, url, first):
        calls = [
            asyncio.create_task(call(backend, f"{url}/send", "once", b"small"))
            for _ in range(100)
        ]
        await bytes_out(backend, url, LARGE + 5)
        assert not any(each.done() for each in (first, *calls))
        assert (await backend.call(f"{url}/disconnect")).code == 200
        await client.read()
        async with asyncio.timeout(DEADLINE):
            answers = await asyncio.gather(*calls)
        assert {answer.code for answer in answers} == {200}
        assert sorted(str(replayed(each)) for each in answers) == (
            ["None"] + ["true"] * 99
        )
    sizes = [len(payload) for opcode, payload in client.frames() if opcode != 8]
    assert sizes == [LARGE, 5]


async def test_repeat_waits_for_an_answer_whatever_it_is(io_loop):
    """The client ends before it has read the frame: 410 for all."""
    stack = contextlib.AsyncExitStack()
    async with deaf() as (backend, client, url, _), stack:
        host, _, path = url.removeprefix("http://").partition("/")
        address, port = host.split(":")
        readers = []
        for _ in range(5):
            reader, writer = await asyncio.open_connection(address, int(port))
            stack.callback(writer.close)
            writer.write(
                f"POST /{path}/send HTTP/1.1\r\nHost: {host}\r\n"
                "Idempotency-Key: once\r\nContent-Length: 5\r\n\r\nsmall".encode()
            )
            await writer.drain()
            readers.append(reader)
        await bytes_out(backend, url, LARGE + 5)
        # These five requests arrived before this one, and so were read before it.
        await bytes_out(backend, url, LARGE + 5)
        client.sock.close()
        async with asyncio.timeout(DEADLINE):
            heads = [await reader.readuntil(b"\r\n\r\n") for reader in readers]
        assert all(head.startswith(b"HTTP/1.1 410 ") for head in heads)
        assert sorted(b"Idempotent-Replayed: true" in head for head in heads) == (
            [False] + [True] * 4
        )
        # It was not remembered.
        assert replayed(await call(backend, f"{url}/send", "once", b"small")) is None


@servers
async def test_first_answer_comes_before_410(io_loop, server):
    """The client has left meanwhile, and other keys get 410."""
    async with opened(f"--http_server={server}") as (_, backend, client, url):
        for route in ("send", "disconnect"):
            assert (await call(backend, f"{url}/{route}", "one", b"")).code == 200
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        await backend.wait_for("disconnect", 1)
        for route in ("send", "disconnect"):
            again = await call(backend, f"{url}/{route}", "one", b"")
            assert (again.code, replayed(again)) == (200, "true")
            for _ in range(2):
                other = await call(backend, f"{url}/{route}", "two", b"")
                assert (other.code, replayed(other)) == (410, None)
            reused = await call(backend, f"{url}/{route}", "one", b"{}")
            assert reused.code == 422


async def test_first_answer_comes_before_429(io_loop):
    """A full send buffer does not matter to a repeat; a 429 is not remembered."""
    flags = (f"--max_message_size={LARGE}", "--max_send_buffer=1000")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags, "--send_timeout=60") as service:
            with await SlowClient.connect(service.ws_url, 4096) as client:
                (event,) = await backend.wait_for("connect", 1)
                send = event["meta"]["send"]
                assert (await call(backend, send, "one")).code == 200
                large = asyncio.create_task(backend.call(send, body=bytes(LARGE)))
                await bytes_out(backend, send.removesuffix("/send"), LARGE)
                for key, code, expected in (
                    ("new", 429, None),
                    ("new", 429, None),
                    ("one", 200, "true"),
                ):
                    answer = await call(backend, send, key, bytes(1001))
                    assert answer.code == (422 if key == "one" else code)
                    answer = await call(backend, send, key)
                    assert (answer.code, replayed(answer)) == (code, expected)
                closing = asyncio.create_task(
                    backend.call(event["meta"]["disconnect"])
                )
                await client.read()
                assert (await asyncio.wait_for(large, DEADLINE)).code == 200
                assert (await asyncio.wait_for(closing, DEADLINE)).code == 200


@servers
async def test_keys_belong_to_a_connection_and_a_route(io_loop, server):
    """The same key elsewhere is another request."""
    async with opened(f"--http_server={server}") as (service, backend, client, url):
        async with websockets.connect(service.ws_url) as other:
            (_, event) = await backend.wait_for("connect", 2)
            other_url = event["meta"]["send"].removesuffix("/send")
            for each in (url, other_url):
                answer = await call(backend, f"{each}/send", "one", b"")
                assert (answer.code, replayed(answer)) == (200, None)
            for each in (client, other):
                assert await asyncio.wait_for(each.recv(), DEADLINE) == b""
            answer = await call(backend, f"{url}/disconnect", "one", b"")
            assert (answer.code, replayed(answer)) == (200, None)
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert (await backend.call(f"{other_url}/send")).code == 200


@servers
async def test_key_with_another_request_is_422(io_loop, server):
    """Another body, or another type of the frame; nothing is sent."""
    async with opened(f"--http_server={server}") as (_, backend, client, url):
        text = {"Content_Type": "text/plain"}
        assert (await call(backend, f"{url}/send", "one", b"x", **text)).code == 200
        for query, body, headers, status in (
            ("", b"x", text, 200),
            ("?type=text", b"x", {}, 200),  # the same frame
            ("", b"x", {"Content_Type": "application/json"}, 200),
            ("", b"y", text, 422),
            ("", b"", text, 422),
            ("", b"x", {}, 422),
            ("?type=binary", b"x", text, 422),
            ("?type=blob", b"x", text, 400),
            ("?type=text", b"\xff", text, 400),
        ):
            answer = await call(backend, f"{url}/send{query}", "one", body, **headers)
            assert answer.code == status, (query, body, headers)
            assert replayed(answer) == ("true" if status == 200 else None)
            if status >= 400:
                problem = json.loads(answer.body)
                assert problem["status"] == status
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert status == 400 or "Idempotency-Key" in problem["detail"]
        await backend.call(f"{url}/send", body=b"last")
        assert await frames_until(client, b"last") == ["x", b"last"]
        closing = json.dumps({"code": 3000}).encode()
        assert (await call(backend, f"{url}/disconnect", "one", closing)).code == 200
        reused = await call(backend, f"{url}/disconnect", "one", b'{"code": 3001}')
        assert reused.code == 422
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 3000


@servers
async def test_malformed_key_is_400(io_loop, server):
    """1 to 255 visible ASCII characters, in one header; 413 and 415 come first."""
    flag = f"--http_server={server}"
    async with opened(flag, "--max_message_size=1000") as (service, backend, _, url):
        path = url.removeprefix(service.callback_url)
        for lines in (
            ["Idempotency-Key:"],
            ["Idempotency-Key: a b"],
            ["Idempotency-Key: \xe9"],
            ["Idempotency-Key: a\tb"],
            [f"Idempotency-Key: {'x' * 256}"],
            ["Idempotency-Key: a", "Idempotency-Key: a"],
        ):
            for route in ("send", "disconnect"):
                async with Caller(service) as caller:
                    answer = await caller.ask(
                        "POST", f"{path}/{route}", *lines, body=b""
                    )
                assert answer.status == 400, lines
                assert "Idempotency-Key" in answer.detail
        for body, more, status in (
            (bytes(1001), {}, 413), (b"", {"Content_Encoding": "gzip"}, 415)
        ):
            answer = await call(backend, f"{url}/send", "a b", body, **more)
            assert answer.code == status
        # Other methods have no effect that could be repeated, or repeat it anyway.
        for method, status in (("GET", 200), ("DELETE", 204)):
            answer = await backend.call(url, method, headers={"Idempotency-Key": "a b"})
            assert answer.code == status


async def test_202_of_a_handshake_is_repeated(io_loop):
    """The frame of the first follows the 101, and those of repeats do not exist."""
    async with RecordingBackend() as backend:
        release = withhold(backend, "connect")
        async with Service(*backend.flags()) as service:
            connecting = asyncio.ensure_future(websockets.connect(service.ws_url))
            (event,) = await backend.wait_for("connect", 1)
            send = event["meta"]["send"]
            for expected in (None, "true"):
                answer = await call(backend, send, "one")
                assert (answer.code, replayed(answer)) == (202, expected)
            release.set()
            client = await asyncio.wait_for(connecting, DEADLINE)
            again = await call(backend, send, "one")
            assert (again.code, replayed(again)) == (202, "true")
            assert (await backend.call(send, body=b"last")).code == 200
            assert await frames_until(client, b"last") == [b"x", b"last"]
            await client.close()


async def test_request_goes_on_without_its_caller(io_loop):
    """A caller that gave up repeats the request, and gets the first one's answer."""
    async with deaf() as (backend, client, url, _):
        path = url[url.index("/socket") :]
        host, port = url.split("/")[2].split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"POST {path}/send HTTP/1.1\r\nHost: x\r\nIdempotency-Key: one\r\n"
            "Content-Length: 5\r\n\r\nsmall".encode()
        )
        await bytes_out(backend, url, LARGE + 5)
        writer.close()
        await writer.wait_closed()
        repeat = asyncio.create_task(call(backend, f"{url}/send", "one", b"small"))
        assert (await backend.call(f"{url}/disconnect")).code == 200
        await client.read()
        answer = await asyncio.wait_for(repeat, DEADLINE)
        assert (answer.code, replayed(answer)) == (200, "true")
    assert [len(payload) for opcode, payload in client.frames() if opcode != 8] == [
        LARGE, 5,
    ]


async def test_answers_of_sends_with_keys_are_counted(io_loop):
    """422 has a count of its own, and repeats count by their status."""
    async with opened() as (service, backend, _, url):
        for body in (b"x", b"x", b"y"):
            await call(backend, f"{url}/send", "one", body)
        metrics = await backend.call(f"{service.callback_url}/metrics", "GET")
        lines = metrics.body.decode().splitlines()
        assert 'socketdock_sends_total{status="200"} 2.0' in lines
        assert 'socketdock_sends_total{status="422"} 1.0' in lines


# In bulk.

TOKEN = "0123456789abcdef"


async def bulk(backend, service, key, *commands, **more):
    """The answer to a bulk callback with a key."""
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Content-Type": "application/json",
        "Idempotency-Key": key,
    }
    return await backend.call(
        f"{service.callback_url}/commands",
        body=json.dumps({"commands": commands}),
        headers=headers,
        request_timeout=DEADLINE,
        **more,
    )


@servers
async def test_bulk_callback_is_carried_out_once(io_loop, server):
    """Its key belongs to the instance; a repeat has the results of the first."""
    flags = (f"--http_server={server}", f"--callback_token={TOKEN}")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            clients, ids = [], []
            for number in (1, 2):
                clients.append(await websockets.connect(service.ws_url))
                event = (await backend.wait_for("connect", number))[-1]
                ids.append(event["meta"]["connection_id"])
            commands = (
                {"send": "a", "connection_ids": ids},
                {"state": 1, "connection_id": ids[0]},
                {"send": "b", "connection_id": "0" * 32},
                {"close": True, "connection_id": ids[1]},
            )
            first = await bulk(backend, service, "one", *commands)
            await asyncio.wait_for(clients[1].wait_closed(), DEADLINE)
            statuses = [
                result["status"] for result in json.loads(first.body)["results"]
            ]
            assert statuses[2:] == [200, 410, 200]
            assert (first.code, replayed(first)) == (200, None)
            for _ in range(2):
                again = await bulk(backend, service, "one", *commands)
                assert (again.code, again.body) == (200, first.body)
                assert replayed(again) == "true"
                assert again.headers["Content-Type"] == first.headers["Content-Type"]
            for changed in (commands[:1], (*commands, commands[1])):
                reused = await bulk(backend, service, "one", *changed)
                assert (reused.code, json.loads(reused.body)["status"]) == (422, 422)
            malformed = await bulk(backend, service, "one", {"send": 1})
            assert malformed.code == 400
            assert (await bulk(backend, service, "a b", *commands)).code == 400
            # The key is another one for a connection.
            send = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": "one"}
            url = f"{service.callback_url}/socket/{ids[0]}/send"
            answer = await backend.call(url, body=b"last", headers=send)
            assert (answer.code, replayed(answer)) == (200, None)
            assert await frames_until(clients[0], b"last") == ["a", b"last"]
            await clients[0].close()


@servers
async def test_concurrent_bulk_repeats_send_one_frame(io_loop, server):
    """They wait for the first, which waits for a slow client."""
    token = f"--callback_token={TOKEN}"
    flags = (f"--http_server={server}", token, ROOM, "--send_timeout=60")
    async with RecordingBackend() as backend:
        async with Service(
            *backend.flags(), *flags, f"--max_message_size={LARGE}"
        ) as service:
            with await SlowClient.connect(service.ws_url, 4096) as client:
                (event,) = await backend.wait_for("connect", 1)
                name = event["meta"]["connection_id"]
                url = event["meta"]["send"].removesuffix("/send")
                authorized = {"Authorization": f"Bearer {TOKEN}"}
                large = asyncio.create_task(
                    backend.call(f"{url}/send", body=bytes(LARGE), headers=authorized)
                )
                await bytes_out(backend, url, LARGE, **authorized)
                command = {"send": "small", "connection_id": name}
                calls = [
                    asyncio.create_task(bulk(backend, service, "one", command))
                    for _ in range(20)
                ]
                await bytes_out(backend, url, LARGE + 5, **authorized)
                assert not any(call.done() for call in calls)
                close = {"close": True, "connection_id": name}
                assert (await bulk(backend, service, "two", close)).code == 200
                await client.read()
                answers = [await asyncio.wait_for(call, DEADLINE) for call in calls]
                assert (await asyncio.wait_for(large, DEADLINE)).code == 200
    assert {answer.body for answer in answers} == {answers[0].body}
    assert json.loads(answers[0].body)["results"][0]["status"] == 200
    assert [replayed(answer) for answer in answers].count(None) == 1
    sizes = [len(payload) for opcode, payload in client.frames() if opcode != 8]
    assert sizes == [LARGE, 5]


# The store.


class Act:
    """Counts how often it is carried out."""

    def __init__(self, outcome: Outcome = OK) -> None:
        self.outcome = outcome
        self.times = 0

    async def __call__(self) -> Outcome:
        self.times += 1
        return self.outcome


def keyed(key: str, scope: str = "a", body: bytes = b"") -> Keyed:
    return Keyed(scope, "send", key, digest_of("text", body))


def store() -> Repeats:
    return Repeats(asyncio.get_running_loop())


@pytest.mark.parametrize(
    ("outcome", "is_remembered"),
    [
        (OK, True),
        (ACCEPTED, True),
        (Outcome(HTTPStatus.GATEWAY_TIMEOUT, ""), True),
        (GONE, False),
        (FULL, False),
        (Outcome(HTTPStatus.BAD_REQUEST, ""), False),
        (Outcome(HTTPStatus.SERVICE_UNAVAILABLE, ""), False),
    ],
)
async def test_only_good_answers_and_504_are_remembered(
    io_loop, outcome, is_remembered
):
    """After the others the request had no effect."""
    known, act = store(), Act(outcome)
    assert await known.once(keyed("one"), act) == (outcome, False)
    assert await known.once(keyed("one"), act) == (outcome, is_remembered)
    assert act.times == (1 if is_remembered else 2)


async def test_oldest_answers_of_a_connection_are_forgotten(io_loop, monkeypatch):
    """Those of other connections are not."""
    monkeypatch.setattr(repeats, "MAX_OF_CONNECTION", 3)
    known, act = store(), Act()
    await known.once(keyed("0", "b"), act)
    for number in range(4):
        assert not (await known.once(keyed(f"{number}"), act))[1]
    for request, is_repeat in (
        (keyed("0", "b"), True),
        (keyed("1"), True),
        (keyed("3"), True),
        (keyed("0"), False),  # and "1" is forgotten for it
        (keyed("2"), True),
        (keyed("1"), False),
    ):
        assert (await known.once(request, act))[1] == is_repeat, request


async def test_bulk_callbacks_are_limited_by_their_statuses(io_loop, monkeypatch):
    """Not as those of one connection, which has far fewer."""
    monkeypatch.setattr(repeats, "MAX_OF_CONNECTION", 3)
    monkeypatch.setattr(repeats, "MAX_STATUSES", 100)
    known = store()

    async def once(key: str, statuses: int = 1) -> bool:
        async def act() -> Statuses:
            return Statuses(array("H", [200] * statuses))

        return (await known.once(keyed(key, repeats.INSTANCE), act))[1]

    await known.once(keyed("0"), Act())
    assert not await once("none", 0)
    for number in range(100):
        assert not await once(f"{number}")
    assert await once("none") and await once("0") and await once("99")
    assert not await once("large", 98)
    assert not await once("97")  # the oldest 98 are forgotten for it, and "98" for this
    assert await once("99") and await once("large") and not await once("98")
    assert (await known.once(keyed("0"), Act()))[1]
    assert not await once("too large", 101)
    assert repeats.INSTANCE not in known._by_scope and known._statuses == 0


async def test_oldest_answers_of_all_are_forgotten(io_loop, monkeypatch):
    """Of any connection; nothing is left of a connection without answers."""
    monkeypatch.setattr(repeats, "MAX_IN_ALL", 3)
    known, act = store(), Act()
    for number in range(4):
        assert not (await known.once(keyed("one", f"{number}"), act))[1]
    assert not (await known.once(keyed("one", "0"), act))[1]
    assert (await known.once(keyed("one", "2"), act))[1]
    assert len(known) == 3
    assert len(known._by_scope) == 3


async def test_request_under_way_is_never_forgotten(io_loop, monkeypatch):
    """However many answers follow."""
    monkeypatch.setattr(repeats, "MAX_OF_CONNECTION", 3)
    monkeypatch.setattr(repeats, "MAX_IN_ALL", 3)
    known, act, release = store(), Act(), asyncio.Event()

    async def wait() -> Outcome:
        await release.wait()
        return OK

    first = asyncio.create_task(known.once(keyed("first"), wait))
    await asyncio.sleep(0)
    for number in range(10):
        await known.once(keyed(f"{number}"), act)
    repeat = asyncio.create_task(known.once(keyed("first"), act))
    with pytest.raises(KeyReused):
        await known.once(keyed("first", body=b"other"), act)
    assert not repeat.done()
    release.set()
    assert await first == (OK, False)
    assert await repeat == (OK, True)
    assert act.times == 10


async def test_answers_are_forgotten_in_time(io_loop, monkeypatch):
    """Without a further request, and without one timer for each."""
    monkeypatch.setattr(repeats, "PERIOD", 0.1)
    known, act = store(), Act()
    for number in range(100):
        await known.once(keyed(f"{number}", f"{number % 7}"), act)
    await eventually(lambda: len(known) == 0)
    assert not known._by_scope
    await eventually(lambda: known._timer is None)
    assert not (await known.once(keyed("1", "1"), act))[1]


async def test_bug_in_a_request_is_not_remembered(io_loop):
    """All that wait for it fail, and the next request is carried out."""
    known, act = store(), Act()

    async def fail() -> Outcome:
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            await known.once(keyed("one"), fail)
    assert await known.once(keyed("one"), act) == (OK, False)


def test_limits_are_those_of_the_documents():
    """docs/backends.md names them."""
    assert repeats.PERIOD == 300
    assert repeats.MAX_OF_CONNECTION == 1_000
    assert repeats.MAX_IN_ALL == 100_000
    assert repeats.MAX_STATUSES == 10_000_000
