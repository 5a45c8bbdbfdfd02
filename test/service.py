"""SocketDock as a process, and the backends that it uses in tests."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import websockets
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

PROJECT = Path(__file__).resolve().parent.parent
DEADLINE = 30.0  # seconds for each quick step, also on a busy machine

DRAINS_SLOWLY = "--drain_spread=3600"

STARTED = re.compile(r"clients at (wss?://\S+), callbacks at (https?://\S+), backend")


class Service:
    """`python socketdock.py` on free ports, during the block.

    At the end of the block it gets SIGTERM, and must exit with 0 and without a
    traceback, unless the test has ended it. By default its log is text.
    """

    def __init__(
        self,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        command: list[str] | None = None,
        cwd: Path = PROJECT,
    ) -> None:
        self.command = command or [sys.executable, "socketdock.py"]
        self.flags = list(flags)
        if not any(flag.startswith("--bindport") for flag in flags):
            self.flags += ["--bindport=0"]
        # TEST_FLAGS: the whole relay again with other than the defaults; see Makefile.
        if not command:
            self.flags[:0] = os.environ.get("TEST_FLAGS", "").split()
        # A developer's own settings must not change the tested relay.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SOCKETDOCK_")
        }
        self.environment = {
            "SOCKETDOCK_LOG_FORMAT": "text", **inherited, **(environment or {})
        }
        self.cwd = cwd
        self.log: list[str] = []
        self.ws_url = self.callback_url = ""

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            *self.flags,
            cwd=self.cwd,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=2**20,
        )
        self._started = asyncio.Event()
        self._reader = asyncio.create_task(self._read_log())
        try:
            await asyncio.wait_for(self._started.wait(), DEADLINE)
        except BaseException:  # end the process also after a failed start
            self.process.kill()
            await self.process.wait()
            await self._reader
            raise
        if not self.ws_url:
            raise RuntimeError(f"did not start: {self.log}")
        return self

    async def __aexit__(self, *error: object) -> None:
        killed = self.process.returncode is not None
        if not killed:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.wait_for(self.process.wait(), 40)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            raise
        finally:
            await self._reader
        assert not self.tracebacks, "\n".join(self.log)
        if error[0] is None and not killed:
            assert status == 0, "\n".join(self.log)

    @contextlib.asynccontextmanager
    async def stalled(self, seconds: float) -> AsyncIterator[None]:
        """Stop the process with SIGSTOP for the block, and for at least `seconds`."""
        self.process.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{self.process.pid}/stat")
        await eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        try:
            yield
            await asyncio.sleep(seconds)
        finally:
            self.process.send_signal(signal.SIGCONT)

    @property
    def tracebacks(self) -> list[str]:
        """Return the lines of the log that begin a traceback."""
        return [line for line in self.log if "Traceback" in line]

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            line = raw.decode(errors="replace").rstrip()
            self.log.append(line)
            if (match := STARTED.search(line)) is not None:
                self.ws_url, self.callback_url = match[1], match[2]
                self._started.set()
        self._started.set()


SOCKETDOCK = (sys.executable, "socketdock.py")
# A relay of another user; root starts it. Imports first: that user need not be able to
# read this Python or this checkout.
AS_NOBODY = (sys.executable, "-c", """
import os, sys
sys.path.insert(0, os.getcwd())
import backends, encodings.idna, encodings.utf_8_sig, socketdock, uvloop
for name in backends.BUILT_IN:
    backends.load(name)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
