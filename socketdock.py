"""SocketDock: relays between WebSocket clients and a backend that speaks only HTTP.

    python socketdock.py --backend=http --messageuri=http://127.0.0.1:8000/message

This module composes the service from the options, starts it and drains it.
`handlers` has the client side and the callback side, `backends` the backends.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tornado.options import Error as OptionError
from tornado.options import define, options
from tornado.web import RequestHandler

import backends
from backends import Backend, Check, Finding, Observer, Occupancy, Relay, Unavailable
from backends.cluster import make_cluster, make_cluster_check
from handlers.admission import Admission
from handlers.backlog import Backlog
from handlers.callbacks.access import CallbackAccess
from handlers.callbacks.address import callback_url
from handlers.callbacks.apigateway.routes import connections_routes
from handlers.callbacks.apigateway.sigv4_keys import make_signing_keys
from handlers.callbacks.bulk import PATH as BULK_PATH
from handlers.callbacks.bulk import Bulk, BulkHandler, bulk_routes
from handlers.callbacks.capabilities import make_capabilities
from handlers.callbacks.executor import CommandExecutor
from handlers.callbacks.fast_bulk import FastBulk
from handlers.callbacks.fast_send import FastSend
from handlers.callbacks.peers.check import peer_findings
from handlers.callbacks.peers.shared_bulk import SharedBulkHandler, without_trace
from handlers.callbacks.peers.sharing import Peers, Sharing, make_peers
from handlers.callbacks.repeats import Repeats
from handlers.callbacks.routes import callback_routes, is_send
from handlers.callbacks.tokens import CallbackTokens
from handlers.clients.connection import ClientContext, Connections
from handlers.clients.heartbeat import Heartbeat
from handlers.clients.lifetimes import Lifetimes
from handlers.clients.paths import make_paths
from handlers.clients.policy import make_policy
from handlers.clients.routes import client_routes
from handlers.clients.tickets import Tickets
from handlers.http.access_log import log_access, log_request
from handlers.http.application import RelayApplication, Routes
from handlers.http.binding import bind_listeners
from handlers.http.body import NotFoundHandler
from handlers.http.body_budget import MAX_BODY_BYTES, BodyBudget
from handlers.http.bounds import RequestBounds
from handlers.http.development import (
    DevelopmentAuthority,
    local_url,
    named_hosts,
    set_development_options,
)
from handlers.http.listener import Descriptors, Server, bindable, is_wildcard
from handlers.http.request import FastHandler, Request
from handlers.http.server import RequestServer
from handlers.http.tornado_server import TornadoServer
from handlers.operators.console import console_routes
from handlers.operators.console.assets import clients_of
from handlers.operators.console.tail import Tail
from handlers.operators.guard import OperatorGuard
from handlers.operators.prometheus import make_collector
from handlers.operators.routes import operator_routes
from handlers.operators.status import Status
from handlers.probes import Readiness, probe
from handlers.process.command_line import arguments_of
from handlers.process.event_loop import collect_garbage_less_often, loop_factory
from handlers.process.findings import (
    certificate_finding,
    descriptors_finding,
    port_finding,
)
from handlers.process.lifecycle import exit_after, exit_now, open_standard_streams
from handlers.process.limits import claim_descriptors
from handlers.process.logs import Log, make_log, read_log_config
from handlers.process.options import (
    limits,
    load_backends,
    parse_options,
    settings_of,
)
from handlers.process.options.help import print_help
from handlers.process.options.template import print_template
from handlers.process.signals import reload_on_signal, stop_signal
from handlers.process.systemd import SystemdNotifier
from handlers.telemetry import load_tracing, make_tracing
from handlers.telemetry.observers import ObservedBackend, Observers
from handlers.websocket.frames import UNMASKS_IN_C

if TYPE_CHECKING:
    from handlers.telemetry.spans import Tracing

__version__ = "0.1.0"

logger = logging.getLogger("socketdock")

define("backend", default="loopback", metavar="NAME",
       help="the backend: loopback (an echo server), http, apigateway, redis, or the "
            "full name of a module")
define("instance_name", type=str, metavar="NAME",
       help="name of this instance in events; none: the host name")
define("config", type=str, metavar="PATH",
       help="options file; none: conf/socketdock.conf beside socketdock.py, if it "
            "exists")

# Returns what can answer a request without a handler, or None.
Fast = Callable[[Request], FastHandler | None]

END_GRACE = 0.8  # seconds after the drain timeouts, before the rest is cut off
STOP_REPORT_INTERVAL = 2.0  # seconds
DESCRIPTORS = 256  # for open callbacks, the log, and the process itself
# The name in the instance of test events. It differs from that of each relay, since an
# event with a new boot id says that the connections of the run before are lost.
CHECK_INSTANCE = "socketdock-check"
USAGE_ERROR = 2  # exit status: an invalid option
COMMANDS = ("check", "config", "dev", "health", "redis-partitions", "worker")


def make_server(
    routes: Routes,
    bounds: RequestBounds,
    observer: Observer,
    fast: Callable[[Request], FastHandler | None] = lambda request: None,
    tracing: "Tracing | None" = None,
    keep_names: bool = False,
) -> Server:
    """Create the server for `routes`; all other paths get 404.

    `fast` may answer a send or a bulk callback without creating a handler. If
    `keep_names`, handlers can see the names of headers as they were written.
    """

    def on_answered(handler: RequestHandler) -> None:
        log_request(handler)
        sends = is_send(handler)
        if sends:
            observer.send_answered(handler.get_status())
        if tracing is not None and (sends or isinstance(handler, BulkHandler)):
            tracing.answered(handler.request, handler.get_status())

    def on_fast_answered(method: str, target: str, status: int) -> None:
        log_access(method, target, status)
        if not target.endswith(BULK_PATH):
            observer.send_answered(status)

    application = RelayApplication(
        routes, default_handler_class=NotFoundHandler, log_function=on_answered
    )
    if options.http_server == "tornado":
        return TornadoServer(application, bounds)
    return RequestServer(application, bounds, fast, on_fast_answered, keep_names)


async def serve(log: Log, variables: Sequence[str] = ()) -> int:
    """Start, relay until a signal, and drain. Returns the exit status.

    `variables` are for functions that call back, and are printed. Raises `OptionError`
    if an option prevents the start.
    """
    stop = stop_signal()  # before anything can observe the start
    service = Service()
    await service.backend.start()
    service.start(log)
    if variables:
        address = f"{local_url(service.to_clients, 'ws')}/{options.stage}"
        with contextlib.suppress(BrokenPipeError):
            print("\n".join((*variables, f"clients connect to {address}")), flush=True)
    await stop.wait()
    return await service.stop(log)


class Service:
    """The relay of one process, composed as the options say.

    All parts are created here, on the running loop. Raises `OptionError` if one
    cannot be created.
    """

    def __init__(self) -> None:
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
        self.tracing = make_tracing(__version__, self.instance)
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
        self.readiness = Readiness(
            self.connections, self.backend, options.ready_breaker_timeout
        )
        self.collector = make_collector(
            self.connections, self.backend, self.observers, __version__, self.cluster
        )
        self.tail = Tail(
            self.observers,
            self.connections,
            self.backend,
            options.console_bodies,
            {
                "version": __version__,
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
                __version__,
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
        self.instance = self.tail.named["instance"] = instance
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
        context = ClientContext(
            self.connections, self.backend, self.heartbeat, self.lifetimes, self.policy
        )
        return client_routes(
            self.paths,
            others,
            forbid=self._forbids_others,
            context=context,
            tickets=self.tickets,
            tracer=self.tracing,
        )

    def _for_backend(self) -> Routes:
        guard = OperatorGuard(self.tokens, self.to_backend.is_loopback)
        self.status = status = Status(
            self.connections,
            self.readiness,
            self.backend,
            __version__,
            self.instance,
            options.backend,
            limits(),
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
            self._prefix, self.access, self.readiness, __version__, stage, **callbacks
        )
        if stage is not None:
            routes += connections_routes(
                self._prefix, stage, self.signing_keys, self.access, **callbacks
            )
        if self.sharing is not None:
            routes = self.sharing.routes() + routes
        routes += bulk_routes(
            self._prefix,
            self.tokens,
            BulkHandler if self.sharing is None else SharedBulkHandler,
            bulk=self.bulk,
            repeats=self.repeats,
            max_bulk_size=options.max_bulk_size,
        )
        routes += operator_routes(guard, status, self.collector)
        if options.console:
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
                bulk = without_trace(bulk)
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
        both = make_server(
            self._for_clients(for_backend) if one_listener else for_backend,
            bounds(body_budget, max_body_size=most),
            self.observers,
            self._fast(),
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
            "SocketDock %s: clients at %s%s, callbacks at %s, backend %s",
            __version__,
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


def either(first: Fast, second: Fast) -> Fast:
    """Return what answers requests by `first`, or else by `second`."""
    return lambda request: first(request) or second(request)


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


def bounds(body_budget: BodyBudget, max_body_size: int) -> RequestBounds:
    """Return the limits of one listener's requests; `max_body_size` in bytes."""
    return RequestBounds(
        options.header_timeout,
        options.body_timeout,
        options.max_header_size,
        max_body_size,
        body_budget,
    )


