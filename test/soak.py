"""Random faults for minutes, and a check of every message and connection.

    python test/soak.py --seconds=300 --seed=N
    python test/soak.py --seconds=600 --one-relay
    python test/soak.py --cluster           relays that share Redis: cluster_soak.py,
                                            and a durable queue: queue_soak.py

Each round takes about ten seconds: a relay with options drawn from the seed, clients
that connect, send, read and leave in every possible way (`soaking.visits`), callers
that send to them or read no responses, a backend that fails and answers in every
possible way (`soaking.answers`). The relay is stopped by SIGSTOP at times; at the end
it is stopped by SIGTERM, or killed and started again. After each round
`soaking.books` checks:

- each accepted connection has one disconnect event, and its code is the one that the
  client got if the relay closed;
- each message that a client sent, and could expect to be read, was accepted under one
  webhook-id, or refused, or abandoned, or counts as undelivered;
- no message overtakes one that failed and waits for its retry; with strict order, a
  client's messages are accepted in order;
- an answered event is not sent again, and a failed one not before its Retry-After;
- sends that were answered 200 arrived, none behind a close frame;
- a client that reads and answers pings is neither cut off nor reported as too slow.

Round trips between soak and relay (`soaking.pulse`), not seconds, decide whether an
event came too late after another one: on a busy machine the checks are less strict for
a while, but report no false violation. Each violation is printed with what the backend
and the relay's log have about its connection. With --one-relay one relay runs all the
time; its resident memory is printed, and must not grow. The seed does not repeat the
timing. Exit status 1 on a violation.
"""

import argparse
import asyncio
import random
import re
import signal
import ssl
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import cluster_soak
import queue_soak
from certificates import Authority
from faults import Attempt, FaultyBackend, Reply, SilentProxy, memory
from service import Service
from soaking.answers import Behavior
from soaking.books import Audit, Violation
from soaking.callers import read_no_answers
from soaking.pulse import Pulse
from soaking.visits import (
    PERMANENT,
    TEMPORARY,
    Refused,
    Staying,
    Vanishing,
    Visit,
    pause_until,
)

SETTLED = 120.0  # seconds, at most, until all is delivered
MIB = 2**20
ENOUGH_MEMORY = 300 * MIB
MEMORY_PERIOD = 5.0  # seconds between two measurements of it
FLAT = 24 * MIB  # growth over minutes that does not count
COMPLAINT = re.compile(r"^\[E |^ *[\w.]+(Error|Exception): ")
EXAMPLES = 2  # of each kind of violation
DETAIL = re.compile(r"[0-9a-f]{32}|(?<!')\b\d[-\d., ]*|'(?!code|initiator)\w+': [^,}]+")
CLUSTER = (cluster_soak.main, queue_soak.main)  # with --cluster
WARM = 60.0  # seconds after which memory is to be flat


@dataclass(frozen=True)
class Plan:
    """What the seed has drawn for a round."""

    seconds: float
    strict: bool
    ending: str  # stop, hasty (with a drain that is too short for all), kill
    early: bool  # the stop comes while clients talk
    freezes: bool
    share: float  # of requests that fail
    odd: float  # of answers in an odd form
    delivery_timeout: float  # seconds
    order_wait: float  # seconds
    queue: int  # messages
    max_pending: int
    backend_tls: bool
    client_tls: bool
    two_listeners: bool

    @classmethod
    def draw(cls, rng: random.Random, seconds: float) -> "Plan":
        strict = rng.random() < 0.4
        client_tls = rng.random() < 0.25
        return cls(
            seconds=seconds,
            strict=strict,
            ending=rng.choices(["stop", "hasty", "kill"], [6, 1, 2])[0],
            early=rng.random() < 0.5,
            freezes=rng.random() < 0.4,
            share=rng.choice([0.0, 0.05, 0.3]),
            odd=rng.choice([0.0, 0.1, 0.5]),
            delivery_timeout=rng.choice([2, 5, 60]),
            order_wait=float("inf") if strict else rng.choice([0.1, 1]),
            queue=rng.choice([1, 4, 64]),
            max_pending=rng.choice([200, 100_000]),
            backend_tls=rng.random() < 0.25,
            client_tls=client_tls,
            # Callers here speak no TLS.
            two_listeners=client_tls or rng.random() < 0.3,
        )

    @classmethod
    def for_memory(cls, seconds: float) -> "Plan":
        """One long round in which much is held, and no process is killed."""
        return cls(
            seconds=seconds, strict=False, ending="stop", early=False, freezes=False,
            share=0.3, odd=0.1, delivery_timeout=8, order_wait=0.1, queue=64,
            max_pending=100_000, backend_tls=False, client_tls=False,
            two_listeners=False,
        )  # fmt: skip

    def flags(self) -> Iterator[str]:
        """The relay's."""
        yield f"--order_wait={self.order_wait}"
        if self.strict:
            yield "--backend_timeout=2"
        yield f"--delivery_timeout={self.delivery_timeout}"
        yield f"--connection_queue_messages={self.queue}"
        yield f"--max_pending={self.max_pending}"
        yield f"--drain_timeout={2 if self.ending == 'hasty' else 60}"
        if self.two_listeners:
            yield "--callbackport=0"
        yield from ("--ping_interval=2", "--ping_timeout=3", "--send_timeout=2")

    def __str__(self) -> str:
        words = [
            "strict" if self.strict else f"wait {self.order_wait:g} s",
            f"early {self.ending}" if self.early else self.ending,
            f"faults {self.share:.0%}",
            f"odd {self.odd:.0%}",
            f"give up {self.delivery_timeout:g} s",
            f"queue {self.queue}",
        ]
        flags = ("freezes", "backend_tls", "client_tls", "two_listeners")
        return ", ".join(words + [name for name in flags if getattr(self, name)])


