"""Replies to slow clients, in held answers, and to many connections."""

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest
import websockets
from certificates import Authority
from faults import memory
from held_test import held, until_held
from reply_backends import (
    MIB,
    RawBackend,
    added,
    commands,
    outcomes,
    received,
    response,
)
from service import DEADLINE, Service, eventually
from slow import SlowClient
from wire import TEXT, frame

pytestmark = pytest.mark.gen_test(timeout=180)

NO_PINGS = "--ping_interval=0"  # they would be among the frames that are read
END = [response(commands({"send": "end"}))]
# More than the kernels of relay and client hold for a `SlowClient`.
LARGE = [response(commands(*[{"send": "x" * MIB}] * 7))]


def sent(*messages: str) -> bytes:
    """Return the frames of messages of a client, for one write."""
    return b"".join(frame(TEXT, message.encode()) for message in messages)


def texts(client: SlowClient, size: int = 100) -> list[str]:
    """Return the beginnings of what a client has read."""
    return [payload[:size].decode() for _, payload in client.frames()]


def hold_large_answers(
    backend: RawBackend, number: int
) -> "tuple[list[str], asyncio.Future[None]]":
    """Return messages, and a future: their answers are held until it is done."""
    release: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    names = [f"held {each}" for each in range(number)]
    backend.answers |= {name: [release, *LARGE] for name in names}
    backend.answers["end"] = END
    return names, release


async def id_of(backend: RawBackend, message: str) -> str:
    """Wait for a message, and return its connection's id."""
    await eventually(lambda: message in backend.messages())
    return next(
        event["meta"]["connection_id"]
        for kind, event in backend.events
        if kind == "message" and event["message"] == message
    )


async def echo(client: websockets.ClientConnection, times: int = 5) -> None:
    """Send messages that are answered; with them, what came before is done."""
    for _ in range(times):
        await client.send("end")
        assert await received(client, 1) == ["end"]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
async def test_slow_client_slows_down_its_own_messages(
    io_loop, tmp_path, loop, is_tls
):
    """It gets a whole reply above its buffer; then its next message is posted."""
    authority = Authority(tmp_path)
    tls = authority.server("127.0.0.1").server_context() if is_tls else None
    flags = [f"--event_loop={loop}", NO_PINGS]
    if is_tls:
        flags.append(f"--backend_ca={authority.path}")
    async with RawBackend(tls) as backend:
        backend.answers |= {"one": LARGE, "two": LARGE, "end": END}
        async with (
            Service(*backend.flags(), *flags) as service,
            websockets.connect(service.ws_url) as other,
        ):
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent("one", "two", "end"))
                await id_of(backend, "one")
                await echo(other)
                assert "two" not in backend.messages()
                await slow.read(lambda data: data.endswith(b"end"))
                assert texts(slow, 3) == ["xxx"] * 14 + ["end"]
            assert await outcomes(service) == {"send/done": 20}


@pytest.mark.parametrize("size", [1, 1024])
async def test_small_send_buffer_does_not_stop_a_connection(io_loop, size):
    """Half of it is less than one frame, or nothing."""
    async with RawBackend() as backend:
        large = [response(commands({"send": "x" * 4 * MIB}))]
        backend.answers |= {"one": large, "end": END}
        async with Service(
            *backend.flags(), f"--max_send_buffer={size}", NO_PINGS
        ) as service:
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent("one", "end"))
                await slow.read(lambda data: data.endswith(b"end"))
                assert texts(slow, 3) == ["xxx", "end"]


