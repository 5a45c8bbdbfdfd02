"""Limits of connections, handshakes, rates, idle time and lifetime."""

import asyncio
import contextlib
import time

import pytest
import websockets
from faults import send_raw
from service import DEADLINE, RecordingBackend, Service, eventually, refusal, withhold
from tornado.web import RequestHandler
from wire import handshake

from handlers import admission
from handlers.admission import Admission, RefusalLog
from handlers.clients.lifetimes import Lifetimes

pytestmark = pytest.mark.gen_test(timeout=60)

TRUSTED = "--trusted_proxies=127.0.0.1"


def connect(
    url: str, address: str | None = None, **options: object
) -> websockets.connect:
    """A client that has this address according to its proxy."""
    headers = {} if address is None else {"X-Forwarded-For": address}
    return websockets.connect(
        url, additional_headers=headers, compression=None, **options
    )


async def refused(url: str, address: str | None = None) -> websockets.Response:
    """The response to a handshake that is rejected."""
    with pytest.raises(websockets.InvalidStatus) as error:
        await connect(url, address)
    return error.value.response


async def closed(client: websockets.ClientConnection) -> tuple[int | None, str | None]:
    """Code and reason with which the relay closes `client`, once it does."""
    with contextlib.suppress(websockets.ConnectionClosed):
        async with asyncio.timeout(DEADLINE):
            while True:
                await client.recv()
    return client.close_code, client.close_reason


