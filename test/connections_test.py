"""The connection map that both listeners share, in process."""

import asyncio

import pytest
import websockets
from service import DEADLINE, eventually
from tornado.ioloop import IOLoop
from tornado.web import Application

from backends import Backend, BackendError, Observer
from handlers.admission import Admission
from handlers.backlog import Backlog
from handlers.callbacks.access import CallbackAccess
from handlers.callbacks.repeats import Repeats
from handlers.callbacks.routes import callback_routes
from handlers.callbacks.tokens import CallbackTokens
from handlers.clients.connection import ClientContext
from handlers.clients.heartbeat import Heartbeat
from handlers.clients.lifetimes import Lifetimes
from handlers.clients.opening import Openings
from handlers.clients.paths import ClientPaths
from handlers.clients.policy import ClientPolicy
from handlers.clients.routes import client_routes
from handlers.clients.tickets import Tickets
from handlers.connections import ConnectionMap
from handlers.http.bounds import RequestBounds
from handlers.http.tornado_server import TornadoServer
from handlers.probes import Readiness

pytestmark = pytest.mark.gen_test(timeout=60)


class HoldingBackend(Backend):
    """Keeps each message until the test releases it."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.close_codes: list[int] = []

    async def message(self, connection, message) -> None:
        await self.release.wait()

    async def disconnect(self, connection, closure) -> None:
        self.close_codes.append(closure.code)


async def make_application(**bounds: int) -> Application:
    """An application as `socketdock.Service` makes it; the test can see its map."""
    admission = Admission(max_connections_per_ip=100)
    connections = ConnectionMap(Backlog(**bounds), admission)
    lifetimes = Lifetimes(idle_timeout=3600, max_lifetime=3600)
    backend = HoldingBackend()
    repeats = Repeats(connections.loop)
    shared = {"connections": connections, "backend": backend, "repeats": repeats}
    context = ClientContext(
        connections, backend, Heartbeat(0, 0), lifetimes, ClientPolicy()
    )
    readiness = Readiness(connections, backend, 0.0)
    readiness.started = True
    routes = client_routes(
        ClientPaths(["/ws"]),
        callback_routes(
            "",
            CallbackAccess(CallbackTokens(), None),
            readiness,
            "1",
            max_message_size=1000,
            **shared,
        ),
        Openings(context, Tickets()),
    )
    return Application(
        routes,
        connections=connections,
        backend=backend,
        admission=admission,
        lifetimes=lifetimes,
        context=context,
    )


@pytest.fixture
def app(io_loop, request):
    """For pytest-tornado's `http_server`; made on the running loop."""
    bounds = getattr(request, "param", {})
    return io_loop.run_sync(lambda: make_application(**bounds))


@pytest.fixture
def http_server(io_loop, app, _unused_port):
    """pytest-tornado's fixture, with the server that the relay has of Tornado's."""
    server = TornadoServer(app, RequestBounds(10.0, 10.0, 64 * 1024, 4 * 2**20))
    server.add_socket(_unused_port[0])
    yield server
    server.stop()
    io_loop.run_sync(server.close_all_connections)


async def connect(http_port: int) -> websockets.ClientConnection:
    return await websockets.connect(f"ws://127.0.0.1:{http_port}/ws")


async def close_code(client: websockets.ClientConnection) -> int | None:
    """Return the code with which the relay closes `client`."""
    with pytest.raises(websockets.ConnectionClosed):
        await asyncio.wait_for(client.recv(), DEADLINE)
    await client.wait_closed()
    return client.close_code


async def test_listeners_share_one_connection_map(
    io_loop, app, http_server, http_client, http_port, base_url
):
    """A callback reaches a client that connects at the other listener."""
    assert IOLoop.current() is io_loop
    connections = app.settings["connections"]
    maps = {
        rule.target_kwargs["connections"]
        for rule in app.wildcard_router.rules
        if "connections" in rule.target_kwargs
    }
    contexts = {
        rule.target_kwargs["openings"].context
        for rule in app.wildcard_router.rules
        if "openings" in rule.target_kwargs
    }
    assert maps == {context.connections for context in contexts} == {connections}
    client = await connect(http_port)
    (connection,) = connections
    url = f"{base_url}/socket/{connection.id}"
    answer = await http_client.fetch(f"{url}/send", method="POST", body=b"x")
    assert answer.body == b"OK"
    assert await client.recv() == b"x"
    await http_client.fetch(f"{url}/disconnect", method="POST", body=b"")
    assert await close_code(client) == 1000
    await eventually(lambda: app.settings["backend"].close_codes == [1000])
    assert len(connections) == connections.backlog.events == 0


