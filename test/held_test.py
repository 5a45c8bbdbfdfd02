"""Held responses: their memory, and what waits for their end."""

import asyncio
import json
from collections import Counter

import pytest
from faults import Attempt, FaultyBackend, Reply, Talker, leave, memory, talkers
from service import DEADLINE, RecordingBackend, Service, eventually

from backends.client.exchange import Terms
from backends.events import Event
from backends.http.held import OverdueLine, Request
from backends.target import Target

pytestmark = pytest.mark.gen_test(timeout=120)

MIB = 2**20
HOLD = Reply(fault="hold")
OK = Reply()


def number_of(attempt: Attempt) -> int:
    """Return the number of a `Talker`'s message, counted from 0."""
    return int(attempt.event["message"].split()[1])


async def held(service: Service) -> int:
    """Return the number of held messages that the relay reports."""
    async with RecordingBackend() as caller:
        answer = await caller.call(f"{service.callback_url}/status", "GET")
    return json.loads(answer.body)["backend"]["held"]


async def until_held(service: Service, number: int) -> None:
    """Wait until `number` messages are held."""
    async with asyncio.timeout(DEADLINE):
        while await held(service) != number:
            await asyncio.sleep(0.05)


async def test_ended_held_requests_leave_no_memory(io_loop):
    """300 messages of 200 kB, five times: memory is as after the first time."""
    clients, each = 20, 15

    def decide(attempt: Attempt) -> Reply:
        # The response to the last one is a sign of life for the earlier ones.
        is_last = attempt.kind == "message" and number_of(attempt) == each - 1
        return OK if is_last or attempt.kind == "disconnect" else HOLD

    async with FaultyBackend(decide) as backend:
        async with Service(*backend.flags(), "--order_wait=0.05") as service:

            async def converse(turn: int, index: int) -> None:
                padding = " " + "x" * 200_000
                name = f"{turn}-{index}"
                talker = await Talker(service.ws_url, name, padding=padding).connect()
                await talker.say(each)
                await eventually(lambda: len(backend.numbers()[name]) == 1, 60)
                await leave([talker])

            after = []
            for turn in range(5):
                await asyncio.gather(*(converse(turn, i) for i in range(clients)))
                await backend.wait_for("disconnect", clients * (turn + 1))
                backend.release()
                await until_held(service, 0)
                after.append(memory(service.process.pid))
                backend.attempts.clear()
                backend.accepted.clear()
            assert after[-1] - after[0] < 30 * MIB


@pytest.mark.long
async def test_held_messages_take_as_much_memory_as_they_are_long(io_loop):
    """While clients connect and disconnect; afterwards nothing is held."""
    clients, each, turns, size = 5, 15, 12, 200_000
    came: dict[str, int] = Counter()  # messages, by client

    def decide(attempt: Attempt) -> Reply:
        if attempt.kind == "disconnect":
            return OK
        name, number, _ = attempt.event["message"].split()
        attempt.event["message"] = f"{name} {number}"
        came[name] += 1
        return OK if int(number) == each - 1 else HOLD

    async with FaultyBackend(decide) as backend:
        async with Service(*backend.flags(), "--order_wait=0.05") as service:
            before = memory(service.process.pid)

            async def converse(name: str) -> None:
                padding = " " + "x" * size
                talker = await Talker(service.ws_url, name, padding=padding).connect()
                for _ in range(each):
                    await talker.say()
                    await eventually(lambda: came[name] == talker.sent, 60)
                await leave([talker])

            excess = []
            for turn in range(turns):
                await asyncio.gather(*(converse(f"{turn}-{i}") for i in range(clients)))
                held = sum(a.outcome == "hold" for a in backend.attempts)
                taken = memory(service.process.pid) - before
                excess.append(taken - held * size)
            assert max(excess) < 30 * MIB
            await backend.wait_for("disconnect", clients * turns)
            await until_held(service, 0)
            assert memory(service.process.pid) - before < 30 * MIB


@pytest.mark.parametrize("how", ["answered", "abandoned"])
async def test_reading_resumes_when_held_bytes_are_released(io_loop, how):
    """Immediately, not at a deadline."""
    async with FaultyBackend(lambda attempt: HOLD) as backend:
        flags = ("--order_wait=0.1", "--max_queued_bytes=250000")
        flags += ("--max_message_size=250000",)
        async with Service(*backend.flags("message"), *flags) as service:
            padding = " " + "x" * 100_000
            many, one = [
                await Talker(service.ws_url, name, padding=padding).connect()
                for name in ("many", "one")
            ]
            await many.say(3)  # the third reaches the bound
            await until_held(service, 3)
            await one.say(2)
            await until_held(service, 4)
            assert len(backend.attempts) == 4
            if how == "answered":
                backend.release(lambda a: a.event["message"].startswith("many "))
            else:
                await leave([many])  # 5 s after its disconnect event
            await eventually(lambda: len(backend.attempts) == 5)
            assert number_of(backend.attempts[-1]) == 1
            assert one.is_open
            backend.release()
            await eventually(lambda: sorted(backend.numbers()["one"]) == [0, 1])
            await leave([one])