async def handshaken(
    url: str,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose handshake is behind it, for frames by hand."""
    host, port = url[5:-3].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def pushed(url: str, message: bytes) -> bytes:
    """The frames to a client that sends messages until its connection ends."""
    reader, writer = await handshaken(url)
    frame = b"\x82\xfe" + len(message).to_bytes(2) + bytes(4) + message

    async def push() -> None:
        while True:
            writer.write(frame)
            await writer.drain()
            await asyncio.sleep(0)  # drain() alone may never yield to the reader

    pushing = asyncio.create_task(push())
    answer = await asyncio.wait_for(reader.read(), DEADLINE)
    pushing.cancel()
    with contextlib.suppress(asyncio.CancelledError, ConnectionError):
        await pushing
    writer.close()
    return answer


# Which handshakes are accepted.


async def test_connections_in_all_are_limited(io_loop):
    """Above --max_connections: 503, also while others await their decision."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), "--max_connections=2") as service:
            async with connect(service.ws_url):
                decide = withhold(backend, "connect")
                second = asyncio.ensure_future(connect(service.ws_url).__aenter__())
                await backend.wait_for("connect", 2)
                response = await refused(service.ws_url)
                assert response.status_code == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert len(backend.of("connect")) == 2
                decide.set()
                await (await second).close()
                await backend.wait_for("disconnect", 1)
                async with connect(service.ws_url):
                    assert (await refused(service.ws_url)).status_code == 503
        assert not any("GET /ws: 503" in line for line in service.log)


async def test_connections_of_one_address_are_limited(io_loop):
    """Above --max_connections_per_ip: 429; others connect, and this one later."""
    async with RecordingBackend() as backend:
        flags = (TRUSTED, "--max_connections_per_ip=2")
        async with Service(*backend.flags(), *flags) as service:
            one, other = "203.0.113.1", "203.0.113.2"
            async with connect(service.ws_url, one) as first:
                async with connect(service.ws_url, one):
                    response = await refused(service.ws_url, one)
                    assert response.status_code == 429
                    assert int(response.headers["Retry-After"]) >= 1
                    async with connect(service.ws_url, other):
                        pass
                    await first.close()
                    await backend.wait_for("disconnect", 2)
                    async with connect(service.ws_url, one):
                        pass
            assert len(backend.of("connect")) == 4


async def test_refused_connections_do_not_count(io_loop):
    """A refused connection leaves room for another one."""

    async def refuse(handler: RequestHandler, event: dict) -> None:
        handler.set_status(403)

    async with RecordingBackend() as backend:
        flags = ("--max_connections=1", "--max_connections_per_ip=1")
        async with Service(*backend.flags(), *flags) as service:
            backend.answers["connect"] = refuse
            for _ in range(3):
                assert (await refused(service.ws_url)).status_code == 403
            backend.answers.clear()
            async with connect(service.ws_url):
                pass


async def test_ipv6_clients_count_with_their_network(io_loop):
    """A client with one address of a /64 has all of them."""
    async with Service(TRUSTED, "--max_connections_per_ip=1") as service:
        async with connect(service.ws_url, "2001:db8::1"):
            response = await refused(service.ws_url, "2001:db8::ffff:2")
            assert response.status_code == 429
            async with connect(service.ws_url, "2001:db8:0:1::1"):
                pass


async def test_handshakes_of_one_address_are_limited(io_loop):
    """Above --handshakes_per_second: 429, until Retry-After; others connect."""
    async with Service(TRUSTED, "--handshakes_per_second=0.4") as service:
        async with connect(service.ws_url, "203.0.113.1"):
            response = await refused(service.ws_url, "203.0.113.1")
            assert response.status_code == 429
            assert 1 <= int(response.headers["Retry-After"]) <= 2
            async with connect(service.ws_url, "203.0.113.2"):
                pass
            await asyncio.sleep(int(response.headers["Retry-After"]))
            async with connect(service.ws_url, "203.0.113.1"):
                pass


async def test_handshakes_of_one_second_may_come_at_once(io_loop):
    """Rejected ones use no credit: the next is accepted when it is due."""
    doors = Admission(handshakes_per_second=5)
    admitted = [doors.refusal("203.0.113.1", 9) is None for _ in range(100)]
    assert 5 <= sum(admitted) < 10 and all(admitted[:5])
    await eventually(lambda: doors.refusal("203.0.113.1", 9) is None, 2)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_handshakes_that_waited_during_a_stall_are_accepted(io_loop, loop):
    """As many as the rate permits for the time of the stall."""
    rate, seconds, count = 5, 4, 60
    flags = (TRUSTED, f"--handshakes_per_second={rate}", f"--event_loop={loop}")
    request = handshake("X-Forwarded-For: 203.0.113.1")
    async with Service(*flags) as service:
        async with connect(service.ws_url, "203.0.113.1"):
            pass
        async with service.stalled(seconds):
            began = time.monotonic()
            waiting = [
                asyncio.create_task(send_raw(service.ws_url, request, answers=1))
                for _ in range(count)
            ]
        received = await asyncio.gather(*waiting)
        took = time.monotonic() - began
    admitted = sum(each.statuses == [101] for each in received)
    assert rate * seconds <= admitted <= rate * (took + 2)


async def test_table_of_addresses_is_bounded(io_loop, monkeypatch):
    """Addresses with a full bucket are removed, and the oldest above a limit."""
    monkeypatch.setattr(admission, "MAX_ADDRESSES", 50)
    doors = Admission(handshakes_per_second=100)
    for number in range(1000):
        assert doors.refusal(f"10.0.{number // 256}.{number % 256}", 9) is None
        assert len(doors._paid_until) <= 50
    assert len(doors._paid_until) > 10

    def forgotten() -> bool:
        doors.refusal("192.0.2.1", 9)
        return len(doors._paid_until) == 1

    await eventually(forgotten, 5)


async def test_flood_of_refusals_does_not_flood_the_log(io_loop):
    """Twenty lines per minute, and one that counts the others."""
    async with Service("--max_connections_per_ip=1") as service:
        async with connect(service.ws_url):
            for _ in range(50):
                await refused(service.ws_url)
    lines = [line for line in service.log if "rejected with 429" in line]
    assert len(lines) == 20
    assert "127.0.0.1" in lines[0] and "Connection limit of this address" in lines[0]
    (counted,) = [line for line in service.log if "more handshakes" in line]
    assert "30 more handshakes were rejected: 30 with 429" in counted


async def test_refusals_are_counted_anew_in_each_interval(io_loop, caplog):
    """A timer logs the summary; then lines are logged again."""
    book = RefusalLog(lines=1, interval=0.05)
    with caplog.at_level("INFO", "handlers.admission"):
        for status in (429, 429, 503):
            book.add("203.0.113.1", status, "why")
        await eventually(lambda: len(caplog.messages) == 2)
        assert caplog.messages[1] == (
            "2 more handshakes were rejected: 1 with 429, 1 with 503"
        )
        book.add("203.0.113.1", 429, "why")
        assert len(caplog.messages) == 3
        book.log_summary()
        assert len(caplog.messages) == 3


# How fast clients send.


async def test_messages_above_the_rate_are_read_later(io_loop):
    """Reading slows to --messages_per_second; order and messages are kept."""
    async with Service("--messages_per_second=20", "--rate_patience=30") as service:
        async with connect(service.ws_url) as client:
            began = time.monotonic()
            for number in range(40):
                await client.send(str(number))
            for number in range(40):
                assert await asyncio.wait_for(client.recv(), DEADLINE) == str(number)
            assert time.monotonic() - began > 0.8  # 20 at once, 20 in a second
            await client.close()
            assert client.close_code == 1000


async def test_bytes_above_the_rate_are_read_later(io_loop):
    """Reading slows to --bytes_per_second, within a message too."""
    async with Service("--bytes_per_second=100000", "--rate_patience=30") as service:
        async with connect(service.ws_url) as client:
            began = time.monotonic()
            await client.send(bytes(300_000))
            assert len(await asyncio.wait_for(client.recv(), DEADLINE)) == 300_000
            assert time.monotonic() - began > 1.5  # 100 KB at once, 200 KB in 2 s


async def test_rates_are_per_connection(io_loop):
    """A throttled client does not delay others."""
    async with Service("--messages_per_second=2", "--rate_patience=30") as service:
        async with connect(service.ws_url) as busy, connect(service.ws_url) as quiet:
            for number in range(6):
                await busy.send(str(number))
            await busy.recv()
            await quiet.send("y")
            assert await asyncio.wait_for(quiet.recv(), DEADLINE) == "y"
            while await busy.recv() != "5":  # which arrives two seconds later
                pass


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--messages_per_second=10", bytes(200)),
        ("--bytes_per_second=10000", bytes(5000)),
    ],
)
async def test_client_that_does_not_slow_down_is_closed_with_1008(
    io_loop, flag, message
):
    """More than its rate for --rate_patience, without a break."""
    async with RecordingBackend() as backend:
        flags = backend.flags("message", "disconnect")
        async with Service(*flags, flag, "--rate_patience=1") as service:
            answer = await pushed(service.ws_url, message)
            assert answer == b"\x88\x0f\x03\xf0rate exceeded"
            (event,) = await backend.wait_for("disconnect", 1)
        meta = event["meta"]
        assert (meta["code"], meta["initiator"]) == (1008, "relay")
        assert 1 <= meta["duration"] < 8
        # At most those of its first second, and of the time that it was given.
        assert len(backend.of("message")) < 10 * (meta["duration"] + 1) + 2


