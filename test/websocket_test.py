"""The clients' side: handshakes, messages, close codes and disconnect events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import websockets
from faults import send_raw, upgraded
from service import DEADLINE, RecordingBackend, Service, eventually, withhold
from tornado.web import RequestHandler
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)

APP = "--allowed_origins=https://app.example.com"
APPS = "--allowed_origins=https://*.example.com"


@contextlib.asynccontextmanager
async def relay(
    *kinds: str, flags: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Service, RecordingBackend]]:
    """A relay in front of a recording backend."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(*kinds), *flags) as service:
            yield service, backend


async def refusal(url: str, **options: object) -> websockets.Response:
    """What a handshake that is refused is answered."""
    with pytest.raises(websockets.InvalidStatus) as error:
        await websockets.connect(url, **options)
    return error.value.response


@pytest.mark.parametrize(
    ("flags", "origin", "status"),
    [
        ((), "http://other.example", 403),
        ((APP,), "https://app.example.com", 101),
        ((APP,), "http://app.example.com", 403),
        ((APPS,), "https://a.b.example.com", 101),
        ((APPS,), "https://example.com", 403),
        ((APPS,), "https://evilexample.com", 403),
        (("--allowed_origins=*",), "null", 101),
        (("--require_origin",), None, 403),
    ],
)
async def test_other_origins_need_an_option(io_loop, flags, origin, status):
    """Pages of other origins may connect only if an option allows it."""
    async with Service(*flags) as service:
        request = handshake(*([] if origin is None else [f"Origin: {origin}"]))
        received = await send_raw(service.ws_url, request, answers=1)
        assert received.statuses == [status]


async def test_client_listener_has_only_websockets_and_livez(io_loop):
    """With a second listener, the first has no other routes."""
    async with RecordingBackend() as backend:
        async with Service("--callbackport=0", *backend.flags()) as service:
            base = service.ws_url.replace("ws://", "http://").removesuffix("/ws")
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                (event,) = await backend.wait_for("message", 1)
                path = event["meta"]["send"].removeprefix(service.callback_url)
                assert (await backend.call(base + path, body=b"x")).code == 404
                assert (await backend.call(base + "/livez", "GET")).code == 200
                other = service.callback_url
                assert (await backend.call(other + "/ws", "GET")).code == 404
                assert (await backend.call(other + path, body=b"x")).code == 200
                assert await client.recv() == b"x"


MESSAGES = {
    "text": ("hello", {"type": "text"}, "hello"),
    "emoji": ("🦆 \U0010ffff", {"type": "text"}, "🦆 \U0010ffff"),
    "nul": ("a\x00b", {"type": "text"}, "a\x00b"),
    "json specials": ('"\\\u2028</script>\x7f\x1f', {"type": "text"}, None),
    "empty text": ("", {"type": "text"}, ""),
    "empty binary": (b"", {"type": "binary"}, ""),
    "utf-8 binary": ("é".encode(), {"type": "binary"}, "é"),
    "other binary": (b"\xff\x00", {"type": "binary", "encoding": "base64"}, "/wA="),
}


async def test_messages_arrive_byte_for_byte(io_loop):
    """Each kind of message has exactly the form of the contract."""
    async with relay() as (service, backend):
        async with websockets.connect(service.ws_url) as client:
            for message, _, _ in MESSAGES.values():
                await client.send(message)
            await backend.wait_for("message", len(MESSAGES))
        await backend.wait_for("disconnect", 1)

    connection_id = backend.of("connect")[0]["meta"]["connection_id"]
    assert len(connection_id) == 32 and int(connection_id, 16) >= 0
    socket_url = f"{service.callback_url}/socket/{connection_id}"
    expected = []
    for number, (message, extra, text) in enumerate(MESSAGES.values(), 1):
        meta = {
            "connection_id": connection_id,
            "send": f"{socket_url}/send",
            "disconnect": f"{socket_url}/disconnect",
            "instance": backend.of("connect")[0]["meta"]["instance"],
            "message_id": f"{connection_id}-{number}",
        }
        expected.append(
            {"meta": meta | extra, "message": message if text is None else text}
        )
    assert backend.of("message") == expected

    for kind, event, headers in backend.events:
        suffix = event["meta"].get("message_id", f"{connection_id}-{kind}")
        assert headers["Webhook-Id"] == suffix
        assert headers["Webhook-Timestamp"].isdigit()
        assert headers["Content-Type"] == "application/json; charset=utf-8"
        assert headers["User-Agent"] == "SocketDock/0.1.0"


async def test_connect_event_describes_the_handshake(io_loop):
    """Headers, path, query, address and subprotocols are the client's."""
    async with relay() as (service, backend):
        async with websockets.connect(
            service.ws_url + "?token=a%20b",
            additional_headers=[("X-Twice", "1"), ("X-Twice", "2")],
            subprotocols=["one", "two"],
        ):
            (event,) = backend.of("connect")
        meta = event["meta"]
        assert list(event) == ["meta"]
        assert (meta["path"], meta["query"]) == ("/ws", "token=a%20b")
        assert meta["remote_ip"] == "127.0.0.1"
        assert meta["subprotocols"] == ["one", "two"]
        assert meta["headers"]["x-twice"] == "1, 2"
        assert all(name == name.lower() for name in meta["headers"])
        assert "message_id" not in meta and "type" not in meta


