"""Starts the relays that are measured, and measures their processor time and memory.

A relay is a tree of processes, on one processor of its own.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.load import BenchError
from bench.wire import TOKEN

PROJECT = Path(__file__).resolve().parent.parent
PEERS = PROJECT / "bench" / "peers"
NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")

START_TIMEOUT = 20.0  # seconds

# The first and the last processor that we may use; the same if there is only one.
RELAY_PROCESSOR, LOAD_PROCESSOR = (sorted(os.sched_getaffinity(0)) * 2)[:2]


class Setting(NamedTuple):
    """The parameters of a relay's start."""

    port: int  # for clients, and for callbacks unless the relay has another port
    backend: str  # URL, without a path
    events: bool  # whether the backend gets connect and disconnect events, too
    folder: Path  # for files, deleted afterwards
    tree: Path  # the checkout that holds socketdock.py
    batches: bool = False  # whether the backend gets events in batches, if it can
    bulk: bool = False  # whether bulk callbacks are possible, if the relay has them
    redis: str = ""  # URL of the Redis that takes events; empty: the backend does
    pair: bool = False  # whether two instances take each other's callbacks
    leases: str = ""  # URL of the Redis that keeps the leases; empty: there are none


class Start(NamedTuple):
    """One process of a relay: it has started when it accepts connections at `port`."""

    command: list[str]
    port: int


class Peer(NamedTuple):
    """A relay that can be measured."""

    title: str
    starts: Callable[[Setting], list[Start]]
    # Whether a client's channel is in its path, and the backend gets no JSON.
    channels: bool = False
    # Modes that it does not support.
    cannot: tuple[str, ...] = ("share", "up-redis", "push-forward", "visit-leases")
    # Whether a response may have messages; batches and bulk callbacks, too.
    replies: bool = False

    def can(self, mode: str) -> bool:
        """Whether the relay supports `mode`."""
        return mode not in self.cannot


class Relay:
    """A running relay."""

    def __init__(
        self, peer: Peer, port: int, processes: list[int], redis: str = ""
    ) -> None:
        self.peer = peer
        self.redis = redis  # URL of the Redis that takes events, or empty
        self.port = port
        self.last_port = port  # of the process that started last
        self.processes = processes

    def path(self, number: int) -> str:
        """Return the path where client `number` connects."""
        return f"/ws/{number:06d}" if self.peer.channels else "/ws"

    def cpu_seconds(self) -> float:
        """Return the processor time of all its threads so far, in seconds."""
        nanoseconds = 0
        for pid in self.tree():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
        return nanoseconds / 1e9

    def memory(self) -> int:
        """Return the bytes of all its processes; shared pages count once (PSS)."""
        kilobytes = 0
        for pid in self.tree():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
        return kilobytes * 1024

    def open_files(self) -> list[int]:
        """Return the number of open files of each process; a client takes one."""
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.processes]

    def profile(self, picture: Path, seconds: float) -> subprocess.Popen[bytes]:
        """Start py-spy, which draws a flame graph, and slows the relay meanwhile."""
        program = str(Path(sys.executable).with_name("py-spy"))
        what = f"--rate=500 --duration={seconds:.0f} --pid={self.processes[0]}".split()
        if is_compiled(PROJECT):  # else compiled functions would not be seen
            what.append("--native")
        return subprocess.Popen([program, "record", *what, "--output", str(picture)])

    def tree(self) -> list[int]:
        """Return the ids of all its processes, parents before their children."""
        found = list(self.processes)
        for pid in found:
            with contextlib.suppress(FileNotFoundError):  # it has ended
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (thread / "children").read_text().split())
        return found


def socketdock(setting: Setting, *flags: str, callback_port: int = 0) -> Start:
    """One process of SocketDock; options not given here have their defaults."""
    kinds = ["message", "connect", "disconnect"] if setting.events else ["message"]
    if setting.batches:
        kinds = ["batch"]
    backend = ["--backend=http"]
    backend += [f"--{kind}uri={setting.backend}/{kind}" for kind in kinds]
    if setting.redis:
        backend = ["--backend=redis", f"--redis_url={setting.redis}"]
    if setting.leases:
        backend += [f"--cluster={setting.leases}"]
    command = [
        *(sys.executable, str(setting.tree / "socketdock.py"), *backend),
        f"--bindport={setting.port}",
        *([f"--callbackport={callback_port}"] if callback_port else []),
        *([f"--callback_token={TOKEN}"] if setting.bulk else []),
        *flags,
    ]
    return Start(command, callback_port or setting.port)


def pure(setting: Setting) -> list[Start]:
    """SocketDock from a copy without the modules that `make compile` has made."""
    tree = setting.folder / "pure"
    others = (".*", "__pycache__", "bench", "build", "docs", "examples", "test")
    shutil.copytree(setting.tree, tree, ignore=shutil.ignore_patterns("*.so", *others))
    return one_or_pair(setting._replace(tree=tree))


def is_compiled(tree: Path) -> bool:
    """Whether `make compile` has made modules of that checkout."""
    return any((tree / "handlers").rglob("*.so"))


def one_or_pair(setting: Setting) -> list[Start]:
    """One process of SocketDock, or two instances that forward callbacks."""
    if not setting.pair:
        return [socketdock(setting)]
    secret = setting.folder / "secret"
    secret.write_text(TOKEN)
    return [
        socketdock(
            each,
            f"--peer_address=127.0.0.1:{each.port}",
            f"--peer_secret_file={secret}",
        )
        for each in (setting, setting._replace(port=free_port()))
    ]