async def test_client_that_pauses_is_not_closed(io_loop):
    """Bursts above the rate, for longer than --rate_patience, with breaks."""
    async with Service("--messages_per_second=50", "--rate_patience=2") as service:
        async with connect(service.ws_url) as client:
            began = time.monotonic()
            while time.monotonic() - began < 3.5:
                for _ in range(40):
                    await client.send("x")
                for _ in range(40):
                    await asyncio.wait_for(client.recv(), DEADLINE)
                await asyncio.sleep(0.2)  # its break
            await client.close()
            assert client.close_code == 1000


async def test_throttled_client_stays_connected(io_loop):
    """While reading waits, no pong can be read, so none is required."""
    flags = ("--messages_per_second=2", "--ping_interval=0.2", "--ping_timeout=0.2")
    async with Service(*flags) as service:
        async with connect(service.ws_url) as client:
            for number in range(6):
                await client.send(str(number))
            for number in range(6):
                assert await asyncio.wait_for(client.recv(), DEADLINE) == str(number)


async def test_throttled_client_can_be_closed(io_loop):
    """A close by the backend does not wait for the client's credit."""
    async with RecordingBackend() as backend:
        flags = backend.flags("message", "disconnect")
        async with Service(*flags, "--messages_per_second=0.01") as service:
            async with connect(service.ws_url) as client:
                await client.send("x")
                (event,) = await backend.wait_for("message", 1)
                answer = await backend.call(event["meta"]["disconnect"])
                assert answer.code == 200
                assert await closed(client) == (1000, "")
                (event,) = await backend.wait_for("disconnect", 1)
                assert event["meta"]["code"] == 1000


async def keep_rate(client: websockets.ClientConnection, message: bytes) -> None:
    """Send `message` less than 20 times a second, until the test ends."""
    while True:
        await client.send(message)
        await asyncio.sleep(0.055)  # its pace