async def check(warnings: Sequence[str], sends: bool) -> int:
    """Print problems that would disturb the relay, and how to fix them.

    `warnings` are those of the options. If it `sends`, each URL of the backend gets a
    test event. Returns the exit status, 1 if there is an error.
    """
    found = [Finding("warning", warning) for warning in warnings]
    with _errors_added_to(found):
        make_policy()
    with _errors_added_to(found):
        make_paths(client_paths() or ())
    with _errors_added_to(found):
        if options.log_config:
            read_log_config(options.log_config)
    with _errors_added_to(found):
        if options.otel:
            load_tracing()
    found += [port_finding("--bindport", bindable(options.bindip), options.bindport,
                           options.reuse_port)]
    if options.callbackport is not None:
        address = bindable(options.callbackip or options.bindip)
        found += [port_finding("--callbackport", address, options.callbackport)]
    with _errors_added_to(found):
        await _check_ends(found, sends)
    with contextlib.suppress(BrokenPipeError):  # the exit status still reports it
        for finding in found:
            print(f"{finding.level + ':':<9}{finding.text}")
    return int(any(finding.level == "error" for finding in found))


async def _check_ends(found: list[Finding], sends: bool) -> None:
    # Listening on the real ports would take clients from a running relay.
    to_clients, to_backend = bind_listeners(elsewhere=True)
    on_loopback = to_backend.is_loopback
    external = callback_url(options.externalhostandport, to_backend)
    for listener in {to_clients, to_backend}:
        await listener.close()
    for path in filter(None, (options.tls_cert, options.callback_tls_cert)):
        found.append(certificate_finding(path))
    with _errors_added_to(found):
        tokens = CallbackTokens(options.callback_token, options.callback_token_file)
        signed = make_signing_keys() is not None
        access = tokens.required or options.callback_capability or signed
        if not (access or on_loopback):
            found.append(
                Finding(
                    "error",
                    f"callbacks need no token, and {to_backend.address or '*'} can be"
                    " reached from other machines; set --callback_token_file or"
                    " --callback_capability",
                )
            )
    with _errors_added_to(found):
        found += peer_findings(to_backend)
    with _errors_added_to(found):
        found += [finding async for finding in make_cluster_check().findings()]
    backend = Check()
    with _errors_added_to(found):
        module = backends.load(options.backend)
        if hasattr(module, "make_check"):
            backend = module.make_check(Relay(external, "check", __version__))
        for path in backend.certificates:
            found.append(certificate_finding(path))
        found += [finding async for finding in backend.findings()]
        if sends:
            found += await _test_events(external)
    found.append(
        descriptors_finding(
            options.max_connections + backend.descriptors + DESCRIPTORS
            + (Peers.descriptors if options.peer_address else 0),
            options.max_connections,
        )
    )


