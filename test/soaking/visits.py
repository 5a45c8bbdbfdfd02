"""The soak's clients of every kind; each records what it did and saw."""

import asyncio
import contextlib
import random
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar
from urllib.parse import urlsplit

import websockets
from faults import ABORTED_LATE, drop
from service import eventually
from wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    frame,
    handshake,
)

from soaking.callers import Caller, Push, Pusher

NUMBER = re.compile(rb"push (\d+)")
PATIENCE = 60.0  # seconds for a handshake, and for an end, on a busy machine
SEND_PATIENCE = 5.0  # seconds for a send; the relay may have stopped reading
LARGE = 300_000  # bytes of a send that fills buffers
HUGE = 4_000_000  # bytes of the longest send
NORMAL = struct.pack("!H", 1000)  # payload of a close frame (RFC 6455, section 7.4.1)
CLOSE_READ = 1.2  # seconds in which the relay, if it runs, has read a close frame
CATCHING_UP = 0.5  # seconds by which a slow reader may be late and still catch up


class Refused(Exception):
    """The handshake was not answered with 101."""


class Pace:
    """Keeps a rate on a busy machine: after a delay it continues at once."""

    def __init__(self) -> None:
        self._next = 0.0  # when it may continue (`time.monotonic()`)

    async def rest(self, seconds: float) -> None:
        """Wait until `seconds` after the end of the previous wait."""
        now = time.monotonic()
        self._next = max(self._next, now - CATCHING_UP) + seconds
        if self._next > now:
            await asyncio.sleep(self._next - now)


@dataclass
class Visit:
    """One connection, from its handshake to its end.

    `sent` counts the messages that its socket took before its close frame, `left`
    is whether it ended the connection, `close_code` what the relay's close frame
    said. `received` are the numbers of the pushes that it read.
    """

    # Reads and answers pings to the end: it is neither cut nor too slow.
    living: ClassVar[bool] = False
    # All that it sent was in the relay's socket, and its close frame too.
    certain: ClassVar[bool] = False

    url: str
    name: str
    rng: random.Random
    tls: ssl.SSLContext | None = None
    sent: int = 0
    behind: int = 0  # messages behind its close frame
    refused: bool = False
    left: bool = False
    left_at: float = float("inf")  # `time.monotonic()`
    close_code: int | None = None
    received: list[int] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)  # seen by the client
    # Where the backend would call back; known once it is connected.
    send_url: Callable[[], str] = lambda: ""
    # Whether the backend has accepted all that it sent.
    is_delivered: Callable[[], bool] = lambda: True

    async def connect(self) -> None:
        """Raises `Refused`, or `OSError`."""
        raise NotImplementedError

    async def stay(self, over: asyncio.Event) -> None:
        """Send and read until it leaves, is closed, or the round ends."""
        raise NotImplementedError

    async def end(self) -> None:
        """Wait until the client or the relay has ended the connection."""
        raise NotImplementedError

    @property
    def target(self) -> str:
        return f"{self.url}?name={self.name}"

    def text(self, number: int) -> str:
        return f"{self.name} {number}{self.padding}"

    @property
    def padding(self) -> str:
        return ""

    def pusher(self, size: int = 0) -> Pusher:
        """Return a caller that sends to this client; its sends are recorded here."""
        pusher = Pusher(self.send_url(), size)
        self.pushes = pusher.pushes
        return pusher

    def leave(self) -> None:
        """Record that it ends the connection now."""
        self.left, self.left_at = True, time.monotonic()


# Clients that use a library.


@dataclass
class Talker(Visit):
    """Sends for some seconds, and reads; subclasses decide how it leaves."""

    client: websockets.ClientConnection = field(init=False)

    @property
    def padding(self) -> str:
        return self._padding

    async def connect(self) -> None:
        self._padding = " " + "x" * self.rng.choice([0, 10, 1000, 50_000])
        try:
            self.client = await websockets.connect(
                self.target, ssl=self.tls, compression=None, ping_interval=None,
                open_timeout=PATIENCE, close_timeout=3, max_size=None,
            )  # fmt: skip
        except (websockets.InvalidHandshake, TimeoutError) as error:
            raise Refused from error
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                self.received.append(number_of(await self.client.recv(decode=False)))
        self.close_code = self.client.protocol.close_rcvd and self.client.close_code

    async def stay(self, over: asyncio.Event) -> None:
        enough = asyncio.Event()
        if not self.living:
            asyncio.get_running_loop().call_later(self.rng.uniform(0, 4), enough.set)
        pause = self.rng.choice([0.01, 0.05, 0.3])
        pusher = self.pusher()
        ends = (websockets.ConnectionClosed, TimeoutError, ABORTED_LATE)
        with contextlib.suppress(*ends):
            async with Caller(self.send_url()) as caller:
                while not (enough.is_set() or over.is_set()):
                    async with asyncio.timeout(SEND_PATIENCE):
                        await self.client.send(self.text(self.sent))
                    self.sent += 1
                    if self.rng.random() < 0.2:
                        await pusher.push(caller)
                    await pause_until(over, pause)
        await self.go()

    async def go(self) -> None:
        """End the visit: leave, or stay."""

    async def end(self) -> None:
        await self._reading