RATE_OF_20 = pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--messages_per_second=20", b"x"),
        ("--bytes_per_second=20200", bytes(1000)),  # and 8 of a frame's header
    ],
    ids=["messages", "bytes"],
)


@pytest.mark.long
@RATE_OF_20
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_stall_does_not_count_for_rates(io_loop, loop, flag, message):
    """SIGSTOP for longer than --rate_patience: what arrived meanwhile is read."""
    flags = (flag, "--rate_patience=1", f"--event_loop={loop}")
    async with Service(*flags) as service:
        async with connect(service.ws_url) as client:
            sending = asyncio.create_task(keep_rate(client, message))
            for _ in range(20):
                await asyncio.wait_for(client.recv(), DEADLINE)
            async with service.stalled(4):
                pass
            for _ in range(140):  # 70 of the stall, and some seconds more
                await asyncio.wait_for(client.recv(), DEADLINE)
            sending.cancel()


@pytest.mark.long
@RATE_OF_20
async def test_slow_backend_does_not_count_for_rates(io_loop, flag, message):
    """Reading stops for longer than --rate_patience, and then continues."""
    async with RecordingBackend() as backend:
        release = withhold(backend, "message")
        flags = (*backend.flags("message", "disconnect"), flag, "--rate_patience=1",
                 "--order_wait=inf", "--backend_timeout=60",
                 "--connection_queue_messages=1")
        async with Service(*flags) as service:
            async with connect(service.ws_url) as client:
                sending = asyncio.create_task(keep_rate(client, message))
                await backend.wait_for("message", 1)
                await asyncio.sleep(4)  # until the backend responds
                release.set()
                await backend.wait_for("message", 140)
                assert not sending.done()
                sending.cancel()
                await client.close()
                assert client.close_code == 1000


# How long connections last.


async def test_idle_client_is_closed_with_1001(io_loop):
    """No message either way for --idle_timeout; pings do not count."""
    async with RecordingBackend() as backend:
        flags = ("--idle_timeout=1", "--ping_interval=0.5")
        async with Service(
            *backend.flags("message", "disconnect"), *flags
        ) as service:
            async with connect(service.ws_url, ping_interval=0.5) as client:
                assert await closed(client) == (1001, "idle")
            (event,) = await backend.wait_for("disconnect", 1)
        meta = event["meta"]
        assert (meta["code"], meta["reason"], meta["initiator"]) == (
            1001, "idle", "relay",
        )
        assert 1 <= meta["duration"] < 8


@pytest.mark.parametrize("way", ["to the backend", "from the backend"])
async def test_client_with_messages_is_not_idle(io_loop, way):
    """Messages in one direction are sufficient."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags("message", "disconnect"), "--idle_timeout=3")
        async with Service(*flags) as service:
            async with connect(service.ws_url) as client:
                await client.send("hello")
                (event,) = await backend.wait_for("message", 1)
                began = time.monotonic()
                while time.monotonic() - began < 4:
                    if way == "to the backend":
                        await client.send("x")
                    else:
                        answer = await backend.call(event["meta"]["send"], body=b"x")
                        assert answer.code == 200
                    await asyncio.sleep(0.3)  # between two messages
                await client.close()
                assert client.close_code == 1000


async def test_client_that_waits_for_the_backend_is_not_idle(io_loop):
    """While the relay waits for the backend, the client may be silent."""
    async with RecordingBackend() as backend:
        answer = withhold(backend, "message")
        flags = ("--idle_timeout=0.5", "--order_wait=inf", "--backend_timeout=30")
        async with Service(
            *backend.flags("message", "disconnect"), *flags
        ) as service:
            async with connect(service.ws_url) as client:
                await client.send("x")
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.recv(), 1.5)
                answer.set()
                assert await closed(client) == (1001, "idle")


async def test_lifetime_ends_for_a_busy_client(io_loop):
    """1001 after --max_lifetime, or up to a tenth earlier."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags("disconnect", "message"), "--max_lifetime=2")
        async with Service(*flags) as service:
            async with contextlib.AsyncExitStack() as clients:
                connected = [
                    await clients.enter_async_context(connect(service.ws_url))
                    for _ in range(20)
                ]

                async def chat(client: websockets.ClientConnection) -> None:
                    with contextlib.suppress(websockets.ConnectionClosed):
                        while True:
                            await client.send("x")
                            await asyncio.sleep(0.2)  # between two messages

                chats = [asyncio.create_task(chat(client)) for client in connected]
                for client in connected:
                    assert await closed(client) == (1001, "lifetime")
                await asyncio.gather(*chats)
            events = await backend.wait_for("disconnect", 20)
        lasted = sorted(event["meta"]["duration"] for event in events)
        assert 1.8 <= lasted[0] < lasted[-1] < 8
        assert {event["meta"]["initiator"] for event in events} == {"relay"}