async def _test_events(external: str | None) -> list[Finding]:
    """Return what the backend answers to test events. Raises `OptionError`."""
    module = backends.load(options.backend)
    if not hasattr(module, "make_trial"):
        why = f"--backend={options.backend} sends no test events"
        return [Finding("warning", f"{why}; leave out --send")]
    relay = Relay(
        external,
        f"{CHECK_INSTANCE}/{secrets.token_hex(8)}",
        __version__,
        executor=CommandExecutor(
            options.max_message_size, options.max_state_size, Observer()
        ),
    )
    return [finding async for finding in module.make_trial(relay).findings()]


@contextlib.contextmanager
def _errors_added_to(found: list[Finding]) -> Iterator[None]:
    try:
        yield
    except OptionError as error:
        found.append(Finding("error", str(error)))


def health() -> int:
    """Print whether the relay with these options serves. Returns the exit status."""
    host = bindable(options.bindip)
    if is_wildcard(host):
        host = "::1" if ":" in host else "127.0.0.1"
    where = f"port {options.bindport} of {host}"
    if not options.bindport:
        why: str | None = "the port is unknown: --bindport=0"
    else:
        why = probe(host, options.bindport, bool(options.tls_cert))
    with contextlib.suppress(BrokenPipeError):
        print(f"{where}: {why or 'ok'}")
    return int(why is not None)


