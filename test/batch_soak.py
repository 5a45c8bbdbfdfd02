"""Batches under random faults, and an account of every message.

    python test/batch_soak.py --clients=1000 --messages=200 --seed=N

Clients send and leave, in several waves. The backend fails in every way of the
contract: whole batches, single events, bad events that split a batch, timeouts, and
connections that end in the middle of a response. Then the relay is stopped while
clients send, or killed and started again. The check:

- each message that a client sent is accepted once by its id, or refused, or counted
  as undelivered; both only if the response that accepted it may have been lost; after a
  kill, those that were not accepted are lost;
- the messages of a connection are accepted in order, and its disconnect event last,
  once, with true counts.

Each violation is printed. Exit status 1 on a violation.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Self

import websockets
from faults import ABORTED_LATE
from service import Service, eventually

SETTLED = 300.0  # seconds, at most, until all is delivered
TYPE = b"Content-Type: application/vnd.socketdock+json\r\n"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
BAD = "bad"  # part of a message that is never accepted


@dataclass
class Account:
    """What the backend has accepted, the first time of each id, in order."""

    seen: set[str] = field(default_factory=set)
    # By connection: numbers of messages, and the disconnect event's `meta`.
    numbers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # connections by client
    # By connection: accepted messages whose response was, or may be, lost.
    doubtful: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    violations: list[str] = field(default_factory=list)

    def accept(self, event: dict[str, Any], is_doubtful: bool) -> None:
        id_ = event["meta"]["connection_id"]
        if is_doubtful or event["id"] in self.seen:
            self.doubtful[id_].add(event["id"])
        if event["id"] in self.seen:
            return
        self.seen.add(event["id"])
        if event["event"] == "disconnect":
            self.ends[id_] = event["meta"]
            return
        if id_ in self.ends:
            self.violations.append(f"{event['id']} came after the disconnect event")
        name, number = event["message"].split()[:2]
        self.names[name] = id_
        self.numbers[id_].append(int(number))

    def ended_names(self) -> set[str]:
        """Return the clients whose disconnect event was accepted."""
        return {name for name, id_ in self.names.items() if id_ in self.ends}

    def check(self, name: str, sent: int, bad: int, lossless: bool) -> None:
        """Compare with what a client has sent; `bad` of it is refused."""
        id_ = self.names.get(name)
        if id_ is None:
            if lossless and sent > bad:
                self.violations.append(f"{name}: nothing was accepted")
            return
        numbers = self.numbers[id_]
        if numbers != sorted(set(numbers)):
            self.violations.append(f"{name}: out of order: {numbers}")
        end = self.ends.get(id_)
        if end is None:
            self.violations.append(f"{name}: no disconnect event")
        elif lossless:
            known = len(numbers) + end["refused"] + end["undelivered"]
            if not sent <= known <= sent + len(self.doubtful[id_]):
                self.violations.append(
                    f"{name}: sent {sent}, accepted {len(numbers)}, but {end}"
                )
            if end["refused"] > bad:
                self.violations.append(f"{name}: {bad} were bad, but {end}")


class ChaosBackend:
    """Answers batches in random ways."""

    def __init__(self, rng: random.Random, account: Account, share: float) -> None:
        self.rng = rng
        self.account = account
        self.share = share  # of requests that fail
        self.kinds: Counter[str] = Counter()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers.add(writer)
        with contextlib.suppress(
            asyncio.IncompleteReadError,
            ConnectionError,
            ABORTED_LATE,
            asyncio.CancelledError,  # at the end
        ):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(LENGTH.search(head)[1])
                events = json.loads(await reader.readexactly(length))["events"]
                if not await self._answer(events, writer):
                    break
        self._writers.discard(writer)
        writer.transport.abort()

    async def _answer(
        self, events: list[dict[str, Any]], writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one batch; return whether the connection stays."""
        kind = "ok"
        if self.rng.random() < self.share:
            kind = self.rng.choice(
                ["failed", "failed", "500", "503", "reset", "silent", "cut-status",
                 "cut-body", "late"]
            )  # fmt: skip
        elif any(BAD in event.get("message", "") for event in events):
            kind = self.rng.choice(["400", "413", "422"])
        self.kinds[kind] += 1
        if kind.isdigit():
            after = b"Retry-After: 0\r\n" if kind == "503" else b""
            head = b"HTTP/1.1 %b No\r\n%b" % (kind.encode(), after)
            writer.write(head + b"Content-Length: 0\r\n\r\n")
            return True
        if kind == "silent":  # the relay gives up
            await asyncio.sleep(1.5)
            return False
        if kind == "reset":
            return False
        failed = []
        if kind in ("failed", "cut-body"):
            failed = [e["id"] for e in events if self.rng.random() < 0.2]
        self._accept(events, failed, kind in ("cut-status", "cut-body", "late"))
        if kind == "cut-status":
            writer.write(b"HTTP/1.1 20")
            return False
        body = json.dumps({"failed": failed}).encode()
        answer = b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (TYPE, len(body))
        if kind == "cut-body":
            writer.write(answer + body[: self.rng.randrange(len(body))])
            return False
        if kind == "late":
            await asyncio.sleep(self.rng.random() * 0.5)
        writer.write(answer + body)
        return True

    def _accept(
        self, events: list[dict[str, Any]], failed: list[str], is_doubtful: bool
    ) -> None:
        stopped = set()
        for event in events:
            id_ = event["meta"]["connection_id"]
            if event["id"] in failed or id_ in stopped:
                stopped.add(id_)  # as the contract says
            else:
                self.account.accept(event, is_doubtful)