socketdock.main()
""")


def ended(
    *flags: str,
    command: tuple[str, ...] = SOCKETDOCK,
    cwd: Path = PROJECT,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a relay that exits by itself."""
    return subprocess.run(
        [*command, *flags],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def refusal(
    *flags: str,
    command: tuple[str, ...] = SOCKETDOCK,
    cwd: Path = PROJECT,
    status: int = 2,
    **environment: str,
) -> str:
    """Return the one-line error of a relay that does not start.

    `status` is 2 for invalid options, 1 for a reason that may end.
    """
    service = ended("--bindport=0", *flags, command=command, cwd=cwd, **environment)
    assert service.returncode == status, service.stderr
    (line,) = service.stderr.splitlines()
    assert line.startswith("socketdock: ")
    return line


class RecordingBackend:
    """A real HTTP server that records every event.

    `on_connect`, `on_message` and `on_disconnect` get the handler and the event; if
    they do not answer, the response is 200.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], Mapping[str, str]]] = []
        self.changed = asyncio.Condition()
        self.answers: dict[str, Callable[[RequestHandler, Any], Awaitable[None]]] = {}
        self.http = AsyncHTTPClient(force_instance=True, max_clients=500)

    async def __aenter__(self) -> Self:
        backend = self

        class EventHandler(RequestHandler):
            async def post(self, kind: str) -> None:
                event = json.loads(self.request.body)
                backend.events.append((kind, event, dict(self.request.headers)))
                async with backend.changed:
                    backend.changed.notify_all()
                if kind in backend.answers:
                    await backend.answers[kind](self, event)

        application = Application(
            [(r"/(connect|message|disconnect)", EventHandler)],
            log_function=lambda handler: None,
        )
        sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
        self.port = sockets[0].getsockname()[1]
        self.server = HTTPServer(application, max_buffer_size=64 * 2**20)
        self.server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.stop()
        await self.server.close_all_connections()
        self.http.close()

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.port}/{kind}"

    def flags(self, *kinds: str) -> list[str]:
        """The relay's flags for this backend; all three events by default."""
        return [
            "--backend=http",
            *(f"--{kind}uri={self.url(kind)}" for kind in kinds or self.KINDS),
        ]

    KINDS = ("message", "disconnect", "connect")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind, in the order of arrival."""
        return [event for name, event, _ in self.events if name == kind]

    async def wait_for(
        self, kind: str, number: int, deadline: float = DEADLINE
    ) -> list[dict[str, Any]]:
        """Wait for `number` events of a kind, and return them."""
        async with asyncio.timeout(deadline), self.changed:
            await self.changed.wait_for(lambda: len(self.of(kind)) >= number)
        return self.of(kind)

    async def call(self, url: str, method: str = "POST", **rest: Any) -> HTTPResponse:
        """Send a callback; return the response with any status."""
        body = rest.pop("body", b"" if method == "POST" else None)
        return await self.http.fetch(
            HTTPRequest(url, method, body=body, **rest), raise_error=False
        )


@contextlib.asynccontextmanager
async def draining(service: Service) -> AsyncIterator[None]:
    """Send SIGTERM; `service` has closed a client, and another one stays for the block.

    Its flags must contain `DRAINS_SLOWLY`. At the end of the block it exits with 0.
    """
    async with websockets.connect(service.ws_url) as closed:
        async with websockets.connect(service.ws_url):
            service.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(closed.wait_closed(), DEADLINE)
            yield
    assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0


async def eventually(claim: Callable[[], bool], deadline: float = DEADLINE) -> None:
    """Wait until `claim()` holds."""
    async with asyncio.timeout(deadline):
        while not claim():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def tcp_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    host: str = "127.0.0.1",
    **options: Any,
) -> AsyncIterator[int]:
    """Run a server that calls `serve` for each connection; yield its port."""
    served: set[asyncio.Task[None] | None] = set()

    async def on_client(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        served.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        writer.close()
        served.discard(asyncio.current_task())

    server = await asyncio.start_server(on_client, host, 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await eventually(lambda: not served)


def withhold(backend: RecordingBackend, kind: str) -> asyncio.Event:
    """Make `backend` answer no event of `kind` until the returned event is set."""
    release = asyncio.Event()

    async def wait(handler: RequestHandler, event: Any) -> None:
        await release.wait()

    backend.answers[kind] = wait
    return release