@pytest.mark.long
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_held_answers_of_a_slow_client_take_the_memory_of_one(io_loop, loop):
    """16 of 7 MiB: one is read at a time, until the client is closed with 1008."""
    async with RawBackend() as backend:
        names, release = hold_large_answers(backend, 16)
        async with (
            Service(
                *backend.flags(), "--order_wait=0.01", "--send_timeout=3",
                f"--event_loop={loop}",
            ) as service,
            websockets.connect(service.ws_url) as other,
        ):
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent(*names))
                connection_id = await id_of(backend, names[-1])
                await echo(other)
                before = memory(service.process.pid)
                release.set_result(None)
                # Until the client is closed, others are served as usual.
                disconnect = asyncio.create_task(backend.disconnect_of(connection_id))
                highest = before
                while not disconnect.done():
                    await echo(other, 1)
                    highest = max(highest, memory(service.process.pid, "VmHWM"))
                meta = (await disconnect)["meta"]
            assert (meta["code"], meta["initiator"]) == (1008, "relay")
            assert (meta["undelivered"], meta["refused"]) == (0, 0)
            # A reply takes its own length as bytes, as text and as frames, for a moment
            # twice; two of them wait for their memory to be given back.
            assert highest - before < 64 * MIB
            async with asyncio.timeout(DEADLINE):
                while await held(service):
                    await asyncio.sleep(0.05)
                counts = await outcomes(service)
                while sum(counts.values()) - counts.get("send/invalid", 0) < 16 * 7:
                    counts = await outcomes(service)
            assert counts["send/gone"] >= 14 * 7
            await echo(other)


@pytest.mark.long
async def test_hundreds_of_held_answers_follow_a_slow_one(io_loop):
    """They have arrived when it is their turn, and are carried out in one go."""
    number = 300
    async with RawBackend() as backend:
        release = asyncio.get_running_loop().create_future()
        backend.answers["0"] = [release, *LARGE]
        for index in range(1, number):
            reply = response(commands({"send": str(index)}))
            backend.answers[str(index)] = [release, reply]
        async with Service(
            *backend.flags(), "--order_wait=0.001", f"--max_unanswered={number}",
            NO_PINGS,
        ) as service:
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent(*map(str, range(number))))
                await until_held(service, number)
                release.set_result(None)
                await slow.read(lambda data: len(slow.frames()) >= number + 6)
                assert sorted(map(int, texts(slow)[7:])) == [*range(1, number)]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
async def test_connections_that_end_while_their_replies_wait(
    io_loop, tmp_path, loop, is_tls
):
    """A whole reply counts, one that was cut off does not; the next message goes."""
    authority = Authority(tmp_path)
    tls = authority.server("127.0.0.1").server_context() if is_tls else None
    flags = [f"--event_loop={loop}", "--order_wait=0.01", NO_PINGS]
    if is_tls:
        flags.append(f"--backend_ca={authority.path}")
    async with RawBackend(tls) as backend:
        release = asyncio.get_running_loop().create_future()
        backend.answers |= {
            "0": [release, *LARGE],
            "1": [release, response(commands({"send": "cut"}))[:-1], None],
            "2": [release, response(commands({"send": "2"}), "Connection: close"),
                  None],
            "end": END,
        }
        async with (
            Service(*backend.flags(), *flags) as service,
            websockets.connect(service.ws_url) as other,
        ):
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent("0", "1", "2"))
                await until_held(service, 3)
                await slow.send(sent("end"))
                release.set_result(None)
                await echo(other)
                # Held replies have no order.
                await slow.read(lambda data: len(slow.frames()) >= 9)
                small = [text for text in texts(slow, 3) if text != "xxx"]
                assert sorted(small) == ["2", "end"]
            counts = await outcomes(service)
            assert counts == {"send/done": 7 + 1 + 1 + 5, "none/invalid": 1}
        assert sorted(backend.messages()) == ["0", "1", "2", *["end"] * 6]


@pytest.mark.long
async def test_drain_with_replies_that_wait_for_a_slow_client(io_loop):
    """Its connection ends as others do, and no reply is reported as unusable."""
    async with RawBackend() as backend:
        names, release = hold_large_answers(backend, 4)
        async with Service(
            *backend.flags(), "--order_wait=0.01", "--send_timeout=2"
        ) as service:
            other = await websockets.connect(service.ws_url)
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent(*names))
                connection_id = await id_of(backend, names[-1])
                await until_held(service, 4)
                release.set_result(None)
                await echo(other)
                service.process.send_signal(signal.SIGTERM)
                meta = (await backend.disconnect_of(connection_id))["meta"]
                assert meta["undelivered"] == 0
                assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
            assert not [line for line in service.log if "cannot be used" in line]
            assert not service.tracebacks
            with pytest.raises(websockets.ConnectionClosed):
                await other.recv()


