"""Random deaths of relays that share Redis, and an account of every connection.

    python test/soak.py --cluster --seconds=300 --clients=500
    python test/cluster_soak.py --seconds=300 --lease-ttl=15

Three relays, each with `--clients` clients. In each round something fails: a relay is
killed, two are, a relay and then the one that sends its events, one is stopped by
SIGSTOP for longer than its lease, Redis is away, or is emptied. Then:

- each connection of a dead relay has one disconnect event within its lease plus 10 s
  (where the sender was killed, too: one webhook-id);
- a relay that was taken for dead closes its clients with 1012, and sends nothing more
  for what others have ended;
- no other connection has a disconnect event, and all of them still relay;
- at the end nothing is left in Redis but tombstones, and each connection has ended.

Exit status 1 on a violation. The seed does not repeat the timing.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import websockets
from cluster import clients_of, ids_of, instance_of, kill, no_keys, relay
from redis_server import RedisServer
from service import RecordingBackend, Service, eventually, withhold

LATER = 10.0  # seconds after the lease in which the events must come
PATIENCE = 60.0  # seconds for each step beyond the lease, on a busy machine
RELAYS = 3


class Site:
    """A relay, its process and its clients by id."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.stack = contextlib.AsyncExitStack()
        self.clients: dict[str, websockets.ClientConnection] = {}
        self.service: Service
        self.instance = ""