@dataclass
class Polite(Talker):
    """Leaves with a closing handshake, but does not wait long for a paused relay."""

    @property
    def certain(self) -> bool:  # type: ignore[override]
        return self.close_code is not None

    async def go(self) -> None:
        if self.client.state == websockets.State.OPEN:
            self.leave()
        with contextlib.suppress(ABORTED_LATE):
            await self.client.close()


@dataclass
class Dropped(Talker):
    """Resets the connection, as a killed process does."""

    async def go(self) -> None:
        self.leave()
        drop(self.client.transport)


@dataclass
class Vanishing(Talker):
    """Its host vanishes at the end of the round, without FIN."""

    async def end(self) -> None:
        self.leave()
        drop(self.client.transport)
        await super().end()


@dataclass
class Staying(Talker):
    """Stays until the relay closes."""

    living = True


@dataclass
class Receiving(Talker):
    """Gets frames all the time: some always wait for it."""

    living = True

    async def stay(self, over: asyncio.Event) -> None:
        pusher = self.pusher(LARGE)
        feeds = [pusher.feed(over, pause=0.0) for _ in range(3)]
        await asyncio.gather(*feeds)

    async def _read(self) -> None:
        pace = Pace()
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                self.received.append(number_of(await self.client.recv(decode=False)))
                # By its pace: the library reads nothing until most of what it has
                # read before is taken, which a busy machine would make long.
                await pace.rest(0.05)
        self.close_code = self.client.protocol.close_rcvd and self.client.close_code


# Clients on bare sockets.