async def grow_partitions(number: str) -> int:
    """Grow the number of partitions in Redis. Returns the exit status."""
    if not number.isdecimal():
        raise OptionError("redis-partitions needs a number: the new one of partitions")
    print(await backends.load("redis").grow_partitions(int(number)))
    return 0


def run(command: str, words: list[str]) -> int:
    """Run a command. Returns the exit status; raises `OptionError`."""
    if "--version" in words:
        print(f"SocketDock {__version__}")
        return 0
    if {"--help", "-h", "--help-all", "--help_all"} & set(words):
        load_backends(words, os.environ)
        print_help(all_options=not {"--help", "-h"} & set(words))
        return 0
    if command == "config":
        if words:
            raise OptionError("config takes no options; it prints all of them")
        load_backends(words, os.environ)
        print_template()
        return 0
    if command == "health" and words[:1] and words[0].startswith("--pid="):
        words = arguments_of(words[0].removeprefix("--pid=")) + words[1:]
    sends = command == "check" and "--send" in words
    if sends:
        words = [word for word in words if word != "--send"]
    develops = command == "dev" or words[:1] == ["dev"]  # of a relay in a process
    if develops:
        words = ["--backend=apigateway", *words[command != "dev" :]]
    if command == "worker":
        words = ["--backend=backends.redis.worker", *words]
    number = words.pop(0) if command == "redis-partitions" and words else ""
    warnings = parse_options(words, os.environ)
    if command == "redis-partitions":
        return asyncio.run(grow_partitions(number))
    if develops:
        folder = set_development_options(os.environ)
    if command == "health":
        return health()
    factory = loop_factory(options.event_loop)
    if command == "check":
        return asyncio.Runner(loop_factory=factory).run(check(warnings, sends))
    log = make_log(lambda: settings_of("logging", words, os.environ))
    for warning in warnings:
        logger.warning(warning)
    variables: Sequence[str] = ()
    if develops:
        authority = DevelopmentAuthority(folder, named_hosts(), os.environ)
        variables = authority.variables
    return asyncio.Runner(loop_factory=factory).run(serve(log, variables))


def main() -> None:
    """The console script `socketdock`."""
    open_standard_streams()
    words = sys.argv[1:]
    command = words.pop(0) if words[:1] and words[0] in COMMANDS else ""
    try:
        status = run(command, words)
    except OptionError as error:
        print(f"socketdock: {error}", file=sys.stderr)
        # Docker allows only 0 and 1.
        passing = isinstance(error, Unavailable) or command == "health"
        status = 1 if passing else USAGE_ERROR
    except KeyboardInterrupt:  # before there is anything to drain
        status = 1
    except BrokenPipeError:  # `head` has closed the pipe
        status = 0
    except OSError as error:  # such as a full disk under redirected help
        print(f"socketdock: {error}", file=sys.stderr)
        status = 1
    exit_now(status)


if __name__ == "__main__":
    main()
