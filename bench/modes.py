"""The modes of the benchmark: what clients and backend do, and what is measured.

`bench.load` has clients and backend, `bench.relays` starts the relays.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from redis.exceptions import RedisError

from bench import streams, wire
from bench.load import (
    SEND_URL,
    Batches,
    BenchError,
    Callbacks,
    Client,
    Events,
    Peer,
    Visitor,
)
from bench.relays import Relay, running, stolen_seconds

HOST = "127.0.0.1"
BACKLOG = 4096
PATIENCE = 20.0  # seconds for each step except the measurement

AT_ONCE = 64  # handshakes, visits, or messages in flight (times the window)
# Messages of one client in flight at once. In other modes, and for messages of more
# than WINDOW_SIZE bytes, there is one.
WINDOW = {"up": 4, "up-redis": 4, "up-crowd": 4, "push-bulk": 4}
WINDOW_SIZE = 256 * 1024
BULK = 100  # commands of one bulk callback; fewer if they exceed BULK_SIZE
BULK_SIZE = 4 * 1024 * 1024  # bytes
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}

Figures = dict[str, float]


class Cell(NamedTuple):
    """One measurement: a relay in one mode, with one size."""

    relay: str
    mode: str
    size: int  # bytes of a message; 0 if the mode sends none
    clients: int
    seconds: float
    warm_up: float  # seconds before the measurement
    profile: str = ""  # path of a flame graph; empty: none


async def measure(cell: Cell) -> Figures:
    """Measure one cell. Raises `BenchError`."""
    run = MODES[cell.mode](cell)
    server = await asyncio.get_running_loop().create_server(
        run.backend, HOST, 0, backlog=BACKLOG
    )
    backend = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    try:
        with (
            run.broker() as redis,
            running(cell.relay, backend, cell.mode, redis) as run.relay,
        ):
            try:
                return await run.figures()
            finally:
                run.close()
    finally:
        server.close()


class Run:
    """The base of all modes: clients, a count of what was done, and failures."""

    relay: Relay

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.clients: list[Client] = []
        self.done = 0
        self.closing = False
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def figures(self) -> Figures:
        """Prepare, measure, and return the figures."""
        raise NotImplementedError

    def backend(self) -> Peer:
        """Return a new connection's end at the backend."""
        return Events(self.answer, self.on_event)

    def broker(self) -> contextlib.AbstractContextManager[str]:
        """Run what takes the events instead of a backend; the value is its URL."""
        return contextlib.nullcontext("")

    def answer(self, tail: bytes) -> bytes:
        """Return the backend's response to an event (see `Events`)."""
        return wire.NO_CONTENT

    def on_event(self, start: bytes, tail: bytes) -> None:
        """The backend got an event, and has answered it."""

    def fail(self, why: str) -> None:
        """End the measurement with `BenchError`."""
        if not self.closing and not self._broken.done():
            self._broken.set_result(why)

    async def wait(self, seconds: float) -> None:
        """Wait. Raises `BenchError` as soon as something fails."""
        await asyncio.wait([self._broken], timeout=seconds)
        if self._broken.done():
            raise BenchError(self._broken.result())

    async def until(self, claim: Callable[[], bool], what: str) -> None:
        """Wait until `claim()` holds. Raises `BenchError`."""
        deadline = time.monotonic() + PATIENCE
        while not claim():
            if time.monotonic() > deadline:
                raise BenchError(f"{what} did not arrive in {PATIENCE:g} s")
            await self.wait(0.002)

    async def rate(self) -> Figures:
        """Measure after the warm-up: rate and cost of what is done meanwhile."""
        await self.wait(self.cell.warm_up)
        profiler = None
        if self.cell.profile:
            profiler = self.relay.profile(Path(self.cell.profile), self.cell.seconds)
        done, begin = self.done, time.perf_counter()
        cpu, own = self.relay.cpu_seconds(), time.process_time()
        stolen = stolen_seconds()
        await self.wait(self.cell.seconds)
        await self.until(lambda: self.done > done, "a message")
        cpu, own = self.relay.cpu_seconds() - cpu, time.process_time() - own
        seconds, count = time.perf_counter() - begin, self.done - done
        if profiler is not None:
            await asyncio.to_thread(profiler.wait)
        return {
            "cpu_us": cpu / count * 1e6,
            "load_us": own / count * 1e6,
            "per_second": count / seconds,
            "busy": cpu / seconds,
            "stolen": (stolen_seconds() - stolen) / seconds,
        }

    async def join(self, protocol: Peer) -> None:
        """Connect to the relay. Raises `BenchError`."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: protocol, HOST, self.relay.port)
        except OSError as error:
            raise BenchError(f"a client can't connect: {error}") from error

    async def enter(self) -> None:
        """Open all clients that are not open yet."""
        for number in range(len(self.clients), self.cell.clients):
            client = Client(number, self.relay.path(number), self.fail)
            await self.join(client)
            self.clients.append(client)
            if len(self.clients) % AT_ONCE == 0:
                await self.until(lambda: self.clients[-1].opened, "a handshake")
        await self.until(lambda: all(c.opened for c in self.clients), "a handshake")

    def close(self) -> None:
        """From now on, a lost connection is not a failure."""
        self.closing = True
        for client in self.clients:
            client.transport.abort()


class Traffic(Run):
    """Messages in flight: for each that arrives, the next one is sent."""

    replying = False  # whether the response to an event has a message

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.pools: dict[bytes, Callbacks] = {}
        self.known = 0  # clients that the backend can call back

    async def figures(self) -> Figures:
        await self.begin()
        return await self.rate()

    async def begin(self) -> None:
        """Introduce all clients to the backend, then send the first messages."""
        self.send: Callable[[Client], None] = Client.send
        self.on_arrival: Callable[[Client], None] = lambda client: None
        await self.enter()
        await self.introduce()
        match self.cell.mode:
            case "up" | "up-redis" | "up-crowd":
                self.on_arrival = self.on_done
            case "push" | "push-bulk" | "push-forward":
                self.send = self.call
            case "echo-reply" if self.relay.peer.replies:
                self.replying = True
            case _:
                self.on_arrival = self.call
        window = self.window
        self.in_flight = min(len(self.clients), AT_ONCE) * window
        # The clients that send next; a client is in this queue once per message.
        self.ready = deque(self.clients * window)
        for _ in range(self.in_flight):
            self.send(self.ready.popleft())

    @property
    def window(self) -> int:
        """Messages of one client in flight at once."""
        return WINDOW.get(self.cell.mode, 1) if self.cell.size <= WINDOW_SIZE else 1

    async def introduce(self) -> None:
        """Let each client send one message, so that the backend can call it back."""
        for sent, client in enumerate(self.clients[self.known :], self.known + 1):
            message = wire.message(self.cell.size, client.number)
            client.frame = wire.client_frame(wire.TEXT, message)
            client.on_message = self.on_done
            client.send()
            if sent % AT_ONCE == 0 or sent == len(self.clients):
                await self.until(lambda: self.known == sent, "an event")  # noqa: B023

    def answer(self, tail: bytes) -> bytes:
        return self.sender(tail).reply if self.replying else wire.NO_CONTENT

    def sender(self, tail: bytes) -> Client:
        """Return the client whose message ends an event."""
        # In JSON, two bytes end the event after the message.
        number = tail[-6:] if self.relay.peer.channels else tail[-8:-2]
        return self.clients[int(number)]

    def on_event(self, start: bytes, tail: bytes) -> None:
        client = self.sender(tail)
        if not client.callback[0]:
            self.learn(client, start)
        self.on_arrival(client)

    def learn(self, client: Client, start: bytes) -> None:
        """Store the URL by which the backend calls a client back."""
        host = b"%b:%d" % (HOST.encode(), self.relay.port)
        path = b"/socket/%06d/send" % client.number
        if not self.relay.peer.channels:
            found = SEND_URL.search(start)
            if found is None:
                self.fail("an event has no meta.send")
                return
            host, path = found[1], found[2]
        if host not in self.pools:
            self.pools[host] = Callbacks(host, self.fail)
        message = wire.message(self.cell.size, client.number)
        client.callback = wire.callback(host, path, message)
        client.callbacks = self.pools[host]
        client.reply = wire.reply(wire.command(message))
        self.known += 1

    def call(self, client: Client) -> None:
        """Send a client a message through the relay."""
        client.callbacks.post(client.callback)

    def on_done(self, client: Client) -> None:
        """A message has arrived: send the next one."""
        self.done += 1
        self.ready.append(client)
        self.send(self.ready.popleft())


    async def rest(self) -> None:
        """Send nothing more, and wait until nothing is in flight."""
        resting = 0

        def rest(client: Client) -> None:
            nonlocal resting
            resting += 1

        self.send = rest
        await self.until(lambda: resting == self.in_flight, "the last message")


class CrowdTraffic(Traffic):
    """Messages of many clients.

    Before, messages of `AT_ONCE` clients are measured in the same run. `crowd_ratio` is
    the cost of the former to that of the latter.
    """

    async def figures(self) -> Figures:
        crowd = self.cell
        self.cell = crowd._replace(clients=min(AT_ONCE, crowd.clients))
        await self.begin()
        few = await self.rate()
        await self.rest()
        self.cell = crowd
        await self.begin()
        many = await self.rate()
        ratio = many["cpu_us"] / few["cpu_us"]
        return {**many, "few_cpu_us": few["cpu_us"], "crowd_ratio": ratio}


class StreamTraffic(Traffic):
    """Messages that go into streams of Redis, from which a consumer reads them."""

    def broker(self) -> contextlib.AbstractContextManager[str]:
        return streams.server()

    async def begin(self) -> None:
        self.consuming = asyncio.create_task(self.consume())
        await super().begin()

    async def consume(self) -> None:
        """Read the messages, like a backend."""
        try:
            async for start, tail in streams.events(self.relay.redis):
                self.on_event(start, tail)
        except RedisError as error:
            self.fail(f"a consumer: {error}")

    def close(self) -> None:
        super().close()
        self.consuming.cancel()


class BatchTraffic(Traffic):
    """Echoes in batches, by commands; relays without batches echo by callback."""

    def backend(self) -> Peer:
        if self.relay.peer.replies:
            return Batches(self.answer_batch)
        return super().backend()

    def answer_batch(self, body: bytes) -> bytes:
        """Return the response to a batch: an echo of each message of a known client."""
        commands = []
        for found in wire.BATCHED.finditer(body):
            client = self.clients[int(found[2])]
            if client.reply:
                commands.append(client.reply)
            else:
                message = wire.message(self.cell.size, client.number)
                client.reply = wire.command(message, found[1])
                self.known += 1
        return wire.reply(*commands)

    def call(self, client: Client) -> None:
        """Send a client a message through the relay, if its event has not done so."""
        if not self.relay.peer.replies:
            super().call(client)


class BulkTraffic(Traffic):
    """Pushes in bulk callbacks; relays without them push by single ones.

    A client whose message has arrived is due again. When `BULK` messages are due, or
    as many as may be in flight, they are sent in one request.
    """

    async def begin(self) -> None:
        self.due: list[Client] = []
        await super().begin()

    @property
    def window(self) -> int:
        return super().window if self.relay.peer.replies else 1

    def learn(self, client: Client, start: bytes) -> None:
        super().learn(client, start)
        message = wire.message(self.cell.size, client.number)
        connection_id = client.callback[0].split(b"/")[2]
        client.command = wire.command(message, connection_id)

    def call(self, client: Client) -> None:
        """Send a client a message through the relay, together with others."""
        if not self.relay.peer.replies:
            super().call(client)
            return
        self.due.append(client)
        if len(self.due) >= min(BULK, self.in_flight, BULK_SIZE // self.cell.size):
            pool = client.callbacks
            pool.post(
                wire.bulk_callback(pool.host, [each.command for each in self.due])
            )
            self.due = []


class ForwardTraffic(Traffic):
    """Pushes by another instance than that of the client.

    Before, pushes by the client's own instance are measured in the same run. `ratio` is
    the cost of the former in both instances to that of the latter.
    """

    async def figures(self) -> Figures:
        await self.begin()
        local = await self.rate()
        host = b"%b:%d" % (HOST.encode(), self.relay.last_port)
        pool = Callbacks(host, self.fail)
        for client in self.clients:
            client.callbacks = pool
        forwarded = await self.rate()
        ratio = forwarded["cpu_us"] / local["cpu_us"]
        return {**forwarded, "local_cpu_us": local["cpu_us"], "ratio": ratio}


class Latency(Traffic):
    """Echoes at half of the maximum rate, independent of when they return.

    A latency counts from when the message was due, not from when it was sent (open
    loop, corrected for coordinated omission).
    """

    async def figures(self) -> Figures:
        await self.begin()
        self.per_second = (await self.rate())["per_second"] / 2
        await self.rest()
        self.total = max(1, int(self.per_second * self.cell.seconds))
        self.sent = 0
        self.due: list[deque[float]] = [deque() for _ in self.clients]
        self.latencies: list[float] = []
        for client in self.clients:
            client.on_message = self.on_echo
        self.start, stolen = time.perf_counter(), stolen_seconds()
        self.pace()
        await self.wait(self.cell.seconds)
        await self.until(lambda: len(self.latencies) == self.total, "the last echo")
        self.latencies.sort()
        return {
            "per_second": self.per_second,
            "stolen": (stolen_seconds() - stolen) / self.cell.seconds,
            **{
                name: self.latencies[int((self.total - 1) * share)] * 1e3
                for name, share in PERCENTILES.items()
            },
        }

    def pace(self) -> None:
        """Send what is due. Spins, since the loop's timers count milliseconds."""
        now = time.perf_counter()
        while self.sent < self.total:
            due = self.start + self.sent / self.per_second
            if due > now:
                break
            client = self.clients[self.sent % len(self.clients)]
            self.due[client.number].append(due)
            self.sent += 1
            client.send()
        if self.sent < self.total and not self.closing:
            asyncio.get_running_loop().call_soon(self.pace)

    def on_echo(self, client: Client) -> None:
        self.latencies.append(time.perf_counter() - self.due[client.number].popleft())


