"""Disconnect events follow all messages that can still fail, at the stop too."""

import asyncio
import contextlib
import re
import signal

import pytest
from faults import Attempt, FaultyBackend, Reply, leave, talkers
from service import Service, eventually

pytestmark = pytest.mark.gen_test(timeout=120)

OK = Reply()
HELD_THEN_FAILS = Reply(503, delay=0.8, headers=("Retry-After: 2",))


def first_fails(reply: Reply):
    """Answer the first attempt with `reply` if it is a message, all others with 200."""
    asked = []

    def decide(attempt: Attempt) -> Reply:
        asked.append(attempt.kind)
        return reply if asked == ["message"] else OK

    return decide


def first_outcome(backend: FaultyBackend) -> str | None:
    """Return how the first attempt ended; None before there is one."""
    return backend.attempts[0].outcome if backend.attempts else None


def kinds(backend: FaultyBackend) -> list[str]:
    return [attempt.kind for attempt in backend.attempts]


@pytest.mark.parametrize("stop", [False, True])
async def test_held_message_that_failed_goes_before_the_disconnect_event(io_loop, stop):
    """The client disconnects, or the relay gets SIGTERM, before the retry."""
    async with FaultyBackend(first_fails(HELD_THEN_FAILS)) as backend:
        async with Service(*backend.flags(), "--order_wait=0.1") as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: first_outcome(backend) == "503")
            if stop:
                service.process.send_signal(signal.SIGTERM)
                assert await talker.until_closed() == 1001
                assert await asyncio.wait_for(service.process.wait(), 60) == 0
            else:
                await leave([talker])
                await backend.wait_for("disconnect", 1)
    assert kinds(backend) == ["message", "message", "disconnect"]
    assert [meta["undelivered"] for meta in backend.disconnects().values()] == [0]


async def test_message_that_fails_at_the_stop_after_the_disconnect_event(io_loop):
    """The message is retried before the relay exits; then the event is sent again."""
    reply = Reply(503, delay=2, headers=("Retry-After: 1",))
    async with FaultyBackend(first_fails(reply)) as backend:
        async with Service(*backend.flags(), "--order_wait=0.1") as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: kinds(backend)[:1] == ["message"])
            service.process.send_signal(signal.SIGTERM)
            await talker.until_closed()
            assert await asyncio.wait_for(service.process.wait(), 60) == 0
    assert kinds(backend) == ["message", "disconnect", "message", "disconnect"]
    assert backend.numbers() == {talker.name: [0]}


@contextlib.asynccontextmanager
async def left_after_a_failure(retry: Reply):
    """The backend, when a client has left whose held message has failed.

    `retry` is the reply to the message's second attempt.
    """
    replies = iter([HELD_THEN_FAILS, retry])

    def decide(attempt: Attempt) -> Reply:
        return next(replies) if attempt.kind == "message" else OK

    async with FaultyBackend(decide) as backend:
        async with Service(*backend.flags(), "--order_wait=0.1") as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: first_outcome(backend) == "503")
            await leave([talker])
            yield backend


async def test_failed_message_that_is_held_again_is_awaited(io_loop):
    """The disconnect event waits for the response to the message's second attempt."""
    async with left_after_a_failure(Reply(delay=1.5)) as backend:
        await eventually(lambda: len(backend.attempts) == 2)
        await backend.wait_for("disconnect", 1)
        assert [a.outcome for a in backend.attempts[:2]] == ["503", "200"]
    assert kinds(backend) == ["message", "message", "disconnect"]


async def test_message_that_is_held_for_ever_delays_the_disconnect_for_seconds(io_loop):
    """The backend may hold a message, even one that failed, until the disconnect event.

    So the relay does not wait for its response longer than that.
    """
    async with left_after_a_failure(Reply(fault="hold")) as backend:
        await backend.wait_for("disconnect", 1, 30)
        backend.release()
    assert kinds(backend) == ["message", "message", "disconnect"]


async def test_messages_given_up_after_the_disconnect_are_counted(io_loop):
    """A held message and its retries fail until the deadline: `undelivered` is 1."""
    failing = Reply(503, headers=("Retry-After: 1",))

    def decide(attempt: Attempt) -> Reply:
        if attempt.kind == "disconnect":
            return OK
        return HELD_THEN_FAILS if len(backend.attempts) == 1 else failing

    async with FaultyBackend(decide) as backend:
        flags = ("--order_wait=0.1", "--delivery_timeout=3")
        async with Service(*backend.flags(), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: first_outcome(backend) == "503")
            await leave([talker])
            await backend.wait_for("disconnect", 1)
    assert kinds(backend)[-1] == "disconnect"
    assert [meta["undelivered"] for meta in backend.disconnects().values()] == [1]


async def test_failed_message_cut_off_at_shutdown_is_reported(io_loop):
    """The log counts it, and the exit status is 1, although its event was sent."""

    def decide(attempt: Attempt) -> Reply:
        if attempt.kind == "disconnect":
            return OK
        if len(backend.attempts) == 1:
            return Reply(503, delay=1.5)
        return Reply(503)

    async with FaultyBackend(decide) as backend:
        flags = ("--order_wait=0.1", "--drain_timeout=4")
        async with Service(*backend.flags(), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: kinds(backend)[:1] == ["message"])
            service.process.send_signal(signal.SIGTERM)
            await talker.until_closed()
            assert await asyncio.wait_for(service.process.wait(), 60) == 1
        (line,) = [line for line in service.log if "not drained" in line]
        assert re.search(r" and 1 messages are cut off", line)
    assert kinds(backend)[:2] == ["message", "disconnect"]


async def test_held_responses_do_not_change_the_exit_status(io_loop):
    """The relay abandons them and exits with 0, even with a short --drain_timeout."""

    def decide(attempt: Attempt) -> Reply:
        return Reply(fault="hold") if attempt.kind == "message" else OK

    async with FaultyBackend(decide) as backend:
        flags = ("--order_wait=0.1", "--drain_timeout=2")
        async with Service(*backend.flags(), *flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say(3)
            await eventually(lambda: len(backend.attempts) == 3)
            service.process.send_signal(signal.SIGTERM)
            await talker.until_closed()
            assert await asyncio.wait_for(service.process.wait(), 60) == 0
    assert {a.outcome for a in backend.attempts} == {"abandoned", "200"}
