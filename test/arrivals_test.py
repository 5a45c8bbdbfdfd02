"""New connections leave the others their turns, however many come at once."""

import asyncio
import logging
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from faults import RawClient
from service import DEADLINE, Service, eventually
from wire import CLOSE, frame, handshake

from handlers.http.arrivals import AT_ONCE, Arrivals
from handlers.http.listener import Listener

CROWD = 300


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.gen_test(timeout=120)
async def test_crowd_that_asks_at_once_does_not_delay_a_client(io_loop, loop):
    """A client that sent something after all the others need not wait for them."""
    async with Service(f"--event_loop={loop}") as service:
        process = Path(f"/proc/{service.process.pid}")

        def files() -> int:
            return len(list((process / "fd").iterdir()))

        parts = urlsplit(service.ws_url)
        with await RawClient.connect(service.ws_url) as client:
            before = files()
            crowd = [
                socket.create_connection((parts.hostname, parts.port))
                for _ in range(CROWD)
            ]
            await eventually(lambda: files() == before + CROWD)
            service.process.send_signal(signal.SIGSTOP)
            await eventually(lambda: ") T " in (process / "stat").read_text())
            for sock in crowd:
                sock.sendall(handshake())
            await client.send_frames(frame(CLOSE, b"\x03\xe8"))
            service.process.send_signal(signal.SIGCONT)

            def lines(text: str) -> list[int]:
                return [n for n, line in enumerate(service.log) if text in line]

            await eventually(lambda: len(lines("opened by")) == CROWD + 1)
            await eventually(lambda: len(lines("closed with 1000")) == 1)
            (left,) = lines("closed with 1000")
            assert sum(number < left for number in lines("opened by")) < CROWD / 2
            for sock in crowd:
                sock.close()


class Arrival:
    """One end of a connection; counts the turns of the loop before it is read."""

    def __init__(self, turns, read) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.turns, self.read = turns, read

    @property
    def descriptor(self) -> int:
        return self.ours.fileno()

    def read_first(self) -> None:
        self.read.append((len(self.turns), self))
        if len(self.read) == 2:
            raise KeyError("a bug")


@pytest.mark.gen_test(timeout=60)
async def test_few_are_read_in_each_turn(io_loop, caplog):
    """In the order in which they have sent something; a bug in one stops no other."""
    loop = asyncio.get_running_loop()
    turns, read = [], []

    def count() -> None:
        turns.append(None)
        loop.call_soon(count)

    arrivals = Arrivals(loop)
    asked = [Arrival(turns, read) for _ in range(3 * AT_ONCE)]
    silent, left = Arrival(turns, read), Arrival(turns, read)
    for arrival in (*asked, silent, left):
        arrivals.add(arrival)
    for arrival in (*reversed(asked), left):
        arrival.theirs.send(b"x")
    arrivals.discard(left)
    count()
    with caplog.at_level(logging.CRITICAL):
        async with asyncio.timeout(DEADLINE):
            while len(read) < len(asked):
                await asyncio.sleep(0)
    assert [arrival for _, arrival in read] == asked[::-1]
    numbers = [turn for turn, _ in read]
    assert max(map(numbers.count, numbers)) <= AT_ONCE
    silent.theirs.send(b"x")
    arrivals.read_all()
    assert read[-1][1] is silent
    arrivals.close()
    for arrival in (*asked, silent, left):
        arrival.ours.close()
        arrival.theirs.close()


class SlowServer:
    """Takes longer for each connection than all of them may take in a turn."""

    def __init__(self) -> None:
        self.accepted = []

    def begin(self, accepted, address, tls) -> None:
        time.sleep(0.001)
        self.accepted.append(accepted)


@pytest.mark.gen_test(timeout=60)
async def test_others_have_their_turn_while_many_connect(io_loop):
    """Accepting takes a short time of each turn; at the stop all are accepted."""
    loop = asyncio.get_running_loop()
    listener, server = Listener("127.0.0.1", 0), SlowServer()
    number = 20
    clients = [
        socket.create_connection(("127.0.0.1", listener.port)) for _ in range(number)
    ]
    had_turn = loop.create_future()
    listener.serve(server, 1 << 20)
    async with asyncio.timeout(DEADLINE):
        while not server.accepted:
            await asyncio.sleep(0)
    loop.call_soon(lambda: had_turn.set_result(len(server.accepted)))
    assert await had_turn < number
    listener.stop_listening()
    assert len(server.accepted) == number
    for sock in (*clients, *server.accepted):
        sock.close()