def processes(setting: Setting, count: int, *flags: str) -> list[Start]:
    """Several processes of SocketDock that share the clients' port."""
    return [
        socketdock(setting, "--reuse_port", *flags, callback_port=free_port())
        for _ in range(count)
    ]


def node(setting: Setting) -> list[Start]:
    """ws and undici."""
    program = find_program("node", "nodejs npm")
    if not (PEERS / "node_modules").exists():
        raise BenchError("bench/peers/node_modules is missing: make bench installs it")
    arguments = [str(setting.port), setting.backend, *["events"] * setting.events]
    return [Start([program, str(PEERS / "relay.mjs"), *arguments], setting.port)]


def plain_tornado(setting: Setting) -> list[Start]:
    """WebSocketHandler, RequestHandler and aiohttp."""
    arguments = [str(setting.port), setting.backend, *["events"] * setting.events]
    command = [sys.executable, str(PEERS / "plain_tornado.py"), *arguments]
    return [Start(command, setting.port)]


def nchan(setting: Setting) -> list[Start]:
    """nginx, with nchan where clients connect."""
    program = find_program("nginx", "nginx")
    if not NCHAN_MODULE.exists():
        raise BenchError("no nchan here (Debian: apt-get install libnginx-mod-nchan)")
    conf = (PEERS / "nchan.conf").read_text("utf-8")
    for word, value in (
        ("MODULE", str(NCHAN_MODULE)),
        ("PORT", str(setting.port)),
        ("BACKEND", setting.backend.removeprefix("http://")),
    ):
        conf = conf.replace(f"@{word}@", value)
    (setting.folder / "nginx.conf").write_text(conf)
    folder = str(setting.folder)
    command = [program, "-p", folder, "-c", f"{folder}/nginx.conf", "-e", "stderr"]
    return [Start(command, setting.port)]


KNOWN = {
    "socketdock": Peer("SocketDock", one_or_pair, cannot=("share",), replies=True),
    "socketdock-pure": Peer(
        "SocketDock, pure", pure, cannot=("share",), replies=True
    ),
    "socketdock-listeners": Peer(
        "SocketDock, two listeners",
        lambda setting: [socketdock(setting, callback_port=free_port())],
        cannot=("share", "push-forward"),
        replies=True,
    ),
    "socketdock-processes": Peer(
        "SocketDock, two processes",
        lambda setting: processes(setting, 2),
        cannot=("push-forward",),
        replies=True,
    ),
    "node": Peer("Node.js", node),
    "tornado": Peer("plain Tornado", plain_tornado),
    "nchan": Peer(
        "nginx, nchan",
        nchan,
        channels=True,
        cannot=("visit", "share", "up-redis", "push-forward", "visit-leases"),
    ),
}


@contextlib.contextmanager
def running(name: str, backend: str, mode: str, redis: str = "") -> Iterator[Relay]:
    """Run the relay called `name` during the block, as `mode` needs it.

    A name may end with @PATH: SocketDock from another checkout.
    """
    name, _, tree = name.partition("@")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            free_port(),
            backend,
            mode in ("visit", "visit-leases"),
            Path(folder),
            Path(tree or PROJECT),
            mode == "echo-batch",
            mode == "push-bulk",
            "" if mode == "visit-leases" else redis,
            mode == "push-forward",
            redis if mode == "visit-leases" else "",
        )
        try:
            with started(KNOWN[name], setting) as relay:
                yield relay
        except BenchError as error:
            raise BenchError(f"{name}: {error}") from error


@contextlib.contextmanager
def started(peer: Peer, setting: Setting) -> Iterator[Relay]:
    """Run a relay during the block. A `BenchError` gets the end of its log."""
    log = setting.folder / "log"
    processes: list[subprocess.Popen[bytes]] = []
    relay = Relay(peer, setting.port, [], setting.redis or setting.leases)
    try:
        for start in peer.starts(setting):
            processes.append(spawn(start, log))
            relay.processes.append(processes[-1].pid)
            relay.last_port = start.port
            wait_for_start(start, processes[-1], log)
        yield relay
    except BenchError as error:
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        reasons = [line for line in said if '"level":"info"' not in line] or said
        last = f" (its log: {reasons[-1]})" if reasons else ""
        raise BenchError(f"{error}{last}") from error
    finally:
        for pid in relay.tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.wait()


def spawn(start: Start, log: Path) -> subprocess.Popen[bytes]:
    """Start a process on the relay's processor."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SOCKETDOCK_")
    }
    # The child inherits the affinity, so all its threads start there.
    os.sched_setaffinity(0, {RELAY_PROCESSOR})
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                start.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
    finally:
        os.sched_setaffinity(0, {LOAD_PROCESSOR})


def wait_for_start(start: Start, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it accepts connections. Raises `BenchError`."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", start.port)).close()
            return
        if process.poll() is not None:
            raise BenchError(f"it ended with status {process.returncode}")
        time.sleep(0.02)
    raise BenchError(f"it takes no connections after {START_TIMEOUT:g} s")


def stolen_seconds() -> float:
    """Return the time, in seconds, for which the host used the relay's processor."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{RELAY_PROCESSOR}":
            return int(ticks[7]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def find_program(name: str, packages: str) -> str:
    """Return a program's path. Raises `BenchError` that names Debian's `packages`."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        raise BenchError(f"{name} is missing (Debian: apt-get install {packages})")
    return path