async def test_nothing_is_kept_of_clients_that_have_left(
    io_loop, app, http_server, http_port
):
    """Neither their addresses nor their times."""
    admission, lifetimes = app.settings["admission"], app.settings["lifetimes"]
    clients = [await connect(http_port) for _ in range(3)]
    assert admission._present_from == {"127.0.0.1": 3}
    assert len(lifetimes._turn_of) == sum(map(len, lifetimes._turns.values())) == 3
    for client in clients:
        await client.close()
    await eventually(lambda: len(app.settings["backend"].close_codes) == 3)
    assert admission._present == 0
    assert not (admission._present_from or lifetimes._turn_of or lifetimes._turns)
    lifetimes.close()


def nothing(connection, closure) -> None:
    """The end needs no waiting."""


def fails_at_once(connection, closure) -> None:
    """A method without `async`."""
    raise BackendError("no")


async def fails_later(connection, closure) -> None:
    """The simple case."""
    raise BackendError("no")


@pytest.mark.parametrize(
    ("disconnect", "lines"), [(nothing, 0), (fails_at_once, 1), (fails_later, 1)]
)
async def test_disconnect_may_wait_or_not(
    io_loop, app, http_server, http_port, caplog, disconnect, lines
):
    """Nothing waits afterwards, and a failure is logged."""
    connections = app.settings["connections"]
    app.settings["backend"].disconnect = disconnect
    client = await connect(http_port)
    await eventually(lambda: connections.open == 1)
    await client.close()
    await eventually(lambda: not len(connections) and not connections.backlog.events)
    assert caplog.text.count("disconnect notification failed: no") == lines


async def test_disconnects_may_share_a_future(
    io_loop, app, http_server, http_port, caplog
):
    """The map waits for it once for each of the connections."""
    connections, shared = app.settings["connections"], asyncio.Future()
    app.settings["backend"].disconnect = lambda connection, closure: shared
    clients = [await connect(http_port) for _ in range(2)]
    await eventually(lambda: connections.open == 2)
    for client in clients:
        await client.close()
    await eventually(lambda: not connections.open)
    assert connections.backlog.events == 2
    shared.set_result(None)
    await eventually(lambda: not len(connections) and not connections.backlog.events)
    assert not caplog.records


@pytest.mark.parametrize(
    "app", [{"max_events": 3}, {"max_bytes": 30}], indirect=True
)
async def test_full_backlog_stops_reading(
    io_loop, app, http_server, http_client, http_port, base_url
):
    """Handshakes get 503; later, reading and handshakes continue."""
    connections = app.settings["connections"]
    backend = app.settings["backend"]
    clients = [await connect(http_port) for _ in range(2)]
    for _ in range(5):
        for client in clients:
            await client.send("0123456789")
    await eventually(lambda: connections.backlog.full)
    answer = await http_client.fetch(
        f"{base_url}/ws",
        headers={
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        },
        raise_error=False,
    )
    assert answer.code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert connections.backlog.events <= 4  # at most one more than the bound
    backend.release.set()
    await eventually(lambda: sum(c.messages_in for c in connections) == 10)
    await eventually(lambda: connections.backlog.events == 0)
    for client in clients:
        await client.close()
    await eventually(lambda: len(backend.close_codes) == 2)
    assert connections.backlog.events == 0


async def test_bug_in_reading_closes_with_1011(
    io_loop, app, http_server, http_port, caplog
):
    """The event names the relay as the initiator; other clients are unaffected."""
    connections, backend = app.settings["connections"], app.settings["backend"]

    class BuggyObserver(Observer):
        def received(self, connection, message, size) -> None:
            if message == "boom":
                raise RuntimeError("a bug")

    app.settings["context"].observer = BuggyObserver()
    other = await connect(http_port)
    client = await connect(http_port)
    await client.send("boom")
    assert await close_code(client) == 1011
    await eventually(lambda: backend.close_codes == [1011])
    assert len(connections) == 1
    backend.release.set()
    await other.send("fine")
    await eventually(lambda: next(iter(connections)).messages_in == 1)
    await other.close()


async def test_readiness_ends_with_the_stop_signal(
    io_loop, app, http_server, http_client, http_port, base_url
):
    """During --drain_delay handshakes are accepted, and /readyz is 503."""
    connections = app.settings["connections"]
    answer = await http_client.fetch(f"{base_url}/readyz")
    assert answer.code == 200
    draining = asyncio.create_task(connections.drain(1.0, 0.0, 10.0))
    await eventually(lambda: connections.stopping)
    answer = await http_client.fetch(f"{base_url}/readyz", raise_error=False)
    assert answer.code == 503
    assert (await http_client.fetch(f"{base_url}/livez")).code == 200
    client = await connect(http_port)
    assert await close_code(client) == 1001
    assert await draining


async def test_drain_ends_at_drain_timeout(io_loop, app, http_server, http_port):
    """The remaining work is cut off, which the log says."""
    connections = app.settings["connections"]
    client = await connect(http_port)
    await client.send("held for ever")
    await eventually(lambda: connections.backlog.events == 1)
    assert not await connections.drain(0.0, 0.0, 0.2)
    assert await close_code(client) == 1001
    app.settings["backend"].release.set()