async def test_full_buffers_of_other_connections_drop_commands(io_loop):
    """They are counted; the connection of the event is not slowed down."""
    async with RawBackend() as backend:
        async with (
            Service(
                *backend.flags(), "--max_send_buffer=65536", NO_PINGS
            ) as service,
            websockets.connect(service.ws_url) as client,
        ):
            with await SlowClient.connect(service.ws_url) as slow:
                await slow.send(sent("slow"))
                other = await id_of(backend, "slow")
                before = await outcomes(service)
                backend.answers["go"] = [response(commands(
                    *[{"send": "x" * 100_000, "connection_id": other}] * 70,
                    {"send": "sent"},
                ))]
                await client.send("go")
                assert await received(client, 1) == ["sent"]
                counts = added(before, await outcomes(service))
                assert counts["send/full"] > 10
                assert counts["send/full"] + counts["send/done"] == 71
                # The frames that were not dropped are whole.
                done = int(counts["send/done"]) - 1
                await slow.read(lambda data: len(slow.frames()) >= done)
                assert texts(slow, 3) == ["xxx"] * done


# Held answers.


async def test_overdue_reply_is_carried_out_when_it_comes(io_loop):
    """After those of later messages, which did not wait for it."""
    async with RawBackend() as backend:
        release = asyncio.get_running_loop().create_future()
        late = response(commands({"state": 1}, {"send": "late"}))
        backend.answers |= {"held": [release, late], "end": END}
        async with (
            Service(*backend.flags(), "--order_wait=0.05") as service,
            websockets.connect(service.ws_url) as client,
        ):
            await client.send("held")
            await echo(client)
            release.set_result(None)
            assert await received(client, 1) == ["late"]
            await echo(client, 1)
    ends = [event for _, event in backend.events if event.get("message") == "end"]
    assert ["state" in event["meta"] for event in ends] == [False] * 5 + [True]


@pytest.mark.parametrize("how", ["client", "drain"])
async def test_reply_after_the_end_is_gone(io_loop, how):
    """The client has left, or the relay drains: nothing is carried out."""
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(RawBackend())
        release = asyncio.get_running_loop().create_future()
        late = response(commands({"send": "late"}, {"close": True}))
        backend.answers["held"] = [release, late]
        service = await stack.enter_async_context(
            Service(*backend.flags(), "--order_wait=0.05", "--drain_timeout=20")
        )
        client = await websockets.connect(service.ws_url)
        await client.send("held")
        connection_id = await id_of(backend, "held")
        if how == "client":
            await client.close()
        else:
            service.process.send_signal(signal.SIGTERM)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(client.recv(), DEADLINE)
            assert closed.value.rcvd.code == 1001
        meta = (await backend.disconnect_of(connection_id))["meta"]
        assert meta["undelivered"] == 0
        release.set_result(None)
        if how == "client":
            async with asyncio.timeout(DEADLINE):
                while await held(service):
                    await asyncio.sleep(0.02)
            counts = await outcomes(service)
            # It is let go 5 s after the disconnect event.
            assert counts in ({"send/gone": 1, "close/gone": 1}, {})
        else:
            assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
            assert not service.tracebacks
            assert not [line for line in service.log if "cannot be used" in line]


