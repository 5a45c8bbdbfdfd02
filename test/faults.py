"""Backends and clients that fail on request, and a record of what the backend got.

A test or `soak.py` runs a `Service` between the two. Run as a program, this file is a
backend in its own process, which can be stopped, or run in a network namespace:

    python test/faults.py [--host=127.0.0.1] [--port=0] [--hold]
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import struct
import sys
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import websockets
from service import DEADLINE, eventually
from wire import handshake

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 s (socket(7))
# Raised by asyncio before 3.12 if close() of a transport had just written the rest.
ABORTED_LATE = AttributeError
BACKLOG = 4096  # connections that the kernel holds until they are accepted
# Strict, so that no split or smuggled bytes count as a response.
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]+")
FIELD_LINE = re.compile(rb"([!-9;-~]+): ([^\0-\x1f\x7f]*)")
INTERIM = (100, 102, 103)
BODILESS = (204, 304)
ENDLESS_CHUNK = b"10000\r\n" + bytes(0x10000) + b"\r\n"

# Faults of a backend, instead of a response.
Fault = Literal["hold", "reset", "cut", "garbage", "endless"]
# How a backend is unreachable: no listener, reset connections, or 503.
Outage = Literal["refused", "reset", "503"]


# What the backend got.


@dataclass(slots=True)
class Attempt:
    """One event that reached the backend completely."""

    kind: str  # connect, message or disconnect
    webhook_id: str
    event: dict[str, Any]
    # The status of the response, such as "200"; "hold" while there is none; "abandoned"
    # if the relay then closed the connection, or did not read the response; "lost" if
    # the backend closed it.
    outcome: str = "hold"
    # When it arrived, and when it got its outcome (`time.monotonic()`).
    arrived: float = field(default_factory=time.monotonic)
    ended: float = float("inf")
    # Retry-After of its response, in seconds; 0: absent or invalid.
    retry_after: float = 0.0
    # The connection was reset afterwards: the relay may not have read the response.
    doubtful: bool = False

    @property
    def connection_id(self) -> str:
        return self.event["meta"]["connection_id"]

    @property
    def accepted(self) -> bool:
        """Whether it was answered with 2xx."""
        return self.outcome.startswith("2")


class Book:
    """Every attempt that arrived, and the first accepted one of each id.

    Messages are those of `Talker`: a client's name and a number, counted from 0.
    """

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        # By webhook-id, in the order of their first acceptance.
        self.accepted: dict[str, Attempt] = {}
        self.counts: dict[str, int] = defaultdict(int)  # of those, by kind
        # When connections were reset, with read and unread bytes, in order
        # (`time.monotonic()`).
        self.resets: list[float] = []

    def first_reset(self, begin: float, end: float) -> float:
        """Return the first reset between `begin` and `end`; infinite: none."""
        first = bisect_right(self.resets, begin)
        if first < bisect_left(self.resets, end):
            return self.resets[first]
        return float("inf")

    def enter(self, attempt: Attempt) -> None:
        """Record an attempt that was read completely."""
        self.attempts.append(attempt)

    def settle(self, attempt: Attempt, outcome: str) -> None:
        """Record the outcome of an attempt."""
        attempt.outcome = outcome
        attempt.ended = time.monotonic()
        if attempt.accepted and attempt.webhook_id not in self.accepted:
            self.accepted[attempt.webhook_id] = attempt
            self.counts[attempt.kind] += 1

    def of(self, kind: str) -> list[Attempt]:
        """Return the accepted events of a kind, each once."""
        return [a for a in self.accepted.values() if a.kind == kind]

    async def wait_for(self, kind: str, number: int, deadline: float = 60) -> None:
        """Wait until `number` events of a kind have been accepted."""
        try:
            await eventually(lambda: self.counts[kind] >= number, deadline)
        except TimeoutError:
            raise AssertionError(
                f"{self.counts[kind]} {kind} events in {deadline} s, not {number}"
            ) from None

    def numbers(self) -> dict[str, list[int]]:
        """Return each client's numbers, in the order of acceptance.

        A message that arrived with two ids is there twice.
        """
        received: dict[str, list[int]] = defaultdict(list)
        for attempt in self.of("message"):
            name, number = attempt.event["message"].split()[:2]
            received[name].append(int(number))
        return received

    def names(self) -> dict[str, str]:
        """Return the client's name of each connection that has sent a message."""
        return {
            attempt.connection_id: attempt.event["message"].split()[0]
            for attempt in self.attempts
            if attempt.kind == "message"
        }

    def disconnects(self) -> dict[str, dict[str, Any]]:
        """Return `meta` of the last disconnect event of each connection.

        The last one also counts the messages that failed after the first.
        """
        return {
            attempt.connection_id: attempt.event["meta"]
            for attempt in self.attempts
            if attempt.kind == "disconnect" and attempt.accepted
        }