class Visits(Run):
    """Clients that connect and disconnect: for each that has left, the next connects.

    In mode connect, a client has left when its socket is closed; in the others, when
    the backend got its disconnect event.
    """

    async def figures(self) -> Figures:
        self.joining: set[asyncio.Task[None]] = set()
        self.on_gone = self.on_done if self.cell.mode == "connect" else lambda: None
        self.words = wire.CLOSE_NORMALLY
        if self.cell.mode != "connect":
            message = wire.message(self.cell.size, 0)
            self.words = wire.client_frame(wire.TEXT, message) + self.words
        for number in range(min(self.cell.clients, AT_ONCE)):
            self.visit(number)
        return await self.rate()

    def visit(self, number: int) -> None:
        """Connect another client."""
        asks = wire.handshake(self.relay.path(number))
        visitor = Visitor(asks, self.words, self.on_gone, self.fail)
        joining = asyncio.create_task(self.join(visitor))
        self.joining.add(joining)
        joining.add_done_callback(self.on_joined)

    def on_joined(self, joining: asyncio.Task[None]) -> None:
        self.joining.discard(joining)
        if not joining.cancelled() and (error := joining.exception()) is not None:
            self.fail(str(error))

    def on_done(self) -> None:
        self.done += 1
        if not self.closing:
            self.visit(self.done % AT_ONCE)

    def on_event(self, start: bytes, tail: bytes) -> None:
        if start.startswith(b"POST /disconnect"):
            self.on_done()