async def test_reply_that_has_begun_is_not_abandoned(io_loop):
    """Another held request is closed to send the next message."""
    loop = asyncio.get_running_loop()
    async with RawBackend() as backend:
        begun, rest, never = (loop.create_future() for _ in range(3))
        reply = response(commands({"send": "reply"}))
        backend.answers |= {
            "one": [begun, reply[:-5], rest, reply[-5:]],
            "two": [never],
            "end": END,
        }
        async with (
            Service(
                *backend.flags(), "--order_wait=0.05", "--max_unanswered=2"
            ) as service,
            websockets.connect(service.ws_url) as client,
            websockets.connect(service.ws_url) as other,
        ):
            await client.send("one")
            await client.send("two")
            connection_id = await id_of(backend, "two")
            async with asyncio.timeout(DEADLINE):
                while await held(service) < 2:
                    await asyncio.sleep(0.01)
            begun.set_result(None)
            await echo(other)
            # A sign of life for both.
            backend.answers["call"] = [
                response(commands({"state": 1, "connection_id": connection_id}))
            ]
            await client.send("three")
            await other.send("call")
            await id_of(backend, "three")
            rest.set_result(None)
            assert await received(client, 1) == ["reply"]
        assert backend.messages().count("one") == 1


async def test_slow_parallel_backend_that_replies_loses_nothing(io_loop):
    """A reply shows that its message was seen, but not the messages after it."""
    loop = asyncio.get_running_loop()
    async with RawBackend() as backend:
        gates = [loop.create_future() for _ in range(6)]
        for number, gate in enumerate(gates):
            backend.answers[str(number)] = [
                gate, response(commands({"send": f"reply {number}"}))
            ]
        async with (
            Service(
                *backend.flags(), "--order_wait=0.05", "--max_unanswered=3"
            ) as service,
            websockets.connect(service.ws_url) as client,
        ):
            for number in range(6):
                await client.send(str(number))
            for number, gate in enumerate(gates):
                await until_held(service, min(3, 6 - number))
                gate.set_result(None)
                assert await received(client, 1) == [f"reply {number}"]
        assert backend.messages() == [*map(str, range(6))]


# Order.


async def test_replies_leave_in_the_order_of_the_messages(io_loop):
    """Also if the first is carried out in many turns."""
    async with RawBackend() as backend, AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            Service(*backend.flags(), "--order_wait=60")
        )
        clients = [
            await stack.enter_async_context(websockets.connect(service.ws_url))
            for _ in range(20)
        ]
        ids = []
        for number, client in enumerate(clients):
            await client.send(f"id {number}")
            ids.append(await id_of(backend, f"id {number}"))
        for number in range(1, 4):
            backend.answers[f"all {number}"] = [response(commands(
                *[{"send": f"{number}", "connection_ids": ids}] * 499,
                {"state": number},
                {"send": f"end of {number}"},
            ))]
            await clients[0].send(f"all {number}")
        got = await received(clients[0], 1500)
        assert got == [
            text for n in "123" for text in [*[n] * 499, f"end of {n}"]
        ]
        for client in clients[1:]:
            assert "".join(await received(client, 1497)) == (
                "1" * 499 + "2" * 499 + "3" * 499
            )
        states = [event["meta"].get("state") for kind, event in backend.events
                  if kind == "message" and event["message"].startswith("all")]
        assert states == [None, 1, 2]


async def test_disconnect_event_follows_what_a_reply_does(io_loop):
    """A fan-out of a client that has left is carried out before."""
    async with RawBackend() as backend:
        async with (
            Service(*backend.flags()) as service,
            websockets.connect(service.ws_url) as other,
        ):
            await other.send("id")
            connection_id = await id_of(backend, "id")
            backend.answers["all"] = [response(commands(
                {"send": "first", "connection_id": connection_id},
                *[{"send": "x", "connection_ids": ["0" * 32] * 100}] * 99,
                {"send": "last", "connection_id": connection_id},
            ))]
            async with websockets.connect(service.ws_url) as client:
                await client.send("all")
                own = await id_of(backend, "all")
            await backend.disconnect_of(own)
            counts = await outcomes(service)
            assert counts == {"send/done": 2, "send/gone": 9900}
            assert await received(other, 2) == ["first", "last"]
