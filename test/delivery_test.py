"""The http backend: order, held responses, and a misbehaving backend."""

import asyncio
import contextlib
from collections import defaultdict

import pytest
import websockets
from faults import Attempt, FaultyBackend, Reply, leave, talkers
from service import (
    DEADLINE,
    RecordingBackend,
    Service,
    eventually,
    tcp_server,
    withhold,
)
from tornado.web import RequestHandler

from backends.client import Response
from backends.http.retries import MAX_BACKOFF, backoff, retry_after

pytestmark = pytest.mark.gen_test(timeout=90)


@pytest.mark.long
async def test_a_thousand_clients_in_order(io_loop):
    """1,000 clients, five messages each: each arrives once and in order."""
    clients, each = 1000, 5
    async with RecordingBackend() as backend:
        # This backend may be slow for so many clients; overdue requests delay nobody.
        flags = (*backend.flags("message", "disconnect"), "--order_wait=30")
        async with Service(*flags) as service:
            room = asyncio.Semaphore(200)

            async def talk(number: int) -> None:
                async with room:
                    client = await websockets.connect(service.ws_url, compression=None)
                ready.release()
                await start.wait()
                for count in range(each):
                    await client.send(f"{number} {count}")
                await client.close()

            ready, start = asyncio.Semaphore(0), asyncio.Event()
            talks = [asyncio.create_task(talk(number)) for number in range(clients)]
            for _ in range(clients):
                await ready.acquire()
            start.set()  # all are open at once
            await asyncio.gather(*talks)
            await backend.wait_for("disconnect", clients, 60)
            assert len(backend.events) == clients * (each + 1)
            received = defaultdict(list)
            for kind, event, _ in backend.events:
                words = event["message"] if kind == "message" else kind
                received[event["meta"]["connection_id"]].append(words)
            spoken = sorted(tuple(words) for words in received.values())
            assert spoken == sorted(
                (*(f"{number} {count}" for count in range(each)), "disconnect")
                for number in range(clients)
            )


async def test_next_message_waits_for_the_response(io_loop):
    """While the backend responds in time, one message is sent at a time."""
    open_now, most = 0, 0

    async def answer(handler: RequestHandler, event: dict) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.05)
        open_now -= 1

    async with RecordingBackend() as backend:
        backend.answers["message"] = answer
        async with Service(*backend.flags()) as service:
            async with websockets.connect(service.ws_url) as client:
                for number in range(10):
                    await client.send(str(number))
                events = await backend.wait_for("message", 10)
    assert [event["message"] for event in events] == list("0123456789")
    assert most == 1


@pytest.mark.long
async def test_backend_that_holds_every_response(io_loop):
    """100 clients, twenty messages each, answered by callback: all complete."""
    clients, rounds = 100, 20  # more than `--max_unanswered`
    done: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async with RecordingBackend() as backend:

        async def hold(handler: RequestHandler, event: dict) -> None:
            meta = event["meta"]
            reply = await backend.call(
                meta["send"],
                body=event["message"].encode(),
                headers={"Content-Type": "text/plain"},
            )
            assert reply.code == 200
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done[meta["connection_id"]].wait(), 60)

        async def end(handler: RequestHandler, event: dict) -> None:
            done[event["connection_id"]].set()

        backend.answers = {"message": hold, "disconnect": end}
        async with Service(*backend.flags("message", "disconnect")) as service:

            async def converse(number: int) -> None:
                async with websockets.connect(service.ws_url) as client:
                    for turn in range(rounds):
                        await client.send(f"{number} {turn}")
                        assert await client.recv() == f"{number} {turn}"

            await asyncio.gather(*map(converse, range(clients)))
            await backend.wait_for("disconnect", clients)
    assert len(backend.of("message")) == clients * rounds
    assert {e["meta"]["undelivered"] for e in backend.of("disconnect")} == {0}


async def test_connection_limit_abandons_held_requests(io_loop):
    """With fewer connections than held responses, messages still arrive."""
    forever = asyncio.Event()
    async with RecordingBackend() as backend:

        async def hold(handler: RequestHandler, event: dict) -> None:
            await backend.call(event["meta"]["send"], body=b"reply")
            await forever.wait()

        backend.answers["message"] = hold
        flags = backend.flags("message", "disconnect")
        async with Service(*flags, "--max_backend_connections=10") as service:

            async def converse() -> None:
                async with websockets.connect(service.ws_url) as client:
                    for _ in range(3):
                        await client.send("question")
                        assert await client.recv() == b"reply"

            await asyncio.gather(*(converse() for _ in range(15)))
            await backend.wait_for("disconnect", 15)
            forever.set()
    assert len(backend.of("message")) == 45