@dataclass
class Bare(Visit):
    """Makes its own frames, and reads at its own rate."""

    # Bytes that its kernel takes unread, about.
    receive_buffer: ClassVar[int] = 64 * 1024

    rate: float = float("inf")  # bytes a second that it reads, at most
    pace: Pace = field(default_factory=Pace)

    async def connect(self) -> None:
        parts = urlsplit(self.target)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (parts.hostname, parts.port))
        except OSError as error:
            sock.close()
            raise Refused from error
        try:  # from here on it is the transport's
            self.reader, self.writer = await asyncio.open_connection(
                sock=sock, ssl=self.tls, limit=32 * 1024,
                server_hostname=parts.hostname if self.tls else None,
            )  # fmt: skip
        except OSError as error:
            raise Refused from error
        line = f"GET {parts.path}?{parts.query} HTTP/1.1"
        head = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.writer.write(handshake(line=line))
            head = await self.reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in head:
            drop(self.writer.transport)
            raise Refused(head[:100])

    async def say(self, frames: bytes) -> bool:
        """Write; return whether the kernel took it within `SEND_PATIENCE`."""
        try:
            self.writer.write(frames)
            async with asyncio.timeout(SEND_PATIENCE):
                await self.writer.drain()
                while self.writer.transport.get_write_buffer_size():
                    await asyncio.sleep(0.01)
        except (OSError, TimeoutError):
            return False
        return not self.writer.transport.is_closing()

    async def read(self) -> None:
        """Read all frames, and answer pings, until the relay closes the connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                first, second = await self.reader.readexactly(2)
                if self.close_code is not None:
                    self.violations.append("frames behind the relay's close frame")
                size = second
                if size > 125:
                    size = int.from_bytes(
                        await self.reader.readexactly(2 if size == 126 else 8)
                    )
                self._on_frame(first & 15, await self._payload(size))

    def _on_frame(self, opcode: int, payload: bytes) -> None:
        if opcode in (TEXT, BINARY):
            self.received.append(number_of(payload))
        elif opcode == PING:
            self.writer.write(frame(PONG, payload))
        elif opcode == CLOSE:
            self.close_code = int.from_bytes(payload[:2]) if payload else 1005
            if not self.left:
                self.writer.write(frame(CLOSE, payload))

    async def _payload(self, size: int) -> bytes:
        """Read a frame's payload at the client's rate; return it, or its beginning."""
        start = b""
        while size:
            part = await self.reader.read(min(size, 8192))
            if not part:
                raise asyncio.IncompleteReadError(start, size)
            size -= len(part)
            start = (start + part)[:200]
            if self.rate != float("inf"):
                await self.pace.rest(len(part) / self.rate)
        return start

    async def end(self) -> None:
        self.rate = float("inf")
        async with asyncio.timeout(PATIENCE):
            await self.read()
        drop(self.writer.transport)


@dataclass
class Hasty(Bare):
    """Sends, closes and disconnects at once; sends to it fail meanwhile."""

    certain = True

    async def stay(self, over: asyncio.Event) -> None:
        pusher = self.pusher(1000)
        count = self.rng.randrange(1, 150)
        messages = [frame(TEXT, self.text(n).encode()) for n in range(count)]
        async with Caller(self.send_url()) as caller:
            pushing = asyncio.create_task(self._push(pusher, caller))
            self.writer.write(b"".join(messages) + frame(CLOSE, NORMAL))
            # Bytes that are still in this process would be lost by the client.
            if not self.writer.transport.get_write_buffer_size():
                self.sent = count
            self.leave()
            drop(self.writer.transport)
            await pushing

    @staticmethod
    async def _push(pusher: Pusher, caller: Caller) -> None:
        for _ in range(20):
            await pusher.push(caller)

    async def end(self) -> None:
        pass


@dataclass
class SendingAfterClose(Bare):
    """Continues to send after its close frame."""

    certain = True

    async def stay(self, over: asyncio.Event) -> None:
        count = self.rng.randrange(1, 20)
        self.behind = 20
        messages = [
            frame(TEXT, self.text(number).encode())
            for number in range(count + self.behind)
        ]
        messages.insert(count, frame(CLOSE, NORMAL))
        self.leave()
        if await self.say(b"".join(messages)):
            self.sent = count  # otherwise the relay need not have read them


@dataclass
class Fragmenting(Bare):
    """Sends each message in many fragments, most of them empty, and pings between."""

    certain = True

    async def stay(self, over: asyncio.Event) -> None:
        reading = asyncio.create_task(self.read())
        for number in range(self.rng.randrange(1, 20)):
            text = self.text(number).encode()
            parts = [
                frame(TEXT, fin=False),
                *(frame(CONTINUATION, fin=False) for _ in range(200)),
                frame(PING, b"between"),
                *(frame(CONTINUATION, text[at : at + 1], fin=False)
                  for at in range(len(text))),
                frame(CONTINUATION),
            ]  # fmt: skip
            if not await self.say(b"".join(parts)):
                break
            self.sent += 1
            await pause_until(over, 0.05)
        self.leave()
        await self.say(frame(CLOSE, NORMAL))
        await reading


@dataclass
class Closing(Bare):
    """Sends a close frame while frames wait for it, and only then reads."""

    async def stay(self, over: asyncio.Event) -> None:
        if not await self.say(frame(TEXT, self.text(0).encode())):
            return
        self.sent = 1
        # Otherwise the relay would delay reading the close frame.
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: self.is_delivered() or over.is_set(), PATIENCE)
        pusher = self.pusher(HUGE)
        async with Caller(self.send_url()) as early, Caller(self.send_url()) as late:
            waiting = asyncio.create_task(pusher.push(early))
            await pause_until(over, 0.3)
            self.leave()
            await self.say(frame(CLOSE, NORMAL))
            await pause_until(over, CLOSE_READ)
            pusher.size = 0
            await pusher.push(late)
            await self.end()
            await waiting


@dataclass
class SlowReader(Bare):
    """Reads many bytes slowly but steadily; sends at times."""

    living = True
    # Small, so that what it takes from the kernel shows outside several times a second.
    receive_buffer = 8 * 1024

    async def stay(self, over: asyncio.Event) -> None:
        # asyncio's TLS takes some 400 KB from the kernel at a time.
        rates = [60_000, 120_000, 300_000] if self.tls is None else [600_000]
        self.rate = self.rng.choice(rates)
        pusher = self.pusher(HUGE)
        self._reading = asyncio.create_task(self.read())
        feeding = asyncio.create_task(pusher.feed(over, pause=0.1))
        while not over.is_set() and not self._reading.done():
            if await self.say(frame(TEXT, self.text(self.sent).encode())):
                self.sent += 1
            await pause_until(over, 1)
        await self._stop(feeding)

    async def _stop(self, feeding: asyncio.Task[None]) -> None:
        """Read at full speed from now on."""
        self.rate = float("inf")
        await feeding

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._reading
        drop(self.writer.transport)


@dataclass
class NonReader(Bare):
    """Sends, and never reads; gets frames until the relay closes it."""

    async def stay(self, over: asyncio.Event) -> None:
        pusher = self.pusher(LARGE)
        feeding = asyncio.create_task(pusher.feed(over, pause=0.05))
        while not over.is_set() and not feeding.done():
            if await self.say(frame(TEXT, self.text(self.sent).encode())):
                self.sent += 1
            await pause_until(over, 0.3)
        await feeding
        self.leave()
        drop(self.writer.transport)

    async def end(self) -> None:
        pass


# Clients that stay for the whole round; the others connect and leave.
PERMANENT: tuple[type[Visit], ...] = (Receiving, SlowReader, NonReader)
TEMPORARY: dict[type[Visit], int] = {
    Polite: 6, Dropped: 2, Vanishing: 1, Staying: 2, Hasty: 3, SendingAfterClose: 1,
    Fragmenting: 1, Closing: 2,
}  # fmt: skip


def number_of(payload: bytes) -> int:
    """Return the number of a send."""
    match = NUMBER.match(payload)
    return int(match[1]) if match else -1


async def pause_until(over: asyncio.Event, seconds: float) -> None:
    """Wait for `seconds`, or until the round ends."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)
