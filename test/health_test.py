"""/readyz says when balancers should look away, and why; /status agrees."""

import asyncio
import json

import pytest
import websockets
from authorization_test import ask
from faults import ScriptedBackend
from service import DEADLINE, Service, refusal
from tornado.web import Application

from backends.loopback import LoopbackBackend
from handlers.connections import ConnectionMap
from handlers.health import LiveHandler, Readiness, ReadyHandler, Status

pytestmark = pytest.mark.gen_test(timeout=60)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
BREAKER = ("--breaker_attempts=1", "--breaker_connections=1",
           "--breaker_first_probe=0.1", "--breaker_last_probe=0.1")


@pytest.fixture
def app(io_loop):
    """For pytest-tornado's `http_server`: the probes of a relay that starts."""

    async def make() -> Application:
        connections, backend = ConnectionMap(), LoopbackBackend()
        readiness = Readiness(connections, backend, 0.0)
        return Application(
            [(r"/livez", LiveHandler), (r"/readyz", ReadyHandler,
                                        {"readiness": readiness})],
            readiness=readiness,
            status=Status(connections, readiness, backend, "1", "a/b", "loopback", {}),
        )

    return io_loop.run_sync(make)


async def readyz(service: Service) -> str | None:
    """The sentence of a 503; None: ready."""
    answer = await ask(service, "GET", "/readyz")
    assert answer.headers["cache-control"] == "no-store"
    if answer.status == 200:
        return None
    assert answer.status == 503
    return answer.detail


async def status(service: Service) -> dict:
    return json.loads((await ask(service, "GET", "/status")).body)


async def test_relay_that_starts_is_not_ready(
    io_loop, app, http_server, http_client, base_url
):
    """But alive; it is ready when all of it has started."""
    told = app.settings["status"]
    answer = await http_client.fetch(f"{base_url}/readyz", raise_error=False)
    assert answer.code == 503
    assert json.loads(answer.body)["detail"] == "This instance is starting."
    assert (await http_client.fetch(f"{base_url}/livez")).code == 200
    assert (told.describe()["state"], told.describe()["ready"]) == ("starting", False)
    app.settings["readiness"].started = True
    assert (await http_client.fetch(f"{base_url}/readyz")).code == 200
    assert (told.describe()["state"], told.describe()["ready"]) == ("serving", True)


async def test_relay_that_stops_is_not_ready(io_loop):
    """And says so."""
    async with Service("--drain_delay=2") as service:
        assert await readyz(service) is None
        service.process.terminate()
        async with asyncio.timeout(DEADLINE):
            while (reason := await readyz(service)) is None:
                pass
        assert reason == "This instance is stopping."
        assert await service.process.wait() == 0


async def test_backend_that_is_away_does_not_matter_by_default(io_loop):
    """Or all relays would look away at once, though messages can be retried."""
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *BREAKER) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while not (await status(service))["backend"]["away"]:
                        pass
                assert await readyz(service) is None
                backend.script = lambda kind: OK


async def test_backend_that_is_away_for_long_can_matter(io_loop):
    """From --ready_breaker_timeout on, until it is back."""
    flags = (*BREAKER, "--ready_breaker_timeout=0.5")
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while not (told := await status(service))["backend"]["away"]:
                        pass
                    assert told["ready"] is (told["backend"]["away"] < 0.5)
                    while (reason := await readyz(service)) is None:
                        pass
                assert reason.startswith("The backend has been away for ")
                told = await status(service)
                assert not told["ready"]
                assert told["state"] == "serving"
                assert told["backend"]["away"] >= 0.5
                for _ in range(50):  # its message goes again, and finds out
                    assert await readyz(service)
                backend.script = lambda kind: OK
                async with asyncio.timeout(DEADLINE):
                    while await readyz(service) is not None:
                        pass
                assert (await status(service))["backend"]["away"] is None


async def test_somebody_has_to_find_out_that_the_backend_is_back(io_loop):
    """Where no event waits, a new client is the one: so it must be let in."""
    flags = (*BREAKER, "--ready_breaker_timeout=0.2", "--delivery_timeout=1")
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while await readyz(service) is None:
                        pass
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            backend.script = lambda kind: OK
            async with asyncio.timeout(DEADLINE):
                while await readyz(service) is not None:
                    pass
            assert (await status(service))["backend"]["away"]
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while (await status(service))["backend"]["away"]:
                        pass


def test_option_has_a_range():
    """As others that are in seconds."""
    assert "seconds" in refusal("--ready_breaker_timeout=-1")