async def test_disconnect_event_has_the_form_of_the_contract(io_loop):
    """Code, reason and initiator are the client's if it closed first."""
    async with relay("message", "disconnect") as (service, backend):
        client = await websockets.connect(service.ws_url)
        await client.send("x")
        await client.close(4001, "so long")
        (event,) = await backend.wait_for("disconnect", 1)
    meta = event["meta"]
    assert event["connection_id"] == meta["connection_id"]
    assert meta.pop("duration") > 0
    assert meta == {
        "connection_id": backend.of("message")[0]["meta"]["connection_id"],
        "instance": backend.of("message")[0]["meta"]["instance"],
        "code": 4001,
        "reason": "so long",
        "initiator": "client",
        "undelivered": 0,
        "refused": 0,
    }


@pytest.mark.parametrize(
    ("close_frame", "code"), [(b"\x88\x80\x00\x00\x00\x00", 1005), (b"", 1006)]
)
async def test_close_without_a_code(io_loop, close_frame, code):
    """An empty close frame is reported as 1005, none at all as 1006."""
    async with relay("message", "disconnect") as (service, backend):
        _, writer = await upgraded(service.ws_url)
        writer.write(close_frame)
        writer.close()
        (event,) = await backend.wait_for("disconnect", 1)
    assert event["meta"]["code"] == code
    assert event["meta"]["initiator"] == "client"


async def test_decision_selects_the_subprotocol(io_loop):
    """The backend's choice overrides --subprotocols."""

    async def choose(handler: RequestHandler, event: dict) -> None:
        handler.finish({"subprotocol": "two"})

    async with relay("message", "connect", flags=("--subprotocols=one",)) as (
        service,
        backend,
    ):
        backend.answers["connect"] = choose
        offers = ["one", "two"]
        async with websockets.connect(service.ws_url, subprotocols=offers) as client:
            assert client.subprotocol == "two"
        backend.answers.clear()
        async with websockets.connect(
            service.ws_url, subprotocols=["zero", "one"]
        ) as client:
            assert client.subprotocol == "one"


@pytest.mark.parametrize("status", [401, 403, 404, 429])
async def test_refusal_is_passed_on(io_loop, status):
    """The client gets its status, body and the permitted headers."""

    async def refuse(handler: RequestHandler, event: dict) -> None:
        handler.set_status(status)
        handler.set_header("Content-Type", "text/x-why")
        handler.set_header("WWW-Authenticate", "Bearer")
        handler.set_header("Retry-After", "7")
        handler.set_header("X-Secret", "no")
        handler.finish("because")

    async with relay() as (service, backend):
        backend.answers["connect"] = refuse
        response = await refusal(service.ws_url)
        assert (response.status_code, response.body) == (status, b"because")
        assert response.headers["Content-Type"] == "text/x-why"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["Retry-After"] == "7"
        assert "X-Secret" not in response.headers
        backend.answers.clear()
        async with websockets.connect(service.ws_url):
            pass
        await backend.wait_for("disconnect", 1)
        assert len(backend.of("disconnect")) == 1  # none for the refused one


@pytest.mark.parametrize("how", ["500", "302", "hang", "not offered", "close"])
async def test_missing_decision_is_503_and_a_disconnect_event(io_loop, how):
    """Without a decision the client gets 503, and the backend can clean up."""

    async def answer(handler: RequestHandler, event: dict) -> None:
        if how == "hang":
            await asyncio.sleep(3)
        elif how == "not offered":
            handler.finish({"subprotocol": "mine"})
        elif how == "close":
            handler.request.connection.stream.close()
        else:
            handler.set_status(int(how))

    async with relay(flags=("--handshake_timeout=0.5",)) as (service, backend):
        backend.answers["connect"] = answer
        response = await refusal(service.ws_url)
        assert response.status_code == 503
        (event,) = await backend.wait_for("disconnect", 1)
        assert event["meta"]["code"] == 1006
        assert event["meta"]["initiator"] == "relay"
        assert len(backend.of("connect")) == 1


async def test_client_that_leaves_before_the_decision_is_reported(io_loop):
    """A client gone before the 101 is reported as 1006, and not listed."""
    async with relay() as (service, backend):
        release = withhold(backend, "connect")
        connecting = asyncio.ensure_future(websockets.connect(service.ws_url))
        (event,) = await backend.wait_for("connect", 1)
        url = event["meta"]["send"].removesuffix("/send")
        info = await backend.call(url, "GET")
        assert json.loads(info.body)["state"] == "connecting"
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await connecting
        release.set()
        (event,) = await backend.wait_for("disconnect", 1)
        assert event["meta"]["code"] == 1006
        assert (await backend.call(url, "GET")).code == 410