async def test_no_sign_of_life_closes_with_1013(io_loop):
    """Held responses without a callback: at most --max_unanswered, then 1013."""
    async with RecordingBackend() as backend:
        forever = withhold(backend, "message")
        flags = ("--order_wait=0.05", "--max_unanswered=3", "--delivery_timeout=3")
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                for number in range(6):
                    await client.send(str(number))
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(client.recv(), DEADLINE)
                assert client.close_code == 1013
            assert len(backend.of("message")) == 3
            (event,) = await backend.wait_for("disconnect", 1)
            assert event["meta"]["undelivered"] == 3
            forever.set()


async def test_strict_order_never_overtakes(io_loop):
    """With --order_wait=inf the second message waits for any time."""
    async with RecordingBackend() as backend:
        release = withhold(backend, "message")
        flags = ("--order_wait=inf", "--backend_timeout=30")
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("1")
                await client.send("2")
                await backend.wait_for("message", 1)
                with pytest.raises(TimeoutError):
                    await backend.wait_for("message", 2, deadline=2)
                release.set()
                await backend.wait_for("message", 2)


async def test_refused_message_is_counted_and_the_client_stays(io_loop):
    """400, 404, a redirect are not retried; `meta.refused` counts them."""
    statuses = iter([400, 302, 200])

    async def refuse(handler: RequestHandler, event: dict) -> None:
        handler.set_status(next(statuses))

    async with RecordingBackend() as backend:
        backend.answers["message"] = refuse
        async with Service(*backend.flags()) as service:
            async with websockets.connect(service.ws_url) as client:
                for _ in range(3):
                    await client.send("x")
                await backend.wait_for("message", 3)
            (event,) = await backend.wait_for("disconnect", 1)
    assert event["meta"]["refused"] == 2
    assert event["meta"]["undelivered"] == 0
    assert event["meta"]["code"] == 1000


class RawBackend:
    """A TCP server that answers each request with the test's bytes."""

    def __init__(self, *answers: bytes | None, keep: bool = True) -> None:
        self.answers = list(answers)
        self.keep = keep
        self.requests: list[bytes] = []
        self.connections = 0

    async def __aenter__(self) -> "RawBackend":
        self._server = tcp_server(self._serve)
        port = await self._server.__aenter__()
        self.flags = ["--backend=http", f"--messageuri=http://127.0.0.1:{port}/m"]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.__aexit__(*error)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            self.requests.append(await reader.readexactly(length))
            answer = self.answers.pop(0) if self.answers else OK
            if answer is not None:
                for part in answer.split(b"|"):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.02)  # parts of a response arrive separately
            if answer is None or not self.keep or b"close" in answer:
                return


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (OK, 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 1),
        (b"HTTP/1.1 100 Continue\r\n\r\n|" + OK, 1),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" + OK, 1),
        (CHUNKED + b"2\r\n|OK\r\n|0\r\n\r\n", 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n|ab|cd", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(300000), None),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nOK", 3),
        (b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nuntil the end", 3),
        (b"HTTP/1.1 200 OK\r\nX-Connection: close\r\n\r\nuntil |the end", 3),
    ],
)
async def test_every_framing_of_a_response(io_loop, answer, connections):
    """Three messages arrive once each, over as few connections as possible."""
    async with RawBackend(answer, answer, answer) as backend:
        async with Service(*backend.flags) as service:
            async with websockets.connect(service.ws_url) as client:
                for number in range(3):
                    await client.send(str(number))
                    await eventually(lambda n=number: len(backend.requests) == n + 1)
                await client.send("last")
                await eventually(lambda: len(backend.requests) == 4)
                assert client.state == websockets.State.OPEN
    if connections is not None:
        assert connections <= backend.connections <= connections + 1


