"""Clients with much work do not delay those with little."""

import asyncio
import contextlib
import json
import socket
import statistics
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from service import DEADLINE, Service
from slow import in_thread
from wire import (
    BINARY,
    CONTINUATION,
    DEFLATE,
    PING,
    PONG,
    TEXT,
    deflated,
    frame,
    handshake,
)

from handlers.websocket.turns import ALL_TURNS, Turns

pytestmark = [
    pytest.mark.gen_test(timeout=120),
    pytest.mark.skipif(
        not Path("/proc/self/schedstat").exists(), reason="it is no Linux"
    ),
]
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])

NO_PINGS = "--ping_interval=0"  # they would come between the echoes
FLOODING = 10  # clients
DELAY = 0.02  # seconds by which all of them may delay another one
FLOODS = {
    "fragments": frame(CONTINUATION, fin=False),
    "messages": frame(BINARY) + frame(TEXT, b"x"),
    "pings": frame(PING) + frame(PONG),
    "deflated": frame(TEXT, deflated(bytes(100_000)), rsv=4),
}


class Peer:
    """A client of which each byte is the test's own."""

    def __init__(self, service: Service, *headers: str) -> None:
        parts = urlsplit(service.ws_url)
        self.sock = socket.create_connection((parts.hostname, parts.port), DEADLINE)
        self.sock.sendall(handshake(*headers))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.sock.recv(1)
        assert head.startswith(b"HTTP/1.1 101 "), head

    def flood(self, data: bytes) -> None:
        """Send `data` again and again, until the socket is shut down."""
        with contextlib.suppress(OSError):
            while True:
                self.sock.sendall(data)

    def discard(self) -> None:
        """Read until the end."""
        with contextlib.suppress(OSError):
            while self.sock.recv(2**20):
                pass

    def echo(self) -> None:
        """Send a message, and wait for it to come back."""
        self.sock.sendall(frame(TEXT, b"y"))
        assert self.sock.recv(3, socket.MSG_WAITALL) == b"\x81\x01y"


@contextlib.contextmanager
def in_threads(acts: list, peers: list[Peer]) -> Iterator[None]:
    """Do what blocks, each in a thread, until the peers' sockets are shut down."""
    threads = [threading.Thread(target=act, args=rest) for act, *rest in acts]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for peer in peers:
            peer.sock.close()


def processor_time(service: Service) -> float:
    """Return the seconds for which the relay's process has run, without others."""
    text = Path(f"/proc/{service.process.pid}/schedstat").read_text()
    return int(text.split()[0]) / 1e9


def delays(service: Service, other: Peer, count: int = 30) -> list[float]:
    """How long the relay runs for each echo."""
    found = []
    for _ in range(count):
        began = processor_time(service)
        other.echo()
        found.append(processor_time(service) - began)
    return found


@pytest.mark.parametrize("name", FLOODS)
@LOOPS
async def test_flood_does_not_delay_others(io_loop, loop, name):
    """Ten clients send at full speed; another client's echo is in time."""
    flood = FLOODS[name]
    chunk = flood * (2**18 // len(flood) + 1)
    flags = (f"--event_loop={loop}", "--compression", NO_PINGS)
    async with Service(*flags) as service:
        offers = DEFLATE if name == "deflated" else ()
        peers = [Peer(service, *offers) for _ in range(FLOODING)]
        if name == "fragments":
            for peer in peers:
                peer.sock.sendall(frame(TEXT, fin=False))
        acts = [(peer.flood, chunk) for peer in peers]
        acts += [(peer.discard,) for peer in peers]
        other = Peer(service)
        with in_threads(acts, peers):
            found = await in_thread(delays, service, other)
        other.sock.close()
        # It need not read the megabytes that the kernel still has.
        service.process.kill()
        await service.process.wait()
    assert statistics.median(found) < DELAY, sorted(found)


def waiting(service: Service) -> int:
    """How many messages wait."""
    url = service.callback_url + "/status"
    with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
        status = json.load(answer)
    count: int = status["pending"]["events"]
    return count


def delays_while_some_wait(service: Service, other: Peer) -> list[float]:
    """Those of as many echoes as there are until nothing waits."""
    found = delays(service, other)
    while waiting(service):
        found += delays(service, other)
    return found


@LOOPS
async def test_resumed_clients_do_not_delay_others(io_loop, loop):
    """Their messages that were read ahead are delivered in small parts."""
    count, queued, large = 4, 20_000, 8 * 2**20
    flags = ("--send_timeout=60", f"--connection_queue_messages={queued}",
             f"--max_message_size={large}", f"--event_loop={loop}", NO_PINGS)
    async with Service(*flags) as service:
        peers = [Peer(service) for _ in range(count)]
        # The echo of a large one waits, and tiny ones stand behind.
        chunk = frame(BINARY, bytes(large)) + frame(BINARY, b"x") * 2**15
        other = Peer(service)
        with in_threads([(peer.sock.sendall, chunk) for peer in peers], peers):
            async with asyncio.timeout(DEADLINE):
                while await in_thread(waiting, service) < count * queued:
                    await asyncio.sleep(0.01)  # until the next look
            acts = [(peer.discard,) for peer in peers]
            with in_threads(acts, peers):
                found = await in_thread(delays_while_some_wait, service, other)
        other.sock.close()
    assert max(found) < 5 * DELAY, sorted(found)


async def test_turns_of_many_take_no_longer_than_those_of_one(io_loop):
    """Each has its turn, and between turns the loop does other work."""
    loop = asyncio.get_running_loop()
    turns, served = Turns(loop), Counter[int]()
    passed = 0

    def go_on(number: int) -> None:
        began = time.perf_counter()
        while time.perf_counter() < began + ALL_TURNS / 2:
            pass
        served[number] += 1

    acts = [partial(go_on, number) for number in range(20)]
    for act in acts * 2:  # each waits once, however often it is asked for
        turns.wait(act)
    while len(served) < len(acts):
        before = served.total()
        await asyncio.sleep(0)
        passed = max(passed, served.total() - before)
    assert passed <= 2
    await asyncio.sleep(0)
    assert served == dict.fromkeys(range(20), 1)


async def test_bug_in_one_turn_does_not_affect_others(io_loop, caplog):
    """It is logged, and the next client has its turn."""
    loop = asyncio.get_running_loop()
    turns, done = Turns(loop), loop.create_future()
    turns.wait(partial(int, "no number"))
    turns.wait(partial(done.set_result, None))
    await asyncio.wait_for(done, DEADLINE)
    assert "bug in a client's turn" in caplog.text