async def test_lifetimes_of_simultaneous_clients_are_spread(io_loop):
    """Their lifetimes end in many turns of the loop, none too late."""

    class Client:
        busy, last_message_at = False, 0.0

        def expire(self, reason: str) -> None: ...

    lifetimes = Lifetimes(max_lifetime=3600)
    now = asyncio.get_running_loop().time()
    began = int(now)
    for _ in range(100):
        lifetimes.add(Client(), now)
    turns = set(lifetimes._turn_of.values())
    assert len(turns) > 50
    assert began + 3240 <= min(turns) and max(turns) <= began + 3603
    lifetimes.close()


async def test_optional_limits_are_off_by_default(io_loop):
    """A thousand messages at once, and three connections of one address."""
    async with Service() as service:
        async with contextlib.AsyncExitStack() as clients:
            for _ in range(3):
                client = await clients.enter_async_context(connect(service.ws_url))
                for number in range(1000):
                    await client.send(str(number))
                for number in range(1000):
                    assert await client.recv() == str(number)


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--max_connections=0", "at least 1"),
        ("--max_connections_per_ip=-1", "0 or more"),
        ("--bytes_per_second=-1", "0 or more"),
        ("--messages_per_second=-1", "0, or 0.01 or more"),
        ("--messages_per_second=0.001", "0, or 0.01 or more"),
        ("--handshakes_per_second=nan", "0, or 0.01 or more"),
        ("--handshakes_per_second=inf", "0, or 0.01 or more"),
        ("--idle_timeout=-1", "0 or more seconds"),
        ("--max_lifetime=inf", "a finite number"),
    ],
)
def test_limit_out_of_range_exits_with_an_error(flag, why):
    """One line names the option and what it must be."""
    line = refusal(flag)
    assert flag.partition("=")[0] in line and why in line


# Incomplete messages.


async def test_incomplete_messages_are_bounded(io_loop):
    """Above --max_queued_bytes of parts, the slowest client gets 1013."""
    part, rest = bytes(400_000), bytes(100_000)
    size = len(part) + len(rest)
    ping = b"\x89\x80" + bytes(4)
    flags = ("--max_queued_bytes=1000000", f"--max_message_size={size}")
    async with Service(*flags) as relay, contextlib.AsyncExitStack() as stack:
        clients = []
        for number in range(3):
            reader, writer = await handshaken(relay.ws_url)
            stack.callback(writer.close)
            clients.append((reader, writer))
            writer.write(b"\x02\xff" + len(part).to_bytes(8) + bytes(4) + part + ping)
            if number < 2:  # the pong shows that the fragment has been read
                await asyncio.wait_for(reader.readexactly(2), DEADLINE)
        (first, _), second, third = clients
        close_frame = await asyncio.wait_for(first.read(), DEADLINE)
        assert close_frame[:4] == b"\x88" + bytes([len(close_frame) - 2]) + b"\x03\xf5"
        await asyncio.wait_for(third[0].readexactly(2), DEADLINE)
        for reader, writer in (second, third):
            writer.write(b"\x80\xff" + len(rest).to_bytes(8) + bytes(4) + rest)
            echo = await asyncio.wait_for(reader.readexactly(10 + size), DEADLINE)
            assert echo[:10] == b"\x82\x7f" + size.to_bytes(8)


async def test_completed_messages_do_not_count(io_loop):
    """Many large messages in turn, and connections cut within a message."""
    size = 400_000
    start = b"\x82\xff" + size.to_bytes(8) + bytes(4)
    flags = ("--max_queued_bytes=1000000", f"--max_message_size={size}")
    async with Service(*flags) as relay:
        for _ in range(4):
            _, writer = await handshaken(relay.ws_url)
            writer.write(start + bytes(size // 2))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        reader, writer = await handshaken(relay.ws_url)
        for _ in range(4):
            writer.write(start + bytes(size))
            await asyncio.wait_for(reader.readexactly(10 + size), DEADLINE)
        writer.close()