class Backend(FaultyBackend):
    """Records connections by their client's name, and the beginning of messages."""

    def __init__(self, behavior: Behavior, tls: ssl.SSLContext | None) -> None:
        super().__init__(behavior.decide, tls)
        self.send_urls: dict[str, str] = {}  # by name
        self.messages: Counter[str] = Counter()  # first accepted ones, by client

    def enter(self, attempt: Attempt) -> None:
        if attempt.kind == "message":
            attempt.event["message"] = attempt.event["message"][:40]
        elif attempt.kind == "connect":
            meta = attempt.event["meta"]
            self.send_urls[meta["query"].removeprefix("name=")] = meta["send"]
        super().enter(attempt)

    def settle(self, attempt: Attempt, outcome: str) -> None:
        super().settle(attempt, outcome)
        first = self.accepted.get(attempt.webhook_id) is attempt
        if attempt.kind == "message" and first:
            self.messages[attempt.event["message"].split()[0]] += 1

    def reply_to(self, attempt: Attempt) -> Reply:
        # A decision of 503 would be one; the tests of handshakes have those.
        return Reply() if attempt.kind == "connect" else super().reply_to(attempt)


@dataclass
class Round:
    """One run of a relay, and what was observed."""

    number: int
    rng: random.Random
    plan: Plan
    authority: Authority
    clients: int  # at once, that come and go
    prints_memory: bool = False
    visits: list[Visit] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)  # lines, of some of those
    outcomes: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes
    pulse: Pulse = field(default_factory=Pulse)
    status: int = 0  # the relay's exit status

    def report(self, what: str) -> None:
        self.violations.append(Violation(what))

    async def run(self) -> None:
        """Run it, and check the result."""
        plan = self.plan
        behavior = Behavior(
            self.rng, plan.share, plan.odd, not plan.strict, plan.delivery_timeout <= 5
        )
        certificate = self.authority.server() if plan.backend_tls else None
        tls = certificate and certificate.server_context()
        async with Backend(behavior, tls) as backend:
            with tempfile.TemporaryDirectory() as state:
                flags = [
                    *backend.flags("connect", "message", "disconnect"),
                    f"--state_dir={state}", *plan.flags(), *self._tls_flags(),
                ]  # fmt: skip
                log = await self._run_relay(flags, backend, behavior)
            self._audit(backend, log)

    def _tls_flags(self) -> Iterator[str]:
        if self.plan.backend_tls:
            yield f"--backend_ca={self.authority.path}"
        if self.plan.client_tls:
            certificate = self.authority.server()
            yield f"--tls_cert={certificate.cert}"
            yield f"--tls_key={certificate.key}"

    async def _run_relay(
        self, flags: list[str], backend: Backend, behavior: Behavior
    ) -> list[str]:
        """Run the relay and its clients; return the relay's log."""
        over, stopping = asyncio.Event(), asyncio.Event()
        async with Service(*flags) as service:
            async with (
                SilentProxy(service.ws_url) as proxy,
                self.pulse.taken(f"{service.callback_url}/livez"),
            ):
                around = [
                    self._fail_now_and_then(backend, over),
                    self._freeze(service, stopping),
                    self._look_at_memory(service, stopping),
                    read_no_answers(f"{service.callback_url}/", over),
                    read_no_answers(service.ws_url.replace("ws", "http", 1), over),
                ]
                coming = [
                    self._visit_again_and_again(
                        index, service.ws_url, proxy.url, backend, over
                    )
                    for index in range(self.clients + 2 * len(PERMANENT))
                ]
                living = [asyncio.create_task(one) for one in around + coming]
                await asyncio.sleep(self.plan.seconds)
                if not self.plan.early:
                    over.set()
                    await asyncio.gather(*living[: 1], *living[len(around) :])
                stopping.set()
                await asyncio.gather(*living[1:3])
                self.status = await self._end(service, backend, behavior, over)
                await asyncio.gather(*living)
                proxy.stop_forwarding()  # clients that vanish have done so by now
                ends = (visit.end() for visit in self.visits if not visit.refused)
                async with asyncio.timeout(SETTLED):
                    await asyncio.gather(*ends)
        backend.release()
        if self.status != 0:
            await self._recover_events(flags, backend)
        return service.log

    async def _end(
        self,
        service: Service,
        backend: Backend,
        behavior: Behavior,
        over: asyncio.Event,
    ) -> int:
        """End the relay as planned; its exit status."""
        process, plan = service.process, self.plan
        if plan.ending == "kill":
            over.set()
            process.kill()
            return await process.wait()
        process.send_signal(signal.SIGTERM)
        if plan.early:
            behavior.failing = self.rng.random() < 0.5
        await asyncio.sleep(1)
        over.set()
        behavior.failing = False
        if backend.outage is not None:
            await backend.make_reachable()
        backend.release()
        status = await asyncio.wait_for(process.wait(), SETTLED)
        if status != (0 if plan.ending == "stop" else status & 1):
            self.report(f"exit status {status}: {'; '.join(complaints(service.log))}")
        return status

    async def _recover_events(self, flags: list[str], backend: Backend) -> None:
        """The next run sends the disconnect events that this one could not."""
        deadline = time.monotonic() + SETTLED
        async with Service(*flags):
            while time.monotonic() < deadline:
                if self._book(backend).all_are_reported():
                    return
                await asyncio.sleep(0.1)

    async def _fail_now_and_then(self, backend: Backend, over: asyncio.Event) -> None:
        """Make the backend unreachable at times, and reachable at the end."""
        while not over.is_set():
            await pause_until(over, self.rng.uniform(0.5, 4))
            backend.make_unreachable(self.rng.choice(["refused", "reset", "503"]))
            await pause_until(over, self.rng.uniform(0.1, 2))
            if backend.outage is not None:
                await backend.make_reachable()

    async def _freeze(self, service: Service, stopping: asyncio.Event) -> None:
        """Stop the relay at times, like a paused machine."""
        while self.plan.freezes and not stopping.is_set():
            await pause_until(stopping, self.rng.uniform(1, 5))
            if stopping.is_set():
                return
            service.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self.rng.choice([0.5, 2.5, 6]))
            service.process.send_signal(signal.SIGCONT)

    async def _look_at_memory(self, service: Service, stopping: asyncio.Event) -> None:
        began = time.monotonic()
        while not stopping.is_set():
            await pause_until(stopping, MEMORY_PERIOD)
            seconds, used = time.monotonic() - began, memory(service.process.pid)
            self.memory.append((seconds, used))
            if self.prints_memory:
                print(f"{seconds:6.0f} s {used / MIB:6.1f} MiB", flush=True)
        self.memory.append((seconds, memory(service.process.pid, "VmHWM")))

    async def _visit_again_and_again(
        self, index: int, url: str, proxy_url: str, backend: Backend,
        over: asyncio.Event,
    ) -> None:  # fmt: skip
        """Make one visit after the other."""
        rng = random.Random(self.rng.random())
        kinds, weights = list(TEMPORARY), list(TEMPORARY.values())
        if index < 2 * len(PERMANENT):
            kinds, weights = [PERMANENT[index // 2]], [1]
        elif self.prints_memory:  # no client stays for the whole round
            weights = [0 if kind in (Staying, Vanishing) else 1 for kind in kinds]
        turn = 0
        while not over.is_set():
            turn += 1
            kind = rng.choices(kinds, weights)[0]
            name = f"{self.number}-{index}-{turn}"
            visit = kind(url, name, rng)
            if kind is Vanishing:
                visit.url = proxy_url.replace("ws:", url.partition("//")[0], 1)
            if self.plan.client_tls:
                visit.tls = ssl.create_default_context(cafile=str(self.authority.path))
            visit.send_url = lambda name=name: backend.send_urls[name]
            visit.is_delivered = (
                lambda visit=visit: backend.messages[visit.name] >= visit.sent
            )
            self.visits.append(visit)
            try:
                await visit.connect()
            except (Refused, OSError):
                visit.refused = True
                await pause_until(over, 0.2)
                continue
            await visit.stay(over)
            if kind is Vanishing:  # at the end of the round
                return

    def _book(self, backend: Backend) -> Audit:
        plan = self.plan
        return Audit(
            backend, self.pulse, plan.strict, plan.delivery_timeout, self.status != 0
        )

    def _audit(self, backend: Backend, log: list[str]) -> None:
        self.outcomes = Counter(attempt.outcome for attempt in backend.attempts)
        audit = self._book(backend)
        self.violations += audit.violations(
            self.visits, reads_at_once=self.plan.max_pending > 1000
        )
        for example, *_ in kinds(self.violations):
            if connection_id := example.connection_id:
                self.evidence += [
                    example.what,
                    *audit.timeline(connection_id),
                    *(line for line in log if connection_id in line),
                ]
        used = [bytes for _, bytes in self.memory]
        if used and max(used) > ENOUGH_MEMORY:
            self.report(f"{max(used) // MIB} MiB of memory")
        if self.prints_memory:
            self._judge_growth()

    def _judge_growth(self) -> None:
        """Compare memory of the last third of the time with the third before."""
        used = [bytes for seconds, bytes in self.memory[:-1] if seconds > WARM]
        third = len(used) // 3
        if third == 0:
            return
        growth = median(used[-third:]) - median(used[-2 * third : -third])
        print(f"growth in the last third: {growth / MIB:.1f} MiB")
        if growth > FLAT:
            self.report(f"memory grew by {growth / MIB:.0f} MiB")


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument(
        "--one-relay", action="store_true", help="one long round; prints its memory"
    )
    parser.add_argument(
        "--round", type=float, default=10, help="seconds in which clients come and go"
    )
    parser.add_argument("--clients", type=int, default=50, help="how many at once")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        rounds = await live(arguments, rng, Authority(Path(folder)))
    visits = sum(not visit.refused for one in rounds for visit in one.visits)
    sent = sum(visit.sent for one in rounds for visit in one.visits)
    outcomes = sum((one.outcomes for one in rounds), Counter[str]())
    violations = sum(len(one.violations) for one in rounds)
    print(
        f"seed {arguments.seed}: {len(rounds)} rounds, {visits} connections, {sent}"
        f" messages, attempts {dict(outcomes)}, {violations} violations"
    )
    return 1 if violations else 0


def complaints(log: list[str]) -> list[str]:
    """Errors of a relay's log, and the ends of tracebacks; else its last line."""
    found = [line for line in log if COMPLAINT.search(line)]
    return found[:EXAMPLES] or log[-1:]


def kinds(violations: list[Violation]) -> list[list[Violation]]:
    """Group equal ones, the most frequent kind first."""
    found: dict[str, list[Violation]] = {}
    for violation in violations:
        found.setdefault(DETAIL.sub("#", violation.what), []).append(violation)
    return sorted(found.values(), key=len, reverse=True)


def examples(violations: list[Violation]) -> Iterator[str]:
    """Some of each kind, and how many there are."""
    for alike in kinds(violations):
        yield from (violation.what for violation in alike[:EXAMPLES])
        if len(alike) > EXAMPLES:
            yield f"... and {len(alike) - EXAMPLES} like it"


async def live(
    arguments: argparse.Namespace, rng: random.Random, authority: Authority
) -> list[Round]:
    """Every round, one after the other."""
    began = time.monotonic()
    rounds: list[Round] = []
    while time.monotonic() - began < arguments.seconds:
        own = random.Random(rng.random())
        plan = Plan.draw(own, arguments.round)
        if arguments.one_relay:
            plan = Plan.for_memory(arguments.seconds)
        this = Round(
            len(rounds) + 1, own, plan, authority, arguments.clients,
            arguments.one_relay,
        )  # fmt: skip
        rounds.append(this)
        try:
            await this.run()
        except Exception as error:
            said = "; ".join(complaints(str(error).splitlines()))
            this.report(f"{type(error).__name__}: {said}")
            this.evidence += "".join(traceback.format_exception(error)).splitlines()
        most = max((bytes for _, bytes in this.memory), default=0)
        print(
            f"round {this.number}: {plan}: {len(this.visits)} visits,"
            f" {most // MIB} MiB, {len(this.violations)} violations",
            *examples(this.violations),
            *this.evidence,
            sep="\n  ",
            flush=True,
        )
    return rounds


if __name__ == "__main__":
    if "--cluster" in sys.argv:
        words = [word for word in sys.argv[1:] if word != "--cluster"]
        statuses = [asyncio.run(main(words)) for main in CLUSTER]
        sys.exit(max(statuses))
    sys.exit(asyncio.run(main()))