async def test_immediate_retry_is_counted_once(io_loop):
    """Its kept connection ended after the wait had become shorter."""

    def decide(attempt: Attempt) -> Reply:
        if number_of(attempt) == 0:
            return Reply(delay=0.3)  # two at once: two connections are kept
        if number_of(attempt) == 2 and len(backend.attempts) == 4:
            return Reply(fault="reset", delay=0.5)
        return HOLD

    async with FaultyBackend(decide) as backend, RecordingBackend() as caller:
        async with Service(*backend.flags("message")) as service:
            clients = await talkers(service.ws_url, 2)
            await asyncio.gather(*(client.say() for client in clients))
            await backend.wait_for("message", 2)
            talker = clients[0]
            await talker.say(2)
            await eventually(lambda: len(backend.attempts) == 4)
            await caller.call(backend.attempts[3].event["meta"]["send"], body=b"alive")
            await eventually(lambda: len(backend.attempts) == 5)
            assert backend.attempts[4].webhook_id == backend.attempts[3].webhook_id
            await until_held(service, 2)
            # A request behind it in the line must become overdue, too.
            await clients[1].say(1)
            await until_held(service, 3)
            backend.release()
            await until_held(service, 0)
            await leave(clients)


async def test_without_a_free_connection_there_is_a_deadline(io_loop):
    """All connections are held: --delivery_timeout, then 1013; it is counted."""
    async with FaultyBackend(
        lambda attempt: HOLD if attempt.kind == "message" else OK
    ) as backend:
        flags = ("--max_backend_connections=2", "--delivery_timeout=2")
        async with Service(*backend.flags(), *flags) as service:
            first = await talkers(service.ws_url, 2, "first")
            await asyncio.gather(*(client.say() for client in first))
            await eventually(lambda: len(backend.attempts) == 2)
            (late,) = await talkers(service.ws_url, 1, "late")
            await late.say(3)
            code = await asyncio.wait_for(late.until_closed(), DEADLINE)
            assert code == 1013
            assert all(client.is_open for client in first)
            backend.release()
            await backend.wait_for("disconnect", 1)
            (meta,) = backend.disconnects().values()
            assert (meta["code"], meta["undelivered"]) == (1013, 3)
            await leave(first)


@pytest.mark.parametrize("strictly", [(), ("--order_wait=inf", "--backend_timeout=2")])
async def test_waiting_in_a_moving_queue_is_not_late(
    io_loop, strictly
):
    """For any time: it does not count as a failure of the backend."""
    async with FaultyBackend(lambda attempt: Reply(delay=0.3)) as backend:
        flags = ("--max_backend_connections=1", "--delivery_timeout=2", *strictly)
        async with Service(*backend.flags("message"), *flags) as service:
            clients = await talkers(service.ws_url, 10)
            await asyncio.gather(*(client.say() for client in clients))
            await backend.wait_for("message", 10)
            assert all(client.is_open for client in clients)
            assert not [line for line in service.log if "is retried" in line]
            await leave(clients)


async def test_response_before_a_retry_is_no_sign_of_life_for_it(io_loop):
    """The first is held again after the second was answered: it is not abandoned."""

    def decide(attempt: Attempt) -> Reply:
        number = number_of(attempt)
        if number == 0 and len(backend.attempts) == 1:
            return Reply(503, delay=0.5, headers=("Retry-After: 1",))
        return HOLD if number in (0, 2) else OK

    async with FaultyBackend(decide) as backend:
        flags = ("--order_wait=0.1", "--max_unanswered=2")
        async with Service(*backend.flags("message"), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(2)
            await eventually(
                lambda: [a.outcome for a in backend.attempts[:2]] == ["503", "200"]
            )
            await talker.say(2)
            await eventually(lambda: len(backend.attempts) == 4)
            await until_held(service, 2)
            backend.release()
            await backend.wait_for("message", 4)
            await leave([talker])
    assert [number_of(a) for a in backend.attempts] == [0, 1, 0, 2, 3]


async def test_held_requests_after_a_disconnect_are_abandoned_one_by_one(io_loop):
    """After the disconnect event, a lack of connections ends the oldest one."""
    outcomes: list[str] = []

    def decide(attempt: Attempt) -> Reply:
        if attempt.kind == "disconnect":
            return OK
        if attempt.event["message"].startswith("other 1"):
            outcomes.extend(a.outcome for a in backend.attempts[:2])
        return HOLD

    async with FaultyBackend(decide) as backend:
        flags = ("--order_wait=0.1", "--max_backend_connections=3")
        async with Service(*backend.flags(), *flags) as service:
            gone = await Talker(service.ws_url, "gone").connect()
            other = await Talker(service.ws_url, "other").connect()
            await gone.say(2)
            await until_held(service, 2)
            await leave([gone])
            await backend.wait_for("disconnect", 1)
            await other.say(2)
            await eventually(lambda: bool(outcomes))
            assert outcomes == ["abandoned", "hold"]
            backend.release()
            await leave([other])


async def test_failing_request_does_not_affect_others(io_loop, caplog):
    """Requests that become overdue by one timer are all reported."""
    overdue = []

    class Sender:
        def on_overdue(self, request: Request) -> None:
            overdue.append(request.number)
            if request.number == 1:
                raise OverflowError("of its own")

    event = Event("1", b"{}", "", None)
    target, terms = Target.parse("http://127.0.0.1:9/"), Terms(None)
    line = OverdueLine(0.01, asyncio.get_running_loop())
    for number in range(4):
        request = Request(Sender(), number, event, target, terms)
        request.sent_at = asyncio.get_running_loop().time()
        line.add(request)
    await eventually(lambda: overdue == [0, 1, 2, 3])
    assert caplog.text.count("OverflowError: of its own") == 1
