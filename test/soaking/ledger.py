"""What a durable queue took and delivered: an account of every entry.

`Ledger` reads the streams in a consumer group of its own, so that it has each entry
before the relays trim it. `audit` compares the entries with what the clients sent and
with what the backend got.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import redis
from faults import Book, Talker
from redis_streams import Entry, Streams

GROUP = "account"
READ = 500  # entries at a time
PAUSE = 0.05  # seconds, after a read that found nothing or failed

# Redis is away, or starts.
AWAY = (redis.exceptions.RedisError, OSError)


class Ledger:
    """Every entry of the streams, by connection, in their order."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.entries: dict[str, list[Entry]] = defaultdict(list)
        self.over = False
        self._seen: set[tuple[str, str]] = set()  # stream, id of the entry

    async def begin(self) -> None:
        """Make the group: what is added from now on is kept until it is read."""
        for name in self.streams.names:
            await self.streams.redis.client.xgroup_create(
                name, GROUP, "0", mkstream=True
            )

    async def run(self) -> None:
        """Read until `over` is set, while Redis comes and goes.

        Not until it is cancelled: redis-py may lose that.
        """
        start = ">"
        while not self.over:
            found = 0
            with contextlib.suppress(*AWAY):
                found = await self._read(start)
            if not found:
                # "0": what was read, but not received when Redis died.
                start = "0" if start == ">" else ">"
                await asyncio.sleep(PAUSE)

    async def _read(self, start: str) -> int:
        client, found = self.streams.redis.client, 0
        reply = await client.xreadgroup(
            GROUP, "one", dict.fromkeys(self.streams.names, start), count=READ
        )
        parts = reply.items() if isinstance(reply, dict) else reply
        for name, entries in parts:
            flat = [pair for part in entries for pair in pairs_in(part)]
            for entry_id, fields in flat:
                self._enter(name, Entry(entry_id, fields))
            if flat:
                await client.xack(name, GROUP, *(entry_id for entry_id, _ in flat))
                found += len(flat)
        return found

    def in_order(self) -> dict[str, list[Entry]]:
        """Return the entries of each connection in the order of its stream."""
        return {
            connection_id: sorted(entries, key=position)
            for connection_id, entries in self.entries.items()
        }

    def _enter(self, stream: str, entry: Entry) -> None:
        if (stream, entry.entry_id) not in self._seen:
            self._seen.add((stream, entry.entry_id))
            self.entries[entry.connection_id].append(entry)

    async def unread(self, group: str) -> int:
        """Return how many entries `group`, or the ledger's, have not acknowledged."""
        left = 0
        for name in self.streams.names:
            with contextlib.suppress(redis.exceptions.ResponseError):
                for one in await self.streams.redis.client.xinfo_groups(name):
                    if one["name"] in (group, GROUP):
                        entries = await self.streams.redis.client.xrange(
                            name, f"({one['last-delivered-id']}"
                        )
                        left += one["pending"] + len(entries)
        return left


def pairs_in(part: object) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the entries of one stream, which RESP3 nests once more."""
    if isinstance(part, tuple) or (
        isinstance(part, list) and part and isinstance(part[0], str)
    ):
        yield part[0], part[1]
    elif isinstance(part, list):
        for each in part:
            yield from pairs_in(each)


def position(entry: Entry) -> tuple[int, ...]:
    """Return the place of an entry in its stream."""
    return tuple(map(int, entry.entry_id.split("-")))


@dataclass
class Client(Talker):
    """A client of one relay, and how it ended."""

    relay: str = ""  # the name of the relay's run
    left: bool = False  # it has begun to close the connection


@dataclass
class Account:
    """The result of an audit."""

    violations: list[str] = field(default_factory=list)
    messages: int = 0  # in the streams, each once
    repeated: int = 0  # entries that were added again
    lost: int = 0  # that a client had sent, in the memory of a killed relay
    resent: int = 0  # requests to the backend beyond the first accepted one
    connections: int = 0

    def report(self, what: str) -> None:
        self.violations.append(what)


def audit(
    ledger: Ledger, book: Book, clients: Iterable[Client], died: set[str]
) -> Account:
    """Account for every connection; `died` has the relays that were killed."""
    account = Account()
    arrived: dict[str, list[str]] = defaultdict(list)  # webhook-ids by connection
    known: set[str] = set()
    for attempt in book.attempts:
        if attempt.webhook_id not in known:
            known.add(attempt.webhook_id)
            arrived[attempt.connection_id].append(attempt.webhook_id)
    accepted = sum(attempt.accepted for attempt in book.attempts)
    account.resent = accepted - len(book.accepted)
    named: dict[str, str] = {}
    taken = ledger.in_order()
    for connection_id, entries in taken.items():
        account.connections += 1
        for entry in entries:
            if entry.name == "connect":
                named[entry.meta["query"].removeprefix("name=")] = connection_id
        check_connection(account, connection_id, entries, arrived[connection_id], book)
    for connection_id in set(arrived) - set(taken):
        account.report(f"{connection_id} is in no stream")
    for client in clients:
        check_client(account, client, named, taken, client.relay in died)
    return account


def check_connection(
    account: Account,
    connection_id: str,
    entries: list[Entry],
    arrived: list[str],
    book: Book,
) -> None:
    """Compare the entries of one connection with what the backend got."""
    unique = list(dict.fromkeys(e.id for e in entries if e.name != "connect"))
    account.repeated += sum(e.name != "connect" for e in entries) - len(unique)
    *messages, last = unique or [""]
    account.messages += len(messages)
    due = [f"{connection_id}-{n}" for n in range(1, len(messages) + 1)]
    if last != f"{connection_id}-disconnect" or messages != due:
        account.report(f"{connection_id}: the stream has {unique[-4:]}, not {due[-3:]}")
    if missing := [id_ for id_ in unique if id_ not in book.accepted]:
        account.report(f"{connection_id}: {missing[:3]} of {len(unique)} not accepted")
    if arrived != unique:
        account.report(f"{connection_id}: arrived {arrived[-4:]}, not {unique[-4:]}")


def check_client(
    account: Account,
    client: Client,
    named: dict[str, str],
    taken: dict[str, list[Entry]],
    died: bool,
) -> None:
    """Compare what a client sent with the entries of its connection."""
    if client.name not in named:
        account.report(f"{client.name} was accepted, and is in no stream")
        return
    entries = taken[named[client.name]]
    texts = {e.id: e.payload["message"] for e in entries if e.name == "message"}
    numbers = [text.split() for text in texts.values()]
    if numbers != [[client.name, str(n)] for n in range(len(numbers))]:
        account.report(f"{client.name}: the stream has other messages than it sent")
    lost = client.sent - len(numbers)
    if died:
        account.lost += max(lost, 0)
    elif lost:
        account.report(f"{client.name}: {lost} of {client.sent} are missing")
    if not (died or client.left):
        account.report(f"{client.name} was closed with {client.close_code}")
