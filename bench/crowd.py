"""Shows many idle clients, over processes that share the clients' port.

    python -m bench.crowd --clients=100000 --processes=7

The clients are in `--processes` further processes, each with a loopback address of its
own: an address has ports for 28,000 connections to the relay. Relay and clients have a
processor each, as in `bench`.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from bench import results, wire
from bench.load import BenchError, Peer
from bench.modes import AT_ONCE, HOST
from bench.relays import (
    LOAD_PROCESSOR,
    PROJECT,
    Relay,
    Setting,
    free_port,
    processes,
    started,
)
from bench.relays import Peer as RelayPeer

PATIENCE = 600.0  # seconds, for each step
SETTLING = 0.125  # of the time that the clients idle, before memory is measured
FIRST_ADDRESS = 2  # 127.0.0.2 is that of the first process with clients


# `connect` chooses a port that is free for this peer (Linux; a constant from 3.12 on).
IP_BIND_ADDRESS_NO_PORT = 24


class Sleeper(Peer):
    """A client that only answers pings and a close frame; then its socket closes.

    `opened` is done with the status of the handshake; then it is None.
    """

    def __init__(self, load: "Load") -> None:
        self.opened: asyncio.Future[bytes] | None = load.loop.create_future()
        self._load = load

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(wire.handshake("/ws"))

    def data_received(self, data: bytes) -> None:
        # The relay writes each answer, ping and close frame at once.
        if self.opened is not None:
            self.opened.set_result(data[9:12])
            self.opened = None
        elif data[0] == wire.PING:
            self._load.pings += 1
            self.transport.write(wire.EMPTY_PONG)
        elif data[0] == wire.CLOSE:
            self._load.told += 1
            self.transport.write(wire.CLOSE_NORMALLY)

    def connection_lost(self, error: Exception | None) -> None:
        if self.opened is not None:
            self.opened.set_result(b"")
        self._load.left -= 1
        if not self._load.left:
            self._load.over.set()


class Load:
    """The clients of one process."""

    def __init__(self, clients: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.left = clients
        self.pings = 0
        self.told = 0  # clients that got a close frame
        self.over = asyncio.Event()

    async def open(self, address: str, port: int, clients: int) -> None:
        """Open all clients. Raises `BenchError`."""
        numbers = iter(range(clients))

        async def open_some() -> None:
            for _ in numbers:
                sleeper = Sleeper(self)
                opened = sleeper.opened
                assert opened is not None
                sock = socket.socket()
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((address, 0))
                await self.loop.sock_connect(sock, (HOST, port))
                await self.loop.create_connection(
                    lambda: sleeper,  # noqa: B023 # called at once
                    sock=sock,
                )
                status = await opened
                if status != b"101":
                    raise BenchError(f"a handshake got {status!r}")

        await asyncio.gather(*(open_some() for _ in range(AT_ONCE)))


def load(pipe: Connection, address: str, port: int, clients: int) -> None:
    """Be a process with clients: report when all are open, and when all have gone."""
    claim_files()

    async def main() -> None:
        crowd = Load(clients)
        try:
            await crowd.open(address, port, clients)
        except (OSError, BenchError) as error:
            pipe.send(str(error))
            return
        pipe.send(None)

        def answer() -> None:
            try:
                pipe.send((pipe.recv(), crowd.pings))
            except EOFError:  # the process that measures was killed
                crowd.over.set()

        crowd.loop.add_reader(pipe.fileno(), answer)
        await crowd.over.wait()
        crowd.loop.remove_reader(pipe.fileno())
        pipe.send(("over", crowd.told))

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, EOFError):
        uvloop.run(main())


class Crowd:
    """All processes with clients."""

    def __init__(self, port: int, clients: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            address = f"127.0.0.{FIRST_ADDRESS + number}"
            share = clients // count + (number < clients % count)
            process = context.Process(target=load, args=(theirs, address, port, share))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def wait_until_open(self) -> None:
        """Wait until each client has a connection. Raises `BenchError`."""
        for problem in self._receive():
            if problem is not None:
                raise BenchError(str(problem))

    def pings(self) -> int:
        """Return how many pings the clients have got."""
        for pipe in self.pipes:
            pipe.send("pings")
        return sum(count for _, count in self._receive())

    def wait_until_gone(self) -> int:
        """Wait until no client is connected; return how many got a close frame."""
        return sum(count for _, count in self._receive())

    def _receive(self) -> Iterator[object]:
        for pipe in self.pipes:
            if not pipe.poll(PATIENCE):
                raise BenchError(f"the clients are not ready after {PATIENCE:g} s")
            yield pipe.recv()

    def end(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
            process.join()


def claim_files() -> None:
    """Use the hard limit of open files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def kernel_memory() -> int:
    """Return the bytes that the kernel uses for its objects, and for data in TCP."""
    used = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            used += int(line.split()[1]) * 1024
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            used += int(line.split()[-1]) * resource.getpagesize()
    return used