async def test_kept_connection_that_ends_is_not_a_failure(io_loop):
    """Its request is sent again at once, on a new connection."""
    async with RawBackend(OK, None, OK) as backend:
        async with Service(*backend.flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("1")
                await eventually(lambda: len(backend.requests) == 1)
                await client.send("2")
                await eventually(lambda: len(backend.requests) == 3)
                assert backend.requests[1] == backend.requests[2]
                await client.send("3")
                await eventually(lambda: len(backend.requests) == 4)
                assert backend.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close",
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 408 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 425 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_message_without_a_valid_response_is_retried(io_loop, answer):
    """Before the next one, with the same body; the client stays."""
    async with RawBackend(answer, keep=False) as backend:
        async with Service(*backend.flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("1")
                await client.send("2")
                await eventually(lambda: len(backend.requests) == 3)
                assert backend.requests[0] == backend.requests[1]
                assert b'"message":"2"' in backend.requests[2]
                await (await client.ping())


async def test_retry_has_the_same_id_and_its_own_time(io_loop):
    """webhook-id is the event's, webhook-timestamp the attempt's."""
    failures = iter([503, 503])

    async def fail(handler: RequestHandler, event: dict) -> None:
        handler.set_status(next(failures, 200))
        handler.set_header("Retry-After", "1")

    async with RecordingBackend() as backend:
        backend.answers["message"] = fail
        async with Service(*backend.flags("message")) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                await backend.wait_for("message", 3)
    ids = {headers["Webhook-Id"] for _, _, headers in backend.events}
    times = [int(headers["Webhook-Timestamp"]) for _, _, headers in backend.events]
    assert len(ids) == 1
    # Retry-After: at least a second between two attempts.
    assert times[1] - times[0] >= 1 and times[2] - times[1] >= 1


@pytest.mark.parametrize("how", ["down", "500", "hang"])
async def test_unreachable_backend_closes_clients_with_1013(io_loop, how):
    """After --delivery_timeout; all waiting messages are counted."""
    failing = True
    forever = asyncio.Event()

    async def fail(handler: RequestHandler, event: dict) -> None:
        if failing and how == "hang":
            await forever.wait()
        elif failing:
            handler.set_status(500)

    async with RecordingBackend() as backend:
        backend.answers["message"] = fail
        flags = backend.flags("message", "disconnect")
        if how == "down":
            flags[1] = "--messageuri=http://127.0.0.1:1/nobody"
        flags += ["--delivery_timeout=1", "--backend_timeout=0.5", "--order_wait=inf"]
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                for number in range(5):
                    await client.send(str(number))
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(client.recv(), DEADLINE)
                assert client.close_code == 1013
            (event,) = await backend.wait_for("disconnect", 1)
            assert event["meta"]["undelivered"] == 5
            assert (event["meta"]["code"], event["meta"]["initiator"]) == (
                1013,
                "relay",
            )
            assert event["meta"]["duration"] >= 1
            forever.set()


async def test_undeliverable_message_of_a_closed_client_is_given_up(io_loop):
    """The backend is down: the message is counted, without a traceback."""
    async with RecordingBackend() as backend:
        flags = backend.flags("message", "disconnect")
        flags[1] = "--messageuri=http://127.0.0.1:1/nobody"
        async with Service(*flags, "--delivery_timeout=0.5") as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
            (event,) = await backend.wait_for("disconnect", 1)
            assert (event["meta"]["code"], event["meta"]["undelivered"]) == (1000, 1)


async def test_failed_overdue_requests_are_retried_in_order(io_loop):
    """For each kind of failure, the next backend gets the messages in order."""
    fail: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
    failing = True

    async def hold(handler: RequestHandler, event: dict) -> None:
        if failing:
            await fail[event["message"]].wait()
            handler.set_status(503)
            handler.set_header("Retry-After", "1")  # the other attempts fail before

    async with RecordingBackend() as backend:
        backend.answers["message"] = hold
        flags = ("--order_wait=0.1",)
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                for number in "01234":
                    await client.send(number)
                await backend.wait_for("message", 5)
                for number in "31420":
                    fail[number].set()
                failing = False
                events = await backend.wait_for("message", 10)
                assert [event["message"] for event in events] == [*"01234"] * 2
                await client.send("5")
                events = await backend.wait_for("message", 11)
                assert events[-1]["message"] == "5"


def numbers_of(backend: FaultyBackend) -> list[int]:
    """Return the message's number of each attempt, in the order of arrival."""
    return [int(a.webhook_id.rpartition("-")[2]) for a in backend.attempts]


async def test_queued_message_follows_one_that_failed(io_loop):
    """Also if the failure itself frees the connection."""

    def fail_first(attempt: Attempt) -> Reply:
        if len(backend.attempts) == 1:
            return Reply(503, delay=1, headers=("Retry-After: 1",))
        return Reply()

    async with FaultyBackend(fail_first) as backend:
        flags = ("--order_wait=0.1", "--max_backend_connections=1")
        async with Service(*backend.flags("message"), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(2)
            await backend.wait_for("message", 2)
            await leave([talker])
    assert numbers_of(backend) == [1, 1, 2]


async def test_messages_whose_kept_connections_end_together_keep_their_order(io_loop):
    """A message is not sent again at once if one before it has failed."""

    def answer(attempt: Attempt) -> Reply:
        return Reply(fault="hold" if holding else None)

    holding = True
    async with FaultyBackend(answer) as backend:
        flags = (*backend.flags("message"), "--order_wait=0.5")
        async with Service(*flags) as service:
            warming = await talkers(service.ws_url, 2)
            for talker in warming:
                await talker.say()
            await eventually(lambda: len(backend.attempts) == 2)
            backend.release()  # two connections are kept
            await leave(warming)
            backend.attempts.clear()
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(2)
            await eventually(lambda: len(backend.attempts) == 2)
            holding = False
            # The second one may be sent again if it ends before the first one.
            backend.reset(*backend.attempts)
            await eventually(lambda: len(backend.attempts) == 4)
            await leave([talker])
    assert numbers_of(backend) == [1, 2, 1, 2]


async def test_disconnect_event_is_retried(io_loop):
    """A retry has the same webhook-id."""
    failures = iter([503, 500])

    async def fail(handler: RequestHandler, event: dict) -> None:
        handler.set_status(next(failures, 200))

    async with RecordingBackend() as backend:
        backend.answers["disconnect"] = fail
        async with Service(*backend.flags("message", "disconnect")) as service:
            async with websockets.connect(service.ws_url):
                pass
            await backend.wait_for("disconnect", 3)
    assert len({headers["Webhook-Id"] for _, _, headers in backend.events}) == 1


async def test_message_that_fails_after_the_disconnect_is_delivered(io_loop):
    """Then the disconnect event is sent again, for the backend to clean up."""
    fail, failed = asyncio.Event(), False

    async def hold(handler: RequestHandler, event: dict) -> None:
        nonlocal failed
        if not failed:
            failed = True
            await fail.wait()
            handler.set_status(503)

    async with RecordingBackend() as backend:
        backend.answers["message"] = hold
        flags = ("--order_wait=0.1",)
        async with Service(*backend.flags("message", "disconnect"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                await backend.wait_for("message", 1)
            await backend.wait_for("disconnect", 1)
            fail.set()
            await backend.wait_for("disconnect", 2)
    kinds = [kind for kind, _, _ in backend.events]
    assert kinds == ["message", "disconnect", "message", "disconnect"]
    first, second = backend.of("disconnect")
    assert first == second


async def test_reading_stops_while_the_queue_is_full_and_the_client_lives(io_loop):
    """A slow backend delays the client, but never closes it."""
    async def flood(client: websockets.ClientConnection) -> None:
        for number in range(200):
            await client.send(f"{number:06}" + "x" * 100_000)

    async with RecordingBackend() as backend:
        release = withhold(backend, "message")
        flags = ("--order_wait=inf", "--backend_timeout=60")
        flags += ("--ping_interval=0.5", "--ping_timeout=2")
        async with Service(*backend.flags(), *flags) as service:
            async with websockets.connect(
                service.ws_url, ping_interval=None, compression=None
            ) as client:
                flooding = asyncio.ensure_future(flood(client))
                with pytest.raises(TimeoutError):  # TCP pushes back to the client
                    await asyncio.wait_for(asyncio.shield(flooding), 3)
                release.set()
                await asyncio.wait_for(flooding, DEADLINE)
                events = await backend.wait_for("message", 200)
                numbers = [int(event["message"][:6]) for event in events]
                assert numbers == list(range(200))


async def test_ipv6_backend(io_loop):
    """A backend on ::1 is reached by its address."""

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        hosts.append(head.split(b"Host: ")[1].split(b"\r\n")[0].decode())

    hosts: list[str] = []
    async with tcp_server(answer, "::1") as port:
        url = f"http://[::1]:{port}/m"
        async with Service("--backend=http", f"--messageuri={url}") as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                await eventually(lambda: hosts == [f"[::1]:{port}"])


async def test_handshakes_probe_an_unreachable_backend(io_loop):
    """If no event waits, a handshake finds out that the backend is back."""
    away = True

    async def answer(handler: RequestHandler, event: dict) -> None:
        if away:
            handler.set_status(503)

    async with RecordingBackend() as backend:
        backend.answers["connect"] = answer
        async with Service(*backend.flags("message", "connect")) as service:

            async def status() -> int:
                try:
                    await (await websockets.connect(service.ws_url)).close()
                except websockets.InvalidStatus as error:
                    return error.response.status_code
                return 101

            for _ in range(30):
                assert await status() == 503
            asked = len(backend.of("connect"))
            assert asked < 30  # the handshakes do not flood the backend
            away = False
            async with asyncio.timeout(DEADLINE):
                while await status() != 101:
                    pass


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), (" 3\t", 3.0), ("²", None), ("", None), ("soon", None), ("-1", None)],
)
async def test_retry_after_is_seconds_or_a_date(io_loop, value, seconds):
    """Any other value is ignored."""
    assert retry_after(Response(503, {"retry-after": value}, b"")) == seconds
    past = Response(503, {"retry-after": "Fri, 01 Jan 2021 00:00:00 GMT"}, b"")
    assert retry_after(past) == 0.0


FAR = "Thu, 01 Jan 99999999999999999999 00:00:00 GMT"


@pytest.mark.parametrize(
    "value",
    [
        FAR,
        "Thu, 01 Jan 0000 00:00:00 GMT",
        "Thu, 99999999999999999999 Jan 2026 00:00:00 GMT",
        "Thu, 01 Jan 2026 99999999999999999999:00:00 GMT",
        "Thu, 01 Jan 2026 00:00:00 +99999999999999999999",
        "Thu, 01 Jan 0001 00:00:00 +2359",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "0 0 0 0 0",
        "Thu,",
        ", , , , ,",
        "Jan",
        "9" * 5000,
        "Thu, 01 Jan 2026 " + "0" * 60_000,
    ],
)
async def test_any_retry_after_value_is_handled(io_loop, value):
    """Any value of Retry-After or Date gives a number or None."""
    wait = retry_after(Response(503, {"retry-after": value}, b""))
    assert wait is None or wait >= 0
    wait = retry_after(Response(503, {"retry-after": LATER, "date": value}, b""))
    assert wait is None or wait >= 0


LATER = "Thu, 01 Jan 2026 00:00:07 GMT"


@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        ("Thu, 01 Jan 2026 00:00:00 GMT", 7.0),
        ("Thursday, 01-Jan-26 00:00:02 GMT", 5.0),
        ("Thu, 01 Jan 2026 01:00:00 GMT", 0.0),
        (" Thu, 01 Jan 2026 00:00:00 GMT ", 7.0),
        ("Thu Jan  1 00:00:03 2026", 4.0),
    ],
)
async def test_retry_after_is_relative_to_date(io_loop, date, seconds):
    """The backend's clock may differ from the relay's."""
    answer = Response(503, {"retry-after": LATER, "date": date}, b"")
    assert retry_after(answer) == seconds


