"""Two relays behind HAProxy, nginx and Caddy, with the files of conf/.

Only addresses, ports and where nginx writes are put in by the tests.
"""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import websockets
from programs import program
from service import DEADLINE, PROJECT, RecordingBackend, Service, eventually
from tornado.httpclient import AsyncHTTPClient

pytestmark = pytest.mark.gen_test(timeout=60)

CLIENT = "127.0.0.9"  # where clients come from; the balancer's own is 127.0.0.1
TRUSTED = "--trusted_proxies=127.0.0.1"
DRAIN_DELAY = 5  # seconds, as conf/haproxy.cfg asks for


# The balancers.


class Balancer:
    """A process with a copy of its file; `changes` are pairs of old and new text."""

    conf: str
    package: str

    def __init__(
        self, folder: Path, relays: Sequence[Service], *changes: tuple[str, str]
    ) -> None:
        # Debian installs it in a directory that only root has in the PATH; Caddy is
        # installed with the tests.
        self.program = program(
            self.package,
            self.package,
            f"/usr/sbin/{self.package}",
            str(Path(sys.executable).parent / self.package),
        )
        self.relays = relays
        self.folder = folder
        self.path = folder / self.conf
        self.path.write_text((PROJECT / "conf" / self.conf).read_text("utf-8"))
        for old, new in changes:
            self.change(old, new)
        self.log: list[str] = []

    def change(self, old: str, new: str) -> None:
        """Put `new` in place of `old`, which must be there."""
        text = self.path.read_text("utf-8")
        assert old in text, f"{self.conf} has no {old!r}"
        self.path.write_text(text.replace(old, new))

    def change_number(self, old: str, new: str) -> None:
        """As `change`, but not within a longer number, such as a port."""
        text, count = re.subn(rf"\b{old}\b", new, self.path.read_text("utf-8"))
        assert count, f"{self.conf} has no {old}"
        self.path.write_text(text)

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def reload(self) -> None:
        """Read the file again."""
        raise NotImplementedError

    async def __aenter__(self):
        # Bound, but not listening: nobody else gets the port meanwhile.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port = self._reserved.getsockname()[1]
        self.process = await asyncio.create_subprocess_exec(
            *self.command(),
            env={**os.environ, **self.environment()},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read_log())
        try:
            await eventually(self._answers)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _answers(self) -> bool:
        assert self.process.returncode is None, self.log
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def __aexit__(self, *error: object) -> None:
        # Quit, rather than wait for the clients.
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), DEADLINE)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            raise
        finally:
            self._reserved.close()
            await self._reader

    async def _read_log(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            self.log.append(raw.decode(errors="replace").rstrip())

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    async def status(self, path: str) -> int:
        """Return the response to a plain GET."""
        http = AsyncHTTPClient(force_instance=True)
        try:
            url = f"http://127.0.0.1:{self.port}{path}"
            return (await http.fetch(url, raise_error=False)).code
        finally:
            http.close()


class HAProxy(Balancer):
    """HAProxy; its file takes addresses from the environment."""

    conf, package = "haproxy.cfg", "haproxy"

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.change("maxconn 40000", "maxconn 400")  # there may be too few descriptors
        if os.getuid() != 0:  # only root can become another user
            self.change("    user haproxy\n    group haproxy\n", "")

    def command(self) -> list[str]:
        return [self.program, "-W", "-f", str(self.path)]

    def environment(self) -> dict[str, str]:
        found = {"CLIENTS_BIND": f"127.0.0.1:{self.port}"}
        for number, relay in enumerate(self.relays, 1):
            found[f"RELAY_{number}"] = address(relay.ws_url)
            port = address(relay.callback_url).rpartition(":")[2]
            found[f"RELAY_{number}_CALLBACKPORT"] = port
        return found

    def reload(self) -> None:
        self.process.send_signal(signal.SIGUSR2)


class Nginx(Balancer):
    """nginx; its file has no variables, so lines of it are replaced."""

    conf, package = "nginx.conf", "nginx"

    def command(self) -> list[str]:
        for old, new in [
            ("pid /run/nginx.pid;", f"pid {self.folder}/nginx.pid;"),
            ("/var/log/nginx/error.log", "stderr"),
            ("worker_processes auto;", "worker_processes 2;"),
            ("worker_rlimit_nofile 90000;", ""),
            ("worker_connections 40000;", "worker_connections 200;"),
            ("http {", f"http {{ {self.temporary()}"),
            ("listen 80;", f"listen 127.0.0.1:{self.port};"),
            ("server 127.0.0.1:8765 ", f"server {address(self.relays[0].ws_url)} "),
            ("server 127.0.0.1:8775 ", f"server {address(self.relays[1].ws_url)} "),
        ]:
            self.change(old, new)
        return [self.program, "-c", str(self.path), "-g", "daemon off;"]

    def temporary(self) -> str:
        """Folders that a user other than root may make."""
        return "".join(
            f"{kind}_temp_path {self.folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)  # what `nginx -s reload` does


class Caddy(Balancer):
    """Caddy; lines of its file are replaced. A command asks it to read the file."""

    conf, package = "Caddyfile", "caddy"

    def command(self) -> list[str]:
        for old, new in [
            ("\n:80 {", f"\nhttp://:{self.port} {{\n\tbind 127.0.0.1"),
            ("127.0.0.1:8765 ", f"{address(self.relays[0].ws_url)} "),
            ("127.0.0.1:8775 ", f"{address(self.relays[1].ws_url)} "),
        ]:
            self.change(old, new)
        return [self.program, "run", "--config", str(self.path)]

    def environment(self) -> dict[str, str]:
        return {
            "CADDY_ADMIN": f"unix/{self.folder}/admin",
            "HOME": str(self.folder),
            "XDG_CONFIG_HOME": str(self.folder),
            "XDG_DATA_HOME": str(self.folder),
        }

    def reload(self) -> None:
        subprocess.run(
            [self.program, "reload", "--config", self.path],
            env={**os.environ, **self.environment()},
            stderr=subprocess.DEVNULL,
            timeout=DEADLINE,
            check=True,
        )


WITH_IDLE_TIMEOUT = [HAProxy, Nginx]
BALANCERS = [*WITH_IDLE_TIMEOUT, Caddy]
each_balancer = pytest.mark.parametrize(
    "balancer", BALANCERS, ids=lambda balancer: balancer.package
)


def address(url: str) -> str:
    """host:port of a URL."""
    return url.split("/")[2]


# The relays and their clients.


@contextlib.asynccontextmanager
async def relays(
    backend: RecordingBackend, *flags: str, first: str = "", second: str = ""
) -> AsyncIterator[tuple[Service, Service]]:
    """Run two relays, "one" and "two", each with its own flags."""
    common = [*backend.flags(), "--callbackport=0", TRUSTED, *flags]
    async with (
        Service(*common, "--instance_name=one", *shlex.split(first)) as one,
        Service(*common, "--instance_name=two", *shlex.split(second)) as two,
    ):
        yield one, two


def connect(url: str, **options: Any) -> websockets.connect:
    """A client from `CLIENT`, whose page came from the balancer."""
    return websockets.connect(
        url,
        local_addr=(CLIENT, 0),
        origin=f"http://{address(url)}",
        compression=None,
        proxy=None,
        **options,
    )


@contextlib.asynccontextmanager
async def clients(url: str, number: int) -> AsyncIterator[list[Any]]:
    """Connect `number` clients, one after the other."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connect(url)) for _ in range(number)]


async def answer(client: Any, message: str) -> str:
    """Send a message that the backend echoes by callback; return the echo."""
    await client.send(message)
    return await asyncio.wait_for(client.recv(), DEADLINE)


def echoing(backend: RecordingBackend) -> None:
    """Let the backend send each message back."""

    async def echo(handler: Any, event: Any) -> None:
        headers = {"Content-Type": "text/plain"}
        url, body = event["meta"]["send"], event["message"]
        assert (await backend.call(url, body=body, headers=headers)).code == 200

    backend.answers["message"] = echo


def names(backend: RecordingBackend) -> list[str]:
    """The instance of each connection that was made."""
    return [event["meta"]["instance"].split("/")[0] for event in backend.of("connect")]


class Talker:
    """A client that counts, and comes back whenever it is closed.

    It never resends what `send()` has taken, so no relay may lose it.
    """

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        self.sent = 0
        self.closes: list[int | None] = []
        self.refusals: list[str] = []
        self.done = False

    async def run(self) -> None:
        while not self.done:
            try:
                async with connect(self.url) as client:
                    while not self.done:
                        await client.send(f"{self.name} {self.sent}")
                        self.sent += 1
                        await asyncio.sleep(0.02)  # one message in that time
            except websockets.ConnectionClosed:
                self.closes.append(client.close_code)
            except (websockets.InvalidHandshake, OSError, EOFError) as error:
                self.refusals.append(repr(error))
                await asyncio.sleep(0.1)


# The tests.


@each_balancer
async def test_clients_are_distributed_with_their_addresses(
    io_loop, balancer, tmp_path
):
    """Both relays get clients, know their addresses, and answer them."""
    async with RecordingBackend() as backend:
        echoing(backend)
        async with (
            relays(backend) as both,
            balancer(tmp_path, both) as front,
            clients(front.url, 8) as visitors,
        ):
            for number, visitor in enumerate(visitors):
                assert await answer(visitor, f"{number}") == f"{number}"
        spread = Counter(names(backend))
        addresses = {event["meta"]["remote_ip"] for event in backend.of("connect")}
    assert sorted(spread) == ["one", "two"]
    assert min(spread.values()) >= 3, spread
    assert addresses == {CLIENT}


@each_balancer
async def test_forwarding_headers_of_clients_are_ignored(io_loop, balancer, tmp_path):
    """X-Forwarded-For and X-Forwarded-Proto of a client are not passed on."""
    forged = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    async with RecordingBackend() as backend:
        async with relays(backend) as both, balancer(tmp_path, both) as front:
            async with connect(front.url, additional_headers=forged):
                (event,) = backend.of("connect")
    headers = event["meta"]["headers"]
    assert event["meta"]["remote_ip"] == CLIENT
    assert headers["x-forwarded-for"] == CLIENT
    assert headers["x-forwarded-proto"] == "http"


@each_balancer
async def test_balancer_forwards_only_clients(io_loop, balancer, tmp_path):
    """Not callbacks, operators' requests or probes."""
    async with RecordingBackend() as backend:
        async with relays(backend) as both, balancer(tmp_path, both) as front:
            for path in ("/", "/livez", "/readyz", "/status", "/socket/0/send"):
                assert await front.status(path) == 404, path


@each_balancer
async def test_reload_keeps_clients(io_loop, balancer, tmp_path):
    """Open connections stay, and new ones use the new file."""
    async with RecordingBackend() as backend:
        echoing(backend)
        async with (
            relays(backend) as both,
            balancer(tmp_path, both) as front,
            clients(front.url, 4) as before,
        ):
            front.change_number("404", "418")
            async with asyncio.timeout(DEADLINE):
                while await front.status("/") != 418:
                    # A master that has just begun misses a signal, though a worker of
                    # its own answers already.
                    front.reload()
                    await asyncio.sleep(1)
            for visitor in before:
                assert await answer(visitor, "still here") == "still here"
            assert not backend.of("disconnect")
            async with connect(front.url) as after:
                assert await answer(after, "new here") == "new here"


@pytest.mark.long
@each_balancer
async def test_upgrade_of_both_relays_loses_no_message(io_loop, balancer, tmp_path):
    """One drains while the other serves, then the other; no client is rejected."""
    # The others probe nothing: a relay refuses clients while it closes the others.
    drain = "--drain_spread=1"
    if balancer is HAProxy:
        drain = f"--drain_delay={DRAIN_DELAY}"
    async with RecordingBackend() as backend, contextlib.AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(
            relays(backend, first=drain, second=drain)
        )
        front = await stack.enter_async_context(balancer(tmp_path, (one, two)))
        talkers = [Talker(front.url, f"{number}") for number in range(6)]
        talking = asyncio.gather(*(talker.run() for talker in talkers))
        await eventually(lambda: set(names(backend)) == {"one", "two"})
        await drained(one, front)

        await stack.enter_async_context(
            Service(
                *(flag for flag in one.flags if "port=" not in flag and flag != drain),
                f"--bindport={address(one.ws_url).rpartition(':')[2]}",
                f"--callbackport={address(one.callback_url).rpartition(':')[2]}",
                "--instance_name=new",
            )
        )
        async with asyncio.timeout(DEADLINE):
            while "new" not in names(backend):  # until the balancer has seen it
                async with connect(front.url):
                    await asyncio.sleep(0.05)
        await drained(two, front)
        moved = [talker.sent for talker in talkers]
        await eventually(
            lambda: all(t.sent > n for t, n in zip(talkers, moved, strict=True))
        )
        for talker in talkers:
            talker.done = True
        await talking
        await backend.wait_for("message", sum(talker.sent for talker in talkers))
    for talker in talkers:
        assert set(talker.closes) == {1001}
        assert talker.refusals == []
        received = [
            event["message"]
            for event in backend.of("message")
            if event["message"].startswith(f"{talker.name} ")
        ]
        assert set(received) == {f"{talker.name} {n}" for n in range(talker.sent)}
    assert_in_order(backend)


async def drained(relay: Service, front: Balancer) -> None:
    """Stop a relay; HAProxy must notice before the relay rejects a client."""
    relay.process.send_signal(signal.SIGTERM)
    if isinstance(front, HAProxy):
        number = front.relays.index(relay) + 1
        down = f"Server relays/relay-{number} is DOWN, reason: Layer7 wrong status"
        await eventually(lambda: any(down in line for line in front.log))
        assert not any("draining" in line for line in relay.log)
    assert await asyncio.wait_for(relay.process.wait(), 30) == 0, relay.log
    if isinstance(front, HAProxy):
        assert not any("refused" in line for line in relay.log)


def assert_in_order(backend: RecordingBackend) -> None:
    """Each connection's messages came in the order in which they were sent."""
    by_connection: dict[str, list[int]] = {}
    for event in backend.of("message"):
        counted = by_connection.setdefault(event["meta"]["connection_id"], [])
        counted.append(int(event["message"].split()[1]))
    for counted in by_connection.values():
        assert counted == list(range(counted[0], counted[0] + len(counted)))


@each_balancer
async def test_dead_relay_costs_no_handshake(io_loop, balancer, tmp_path):
    """The other relay gets all clients at once."""
    async with RecordingBackend() as backend:
        async with relays(backend) as both, balancer(tmp_path, both) as front:
            both[0].process.kill()
            await both[0].process.wait()
            async with clients(front.url, 4):
                assert names(backend) == ["two"] * 4


@pytest.mark.parametrize("balancer", WITH_IDLE_TIMEOUT)
async def test_pings_keep_idle_clients_connected(io_loop, balancer, tmp_path):
    """A client without pings is closed; the pinged ones stay."""
    timeout = {
        HAProxy: ("timeout tunnel 60s", "timeout tunnel 1s"),
        Nginx: ("proxy_read_timeout 60s", "proxy_read_timeout 1s"),
    }[balancer]
    ping, no_ping = "--ping_interval=0.1", "--ping_interval=0"
    async with RecordingBackend() as backend:
        echoing(backend)
        async with (
            relays(backend, first=ping, second=no_ping) as both,
            balancer(tmp_path, both, timeout) as front,
            clients(front.url, 4) as visitors,
        ):
            idle = dict(zip(visitors, names(backend), strict=True))
            for visitor, name in idle.items():
                if name == "two":
                    await asyncio.wait_for(visitor.wait_closed(), DEADLINE)
            for visitor, name in idle.items():
                if name == "one":
                    assert await answer(visitor, "here") == "here"
    assert set(idle.values()) == {"one", "two"}


def test_idle_timeouts_are_above_the_ping_times():
    """`--ping_interval` and `--ping_timeout` are 20 seconds each."""
    haproxy = (PROJECT / "conf" / "haproxy.cfg").read_text()
    nginx = (PROJECT / "conf" / "nginx.conf").read_text()
    found = re.findall(r"^ *timeout tunnel (\d+)s$", haproxy, re.MULTILINE)
    found += re.findall(r"^ *proxy_(?:read|send)_timeout (\d+)s;$", nginx, re.MULTILINE)
    assert len(found) == 3
    assert all(int(seconds) > 40 for seconds in found)
