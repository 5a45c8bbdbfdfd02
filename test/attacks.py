"""What the relay's memory does while many peers at once try to fill it.

    .venv/bin/python test/attacks.py --peers=500

Each kind of peer in turn, at the clients' listener and at that of the callbacks, by
both servers: resident memory before, during and after, and how long a healthy
client waited for its echo meanwhile, and a healthy caller for its answer.
`test/attacks_test.py` runs it in a short form.
"""

import argparse
import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import websockets
from faults import memory, send_raw
from service import DEADLINE, Service
from wire import handshake

PIECE = 64 * 1024  # bytes that a peer tries to send at a time
GET = b"GET /livez HTTP/1.1\r\nHost: relay\r\n\r\n"
SEND = b"POST /socket/" + b"0" * 32 + b"/send HTTP/1.1\r\nHost: relay\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n" % PIECE + b"x" * PIECE + b"\r\n"
FLOOD = b"x" * PIECE
# The request of a normal caller: it needs several reads, and has one response.
HEALTHY = SEND + b"Content-Length: 150000\r\n\r\n" + bytes(150_000)

# What a peer sends first, and then repeatedly, without reading a response.
PEERS = {
    "pipelined requests": (b"", GET * (PIECE // len(GET))),
    "pipelined requests in one line": (b"", b"GET / HTTP/1.1\r\n\r\n" * 3640),
    "pipelined sends": (b"", SEND + b"Content-Length: 65536\r\n\r\n" + FLOOD),
    "a chunked body behind requests": (GET * 2000 + SEND + CHUNKED, CHUNK),
    "a chunked body": (SEND + CHUNKED, CHUNK),
    "a body in tiny chunks": (SEND + CHUNKED, b"2\r\nxx\r\n" * (PIECE // 7)),
    "a body that is never whole": (SEND + b"Content-Length: 60000000\r\n\r\n", FLOOD),
    "an endless header": (b"GET / HTTP/1.1\r\nX: ", FLOOD),
    "endless headers": (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * (PIECE // 6)),
    "an endless trailer": (SEND + CHUNKED + b"0\r\n", b"X: y\r\n" * (PIECE // 6)),
    "an endless chunk extension": (SEND + CHUNKED + b"5;", FLOOD),
    "empty lines": (b"", b"\r\n" * (PIECE // 2)),
    "frames behind a refused upgrade": (
        handshake(without="Sec-WebSocket-Version"), FLOOD
    ),
    "a body of an upgrade": (SEND + UPGRADE + CHUNKED, CHUNK),
}


@dataclass
class Figures:
    """Resident memory in bytes, and the longest waits in seconds."""

    before: int
    during: int
    after: int
    longest_echo: float
    longest_call: float
    sent: int  # bytes that the relay's side took from all peers


class Peer:
    """Sends its bytes at full speed, and reads nothing."""

    def __init__(self, address: tuple[str, int], kind: str) -> None:
        self._address = address
        self._first, self._again = PEERS[kind]
        self.sent = 0

    async def stay(self) -> None:
        """Send until cancelled; connect again when the relay has closed."""
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as sock:
                sock.setblocking(False)
                # Small, so that only the relay can store many bytes.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
                with contextlib.suppress(OSError):
                    await loop.sock_connect(sock, self._address)
                    for data in itertools.chain(
                        [self._first], itertools.repeat(self._again)
                    ):
                        await loop.sock_sendall(sock, data)
                        self.sent += len(data)
                        await asyncio.sleep(0)
            await asyncio.sleep(0.1)  # between two connections of one peer


async def attack(
    service: Service, url: str, kind: str, peers: int, seconds: float
) -> Figures:
    """Run `peers` of a kind at `url` for `seconds`."""
    process = service.process.pid
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 0)
    before = during = memory(process)
    longest = longest_call = 0.0
    async with websockets.connect(service.ws_url, ping_interval=None) as client:
        attackers = [Peer(address, kind) for _ in range(peers)]
        tasks = [asyncio.create_task(attacker.stay()) for attacker in attackers]
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                began = time.monotonic()
                await client.send("hello")
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
                longest = max(longest, time.monotonic() - began)
                began = time.monotonic()
                received = await send_raw(
                    service.callback_url, HEALTHY, answers=1, deadline=DEADLINE
                )
                assert received.statuses == [410], received
                longest_call = max(longest_call, time.monotonic() - began)
                during = max(during, memory(process))
                await asyncio.sleep(0.05)  # between two measurements
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await client.send("after")
        assert await asyncio.wait_for(client.recv(), DEADLINE) == "after"
        # The relay frees their memory when it has seen that they disconnected.
        after = memory(process)
        until = time.monotonic() + seconds
        while after > before and time.monotonic() < until:
            await asyncio.sleep(0.05)
            after = min(after, memory(process))
    sent = sum(attacker.sent for attacker in attackers)
    return Figures(before, during, after, longest, longest_call, sent)


def doors(service: Service) -> dict[str, str]:
    """Return the listeners' URLs by name."""
    return {"clients": service.ws_url, "callbacks": service.callback_url}


async def main(
    peers: int, seconds: float, servers: Sequence[str], kinds: Sequence[str]
) -> None:
    """Run each attack, and print a row for it."""
    print(f"{peers} peers, {seconds:g} s each; MB: before, during, after; taken;"
          " longest echo and call")
    for server in servers:
        for door in ("clients", "callbacks"):
            for kind in kinds:
                flags = ("--callbackport=0", f"--http_server={server}")
                async with Service(*flags) as service:
                    found = await attack(
                        service, doors(service)[door], kind, peers, seconds
                    )
                mb = [n / 2**20 for n in (found.before, found.during, found.after)]
                print(
                    f"{server:8} {door:10} {kind:32}"
                    f" {mb[0]:6.0f} {mb[1]:6.0f} {mb[2]:6.0f}"
                    f" {found.sent / 2**20:8.0f} {found.longest_echo:6.2f} s"
                    f" {found.longest_call:6.2f} s",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each kind")
    parser.add_argument(
        "--servers", type=lambda text: text.split(","), default=["fast", "tornado"]
    )
    parser.add_argument("--kinds", nargs="*", choices=PEERS, default=list(PEERS))
    given = parser.parse_args()
    asyncio.run(main(given.peers, given.seconds, given.servers, given.kinds))
