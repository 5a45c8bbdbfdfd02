"""`--instanceuri`: an instance tells the backend that it runs, and that it ends."""

import asyncio
import base64
import contextlib
import json
import signal
import time

import pytest
import websockets
from certificates import Authority
from check_test import check, only
from metrics_test import scrape
from ports import free_ports
from service import (
    DEADLINE,
    DRAINS_SLOWLY,
    RecordingBackend,
    Service,
    draining,
    eventually,
    tcp_server,
)
from standardwebhooks import Webhook
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

SECRET = f"whsec_{base64.b64encode(b'the secret of the heartbeat tests').decode()}"


class Listener:
    """A server that records heartbeats: headers, bytes and `meta` of each."""

    def __init__(self, statuses=(), tls=None):
        self.headers, self.bodies, self.tls = [], [], tls
        self.statuses = list(statuses)  # of the next answers; then 200

    async def __aenter__(self):
        listener = self

        class Handler(RequestHandler):
            def post(self):
                fields = self.request.headers.items()
                listener.headers.append({name.lower(): v for name, v in fields})
                listener.bodies.append(self.request.body)
                if listener.statuses:
                    self.set_status(listener.statuses.pop(0))

        sockets = bind_sockets(0, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self.server = HTTPServer(
            Application([("/instance", Handler)], log_function=lambda handler: None),
            ssl_options=self.tls,
        )
        self.server.add_sockets(sockets)
        return self

    async def __aexit__(self, *error):
        self.server.stop()
        await self.server.close_all_connections()

    @property
    def flag(self):
        scheme = "http" if self.tls is None else "https"
        return f"--instanceuri={scheme}://127.0.0.1:{self.port}/instance"

    @property
    def metas(self):
        return [json.loads(body)["meta"] for body in self.bodies]

    async def wait_for(self, number):
        await eventually(lambda: len(self.bodies) >= number)


@contextlib.asynccontextmanager
async def relay(listener, *flags):
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), listener.flag, *flags) as service:
            yield service, backend


async def test_heartbeats_from_the_start_to_the_end(io_loop):
    """At the start, every 5 seconds with the number of connections, and a last one."""
    async with Listener() as listener:
        async with relay(listener) as (service, backend):
            await listener.wait_for(1)
            first = time.monotonic()
            async with websockets.connect(service.ws_url):
                await listener.wait_for(2)
                assert time.monotonic() - first > 3
                (event,) = await backend.wait_for("connect", 1)
        first, second, last = listener.metas
        instance = event["meta"]["instance"]
        beat = {"instance": instance, "connections": 0, "ttl": 15, "draining": False}
        assert first == beat
        assert second == beat | {"connections": 1}
        assert last == beat | {"ttl": 0, "draining": True}
        # Each is an event of its own.
        assert len({headers["webhook-id"] for headers in listener.headers}) == 3


async def test_heartbeat_is_signed_as_events_are(io_loop):
    """With the secrets of the events, and the headers of `--backend_headers_file`."""
    async with Listener() as listener:
        async with relay(listener, f"--webhook_secret={SECRET}"):
            await listener.wait_for(1)
        headers, body = listener.headers[0], listener.bodies[0]
        Webhook(SECRET).verify(body, headers)
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert headers["user-agent"].startswith("SocketDock/")


async def test_drain_is_reported(io_loop):
    """While the instance drains, its heartbeats say so."""
    async with Listener() as listener:
        async with relay(listener, DRAINS_SLOWLY) as (service, _):
            await listener.wait_for(1)
            async with draining(service):
                number = len(listener.bodies) + 1
                await listener.wait_for(number)
        ttls = [(meta["draining"], meta["ttl"]) for meta in listener.metas]
        assert ttls[0] == (False, 15)
        assert (True, 15) in ttls
        assert ttls[-1] == (True, 0)


async def test_silent_listener_delays_neither_start_nor_stop(io_loop):
    """It takes connections and never answers."""
    heard = asyncio.Event()

    async def serve(reader, writer):
        heard.set()
        await reader.read()

    async with tcp_server(serve) as port, RecordingBackend() as backend:
        flag = f"--instanceuri=http://127.0.0.1:{port}/"
        async with Service(*backend.flags(), flag) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                await backend.wait_for("message", 1)
            await asyncio.wait_for(heard.wait(), DEADLINE)
            await backend.wait_for("disconnect", 1)
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(service.process.wait(), DEADLINE) == 0
            assert time.monotonic() - began < 20  # it would wait for the drain


async def test_failures_are_one_warning_and_counted(io_loop):
    """The relay works on; the first heartbeat that is accepted ends the warning."""
    async with Listener([500]) as listener:
        async with relay(listener) as (service, _):
            await eventually(
                lambda: any("heartbeats are accepted" in line for line in service.log)
            )
            found = await scrape(service)
        assert found['heartbeats_total{outcome="failed"}'] == 1
        assert found['heartbeats_total{outcome="delivered"}'] >= 1
        (line,) = (line for line in service.log if "heartbeats fail" in line)
        assert line.endswith("answered 500")


async def test_heartbeat_over_tls(io_loop, tmp_path):
    """Verified by `--backend_ca`, as for events."""
    authority = Authority(tmp_path)
    async with Listener(tls=authority.server().server_context()) as listener:
        async with relay(listener, f"--backend_ca={authority.path}"):
            await listener.wait_for(1)


async def test_check_connects_to_instanceuri(io_loop):
    """And reports that nothing listens there."""
    async with RecordingBackend() as backend:
        port = free_ports(1)
        flag = f"--instanceuri=http://127.0.0.1:{port}/instance"
        lines = await check("--bindport=0", *backend.flags(), flag, status=1)
        assert only("error", lines).startswith("error:   --instanceuri: ")
