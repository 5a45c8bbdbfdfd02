"""Random faults around a durable queue, and an account of every message.

    python test/soak.py --cluster           after the leases: cluster_soak.py
    python test/queue_soak.py --seconds=300 --away=180

Relays with `--backend=redis` and leases, two workers, a Redis with AOF, and a backend
that speaks HTTP. Clients come, send numbers, and go. Meanwhile relays are killed or
stopped by SIGSTOP for longer than their lease, workers and Redis are killed, and the
backend is away, each of them at random. At the end `soaking.ledger` checks:

- each message that a relay added to a stream was accepted by the backend, and those of
  a connection arrived in order, by first appearance;
- a client that left a living relay has all its messages in the stream; of the client of
  a killed one only the last ones may be missing;
- each connection has one disconnect event, as its last one, or the same one again;
- no living relay closed a client; no event is dead; nothing is left unread.

Then the backend is away for `--away` seconds under load, one of two workers is killed,
and some events fail also afterwards: they are dead, and are sent again by a worker with
`--replay_dead`. Exit status 1 on a violation. The seed does not repeat the timing.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import websockets
from faults import Attempt, FaultyBackend, Reply
from redis_server import RedisServer
from redis_streams import Streams
from service import Service, eventually
from soaking.ledger import AWAY, Account, Client, Ledger, audit

RELAYS = 3
WORKERS = 2
PARTITIONS = 8
SETTLED = 120.0  # seconds, at most, until all is delivered
GROUP = "socketdock-worker"
PAUSE = 0.3  # seconds between two messages of a client, at most
REFUSED = (OSError, TimeoutError, websockets.InvalidHandshake)


class Soak:
    """Relays, workers, their Redis and their backend, and clients."""

    def __init__(self, rng: random.Random, folder: Path, ttl: float) -> None:
        self.rng = rng
        self.ttl = ttl
        self.redis = RedisServer(folder, aof=True)
        self.streams = Streams(self.redis, PARTITIONS, "socketdock")
        self.ledger = Ledger(self.streams)
        self.backend = FaultyBackend(self.decide)
        self.is_bad: Callable[[Attempt], bool] = lambda attempt: False
        self.clients: list[Client] = []
        self.relays: dict[str, Service] = {}  # by name; no two have the same one
        self.workers: list[Service] = []
        self.died: set[str] = set()  # relays that were killed or taken for dead
        self.over = asyncio.Event()
        self.faults: Counter[str] = Counter()
        self.names = itertools.count()
        self.stack = contextlib.AsyncExitStack()

    def decide(self, attempt: Attempt) -> Reply:
        return Reply(500) if self.is_bad(attempt) else Reply()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run all of it during the block."""
        async with self.stack:
            await self.stack.enter_async_context(self.redis)
            await self.stack.enter_async_context(self.backend)
            await self.ledger.begin()
            reading = asyncio.create_task(self.ledger.run())
            try:
                for _ in range(RELAYS):
                    await self.start_relay()
                for _ in range(WORKERS):
                    await self.start_worker()
                yield
            finally:
                self.ledger.over = True
                await reading

    async def start_relay(self) -> None:
        name = f"relay-{next(self.names)}"
        flags = self.streams.flags(
            f"--cluster={self.redis.url}", f"--lease_ttl={self.ttl}",
            f"--instance_name={name}", "--delivery_timeout=300",
        )  # fmt: skip
        service = await self.stack.enter_async_context(Service(*flags))
        await eventually(lambda: "holds its lease" in str(service.log), SETTLED)
        self.relays[name] = service

    async def start_worker(self, *more: str) -> None:
        flags = (
            f"--redis_url={self.redis.url}",
            f"--messageuri={self.backend.url('message')}",
            f"--disconnecturi={self.backend.url('disconnect')}",
            "--event_timeout=5", *more,
        )  # fmt: skip
        command = [sys.executable, "socketdock.py", "worker"]
        service = Service(*flags, command=command)
        self.workers.append(await self.stack.enter_async_context(service))

    # Clients.

    async def visit(self) -> None:
        """Connect and talk, again and again until the end."""
        while not self.over.is_set():
            relay, service = self.rng.choice(list(self.relays.items()))
            name = f"client-{next(self.names)}"
            client = Client(f"{service.ws_url}?name={name}", name, relay=relay)
            try:
                await client.connect()
            except REFUSED:
                await asyncio.sleep(0.2)
                continue
            self.clients.append(client)
            enough = asyncio.Event()
            seconds = self.rng.uniform(0.5, 20)
            leaving = asyncio.get_running_loop().call_later(seconds, enough.set)
            talking = asyncio.create_task(
                client.talk(self.rng.uniform(0.01, PAUSE), enough)
            )
            ending = asyncio.create_task(self.over.wait())
            await asyncio.wait([talking, ending], return_when="FIRST_COMPLETED")
            enough.set()
            await talking
            leaving.cancel()
            ending.cancel()
            client.left = client.is_open
            # A paused relay answers late: it may have read all nevertheless.
            client.client.close_timeout = SETTLED
            await client.client.close()

    # Faults, each with what it needs to be over.

    async def relay_is_killed(self) -> None:
        name = self.rng.choice(list(self.relays))
        service = self.relays.pop(name)
        self.died.add(name)
        await kill(service)
        await self.start_relay()

    async def relay_pauses(self) -> None:
        """For longer than its lease; it closes its clients, and goes on."""
        name = self.rng.choice(list(self.relays))
        service = self.relays.pop(name)
        self.died.add(name)
        async with service.stalled(2 * self.ttl + 1):
            pass
        await self.start_relay()

    async def worker_is_killed(self) -> None:
        service = self.workers.pop(self.rng.randrange(len(self.workers)))
        await kill(service)
        await self.start_worker()

    async def redis_is_killed(self) -> None:
        await self.redis.kill()
        await asyncio.sleep(self.rng.uniform(0.2, self.ttl))
        await self.redis.start()

    async def backend_is_away(self) -> None:
        self.backend.make_unreachable(self.rng.choice(["refused", "reset", "503"]))
        await asyncio.sleep(self.rng.uniform(0.5, 2 * self.ttl))
        await self.backend.make_reachable()

    async def fail(self, seconds: float) -> None:
        """Let everything fail now and then, each of them by itself."""
        kinds: list[list[Callable[[], Awaitable[None]]]] = [
            [self.relay_is_killed, self.relay_pauses], [self.worker_is_killed],
            [self.redis_is_killed], [self.backend_is_away],
        ]  # fmt: skip
        end = time.monotonic() + seconds

        async def again_and_again(faults: list[Callable[[], Awaitable[None]]]) -> None:
            longest = min(15.0, seconds / 3)
            for fault in itertools.cycle(faults):
                await asyncio.sleep(self.rng.uniform(0.5, longest))
                self.faults[fault.__name__] += 1
                await fault()
                if time.monotonic() > end and self.faults[faults[-1].__name__]:
                    break  # each of them at least once

        await asyncio.gather(*map(again_and_again, kinds))

    # The two parts.

    async def random_faults(self, seconds: float, number: int) -> None:
        visits = [asyncio.create_task(self.visit()) for _ in range(number)]
        await self.fail(seconds)
        self.over.set()
        await asyncio.gather(*visits)

    async def long_outage(self, seconds: float, number: int) -> None:
        """The backend is away, one of two workers is killed, and some events fail."""
        self.backend.make_unreachable("refused")
        visits = [asyncio.create_task(self.visit()) for _ in range(number)]
        await asyncio.sleep(seconds / 2)
        self.faults["worker_is_killed"] += 1
        await kill(self.workers.pop())
        await asyncio.sleep(seconds / 2)
        self.is_bad = is_third_of_one_in_ten
        await self.backend.make_reachable()
        dead = 0
        async with asyncio.timeout(SETTLED):
            while not dead:
                await asyncio.sleep(0.5)
                dead = await self.redis.client.xlen(f"{self.streams.prefix}:dead")
        self.over.set()
        await asyncio.gather(*visits)
        await self.until_read()
        dead = await self.redis.client.xlen(f"{self.streams.prefix}:dead")
        self.faults["dead events"] += dead
        self.is_bad = lambda attempt: False
        await self.start_worker("--replay_dead")

    async def until_read(self) -> None:
        """Wait until the workers have acknowledged everything, and all has ended."""
        stable = 0.0
        async with asyncio.timeout(SETTLED + 2 * self.ttl):
            while stable < 1 or not self.all_ended():
                await asyncio.sleep(0.25)
                try:
                    left = await self.ledger.unread(GROUP)
                except AWAY:
                    left = 1
                stable = stable + 0.25 if not left else 0.0

    def all_ended(self) -> bool:
        """Whether each connection in the streams has its disconnect event."""
        return all(
            any(entry.name == "disconnect" for entry in entries)
            for entries in self.ledger.entries.values()
        )

    async def check(self) -> Account:
        """Wait for the end, and account for everything."""
        late = ""
        try:
            await self.until_read()
        except TimeoutError:
            late = f"{await self.ledger.unread(GROUP)} entries are left unread"
        # A busy machine may stop a relay for longer than its lease.
        for name, relay in self.relays.items():
            if "was taken for dead" in str(relay.log):
                self.died.add(name)
                self.faults["relay_is_late"] += 1
        account = audit(self.ledger, self.backend, self.clients, self.died)
        if late:
            account.report(late)
        if dead := await self.redis.client.xlen(f"{self.streams.prefix}:dead"):
            account.report(f"{dead} events are dead")
        return account