async def test_retry_after_may_have_asctime_format(io_loop):
    """It names no zone: it is UTC (RFC 9110, section 5.6.7)."""
    headers = {"retry-after": "Thu Jan  1 00:00:07 2026", "date": LATER}
    assert retry_after(Response(503, headers, b"")) == 0.0
    headers["date"] = "Thu, 01 Jan 2026 00:00:00 GMT"
    assert retry_after(Response(503, headers, b"")) == 7.0


@pytest.mark.parametrize("attempts", [1, 1025, 10**9])
async def test_backoff_is_bounded_for_any_number_of_attempts(io_loop, attempts):
    """An unlimited power of two would overflow."""
    assert all(0 <= backoff(attempts) <= MAX_BACKOFF for _ in range(100))


async def test_endless_retry_after_does_not_block_an_event(io_loop):
    """A message and a disconnect event are retried by their deadlines; exit 0."""

    async def fail_once(handler: RequestHandler, event: dict) -> None:
        kind = "message" if "message" in event else "disconnect"
        if len(backend.of(kind)) == 1:
            handler.set_status(503)
            handler.set_header("Retry-After", FAR)

    async with RecordingBackend() as backend:
        backend.answers = {"message": fail_once, "disconnect": fail_once}
        flags = ("--delivery_timeout=2", "--disconnect_timeout=2")
        async with Service(*backend.flags("message", "disconnect"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("x")
                await backend.wait_for("message", 2)
            await backend.wait_for("disconnect", 2)
    first, second = backend.of("disconnect")
    assert first["meta"]["undelivered"] == second["meta"]["undelivered"] == 0


async def test_retry_after_is_not_shortened_by_another_message_s_failure(io_loop):
    """The first gets 3 s, the second fails a little later: both wait."""
    times: list[tuple[int, float]] = []

    def decide(attempt: Attempt) -> Reply:
        number = int(attempt.event["message"].split()[1])
        times.append((number, asyncio.get_running_loop().time()))
        if len(times) > 2:
            return Reply()
        if number == 0:
            return Reply(503, delay=1, headers=("Retry-After: 3",))
        return Reply(delay=1.5, fault="reset")

    async with FaultyBackend(decide) as backend:
        async with Service(*backend.flags("message"), "--order_wait=0.1") as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(2)
            await backend.wait_for("message", 2)
            await leave([talker])
    assert [number for number, _ in times] == [0, 1, 0, 1]
    answered_at = times[0][1] + 1
    assert times[2][1] - answered_at >= 3


# After a stall.


async def test_response_during_a_stall_is_in_time(io_loop):
    """It is read before the request counts as overdue: order is kept."""
    async with FaultyBackend(lambda attempt: Reply(fault="hold")) as backend:
        async with Service(*backend.flags("message"), "--order_wait=1.5") as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(2)
            await eventually(lambda: len(backend.attempts) == 1)
            async with service.stalled(2):
                backend.decide = lambda attempt: Reply()
                backend.release(reply=Reply(503, headers=("Retry-After: 1",)))
            await backend.wait_for("message", 2)
            await leave([talker])
    assert numbers_of(backend) == [1, 1, 2]


@pytest.mark.parametrize(
    "flags", [["--max_unanswered=2"], ["--max_backend_connections=2"]]
)
async def test_deadline_during_a_stall_considers_arrived_responses(io_loop, flags):
    """Responses that arrived meanwhile are signs of life: no 1013."""
    async with FaultyBackend(lambda attempt: Reply(fault="hold")) as backend:
        flags = [*flags, "--order_wait=0.2", "--delivery_timeout=4"]
        async with Service(*backend.flags("message"), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(3)
            await eventually(lambda: len(backend.attempts) == 2)
            async with service.stalled(5):
                backend.decide = lambda attempt: Reply()
                backend.release()
            await backend.wait_for("message", 3)
            assert talker.is_open
            await leave([talker])


async def test_message_that_failed_during_a_stall_after_its_disconnect(io_loop):
    """The 5 s for held requests end only after the failure was read."""
    async with FaultyBackend() as backend:
        backend.decide = lambda attempt: Reply(
            fault="hold" if attempt.kind == "message" else None
        )
        async with Service(*backend.flags(), "--order_wait=0.1") as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: len(backend.attempts) == 1)
            await leave([talker])
            await backend.wait_for("disconnect", 1)
            async with service.stalled(5.5):
                backend.decide = lambda attempt: Reply()
                backend.release(reply=Reply(503))
            await eventually(lambda: len(backend.attempts) == 4)
    kinds = [attempt.kind for attempt in backend.attempts]
    assert kinds == ["message", "disconnect", "message", "disconnect"]


async def test_held_messages_are_bounded_in_bytes(io_loop):
    """Above --max_queued_bytes of overdue messages, a client has one at a time."""
    async with RecordingBackend() as backend:
        forever = withhold(backend, "message")
        flags = ("--order_wait=0.1", "--max_queued_bytes=250000",
                 "--max_message_size=250000")
        flags += ("--delivery_timeout=2",)
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url, compression=None) as client:
                for number in range(5):
                    await client.send(str(number) * 100_000)
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(client.recv(), DEADLINE)
                assert client.close_code == 1013
            assert len(backend.of("message")) == 3  # the third reached the bound
            forever.set()