# Backends.


@dataclass(frozen=True, slots=True)
class Reply:
    """How to answer one request: `status` after `delay` seconds, or a fault.

    `reset` ends the connection with RST before a response, `cut` ends it in the
    response's body, `hold` leaves the request open until `FaultyBackend.release`. `raw`
    is a whole response in an unusual form; %d in it is the status. With `closes` the
    connection ends after the response. `retry_after` is the value of that header in
    seconds, for the record.
    """

    status: int = 200
    delay: float = 0.0
    fault: Fault | None = None
    headers: tuple[str, ...] = ()
    raw: bytes = b""
    closes: bool = False
    retry_after: float = 0.0


OK = Reply()


class FaultyBackend(Book):
    """An HTTP backend that answers each request with the result of `decide`.

    While it is unreachable, a bound socket reserves its port; that refuses connections
    while no other socket listens there.
    """

    def __init__(
        self,
        decide: Callable[[Attempt], Reply] = lambda attempt: OK,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__()
        self.decide = decide
        self._tls = tls
        self.outage: Outage | None = None
        self.connections: set[_BackendConnection] = set()
        self.largest_body = 0  # bytes written to an endless body, at most

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Bind a port, and serve."""
        self._reserved = _bound(host, port)
        self.host, self.port = self._reserved.getsockname()[:2]
        await self._serve()

    async def _serve(self) -> None:
        listener = _bound(self.host, self.port)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _BackendConnection(self),
            sock=listener,
            backlog=BACKLOG,
            ssl=self._tls,
        )

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self._reserved.close()
        for connection in list(self.connections):
            connection.reset()

    def url(self, kind: str) -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{self.host}:{self.port}/{kind}"

    def flags(self, *kinds: str) -> list[str]:
        """The relay's flags for this backend; messages and disconnects by default."""
        return flags_for(self.url, kinds)

    def make_unreachable(self, how: Outage) -> None:
        """Accept no events from now on, nor those that are being answered."""
        self.outage = how
        if how == "refused":
            self._server.close()
        if how != "503":
            self.resets.append(time.monotonic())
            for connection in list(self.connections):
                connection.reset()

    def reset(self, *attempts: Attempt) -> None:
        """Reset the connections of these attempts, in this order."""
        by_attempt = {id(c.attempt): c for c in self.connections}
        for attempt in attempts:
            by_attempt[id(attempt)].reset()

    async def make_reachable(self) -> None:
        """Serve again, on the same port."""
        how, self.outage = self.outage, None
        if how == "refused":
            await self._serve()

    def release(
        self,
        chosen: Callable[[Attempt], bool] = lambda attempt: True,
        reply: Reply = OK,
    ) -> None:
        """Answer the held requests for which `chosen` returns true."""
        for connection in list(self.connections):
            connection.answer_held(chosen, reply)

    def reply_to(self, attempt: Attempt) -> Reply:
        if self.outage == "503":
            return Reply(503)
        return self.decide(attempt)


def flags_for(url: Callable[[str], str], kinds: Iterable[str]) -> list[str]:
    """The relay's flags for a backend with these URLs."""
    kinds = kinds or ("message", "disconnect")
    return ["--backend=http", *(f"--{kind}uri={url(kind)}" for kind in kinds)]


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    return sock


class _BackendConnection(asyncio.Protocol):
    """One connection from the relay: one request at a time."""

    def __init__(self, backend: FaultyBackend) -> None:
        self._backend = backend
        self._buffer = bytearray()
        self._attempt: Attempt | None = None
        self._latest: Attempt | None = None  # the last one with an outcome
        self._timer: asyncio.TimerHandle | None = None
        self._endless: int | None = None  # bytes of an endless body that were written

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that is being answered."""
        return self._attempt

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._backend.outage in ("refused", "reset"):
            # It may have waited in the kernel, with a request on it.
            self._backend.resets.append(time.monotonic())
            self.reset()
        else:
            self._backend.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._backend.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._settle("abandoned")
        latest = self._latest
        if error is not None and latest is not None and latest.outcome.isdigit():
            # The relay reset it, possibly with an unread response on it: which of the
            # two was sent first is unknown.
            latest.doubtful = True
            if not latest.accepted:
                latest.outcome = "abandoned"

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
        if len(rest) < length:
            return
        del self._buffer[: len(head) + len(end) + length]
        self._attempt = Attempt(
            kind=head.split(b" ", 2)[1].decode().strip("/"),
            webhook_id=re.search(rb"(?i)\r\nwebhook-id: (\S+)", head)[1].decode(),
            event=json.loads(rest[:length]),
        )
        self._backend.enter(self._attempt)
        reply = self._backend.reply_to(self._attempt)
        if reply.delay:
            self._timer = asyncio.get_running_loop().call_later(
                reply.delay, self._answer, reply
            )
        else:
            self._answer(reply)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._endless is not None:
            # Later, since a write that fails in this callback breaks asyncio.
            asyncio.get_running_loop().call_soon(self._go_on_forever)

    def answer_held(self, chosen: Callable[[Attempt], bool], reply: Reply) -> None:
        """Answer the current request if it is held and `chosen` returns true."""
        if self._attempt is not None and chosen(self._attempt):
            self._answer(reply)

    def reset(self) -> None:
        """End the connection with RST, at once.

        A transport closes its socket only in the loop's next turn; until then the relay
        could abandon a request that is recorded as lost.
        """
        self._settle("abandoned" if self._has_been_left() else "lost")
        if self._latest is not None:
            self._latest.doubtful = True
        sock = self._transport.get_extra_info("socket")
        # If the peer has ended it already, there may be no socket.
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        drop(self._transport)
        # From now on the transport's descriptor is another socket, for it to close.
        with contextlib.suppress(OSError, AttributeError), socket.socket() as blank:
            os.dup2(blank.fileno(), sock.fileno(), inheritable=False)

    def _has_been_left(self) -> bool:
        """Whether the relay has closed the connection, which the loop has not seen yet.

        While a request is unanswered, the relay sends nothing else. With TLS it sends
        close_notify, which counts as the end.
        """
        own = self._transport.get_extra_info("socket")
        if own is None or own.fileno() < 0:
            return True
        with socket.socket(fileno=os.dup(own.fileno())) as sock:
            try:
                sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True
        return True

    def _settle(self, outcome: str) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._latest = attempt
            self._backend.settle(attempt, outcome)

    def _answer(self, reply: Reply) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._attempt is not None:
            self._attempt.retry_after = reply.retry_after
        if self._has_been_left():
            self._settle("abandoned")
            self._transport.abort()
            return
        head = "".join(f"{line}\r\n" for line in reply.headers)
        start = f"HTTP/1.1 {reply.status} Scripted\r\n{head}"
        match reply.fault:
            case "hold":
                return
            case "reset":
                self.reset()
            case "cut":  # its status counts nevertheless
                self._settle(str(reply.status))
                self._transport.write(f"{start}Content-Length: 9\r\n\r\nOK".encode())
                self._transport.close()
            case "garbage":
                self._settle("garbage")
                self._transport.write(bytes(range(256)) + b"\r\n\r\n")
                self._transport.close()
            case "endless":  # its status counts, too
                self._settle(str(reply.status))
                start += "Transfer-Encoding: chunked\r\n\r\n"
                self._transport.write(start.encode())
                self._endless, self._paused = 0, False
                self._go_on_forever()
            case None:
                self._settle(str(reply.status))
                answer = f"{start}Content-Length: 2\r\n\r\nOK".encode()
                if reply.raw:
                    answer = reply.raw.replace(b"%d", b"%d" % reply.status, 1)
                self._transport.write(answer)
                if reply.closes:
                    self._transport.close()

    def _go_on_forever(self) -> None:
        assert self._endless is not None
        while not self._paused and not self._transport.is_closing():
            self._transport.write(ENDLESS_CHUNK)
            self._endless += len(ENDLESS_CHUNK)
        self._backend.largest_body = max(self._backend.largest_body, self._endless)


class BackendProcess(Book):
    """A backend in its own process, which answers 200 or, with `--hold`, never.

    It prints what it does, which is recorded here. `command` precedes its command line,
    to start it in another place.
    """

    def __init__(self, *flags: str, command: Iterable[str] = ()) -> None:
        super().__init__()
        self._command = [*command, sys.executable, str(Path(__file__)), *flags]

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,  # the process exits at its end
            stdout=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), DEADLINE)
        self.host, self.port = json.loads(line)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reader

    async def _read(self) -> None:
        assert self.process.stdout is not None
        entered: dict[int, Attempt] = {}
        async for line in self.process.stdout:
            number, *rest = json.loads(line)
            if len(rest) == 1:
                self.settle(entered.pop(number), rest[0])
            else:
                entered[number] = Attempt(*rest)
                self.enter(entered[number])

    def url(self, kind: str) -> str:
        return f"http://{self.host}:{self.port}/{kind}"

    def flags(self, *kinds: str) -> list[str]:
        """The relay's flags for this backend; messages and disconnects by default."""
        return flags_for(self.url, kinds)

    def stop(self) -> None:
        """Stop the process; its kernel still accepts connections and bytes."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Continue the process."""
        self.process.send_signal(signal.SIGCONT)


class _WritingBackend(FaultyBackend):
    """The backend in a `BackendProcess`: prints its record to standard output."""

    def __init__(self, decide: Callable[[Attempt], Reply]) -> None:
        super().__init__(decide)
        self._numbers: dict[int, int] = {}  # of unfinished attempts, by id()
        self._next = 0

    def enter(self, attempt: Attempt) -> None:
        self._numbers[id(attempt)] = self._next
        self._write(self._next, attempt.kind, attempt.webhook_id, attempt.event)
        self._next += 1

    def settle(self, attempt: Attempt, outcome: str) -> None:
        self._write(self._numbers.pop(id(attempt)), outcome)

    @staticmethod
    def _write(*words: object) -> None:
        print(json.dumps(words), flush=True)


class ScriptedBackend:
    """A TCP server that reads requests as HTTP, and answers with given bytes.

    `script` is called for each request, with its kind: connect, message or disconnect.
    Its result is written unchanged; if it ends with `CUT`, or is empty, the connection
    is closed afterwards.
    """

    CUT = b"\0cut"

    def __init__(self, script: Callable[[str], bytes]) -> None:
        self.script = script
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.largest_answer = 0  # bytes of the largest response
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._on_relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await eventually(lambda: not self._writers)

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.port}/{kind}"

    def flags(self, *kinds: str) -> list[str]:
        """The relay's flags for this backend; all three events by default."""
        return flags_for(self.url, kinds or ("connect", "message", "disconnect"))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return each attempt of the events of a kind, in the order of arrival."""
        return [event for name, event in self.events if name == kind]

    async def wait_for(self, kind: str, number: int) -> list[dict[str, Any]]:
        """Wait for `number` events of a kind, and return them."""
        await eventually(lambda: len(self.of(kind)) >= number)
        return self.of(kind)

    async def _on_relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
                kind = urlsplit(head.split(b" ", 2)[1].decode()).path.strip("/")
                event = json.loads(await reader.readexactly(length))
                self.events.append((kind, event))
                answer = self.script(kind)
                writer.write(answer.removesuffix(self.CUT))
                await writer.drain()
                if not answer or answer.endswith(self.CUT):
                    break
        self._writers.discard(writer)
        writer.close()


# Clients.


@dataclass
class Talker:
    """A client that sends its name and numbers from 0.

    `sent` counts the messages that its socket has taken; `closed` is the code of the
    close frame that it received, or None while it is open.
    """

    url: str
    name: str
    sent: int = 0
    padding: str = ""
    closed_at: float | None = None  # on the loop's clock
    client: websockets.ClientConnection = field(init=False)

    async def connect(self) -> Self:
        self.client = await websockets.connect(
            self.url, compression=None, ping_interval=None, open_timeout=60
        )
        return self

    async def say(self, count: int = 1) -> None:
        """Send `count` numbers."""
        for _ in range(count):
            await self.client.send(f"{self.name} {self.sent}{self.padding}")
            self.sent += 1

    async def talk(self, pause: float, enough: asyncio.Event) -> None:
        """Send a number every `pause` seconds until `enough` is set, or closed."""
        while not enough.is_set():
            try:
                await self.say()
            except websockets.ConnectionClosed:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), pause)

    async def until_closed(self) -> int:
        """Wait until the relay has closed, and return the close code."""
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await self.client.recv()
        self.closed_at = asyncio.get_running_loop().time()
        return self.close_code

    @property
    def is_open(self) -> bool:
        return self.client.state == websockets.State.OPEN

    @property
    def close_code(self) -> int:
        """The close code; 1006 without a close frame."""
        return self.client.close_code or 1006


async def talkers(url: str, number: int, prefix: str = "client") -> list[Talker]:
    """Connect `number` clients, a hundred at a time."""
    room = asyncio.Semaphore(100)

    async def connect(index: int) -> Talker:
        async with room:
            return await Talker(url, f"{prefix}-{index}").connect()

    return await asyncio.gather(*map(connect, range(number)))


def assert_complete(
    book: Book, clients: list[Talker], *, in_order: bool = True
) -> None:
    """Assert that each number of each client arrived, with one webhook-id."""
    received = book.numbers()
    for client in clients:
        numbers = received[client.name]
        assert sorted(numbers) == list(range(client.sent)), client.name
        if in_order:
            assert numbers == sorted(numbers), client.name


async def leave(clients: Iterable[Talker]) -> None:
    """Close all clients with a closing handshake."""
    await asyncio.gather(*(talker.client.close() for talker in clients))


class RawClient:
    """A WebSocket on a plain socket, which reads only on request."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    async def connect(cls, url: str, receive_buffer: int = 64 * 1024) -> Self:
        """Connect. The kernel holds about `receive_buffer` bytes that are not read."""
        parts = urlsplit(url)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (parts.hostname, parts.port))
        await loop.sock_sendall(sock, handshake())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += (chunk := await loop.sock_recv(sock, 1))
            assert chunk, "refused"
        assert b" 101 " in answer, answer
        return cls(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def send(self, text: str) -> None:
        """Send one text message, masked with zeros."""
        await self.send_frames(masked(text))

    async def send_frames(self, frames: bytes) -> None:
        """Send bytes unchanged; wait while the relay reads none."""
        await asyncio.get_running_loop().sock_sendall(self._socket, frames)

    def close(self) -> None:
        """Close the socket without a close frame."""
        self._socket.close()


def masked(text: str) -> bytes:
    """Make a client's text frame with a masking key of zero."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x81, 0x80 | size)
    elif size < 2**16:
        head = struct.pack("!BBH", 0x81, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x81, 0x80 | 127, size)
    return head + bytes(4) + payload


@dataclass(slots=True)
class Received:
    """What a plain socket received, and whether the relay closed the connection."""

    data: bytes = b""
    ended: bool = False

    def answers(self) -> list[tuple[int, dict[str, str], bytes]]:
        """Return status, headers and body of each final response.

        Raises `ValueError` if the bytes are not a sequence of responses.
        """
        found = []
        rest = self.data
        while rest:
            head, end, rest = rest.partition(b"\r\n\r\n")
            start, *lines = head.split(b"\r\n")
            match = STATUS_LINE.fullmatch(start)
            fields = [FIELD_LINE.fullmatch(line) for line in lines]
            if not end or match is None or None in fields:
                raise ValueError(f"no answer: {head[:200]!r}")
            status = int(match[1])
            if status in INTERIM:
                continue
            headers = {f[1].decode().lower(): f[2].decode("latin-1") for f in fields}
            until_the_end = 0 if status in BODILESS else len(rest)
            length = int(headers.get("content-length", until_the_end))
            if len(rest) < length:
                raise ValueError("an answer that was cut")
            found.append((status, headers, rest[:length]))
            rest = rest[length:]
        return found

    @property
    def statuses(self) -> list[int]:
        return [status for status, *_ in self.answers()]


async def upgraded(
    url: str,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Make a plain connection a WebSocket; the caller sends and reads frames."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(handshake())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    return reader, writer


async def send_raw(
    url: str,
    *pieces: bytes,
    answers: int | None = None,
    ending: bytes | None = None,
    half_close: bool = False,
    deadline: float = DEADLINE,
    source: str | None = None,
) -> Received:
    """Send bytes on a plain connection, and return what is received.

    Ends when the relay closes the connection, has sent `answers` final responses, or
    what is received ends with `ending`; at the latest after `deadline` seconds.
    `source` is the local address.
    """
    parts = urlsplit(url)
    received = Received()
    loop = asyncio.get_running_loop()
    # Not a StreamReader, which drops received bytes at a reset.
    family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
    sock = socket.socket(family)
    sock.setblocking(False)
    if source is not None:
        sock.bind((source, 0))

    def enough() -> bool:
        if ending is not None and received.data.endswith(ending):
            return True
        with contextlib.suppress(ValueError):
            return answers is not None and len(received.statuses) >= answers
        return False

    async def say() -> None:
        for piece in pieces:
            await loop.sock_sendall(sock, piece)
        if half_close:
            sock.shutdown(socket.SHUT_WR)

    await loop.sock_connect(sock, (parts.hostname, parts.port))
    saying = asyncio.create_task(say())
    try:
        async with asyncio.timeout(deadline):
            while not enough():
                data = await loop.sock_recv(sock, 65536)
                if not data:
                    received.ended = True
                    break
                received.data += data
    except TimeoutError:
        pass
    except ConnectionError:
        received.ended = True
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
        sock.close()
    return received


def drop(transport: asyncio.WriteTransport) -> None:
    """Close a connection at once; bytes that wait are lost."""
    with contextlib.suppress(ABORTED_LATE):
        transport.abort()


class SilentProxy:
    """A TCP proxy that can stop forwarding, while both ends stay open.

    For the relay, a client behind it has then vanished without FIN.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._to, self._path = (parts.hostname, parts.port), parts.path
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._on_client, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{port}{self._path}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            drop(writer.transport)

    def stop_forwarding(self) -> None:
        """Forward nothing from now on, on any connection."""
        self._passing.clear()

    def go_on(self) -> None:
        """Forward again, also what has waited."""
        self._passing.set()

    async def _on_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, to = await asyncio.open_connection(*self._to)
        self._writers += [writer, to]
        for ends in ((reader, to), (there, writer)):
            task = asyncio.create_task(self._pass_on(*ends))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
        await self._passing.wait()
        writer.close()


# Processes.


def memory(pid: int, field: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Return the resident memory of a process in bytes, or its maximum (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


async def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--hold", action="store_true", help="leave messages open")
    arguments = parser.parse_args()

    def decide(attempt: Attempt) -> Reply:
        holds = arguments.hold and attempt.kind == "message"
        return Reply(fault="hold") if holds else OK

    backend = _WritingBackend(decide)
    await backend.listen(arguments.host, arguments.port)
    print(json.dumps([backend.host, backend.port]), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
