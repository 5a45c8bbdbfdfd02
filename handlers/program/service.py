"""The service: creates all parts of the relay from the options, starts and drains it.

`handlers` has the client side and the callback side, `backends` the backends.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tornado.options import options

import backends
from backends import Backend, Occupancy, Relay
from backends.cluster import make_cluster
from handlers.admission import Admission
from handlers.backlog import Backlog
from handlers.callbacks.access import CallbackAccess
from handlers.callbacks.address import callback_url
from handlers.callbacks.apigateway import make_signing_keys
from handlers.callbacks.bulk import Bulk, BulkHandler, bulk_routes
from handlers.callbacks.capabilities import make_capabilities
from handlers.callbacks.executor import CommandExecutor
from handlers.callbacks.fast_bulk import FastBulk
from handlers.callbacks.fast_send import FastSend
from handlers.callbacks.peers import make_peers
from handlers.callbacks.repeats import Repeats
from handlers.callbacks.routes import callback_routes
from handlers.callbacks.tokens import CallbackTokens
from handlers.clients.connection import ClientContext, Connections
from handlers.clients.fast_handshake import FastHandshakes
from handlers.clients.heartbeat import Heartbeat
from handlers.clients.lifetimes import Lifetimes
from handlers.clients.opening import Openings
from handlers.clients.paths import make_paths
from handlers.clients.policy import make_policy
from handlers.clients.routes import client_routes
from handlers.clients.tickets import Tickets
from handlers.http.application import Routes
from handlers.http.binding import bind_listeners
from handlers.http.body_budget import MAX_BODY_BYTES, BodyBudget
from handlers.http.listener import Descriptors
from handlers.operators.collecting import make_collector
from handlers.operators.console import make_tail
from handlers.operators.guard import OperatorGuard
from handlers.operators.routes import operator_routes
from handlers.operators.status import Status
from handlers.probes import Readiness
from handlers.process.event_loop import collect_garbage_less_often
from handlers.process.form import form
from handlers.process.lifecycle import exit_after
from handlers.process.limits import claim_descriptors
from handlers.process.logs import Log
from handlers.process.signals import reload_on_signal, stop_signal
from handlers.process.systemd import SystemdNotifier
from handlers.program.servers import Fast, bounds, either, make_server
from handlers.telemetry import make_tracing
from handlers.telemetry.observers import ObservedBackend, Observers
from handlers.websocket.frames import UNMASKS_IN_C

if TYPE_CHECKING:
    from handlers.callbacks.peers.sharing import Sharing

logger = logging.getLogger("socketdock")

END_GRACE = 0.8  # seconds after the drain timeouts, before the rest is cut off
STOP_REPORT_INTERVAL = 2.0  # seconds
DESCRIPTORS = 256  # for open callbacks, the log, and the process itself


async def serve(
    version: str,
    limits: Mapping[str, float | str],
    log: Log,
    variables: Sequence[str] = (),
) -> int:
    """Start, relay until a signal, and drain. Returns the exit status.

    `version` and `limits` are those of the `Service`. `variables` are for functions
    that call back, and are printed. Raises `OptionError` if an option prevents the
    start.
    """
    stop = stop_signal()  # before anything can observe the start
    service = Service(version, limits)
    await service.backend.start()
    service.start(log)
    if variables:
        from handlers.http.development import local_url

        address = f"{local_url(service.to_clients, 'ws')}/{options.stage}"
        with contextlib.suppress(BrokenPipeError):
            print("\n".join((*variables, f"clients connect to {address}")), flush=True)
    await stop.wait()
    return await service.stop(log)


class Service:
    """The relay of one process, composed as the options say.

    All parts are created here, on the running loop. `version` is SocketDock's, and
    `limits` are the options that limit something, for `/status`. Raises `OptionError`
    if a part cannot be created.
    """

    def __init__(self, version: str, limits: Mapping[str, float | str]) -> None:
        self._version = version
        self._limits = limits
        self.systemd = SystemdNotifier(os.environ)
        self.policy = make_policy()
        paths = client_paths()
        self.paths, self._forbids_others = make_paths(paths or ()), paths is not None
        self.tokens = CallbackTokens(
            options.callback_token, options.callback_token_file
        )
        self.signing_keys = make_signing_keys()
        self.to_clients, self.to_backend = bind_listeners()
        self.listeners = {self.to_clients, self.to_backend}
        self.callback_url = callback_url(options.externalhostandport, self.to_backend)
        name = options.instance_name or socket.gethostname()
        self.instance = f"{name}/{secrets.token_hex(8)}"
        self.observers = Observers()
        self.executor = CommandExecutor(
            self.policy.max_message_size, options.max_state_size, self.observers
        )
        self.peers = make_peers(self.instance, self.executor)
        self.access = CallbackAccess(
            self.tokens,
            make_capabilities() if self.peers is None else self.peers.capabilities,
            signed=self.signing_keys is not None,
        )
        self.tracing = make_tracing(self._version, self.instance)
        if self.tracing is not None:
            self.observers.add(self.tracing)
        self.cluster = make_cluster(
            self.instance, "" if self.peers is None else self.peers.address
        )
        self.backend = self._make_backend()
        outgoing = self.backend.descriptors
        if self.peers is not None:
            outgoing += self.peers.descriptors
        claim_descriptors(
            options.max_connections + outgoing + DESCRIPTORS,
            options.max_connections,
        )
        self.descriptors = Descriptors.shared(
            outgoing, self.to_clients is self.to_backend
        )
        self.connections = self._make_connections()
        self.executor.begin(self.connections, self.backend)
        if self.cluster is not None:
            self.cluster.begin(self.connections, self._rename)
        self.repeats = Repeats(self.connections.loop)
        self.sharing: Sharing | None = None
        if self.peers is not None:
            self.sharing = self.peers.share(
                self.connections,
                self.backend,
                self.repeats,
                self._prefix,
            )
        self.forwarder = None if self.sharing is None else self.sharing.forwarder
        if self.forwarder is not None and self.cluster is not None:
            self.forwarder.leases = self.cluster
        self.bulk = (
            Bulk(self.executor, self.connections.turns, self.observers)
            if self.sharing is None
            else self.sharing.bulk
        )
        self.heartbeat = Heartbeat(options.ping_interval, options.ping_timeout)
        self.lifetimes = Lifetimes(options.idle_timeout, options.max_lifetime)
        self.tickets = Tickets(owners=self.connections.owners)
        self.openings = Openings(
            ClientContext(
                self.connections,
                self.backend,
                self.heartbeat,
                self.lifetimes,
                self.policy,
            ),
            self.tickets,
            self.tracing,
        )
        self.readiness = Readiness(
            self.connections, self.backend, options.ready_breaker_timeout
        )
        self.collector = make_collector(
            self.connections, self.backend, self.observers, self._version, self.cluster
        )
        self.tail = make_tail(
            self.observers,
            self.connections,
            self.backend,
            {
                "version": self._version,
                "instance": self.instance,
                "backend": options.backend,
                "metrics": "on" if options.metrics else "off",
            },
        )

    def _make_backend(self) -> Backend:
        backend: Backend = backends.load(options.backend).make_backend(
            Relay(
                self.callback_url,
                self.instance,
                self._version,
                self.observers,
                self.tracing.sample if self.tracing is not None else None,
                self.executor if self.peers is None else self.peers.executor,
                self.access.key_of,
                self._occupancy,
                self.cluster.hold if self.cluster is not None else None,
                self.cluster.dead_runs if self.cluster is not None else None,
            )
        )
        if not backend.observes:
            backend = ObservedBackend(backend, self.observers)
        return backend if self.cluster is None else self.cluster.wrap(backend)

    def _rename(self, instance: str) -> None:
        """Go on under another name: this run was taken for dead."""
        self.instance = instance
        if self.tail is not None:
            self.tail.named["instance"] = instance
        self.status.rename(instance)

    def _occupancy(self) -> Occupancy:
        return Occupancy(len(self.connections), self.connections.stopping)

    def _make_connections(self) -> Connections:
        admission = Admission(
            options.max_connections,
            options.max_connections_per_ip,
            options.handshakes_per_second,
            self.descriptors.websocket,
            self.policy.stalls,
        )
        backlog = Backlog(options.max_pending, options.max_queued_bytes)
        owners = None if self.peers is None else self.peers.owners
        return Connections(backlog, admission, self.observers, owners)

    # Routes.

    def _for_clients(self, others: Routes) -> Routes:
        return client_routes(
            self.paths, others, self.openings, forbid=self._forbids_others
        )

    def _for_backend(self) -> Routes:
        guard = OperatorGuard(self.tokens, self.to_backend.is_loopback)
        self.status = status = Status(
            self.connections,
            self.readiness,
            self.backend,
            self._version,
            self.instance,
            options.backend,
            self._limits,
            self.cluster.describe if self.cluster is not None else None,
        )
        callbacks = {
            "connections": self.connections,
            "backend": self.backend,
            "repeats": self.repeats,
            "max_message_size": self.policy.max_message_size,
            "forwarder": self.forwarder,
        }
        stage = options.stage if options.backend == "apigateway" else None
        routes = callback_routes(
            self._prefix, self.access, self.readiness, self._version, stage, **callbacks
        )
        if stage is not None:
            from handlers.callbacks.apigateway.routes import connections_routes

            routes += connections_routes(
                self._prefix, stage, self.signing_keys, self.access, **callbacks
            )
        if self.sharing is not None:
            routes = self.sharing.routes() + routes
        routes += bulk_routes(
            self._prefix,
            self.tokens,
            BulkHandler if self.sharing is None else self.sharing.bulk_handler,
            bulk=self.bulk,
            repeats=self.repeats,
            max_bulk_size=options.max_bulk_size,
        )
        routes += operator_routes(guard, status, self.collector)
        if self.tail is not None:
            from handlers.operators.console.assets import clients_of
            from handlers.operators.console.routes import console_routes

            routes += console_routes(
                guard,
                self.connections,
                self.tail,
                self.tickets,
                clients_of(self.to_clients, self.to_backend, self.paths.first),
                self.policy.max_message_size,
            )
        return routes

    @property
    def _prefix(self) -> str:
        """The path prefix of each callback."""
        return urlsplit(self.callback_url or "").path

    def _fast(self) -> Fast:
        send: Fast = FastSend(
            self._prefix,
            self.access,
            self.connections,
            self.backend,
            self.policy.max_message_size,
            self.forwarder,
        )
        if self.sharing is not None:
            send = self.sharing.fast_hop(send)
        fast = send
        if self.tokens.required:
            bulk: Fast = FastBulk(
                self._prefix, self.tokens, self.bulk, options.max_bulk_size
            )
            if self.sharing is not None:
                bulk = self.sharing.fast_bulk(bulk)
            fast = either(send, bulk)
        if self.tracing is None:
            return fast
        scheme = "https" if self.to_backend.has_tls else "http"
        return self.tracing.fast(fast, scheme)

    def _listen(self) -> None:
        most = self.policy.max_message_size
        largest = max(most, options.max_bulk_size)
        body_budget = BodyBudget(max(MAX_BODY_BYTES, 2 * largest))
        one_listener = self.to_clients is self.to_backend
        for_backend = self._for_backend()
        handshakes = FastHandshakes(self.paths, self.openings)
        both = make_server(
            self._for_clients(for_backend) if one_listener else for_backend,
            bounds(body_budget, max_body_size=most),
            self.observers,
            self._fast(),
            handshakes if one_listener else None,
            self.tracing,
            one_listener and self.backend.wants_fields,
        )
        if one_listener:
            self.to_clients.serve(both, self.descriptors.client)
            return
        self.to_backend.serve(both, self.descriptors.callback)
        for_clients = make_server(
            self._for_clients([]),
            bounds(body_budget, max_body_size=options.max_header_size),
            self.observers,
            upgrade=handshakes,
            keep_names=self.backend.wants_fields,
        )
        self.to_clients.serve(for_clients, self.descriptors.client)

    # Start and shutdown.

    def start(self, log: Log) -> None:
        """Listen, and log the addresses."""
        self._listen()
        log.begin()
        reload_on_signal(
            self.systemd,
            log,
            *self.listeners,
            self.tokens,
            *filter(None, [self.signing_keys]),
            *filter(None, [self.peers]),
            self.backend,
        )
        self._log_start()
        self.readiness.started = True
        collect_garbage_less_often()
        self.systemd.ready()

    def _log_start(self) -> None:
        callbacks = self.to_backend.url("http")
        local = self.to_backend.is_loopback
        if not (self.access.required or local):
            logger.warning("callbacks need no token: set --callback_token or"
                           " --callback_capability, or let only the backend reach %s",
                           callbacks)
        logger.info(
            "SocketDock %s (%s): clients at %s%s, callbacks at %s, backend %s",
            self._version,
            form(),
            self.to_clients.url("ws"),
            self.paths.first,
            callbacks,
            options.backend,
        )
        if options.console and (self.tokens.required or local):
            logger.info("console at %s/", callbacks)
        if not UNMASKS_IN_C:
            logger.warning("frames are unmasked in Python, which is slow: this Tornado"
                           " lacks its speedups module; install one of its wheels")

    async def stop(self, log: Log) -> int:
        """Drain and close within the drain timeouts. Returns the exit status."""
        self.systemd.stopping()
        longest = options.drain_delay + options.drain_spread + options.drain_timeout
        end_at = time.monotonic() + longest + END_GRACE
        hard_end = exit_after(longest + END_GRACE, 1)
        status = 0 if await self._drain() else 1
        hard_end.cancel()
        exit_after(max(0.0, end_at - time.monotonic()), status)
        await self._close()
        log.close()
        logger.info("stopped")
        return status

    async def _drain(self) -> bool:
        """Return whether everything closed and was delivered in time."""
        reporting = asyncio.create_task(report_stop(self.connections, self.backend))
        # Another process takes new clients only if they share the port.
        leaves = options.reuse_port and self.to_clients is not self.to_backend
        drained = await self.connections.drain(
            options.drain_delay,
            options.drain_spread,
            options.drain_timeout,
            self.to_clients.stop_listening if leaves else lambda: None,
            settle=self.backend.drain,
        )
        reporting.cancel()
        return drained

    async def _close(self) -> None:
        if self.collector is not None:
            self.collector.close()
        if self.tail is not None:
            await self.tail.close()
        self.heartbeat.close()
        self.lifetimes.close()
        self.policy.stalls.close()
        self.connections.refusals.log_summary()
        await self.backend.close()
        if self.sharing is not None:
            await self.sharing.close()
        for listener in self.listeners:
            await listener.close()
        if self.tracing is not None:
            await self.tracing.close()
        self.systemd.close()


def client_paths() -> Sequence[str] | None:
    """Return the paths of the backend's own; None: it has none.

    Raises `OptionError`.
    """
    paths: Callable[[], Sequence[str]] | None = getattr(
        backends.load(options.backend), "client_paths", None
    )
    return None if paths is None else paths()


async def report_stop(connections: Connections, backend: Backend) -> None:
    """Log every few seconds what the shutdown waits for, until cancelled."""
    while True:
        await asyncio.sleep(STOP_REPORT_INTERVAL)
        away = backend.condition().away
        logger.info(
            "stopping: waiting for %d connections and %d events for the backend%s;"
            " a second signal stops immediately",
            len(connections),
            connections.backlog.events,
            "" if away is None else f" (unreachable for {away:.0f} s)",
        )