async def test_pings_are_answered(io_loop):
    """The pong has the payload of the client's ping."""
    async with Service() as service:
        async with websockets.connect(service.ws_url) as client:
            await asyncio.wait_for(await client.ping(b"payload"), DEADLINE)


async def test_vanished_client_is_detected_by_ping(io_loop):
    """Without a sign of life in interval and timeout: closed, reported as 1006."""
    async with relay(
        "message", "disconnect", flags=("--ping_interval=0.5", "--ping_timeout=1.5")
    ) as (service, backend):
        _, silent = await upgraded(service.ws_url)
        async with websockets.connect(service.ws_url) as alive:
            (event,) = await backend.wait_for("disconnect", 1)
            await alive.send("still here")
            await backend.wait_for("message", 1)
        silent.close()
        assert (event["meta"]["code"], event["meta"]["initiator"]) == (1006, "relay")
        assert 1.5 < event["meta"]["duration"] < 8


async def test_compression_is_negotiated_only_if_enabled(io_loop):
    """permessage-deflate works, both ways, with fragments and pings between."""
    for flags, expected in ((("--compression",), True), ((), False)):
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url, compression="deflate") as ws:
                names = [type(e).__name__ for e in ws.protocol.extensions]
                assert ("PerMessageDeflate" in names) is expected
                for message in ("x" * 100_000, bytes(100_000), ""):
                    await ws.send(message)
                    assert await ws.recv() == message

                async def fragments() -> AsyncIterator[str]:
                    yield "one "
                    await (await ws.ping())
                    yield "two"

                await ws.send(fragments())
                assert await ws.recv() == "one two"


async def test_drain_closes_with_1001_and_reports_each(io_loop):
    """SIGTERM: each client gets 1001, each disconnect event is sent, status 0."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags()) as service:
            clients = [await websockets.connect(service.ws_url) for _ in range(50)]
            service.process.terminate()
            for client in clients:
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(client.recv(), DEADLINE)
                assert client.close_code == 1001
            events = await backend.wait_for("disconnect", 50)
            assert {event["meta"]["code"] for event in events} == {1001}
            assert {event["meta"]["initiator"] for event in events} == {"relay"}
            assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0


async def test_short_connections_lose_nothing(io_loop):
    """2,000 clients connect, send one message and leave: all arrive."""
    visits = 2000
    flags = ("--order_wait=30",)  # a slow machine's backend is no reason to go on
    async with relay("message", "disconnect", flags=flags) as (service, backend):
        room = asyncio.Semaphore(200)

        async def visit(number: int) -> None:
            payload = b"%06d" % number
            async with room:
                _, writer = await upgraded(service.ws_url)
                writer.write(
                    b"\x82\x86\0\0\0\0" + payload + b"\x88\x82\0\0\0\0\x03\xe8"
                )
                writer.close()

        await asyncio.gather(*map(visit, range(visits)))
        await backend.wait_for("disconnect", visits, 40)
        arrived = sorted(event["message"] for event in backend.of("message"))
        assert arrived == [f"{number:06}" for number in range(visits)]
        order: dict[str, list[str]] = {}
        for kind, event, _ in backend.events:
            order.setdefault(event["meta"]["connection_id"], []).append(kind)
        assert all(o == ["message", "disconnect"] for o in order.values())
        assert len(order) == visits
        await eventually(lambda: not service.tracebacks)


async def test_overdue_failure_gives_up_what_waits_behind(io_loop):
    """A held response turns out to be 500: 1013, and all behind it is counted."""
    fail, forever = asyncio.Event(), asyncio.Event()

    async def hold(handler: RequestHandler, event: dict) -> None:
        if event["message"] == "0":
            await fail.wait()
            handler.set_status(500)
        else:
            await forever.wait()

    flags = ("--order_wait=0.2", "--max_unanswered=2", "--delivery_timeout=1")
    async with relay("message", "disconnect", flags=flags) as (service, backend):
        backend.answers["message"] = hold
        async with websockets.connect(service.ws_url) as client:
            for number in range(5):
                await client.send(str(number))
            await backend.wait_for("message", 2)
            await (await client.ping())  # so that the last has been read
            fail.set()
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(client.recv(), DEADLINE)
            assert client.close_code == 1013
        forever.set()
        (event,) = await backend.wait_for("disconnect", 1)
        # 1 is held to this day; 0 and what waits behind it are given up.
        assert {event["message"] for event in backend.of("message")} == {"0", "1"}
        assert event["meta"]["undelivered"] == 4


@pytest.mark.gen_test
async def test_start_warns_of_unmasking_in_python(io_loop):
    """It works, but takes a large part of a second for 1 MiB."""
    async with Service(environment={"TORNADO_EXTENSION": "0"}) as slow:
        async with websockets.connect(slow.ws_url) as client:
            await client.send("hello")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
    async with Service() as quick:
        pass
    assert any("unmasked in Python" in line for line in slow.log)
    assert not any("unmasked in Python" in line for line in quick.log)