@dataclass
class Client:
    """Sends numbered messages; `sent` and `bad` count them."""

    name: str
    rng: random.Random
    sent: int = 0
    bad: int = 0

    async def visit(self, url: str, messages: int) -> None:
        with contextlib.suppress(websockets.ConnectionClosed, OSError):
            async with websockets.connect(
                url, ping_interval=None, open_timeout=60, close_timeout=60
            ) as client:
                for _ in range(messages):
                    is_bad = self.rng.random() < 0.0005
                    text = f"{self.name} {self.sent} {BAD if is_bad else 'x' * 100}"
                    await client.send(text)
                    self.sent += 1
                    self.bad += is_bad
                    if self.rng.random() < 0.05:
                        await asyncio.sleep(self.rng.random() * 0.1)


async def run(args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    account = Account()
    async with ChaosBackend(rng, account, args.share) as backend:
        with tempfile.TemporaryDirectory() as folder:
            flags = (
                "--backend=http",
                f"--batchuri=http://127.0.0.1:{backend.port}/",
                f"--state_dir={folder}",
                f"--batch_max_events={rng.choice([20, 256])}",
                "--backend_timeout=1",
                "--delivery_timeout=60",
                "--ping_interval=0",
                "--max_connections_per_ip=0",
            )
            clients = [Client(f"c{n}", rng) for n in range(args.clients)]
            async with Service(*flags) as service:
                async with asyncio.TaskGroup() as tasks:
                    for client in clients:
                        tasks.create_task(client.visit(service.ws_url, args.messages))
                await eventually(
                    lambda: all(
                        account.names.get(client.name) in account.ends
                        for client in clients
                        if client.sent > client.bad
                    ),
                    SETTLED,
                )
                complaints = list(service.log)
            for client in clients:
                account.check(client.name, client.sent, client.bad, lossless=True)
            print(f"{sum(c.sent for c in clients)} messages of {len(clients)} clients:"
                  f" {dict(backend.kinds)}")
            await end_early(args, account, rng, flags)
    account.violations += [line for line in complaints if "Traceback" in line]
    for violation in account.violations[:20]:
        print(violation)
    print(f"{len(account.violations)} violations")
    return 1 if account.violations else 0


async def end_early(
    args: argparse.Namespace, account: Account, rng: random.Random, flags: Any
) -> None:
    """Stop the relay, then kill one, while clients send; the next start ends all."""
    clients: list[Client] = []
    for how in ("stop", "kill"):
        late = [Client(f"{how}{n}", rng) for n in range(args.clients // 4)]
        clients += late
        async with Service(*flags) as service:
            async with asyncio.TaskGroup() as tasks:
                for client in late:
                    tasks.create_task(client.visit(service.ws_url, args.messages))
                before = len(account.seen)
                await eventually(
                    lambda before=before: len(account.seen) > before + args.clients,
                    SETTLED,
                )
                if how == "stop":
                    service.process.terminate()
                else:
                    service.process.kill()
            await service.process.wait()
        print(f"{how}: {sum(c.sent for c in late)} messages")
    async with Service(*flags):  # sends the disconnect events that are missing
        await eventually(
            lambda: account.names.keys() <= account.ended_names(), SETTLED
        )
    for client in clients:
        # What the kernels had, nobody can count.
        account.check(client.name, client.sent, client.bad, lossless=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument(
        "--share", type=float, default=0.2, help="of requests that fail"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