def is_third_of_one_in_ten(attempt: Attempt) -> bool:
    """Whether a message is one that the backend can't take."""
    if attempt.kind != "message":
        return False
    name, number = attempt.event["message"].split()
    return name.endswith("0") and number == "2"


async def kill(service: Service) -> None:
    service.process.send_signal(signal.SIGKILL)
    await service.process.wait()


async def part(
    arguments: argparse.Namespace, act: Callable[[Soak], Awaitable[None]]
) -> bool:
    """Run one part; return whether it violated nothing."""
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(rng, Path(folder), arguments.lease_ttl)
        began = time.monotonic()
        async with soak.running():
            await act(soak)
            account = await soak.check()
    faults = ", ".join(f"{count} {name}" for name, count in soak.faults.items())
    print(
        f"durable queue, seed {arguments.seed}, {time.monotonic() - began:.0f} s:"
        f" {account.connections} connections, {account.messages} messages,"
        f" {account.repeated} entries and {account.resent} requests repeated,"
        f" {account.lost} messages lost with killed relays; {faults};"
        f" {len(account.violations)} violations",
        *account.violations[:20], sep="\n  ", flush=True,
    )  # fmt: skip
    return not account.violations


async def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--away", type=float, default=180, help="seconds; 0: never")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--clients", type=int, default=60, help="at once")
    parser.add_argument("--lease-ttl", type=float, default=5)
    parser.add_argument("--only", default="", help="of cluster_soak.py: nothing here")
    arguments = parser.parse_args(words)
    if arguments.only:
        return 0
    number, good = arguments.clients, True
    if arguments.seconds:
        good &= await part(
            arguments, lambda soak: soak.random_faults(arguments.seconds, number)
        )
    if arguments.away:
        good &= await part(
            arguments, lambda soak: soak.long_outage(arguments.away, number)
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