def measure(relay: Relay, arguments: argparse.Namespace) -> None:
    """Open the clients, let them idle, close them; print what it costs."""
    clients, count = arguments.clients, arguments.processes
    empty, empty_kernel, files = relay.memory(), kernel_memory(), relay.open_files()
    used, began = relay.cpu_seconds(), time.monotonic()
    crowd = Crowd(relay.port, clients, count)
    try:
        crowd.wait_until_open()
        seconds, used = time.monotonic() - began, relay.cpu_seconds() - used
        print(f"opened in {seconds:.1f} s, {clients / seconds:,.0f} per second; "
              f"{used / clients * 1e6:.0f} µs of the relay's processor time each")
        now = relay.open_files()
        shares = [after - before for after, before in zip(now, files, strict=True)]
        print(f"clients of each process: {min(shares):,} to {max(shares):,}")

        time.sleep(arguments.seconds * SETTLING)  # what opening them needed is freed
        memory, kernel = relay.memory() - empty, kernel_memory() - empty_kernel
        print(f"memory of the processes: {empty / 2**20:,.0f} MiB empty, and for the "
              f"clients {memory / 2**20:,.0f} MiB, {memory / clients:,.0f} B each")
        print(f"memory of the kernel: {kernel / 2**20:,.0f} MiB for both ends of the "
              f"connections, {kernel / clients:,.0f} B each")

        pings, used, began = crowd.pings(), relay.cpu_seconds(), time.monotonic()
        time.sleep(arguments.seconds)
        pings, used = crowd.pings() - pings, relay.cpu_seconds() - used
        seconds = time.monotonic() - began
        print(f"idle for {seconds:.0f} s: {used / seconds:.1%} of a processor, "
              f"{pings / seconds:,.0f} pings per second, "
              f"{used / max(pings, 1) * 1e6:.0f} µs each")

        used, began = relay.cpu_seconds(), time.monotonic()
        for pid in relay.processes:
            os.kill(pid, signal.SIGTERM)
        told = crowd.wait_until_gone()
        print(f"drained in {time.monotonic() - began:.1f} s: {told:,} close frames")
    finally:
        crowd.end()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description=__doc__)
    add = parser.add_argument
    add("--clients", type=int, default=100_000)
    add("--processes", type=int, default=7, help="of the relay, and as many of clients")
    add("--seconds", type=float, default=40.0, help="that the clients idle")
    add("--drain-spread", type=float, default=20.0, help="seconds")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a text file
    claim_files()
    os.sched_setaffinity(0, {LOAD_PROCESSOR})
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # stops the relay
    spread = f"--drain_spread={arguments.drain_spread}"
    peer = RelayPeer(
        "SocketDock", lambda setting: processes(setting, arguments.processes, spread)
    )
    machine = results.machine()
    print(f"{machine['date']}; {machine['processor']}; {machine['system']}; "
          f"{arguments.clients:,} clients, {arguments.processes} processes")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            free_port(), f"http://{HOST}:{free_port()}", False, Path(folder), PROJECT
        )
        try:
            with started(peer, setting) as relay:
                measure(relay, arguments)
        except BenchError as error:
            sys.exit(f"bench.crowd: {error}")
        except KeyboardInterrupt:
            sys.exit("bench.crowd: interrupted")


if __name__ == "__main__":
    main()