class LeasedVisits(Visits):
    """Visits of a relay that keeps the ids of its connections in Redis."""

    def broker(self) -> contextlib.AbstractContextManager[str]:
        return streams.server()


class Idle(Run):
    """Clients that send nothing: the memory of one of them."""

    async def figures(self) -> Figures:
        empty = await self.least_memory()
        await self.enter()
        full = await self.least_memory()
        return {"bytes": (full - empty) / len(self.clients), "empty": empty}

    async def least_memory(self) -> int:
        """Return the least of four measurements in bytes, to exclude garbage."""
        found = []
        for _ in range(4):
            await self.wait(self.cell.seconds / 4)
            found.append(self.relay.memory())
        return min(found)


class Share(Run):
    """How evenly the processes of a relay share new clients."""

    async def figures(self) -> Figures:
        before = self.relay.open_files()
        await self.enter()
        after = self.relay.open_files()
        taken = [now - then for now, then in zip(after, before, strict=True)]
        return {"least_share": min(taken) / sum(taken)}


MODES: dict[str, type[Run]] = {
    "up": Traffic,
    "up-crowd": CrowdTraffic,
    "up-redis": StreamTraffic,
    "push": Traffic,
    "push-bulk": BulkTraffic,
    "push-forward": ForwardTraffic,
    "echo": Traffic,
    "echo-reply": Traffic,
    "echo-batch": BatchTraffic,
    "connect": Visits,
    "visit": Visits,
    "visit-leases": LeasedVisits,
    "idle": Idle,
    "latency": Latency,
    "share": Share,
}
ALL_SIZES = ("up", "up-redis", "push", "push-bulk", "echo", "echo-reply", "echo-batch")
# In bytes; other modes send no messages.
ONE_SIZE = dict.fromkeys(
    ("up-crowd", "push-forward", "visit", "visit-leases", "latency"), 1024
)
