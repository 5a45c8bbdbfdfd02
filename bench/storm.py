"""A storm of handshakes: what it does to the messages of clients that are connected.

    python -m bench.storm [--handshakes=5000] [--peer=socketdock@PATH]

The clients of a whole instance come back at once, as after a deploy. Meanwhile other
clients go on sending messages, at a steady rate. Printed are the latencies of these
messages, from when each was due until the backend got it, before and during the storm,
and the seconds until the last handshake was answered.
"""

import argparse
import asyncio
import os
import select
import socket
import sys
import time
from collections import deque

import uvloop

from bench import wire
from bench.load import BenchError, Client
from bench.modes import HOST, Cell, Figures, Traffic
from bench.relays import KNOWN, LOAD_PROCESSOR, running

RATE = 500  # messages per second
SIZE = 1024  # bytes
CLIENTS = 64
CALM = 2.0  # seconds before the storm
PERCENTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}
PATIENCE = 60.0  # seconds for the whole storm
NICENESS = 19  # of the storm, which shares a processor with the measurement


class Storm(Traffic):
    """Messages at a steady rate, and a storm of handshakes meanwhile."""

    def __init__(self, relay: str, handshakes: int) -> None:
        super().__init__(Cell(relay, "storm", SIZE, CLIENTS, CALM, 0.0))
        self.handshakes = handshakes

    async def figures(self) -> Figures:
        self.due: list[deque[float]] = [deque() for _ in range(self.cell.clients)]
        self.latencies: list[float] = []
        self.storm_seconds = 0.0
        await self.enter()
        self.on_arrival = lambda client: None
        self.pools = {}
        await self.introduce()
        self.on_arrival = self.on_message
        pacing = asyncio.create_task(self.pace())
        await self.wait(self.cell.seconds)
        calm, self.latencies = self.latencies, []
        await self.blow()
        stormy = self.latencies
        pacing.cancel()
        return {
            "seconds": self.storm_seconds,
            **{f"calm {name}": at(calm, share) for name, share in PERCENTILES.items()},
            **{f"{name}": at(stormy, share) for name, share in PERCENTILES.items()},
        }

    async def pace(self) -> None:
        """Send what is due, for ever."""
        began, sent = time.perf_counter(), 0
        while True:
            now = time.perf_counter()
            while (due := began + sent / RATE) <= now:
                client = self.clients[sent % len(self.clients)]
                self.due[client.number].append(due)
                client.send()
                sent += 1
            await asyncio.sleep(0.001)

    def on_message(self, client: Client) -> None:
        """The backend got a message."""
        self.latencies.append(time.perf_counter() - self.due[client.number].popleft())

    async def blow(self) -> None:
        """Let another process make the handshakes."""
        words = (str(self.relay.port), self.relay.path(0), str(self.handshakes))
        storm = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.storm", "--blow", *words),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await storm.communicate()
        if storm.returncode:
            raise BenchError("the storm has failed")
        self.storm_seconds = float(said)


def at(latencies: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return sorted(latencies)[int((len(latencies) - 1) * share)] * 1e3


def blow(port: int, path: str, number: int) -> float:
    """Make handshakes at once; return the seconds until the last one is answered."""
    os.nice(NICENESS)
    asks = wire.handshake(path)
    poll = select.epoll()
    sockets = {}
    for _ in range(number):
        sock = socket.socket()
        sock.setblocking(False)
        sockets[sock.fileno()] = sock
    began = time.perf_counter()
    for fd, sock in sockets.items():
        sock.connect_ex((HOST, port))
        poll.register(fd, select.EPOLLOUT)
    left = number
    while left:
        for fd, event in poll.poll():
            if event & select.EPOLLOUT:
                sockets[fd].send(asks)
                poll.modify(fd, select.EPOLLIN)
            elif sockets[fd].recv(4096).startswith(b"HTTP/1.1 101 "):
                poll.modify(fd, 0)
                left -= 1
            else:
                raise BenchError("a handshake was rejected")
        if time.perf_counter() - began > PATIENCE:
            raise BenchError(f"{left} handshakes were not answered")
    return time.perf_counter() - began


async def measure(peer: str, handshakes: int) -> Figures:
    """Measure one storm. Raises `BenchError`."""
    storm = Storm(peer, handshakes)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(storm.backend, HOST, 0)
    backend = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    try:
        with running(peer, backend, "up") as storm.relay:
            try:
                return await storm.figures()
            finally:
                storm.close()
    finally:
        server.close()


def main() -> None:
    """Print the figures of a storm."""
    os.sched_setaffinity(0, {LOAD_PROCESSOR})
    if sys.argv[1:2] == ["--blow"]:
        print(blow(int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", default="socketdock", metavar="NAME",
                        help=f"of {', '.join(KNOWN)}, or socketdock@PATH")
    parser.add_argument("--handshakes", type=int, default=5000)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(measure(given.peer, given.handshakes))
    print(f"{given.handshakes} handshakes in {figures.pop('seconds'):.2f} s")
    print(", ".join(f"{name} {value:.1f} ms" for name, value in figures.items()))


if __name__ == "__main__":
    main()