class Soak:
    """Rounds of faults, and what they violated."""

    def __init__(
        self, redis: RedisServer, backend: RecordingBackend, clients: int, ttl: float
    ) -> None:
        self.redis = redis
        self.backend = backend
        self.number = clients
        self.ttl = ttl
        self.sites = [Site(number) for number in range(RELAYS)]
        self.violations: list[str] = []
        self.ended: set[str] = set()  # ids that must have one disconnect event
        self.repeated: set[str] = set()  # of these, ids that may have several

    async def begin(self, site: Site) -> None:
        """Start a relay and its clients, or bring them back to their number."""
        if not site.instance:
            site.stack = contextlib.AsyncExitStack()
            site.service = await site.stack.enter_async_context(
                relay(
                    self.redis, self.backend, site.number, f"--lease_ttl={self.ttl}"
                )
            )
        site.instance = await instance_of(site.service, self.backend)
        missing = self.number - len(site.clients)
        for first in range(0, missing, 50):
            opened = await clients_of(site.service, min(50, missing - first))
            site.clients |= await ids_of(self.backend, opened)

    async def run(self, rng: random.Random, seconds: float, only: str) -> int:
        """Return the number of rounds; `only` names one fault, or is empty."""
        faults: list[Callable[[random.Random], Awaitable[None]]] = [
            self.one_dies, self.two_die, self.reaper_dies, self.one_pauses,
            self.redis_is_away, self.redis_is_emptied,
        ]  # fmt: skip
        rng.shuffle(faults)
        faults = [fault for fault in faults if only in ("", fault.__name__)]
        began, rounds = time.monotonic(), 0
        while rounds < len(faults) or time.monotonic() - began < seconds:
            for site in self.sites:
                await self.begin(site)
            await asyncio.sleep(self.ttl)  # then each of them may reap
            fault = faults[rounds % len(faults)]
            rounds += 1
            start = time.monotonic()
            await fault(rng)
            took = time.monotonic() - start
            await self.check()
            print(
                f"round {rounds}: {fault.__name__}, {took:.1f} s,"
                f" {len(self.violations)} violations", flush=True,
            )  # fmt: skip
        return rounds

    # The faults.

    async def one_dies(self, rng: random.Random) -> None:
        await self.die(rng.sample(self.sites, 1))

    async def two_die(self, rng: random.Random) -> None:
        await self.die(rng.sample(self.sites, 2))

    async def reaper_dies(self, rng: random.Random) -> None:
        first, *others = rng.sample(self.sites, len(self.sites))
        release = withhold(self.backend, "disconnect")
        before = len(self.backend.of("disconnect"))
        kill(first.service)
        await self.backend.wait_for("disconnect", before + 1, self.ttl * 2 + PATIENCE)
        reaper = await self.redis.client.get(f"socketdock:{{{first.instance}}}:reaper")
        second = next(site for site in others if site.instance == reaper)
        self.repeated |= set(first.clients)
        kill(second.service)
        self.backend.answers.clear()
        release.set()
        await self.die([first, second])

    async def one_pauses(self, rng: random.Random) -> None:
        site = rng.choice(self.sites)
        due = dict(site.clients)
        async with site.service.stalled(0):
            for client in due.values():  # waits in its socket when it goes on
                await client.send("too late")
            await self.reaped(site, time.monotonic())
        for client in due.values():
            await asyncio.wait_for(client.wait_closed(), PATIENCE)
            if client.close_code != 1012:
                self.violations.append(f"{site.number} closed with {client.close_code}")
        if any(event["message"] == "too late" for event in self.backend.of("message")):
            self.violations.append("a message of an ended connection was sent")
        self.ended |= set(due)
        site.clients = {}

    async def redis_is_away(self, rng: random.Random) -> None:
        await self.redis.kill()
        await asyncio.sleep(2 * self.ttl)
        await self.check()
        await self.redis.start()
        await self.known_again()

    async def redis_is_emptied(self, rng: random.Random) -> None:
        await self.redis.client.flushall()
        await self.known_again()
        await asyncio.sleep(1.5 * self.ttl)

    # What must follow.

    async def die(self, dead: list[Site]) -> None:
        """Kill relays; others must send the events of all their connections in time."""
        kill(*(site.service for site in dead))
        began = time.monotonic()
        for site in dead:
            await site.service.process.wait()
        for site in dead:
            await self.reaped(site, began)
            self.ended |= set(site.clients)
            site.clients, site.instance = {}, ""
            await site.stack.aclose()

    async def reaped(self, site: Site, began: float) -> None:
        """Wait until all events of a relay's connections have come."""

        def all_came() -> bool:
            return set(site.clients) <= {
                event["connection_id"] for event in self.backend.of("disconnect")
            }

        await eventually(all_came, 2 * self.ttl + PATIENCE)
        took = time.monotonic() - began
        if took > self.ttl + LATER:
            self.violations.append(f"disconnect events came after {took:.1f} s")
        await no_keys(self.redis, site.instance, PATIENCE)

    async def known_again(self) -> None:
        """Wait until Redis has the ids of all connections."""
        async with asyncio.timeout(2 * self.ttl + PATIENCE):
            for site in self.sites:
                key = f"socketdock:{{{site.instance}}}:connections"
                while await self.redis.client.smembers(key) != set(site.clients):
                    await asyncio.sleep(0.1)

    async def check(self) -> None:
        """Compare the disconnect events with what has ended; the rest must relay."""
        living = [client for site in self.sites for client in site.clients.values()]
        for first in range(0, len(living), 200):
            await ids_of(self.backend, living[first : first + 200])
        counts: dict[str, int] = {}
        for kind, event, headers in self.backend.events:
            if kind == "disconnect":
                id_ = event["connection_id"]
                counts[id_] = counts.get(id_, 0) + 1
                if headers["Webhook-Id"] != f"{id_}-disconnect":
                    self.violations.append(f"webhook-id {headers['Webhook-Id']}")
        for id_ in self.ended - set(counts):
            self.violations.append(f"{id_} has no disconnect event")
        for id_ in set(counts) - self.ended:
            self.violations.append(f"{id_} has a disconnect event, and has not ended")
        for id_, count in counts.items():
            if count > 1 and id_ not in self.repeated:
                self.violations.append(f"{id_} has {count} disconnect events")

    async def end(self) -> None:
        """Stop all relays in order: nothing is left."""
        for site in self.sites:
            await self.begin(site)
        for site in self.sites:
            self.ended |= set(site.clients)
            site.clients = {}
            await site.stack.aclose()
        await self.check()
        left = await self.redis.client.keys("*")
        self.violations += [key for key in left if not key.endswith("}:dead")]


async def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--clients", type=int, default=500, help="of each relay")
    parser.add_argument("--lease-ttl", type=float, default=15)
    parser.add_argument("--only", default="", help="the name of one fault")
    parser.add_argument("--away", help="of queue_soak.py")
    arguments = parser.parse_args(words)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            RedisServer(Path(folder), aof=True) as redis,
            RecordingBackend() as backend,
        ):
            soak = Soak(redis, backend, arguments.clients, arguments.lease_ttl)
            try:
                rng = random.Random(arguments.seed)
                rounds = await soak.run(rng, arguments.seconds, arguments.only)
                await soak.end()
            finally:
                for site in soak.sites:
                    with contextlib.suppress(Exception):
                        await site.stack.aclose()
            events = len(backend.of("disconnect"))
    print(
        f"seed {arguments.seed}: {rounds} rounds, {events} disconnect events,"
        f" {len(soak.violations)} violations", *soak.violations[:20], sep="\n  ",
    )  # fmt: skip
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
