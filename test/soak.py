"""Random faults for minutes, and an account of every message and connection.

    python test/soak.py --seconds=300 --seed=N

Rounds of about ten seconds: a relay with options drawn from the seed, clients
that come, talk and go in every way that they can, a backend that fails in every
way that it can; then the relay is stopped, or killed and started again. After
each round the books must balance:

- each connection that was accepted has one disconnect event, and its code is the
  one that the client saw where the relay closed;
- each message that a client sent, and could expect to be read, has been accepted
  under one webhook-id, or refused, or let go, or counts as undelivered;
- with strict order, a client's messages are accepted in their order.

What the seed can't repeat is timing. Exit status 1 on a violation.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import websockets
from faults import Attempt, FaultyBackend, Reply, SilentProxy, Talker, memory
from service import Service, eventually

ROUND = 10.0  # seconds
CLIENTS = 60  # at once
SETTLED = 90.0  # seconds, at most, until all is told
ENOUGH_MEMORY = 300 * 2**20  # bytes

Ending = Literal["close", "abort", "vanish", "stay"]


@dataclass
class Visit(Talker):
    """One connection of a round, and how it left."""

    ending: Ending = "stay"
    left: bool = False  # it has closed first, or tried to
    refused: bool = False  # by a handshake's answer


@dataclass
class Round:
    """One relay's life, and the books of it."""

    number: int
    rng: random.Random
    strict: bool
    crash: bool
    visits: list[Visit] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    memory: int = 0  # bytes, at most

    def blame(self, what: str) -> None:
        self.violations.append(f"round {self.number}: {what}")


def replies(rng: random.Random, strict: bool) -> list[Reply]:
    """What a round's backend does when it fails; one is drawn per request."""
    drawn = [
        Reply(500), Reply(502), Reply(503), Reply(429), Reply(408), Reply(400),
        Reply(503, headers=("Retry-After: 1",)), Reply(301), Reply(delay=0.2),
        Reply(delay=1.5), Reply(fault="reset"), Reply(fault="reset", delay=0.2),
        Reply(fault="cut"), Reply(503, fault="cut"), Reply(fault="garbage"),
        Reply(fault="endless"),
    ]
    if not strict:  # with --backend_timeout it would be a failure
        drawn.append(Reply(fault="hold"))
    return rng.sample(drawn, 6)


async def live(this: Round, share: float) -> Counter[str]:
    """Run one round; returns the outcomes of its attempts."""
    rng = this.rng
    faults = replies(rng, this.strict)
    failing = True

    def decide(attempt: Attempt) -> Reply:
        if not failing or attempt.kind == "connect" or rng.random() > share:
            return Reply()
        reply = rng.choice(faults)
        if attempt.kind == "disconnect" and (
            reply.fault == "hold" or reply.status in (301, 400)
        ):
            return Reply(503)
        return reply

    async with FaultyBackend(decide) as backend:
        with tempfile.TemporaryDirectory() as state:
            flags = [
                *backend.flags("connect", "message", "disconnect"),
                f"--state_dir={state}", "--ping_interval=1", "--ping_timeout=2",
                f"--delivery_timeout={rng.choice([2, 5, 60])}", "--send_timeout=2",
                f"--drain_spread={rng.choice([0, 1])}", "--drain_timeout=60",
                f"--connection_queue_messages={rng.choice([1, 4, 64])}",
                f"--max_pending={rng.choice([200, 100_000])}",
            ]
            if this.strict:
                flags += ["--order_wait=inf", "--backend_timeout=2"]
            else:
                flags += [f"--order_wait={rng.choice([0.1, 1])}"]
            over = asyncio.Event()
            async with Service(*flags) as service:
                async with SilentProxy(service.ws_url) as proxy:
                    absences = asyncio.create_task(come_and_go(this, backend, over))
                    coming = [
                        asyncio.create_task(come_and_talk(this, index, service, proxy,
                                                          over))
                        for index in range(CLIENTS)
                    ]
                    await asyncio.sleep(ROUND)
                    over.set()
                    await absences
                    await asyncio.gather(*coming)
                    proxy.fall_silent()  # whoever vanishes has done so by now
                    this.memory = memory(service.process.pid, "VmHWM")
                    if not this.crash:
                        service.process.send_signal(signal.SIGTERM)
                        failing = rng.random() < 0.5
                        await asyncio.sleep(1)
                        failing = False
                        backend.release()
                        status = await asyncio.wait_for(service.process.wait(), SETTLED)
                        if status != 0:
                            this.blame(f"exit status {status}: {service.log[-1]}")
                    else:
                        service.process.kill()
                        await service.process.wait()
                    await asyncio.gather(*(part(visit) for visit in this.visits))
            failing = False
            if this.crash:
                async with Service(*flags):
                    expected = {a.connection_id for a in backend.of("connect")}
                    with contextlib.suppress(TimeoutError):
                        await eventually(
                            lambda: expected <= backend.disconnects().keys(), SETTLED
                        )
        audit(this, backend)
    return Counter(attempt.outcome for attempt in backend.attempts)


async def come_and_go(
    this: Round, backend: FaultyBackend, over: asyncio.Event
) -> None:
    """The backend is away now and then, and there at the end."""
    while not over.is_set():
        await pause(over, this.rng.uniform(0.5, 4))
        backend.go_away(this.rng.choice(["refused", "reset", "503"]))
        await pause(over, this.rng.uniform(0.1, 3))
        await backend.come_back()


