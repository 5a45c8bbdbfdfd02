"""Random backends: for each, order is kept and each message is counted.

More seeds: `ORDER_SEEDS=100:140 pytest test/order_test.py`.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
from collections import defaultdict

import pytest
import websockets
from faults import Attempt, FaultyBackend, Reply, Talker, talkers
from service import Service

pytestmark = [pytest.mark.gen_test(timeout=180), pytest.mark.long]

CLIENTS = 70
# Seconds in which the relay may have sent an event that crossed a failure on its way.
CROSSING = 1.0
FIRST, _, LAST = os.environ.get("ORDER_SEEDS", "1:3").partition(":")

MESSAGE_REPLIES = [
    Reply(), Reply(delay=0.3), Reply(delay=0.8), Reply(500), Reply(429), Reply(400),
    Reply(503, headers=("Retry-After: 2",)), Reply(fault="reset"), Reply(fault="hold"),
    Reply(503, delay=0.5, headers=("Retry-After: 3",)), Reply(503, delay=0.8),
    Reply(fault="reset", delay=0.6), Reply(502, delay=1.2, headers=("Retry-After: 2",)),
]
DISCONNECT_REPLIES = [
    Reply(delay=0.5), Reply(503), Reply(503, headers=("Retry-After: 2",)),
    Reply(fault="reset"), Reply(500, delay=0.3),
]


class TimedBackend(FaultyBackend):
    """A backend that fails at random until the test stops it, and records times."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(self._decide)
        self._rng = rng
        self._replies = rng.sample(MESSAGE_REPLIES, 6)
        self._share = rng.choice([0.2, 0.5, 0.8])
        self.failing = True
        # By id() of an attempt, which `attempts` keeps, on the loop's clock.
        self.came: dict[int, float] = {}
        self.ended: dict[int, float] = {}

    def _decide(self, attempt: Attempt) -> Reply:
        if not self.failing or self._rng.random() > self._share:
            return Reply()
        return self._rng.choice(
            self._replies if attempt.kind == "message" else DISCONNECT_REPLIES
        )

    def enter(self, attempt: Attempt) -> None:
        self.came[id(attempt)] = asyncio.get_running_loop().time()
        super().enter(attempt)

    def settle(self, attempt: Attempt, outcome: str) -> None:
        self.ended[id(attempt)] = asyncio.get_running_loop().time()
        super().settle(attempt, outcome)


def number_of(attempt: Attempt) -> float:
    """Its place in the order of its connection's events."""
    if attempt.kind == "disconnect":
        return float("inf")
    return int(attempt.webhook_id.rpartition("-")[2])


def failed(attempt: Attempt) -> bool:
    """Whether the attempt has ended, and the event must be retried."""
    return attempt.outcome in ("lost", "429") or attempt.outcome.startswith("5")


def overtakes(backend: TimedBackend, events: list[Attempt]) -> list[str]:
    """Return the events that arrived while an earlier one waited for its retry."""
    found = []
    for index, attempt in enumerate(events):
        if not failed(attempt):
            continue
        since = backend.ended[id(attempt)] + CROSSING
        again = next(
            (a for a in events[index + 1 :] if a.webhook_id == attempt.webhook_id), None
        )
        until = backend.came[id(again)] if again is not None else since
        found += [
            f"{later.webhook_id} while {attempt.webhook_id} had failed"
            for later in events
            if number_of(later) > number_of(attempt)
            and since < backend.came[id(later)] < until
        ]
    return found


def abandoned_by(log: list[str]) -> set[str]:
    """The webhook-id of each message that the relay says it abandoned.

    The backend may have failed it at that moment, and both are right.
    """
    line = re.compile(r"connection (\w+): message (\d+) is abandoned")
    return {f"{m[1]}-{m[2]}" for m in map(line.search, log) if m}


def unaccounted(events: list[Attempt], sent: int, abandoned: set[str]) -> list[str]:
    """Return what is wrong with a connection whose client sent `sent` messages."""
    ends: dict[str, set[str]] = defaultdict(set)
    metas = []
    for attempt in events:
        if attempt.kind == "message":
            ends[attempt.webhook_id].add(attempt.outcome)
        elif attempt.accepted:
            metas.append(attempt.event["meta"])
    if not metas:
        return ["no disconnect event"]
    if events[-1].kind != "disconnect":
        return ["a message came last"]
    taken = sum(bool(outcomes & {"200", "400"}) for outcomes in ends.values())
    settled = sum(
        bool(outcomes & {"200", "400", "abandoned"}) or webhook_id in abandoned
        for webhook_id, outcomes in ends.items()
    )
    undelivered = metas[-1]["undelivered"]
    if not sent - settled <= undelivered <= sent - taken:
        return [f"{sent} sent, {taken} to {settled} settled, {undelivered} undelivered"]
    refused = sum("400" in outcomes for outcomes in ends.values())
    if refused != metas[-1]["refused"]:
        return [f"{refused} refused, {metas[-1]['refused']} reported"]
    return []


async def visit(talker: Talker, rng: random.Random) -> None:
    """Send some messages; some clients then leave, the others stay."""
    for _ in range(rng.randint(1, 6)):
        try:
            await talker.say(rng.randint(1, 2))
        except websockets.ConnectionClosed:
            return
        await asyncio.sleep(rng.uniform(0, 0.4))  # its pace
    if rng.random() < 0.6:
        await talker.client.close()


@pytest.mark.parametrize("seed", range(int(FIRST), int(LAST or FIRST) + 1))
async def test_order_and_counts_hold_for_any_backend(io_loop, seed):
    """Holds, failures, resets, Retry-After; clients that leave, and the stop."""
    rng = random.Random(seed)
    async with TimedBackend(rng) as backend:
        flags = [
            *backend.flags(),
            f"--order_wait={rng.choice([0.1, 0.1, 1])}",
            f"--delivery_timeout={rng.choice([4, 60])}",
            f"--max_unanswered={rng.choice([2, 16])}",
            f"--max_backend_connections={rng.choice([100, 4096])}",
            "--drain_timeout=60",
            "--logging=debug",
        ]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, CLIENTS)
            await asyncio.gather(
                *(visit(talker, random.Random(rng.random())) for talker in clients)
            )
            service.process.send_signal(signal.SIGTERM)
            ends = [talker.until_closed() for talker in clients]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*ends), rng.uniform(0.5, 4))
            backend.failing = False
            status = await asyncio.wait_for(service.process.wait(), 90)
            assert status == 0, service.log
        by_connection: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in backend.attempts:
            by_connection[attempt.connection_id].append(attempt)
        names = backend.names()
        abandoned = abandoned_by(service.log)
        sent = {talker.name: talker.sent for talker in clients}
        wrong = {
            (names[connection_id], what)
            for connection_id, events in by_connection.items()
            for what in (
                *overtakes(backend, events),
                *unaccounted(events, sent[names[connection_id]], abandoned),
            )
        }
        assert not wrong
        assert len(by_connection) == CLIENTS