async def come_and_talk(
    this: Round, index: int, service: Service, proxy: SilentProxy, over: asyncio.Event
) -> None:
    """One visit after the other; who stays or vanishes does so at its end."""
    rng = random.Random(this.rng.random())
    turn = 0
    while not over.is_set():
        turn += 1
        ending: Ending = rng.choices(
            ["close", "abort", "vanish", "stay"], [6, 2, 1, 2]
        )[0]
        visit = Visit(
            proxy.url if ending == "vanish" else service.ws_url,
            f"{this.number}-{index}-{turn}",
            padding=" " + "x" * rng.choice([0, 10, 1000, 50_000]),
            ending=ending,
        )
        this.visits.append(visit)
        try:
            await visit.connect()
        except (websockets.InvalidHandshake, OSError, TimeoutError):
            visit.refused = True
            await pause(over, 0.2)
            continue
        visit.client.close_timeout = 3
        enough = asyncio.Event()
        asyncio.get_running_loop().call_later(rng.uniform(0, 4), enough.set)
        # Where reading has stopped, sending comes to a halt: not for ever.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(visit.talk(rng.choice([0.01, 0.05, 0.3]), enough), 5)
        if ending in ("stay", "vanish"):
            return
        visit.left = visit.is_open
        if ending == "close":
            await visit.client.close()
        else:
            visit.client.transport.abort()
            await visit.client.wait_closed()


async def part(visit: Visit) -> None:
    """See the end of a visit."""
    if visit.refused:
        return
    if visit.ending == "vanish":
        visit.client.transport.abort()
    async with asyncio.timeout(SETTLED):
        await visit.client.wait_closed()


async def pause(over: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)


def audit(this: Round, backend: FaultyBackend) -> None:
    """Compare what clients did with what the backend was told."""
    names = backend.names()
    ids = {name: connection_id for connection_id, name in names.items()}
    disconnects = backend.disconnects()
    told = Counter(a.connection_id for a in backend.of("disconnect"))
    for attempt in backend.of("connect"):
        if told[attempt.connection_id] != 1:
            this.blame(
                f"{told[attempt.connection_id]} disconnects for"
                f" {names.get(attempt.connection_id, attempt.connection_id)}"
            )
    ends: dict[str, dict[int, set[str]]] = {}
    for attempt in backend.attempts:
        if attempt.kind == "message":
            name, number = attempt.event["message"].split()[:2]
            ends.setdefault(name, {}).setdefault(int(number), set()).add(
                attempt.outcome
            )
    accepted = backend.numbers()
    for visit in this.visits:
        numbers = accepted[visit.name]
        if len(set(numbers)) != len(numbers):
            this.blame(f"{visit.name}: a message came under two ids: {numbers}")
        if this.strict and numbers != sorted(numbers):
            this.blame(f"{visit.name}: out of order: {numbers}")
        if visit.refused or visit.name not in ids:
            continue
        meta = disconnects.get(ids[visit.name])
        if meta is None or meta["reason"] == "instance lost":
            continue  # blamed above; or what was in memory is lost
        check_code(this, visit, meta)
        check_messages(this, visit, meta, ends.get(visit.name, {}))


def check_code(this: Round, visit: Visit, meta: dict) -> None:
    """Where the relay closed first, client and backend hear the same code."""
    if visit.left or visit.ending == "vanish":
        return
    if meta["code"] != visit.close_code or meta["initiator"] == "client":
        this.blame(f"{visit.name}: saw {visit.close_code}, told {meta}")


def check_messages(
    this: Round, visit: Visit, meta: dict, ends: dict[int, set[str]]
) -> None:
    """Each message came to an end of which somebody knows."""
    settled = {
        number
        for number, outcomes in ends.items()
        if outcomes & {"200", "301", "400", "let go"}
    }
    # A message whose socket was cut need not have been read: then none behind
    # it was, and what came is a beginning of what was sent.
    known = len(settled) + meta["undelivered"]
    by_the_book = visit.left and visit.ending == "close" and meta["code"] == 1000
    if by_the_book and known < visit.sent:
        this.blame(f"{visit.name}: sent {visit.sent}, settled {len(settled)}, {meta}")
    seen = max(ends, default=-1) + 1
    if known < seen:
        this.blame(f"{visit.name}: seen {seen}, settled {len(settled)}, {meta}")


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    rng = random.Random(arguments.seed)
    began, number = time.monotonic(), 0
    visits = sent = 0
    outcomes: Counter[str] = Counter()
    violations: list[str] = []
    while time.monotonic() - began < arguments.seconds:
        number += 1
        this = Round(
            number,
            random.Random(rng.random()),
            strict=rng.random() < 0.5,
            crash=rng.random() < 0.3,
        )
        share = rng.choice([0.0, 0.05, 0.3])
        try:
            outcomes += await live(this, share)
        except Exception as error:
            this.blame(f"{type(error).__name__}: {error}")
        if this.memory > ENOUGH_MEMORY:
            this.blame(f"{this.memory >> 20} MiB of memory")
        visits += sum(not visit.refused for visit in this.visits)
        sent += sum(visit.sent for visit in this.visits)
        violations += this.violations
        print(
            f"round {number}: {'strict' if this.strict else 'default'} order,"
            f" {'kill' if this.crash else 'stop'}, faults {share:.0%},"
            f" {len(this.visits)} visits, {this.memory >> 20} MiB,"
            f" {len(this.violations)} violations",
            *this.violations[:20],
            sep="\n  ",
            flush=True,
        )
    print(
        f"seed {arguments.seed}: {number} rounds, {visits} connections, {sent}"
        f" messages, attempts {dict(outcomes)}, {len(violations)} violations"
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
