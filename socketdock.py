"""SocketDock: lets WebSocket clients talk to backends that speak only HTTP.

    python socketdock.py --backend=http --messageuri=http://127.0.0.1:8000/message

Here the service starts, relays and drains, as the options say, which
`handlers.process.options` reads. Both ends of the relay are in `handlers`, what stands
behind it is in `backends`.
"""

import asyncio
import contextlib
import gc
import importlib
import ipaddress
import logging
import os
import re
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from tornado.options import Error as OptionError
from tornado.options import define, options
from tornado.routing import Matcher
from tornado.web import RequestHandler

import backends
from backends import Backend, Check, Finding, Observer, Relay, Unavailable
from backends.hosts import encoded_host
from handlers.admission import Admission
from handlers.backlog import Backlog
from handlers.callbacks.openapi import OpenAPIHandler
from handlers.callbacks.routes import (
    ConnectionHandler,
    DisconnectHandler,
    NoConnectionHandler,
    QuickSend,
    SendHandler,
)
from handlers.callbacks.tokens import (
    CallbackTokens,
    OperatorGuard,
    Unauthorized,
    UnauthorizedHandler,
)
from handlers.clients.connection import ClientContext, Connections
from handlers.clients.handshake import ClientSocketHandler
from handlers.clients.heartbeat import Heartbeat
from handlers.clients.lifetimes import Lifetimes
from handlers.clients.paths import ClientPaths, Handshakes
from handlers.clients.policy import ClientPolicy, make_policy
from handlers.clients.tickets import Tickets
from handlers.http.application import RelayApplication
from handlers.http.body import NotFoundHandler
from handlers.http.kept import MAX_KEPT_BODIES, KeptBodies
from handlers.http.listener import (
    Descriptors,
    Listener,
    Server,
    TLSFiles,
    bindable,
    collide,
    is_wildcard,
)
from handlers.http.server import Quick, Request, RequestBounds, RequestServer
from handlers.http.tornado_server import TornadoServer
from handlers.operators.console import console_routes
from handlers.operators.console.page import Clients
from handlers.operators.console.tail import Tail
from handlers.operators.metrics import Metrics, MetricsHandler, RelayCollector
from handlers.operators.status import (
    LiveHandler,
    Readiness,
    ReadyHandler,
    Status,
    StatusHandler,
    probe,
)
from handlers.process.findings import (
    certificate_finding,
    descriptors_finding,
    port_finding,
)
from handlers.process.lifecycle import end_within, leave, open_standard_streams
from handlers.process.logs import Log, file_channels, read_log_config
from handlers.process.options import (
    limits,
    load_backends,
    parse_options,
    print_help,
    settings_of,
)
from handlers.process.systemd import SystemdNotifier
from handlers.telemetry.observers import ObservedBackend, Observers
from handlers.websocket.frames import UNMASKS_IN_C

if TYPE_CHECKING:
    from handlers.telemetry.tracing import Tracing

__version__ = "0.1.0"

logger = logging.getLogger("socketdock")

define("bindip", default="127.0.0.1", metavar="ADDRESS",
       help="address where clients connect")
define("bindport", default=8765, metavar="PORT",
       help="port where clients connect; 0 takes a free one")
define("callbackip", type=str, metavar="ADDRESS",
       help="address of a second listener, for callbacks; none: --bindip")
define("callbackport", type=int, metavar="PORT",
       help="port of a second listener, for callbacks; none: one serves both")
define("externalhostandport", type=str, metavar="HOST:PORT",
       help="how the backend reaches this instance's callbacks: host:port, or a "
            "URL with scheme and optional path; none: the listener's address")
define("backend", default="loopback", metavar="NAME",
       help="who answers: loopback, http, or a module's full name")
define("instance_name", type=str, metavar="NAME",
       help="this instance's name in events; none: the host's name")
define("config", type=str, metavar="PATH",
       help="options file; none: conf/socketdock.conf beside socketdock.py, "
            "where it exists")

define("event_loop", default="auto", metavar="LOOP",
       help="auto, uvloop or asyncio; auto: uvloop where it is installed")

# What Tornado's log file is made of.
LOG_FILE = ("log_file_prefix", "log_file_max_size", "log_file_num_backups",
            "log_rotate_mode", "log_rotate_when", "log_rotate_interval")
CALLBACK_TLS = ("callback_tls_cert", "callback_tls_key", "callback_client_ca")
END_GRACE = 0.8  # seconds after the drain's time, then whatever is left is cut off
STOP_REPORT_INTERVAL = 2.0  # seconds
DESCRIPTORS = 256  # for callbacks under way, the log, and the process itself
# A name or an address as they stand in a URL, without brackets.
HOST = re.compile(r"[\w.:-]+", re.ASCII)
COLLECT_AFTER = 10_000  # objects that were made and have not gone
USAGE_ERROR = 2  # exit status: an option that cannot be right

Routes = list[tuple[str | Matcher, type[RequestHandler], Any]]


def make_log(argv: Sequence[str], environ: Mapping[str, str]) -> Log:
    """The log, from now on, whose level is looked for in the same places again."""
    to_file = bool(options.log_file_prefix)
    if options.log_config:
        for name in ("log_format", "log_to_stderr", "log_file_prefix"):
            if options[name] not in (None, "", "auto"):
                raise OptionError(f"--log_config leaves nothing for --{name} to say")
    return Log(
        lambda: settings_of("logging", argv, environ),
        options.log_format,
        file_channels({n: options[n] for n in LOG_FILE}) if to_file else (),
        options.log_to_stderr if options.log_to_stderr is not None else not to_file,
        options.log_config or None,
    )


def client_routes(
    paths: ClientPaths, others: Routes, **shared: Any
) -> Routes:
    """What clients may ask for, on a listener that has `others`, too.

    These may have the path of a WebSocket, but for what asks for one.
    """
    return [
        (Handshakes(paths), ClientSocketHandler, shared),
        *(others or [(r"/livez", LiveHandler, {})]),
        (paths, ClientSocketHandler, shared),
    ]


def callback_routes(
    prefix: str, tokens: CallbackTokens, readiness: Readiness, **shared: Any
) -> Routes:
    """What the backend may ask for, with and without its path prefix."""
    sockets = f"(?:{re.escape(prefix)})?/socket"
    start = f"{sockets}/([0-9a-f]{{32}})"
    return [
        (Unauthorized(prefix, tokens), UnauthorizedHandler, {}),
        (rf"{start}/send", SendHandler, shared),
        (rf"{start}/disconnect", DisconnectHandler, shared),
        (start, ConnectionHandler, shared),
        (rf"{sockets}/[^/]*(?:/(?:send|disconnect))?", NoConnectionHandler, {}),
        (r"/livez", LiveHandler, {}),
        (r"/readyz", ReadyHandler, {"readiness": readiness}),
        (r"/openapi\.json", OpenAPIHandler, {"version": __version__, "tokens": tokens}),
    ]


def operator_routes(
    guard: OperatorGuard, status: Status, collector: RelayCollector | None
) -> Routes:
    """What operators may ask for, where the guard lets them."""
    routes: Routes = [
        (r"/status", StatusHandler, {"guard": guard, "status": status})
    ]
    if collector is not None:
        found = {"guard": guard, "registry": collector.registry()}
        routes.append((r"/metrics", MetricsHandler, found))
    return routes


def make_server(
    routes: Routes,
    bounds: RequestBounds,
    observer: Observer,
    quick: Callable[[Request], Quick | None] = lambda request: None,
    tracing: "Tracing | None" = None,
) -> Server:
    """What serves `routes`, and answers 404 to everything else.

    `quick` may answer a send before its handler is made.
    """

    def on_answered(handler: RequestHandler) -> None:
        log_request(handler)
        if is_send(handler):
            observer.send_answered(handler.get_status())
            if tracing is not None:
                tracing.answered(handler.request, handler.get_status())

    def on_quickly_answered(method: str, target: str, status: int) -> None:
        log_access(method, target, status)
        observer.send_answered(status)

    application = RelayApplication(
        routes, default_handler_class=NotFoundHandler, log_function=on_answered
    )
    if options.http_server == "tornado":
        return TornadoServer(application, bounds)
    return RequestServer(application, bounds, quick, on_quickly_answered)


def is_send(handler: RequestHandler) -> bool:
    """Whether a send was asked for, with a token or without."""
    return handler.request.method == "POST" and (
        isinstance(handler, SendHandler)
        or (
            isinstance(handler, UnauthorizedHandler)
            and handler.request.path.endswith("/send")
        )
    )


def log_request(handler: RequestHandler) -> None:
    """One line for each request."""
    log_access(
        handler.request.method or "", handler.request.path, handler.get_status()
    )


def log_access(method: str, target: str, status: int) -> None:
    """One line for a request, without its query.

    Nor what is no path: the target of a proxy's request may name a user.
    """
    # Who answers 503 has told why, and how often it does is up to the clients.
    level = logging.WARNING if status >= 500 and status != 503 else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    path = target.partition("?")[0]
    shown = ascii(path)[1:-1] if path.startswith("/") else "(no path)"
    logger.log(level, "%s %s: %d", method, shown, status)


def make_collector(
    connections: Connections, backend: Backend, observers: Observers
) -> RelayCollector | None:
    """What Prometheus asks, with somebody who counts; None with --metrics=off."""
    if not options.metrics:
        return None
    metrics = Metrics()
    observers.add(metrics)
    build = {"version": __version__, "backend": options.backend}
    most = {"connections": options.max_connections, "pending": options.max_pending}
    return RelayCollector(metrics, connections, backend, build, most)


def make_tracing(instance: str) -> "Tracing | None":
    """What makes spans; None without --otel, and then nothing of it is imported."""
    if not options.otel:
        return None
    tracing: Tracing = load_tracing().Tracing(__version__, instance)
    return tracing


def load_tracing() -> ModuleType:
    """What --otel needs. Raises `OptionError` where it is not installed."""
    try:
        return importlib.import_module("handlers.telemetry.tracing")
    except ImportError as error:
        raise OptionError(
            "--otel needs OpenTelemetry's SDK and OTLP exporter, which"
            f" socketdock[otel] brings: {error}"
        ) from None


def make_paths() -> ClientPaths:
    """Where clients connect, from the options."""
    try:
        return ClientPaths(options.ws_path)
    except ValueError as error:
        raise OptionError(f"--ws_path: {error}") from None


def bind_listeners(elsewhere: bool = False) -> tuple[Listener, Listener]:
    """Those of the clients and of the callbacks, which may be one and the same.

    With `elsewhere` on free ports, not on their own. Raises `OptionError` where
    an address or a certificate can't be used.
    """
    callbackip = options.callbackip or options.bindip
    if (
        options.callbackport
        and options.callbackport == options.bindport
        and collide(callbackip, options.bindip)
    ):
        raise OptionError(
            "--callbackport is --bindport; choose another, or leave it out for one"
            " listener"
        )
    clients = Listener(
        options.bindip,
        0 if elsewhere else options.bindport,
        tls_files("tls"),
        options.reuse_port,
    )
    if options.callbackport is None:
        for name in ("callbackip", *CALLBACK_TLS):
            if options[name] is not None:
                raise OptionError(f"--{name} needs --callbackport")
        if options.reuse_port and options.backend != "loopback":
            raise OptionError(
                "--reuse_port needs --callbackport: callbacks at the shared port would"
                " reach any of the processes"
            )
        return clients, clients
    return clients, Listener(
        callbackip,
        0 if elsewhere else options.callbackport,
        tls_files("callback_tls", options.callback_client_ca),
    )


def tls_files(prefix: str, client_ca: str | None = None) -> TLSFiles | None:
    """A listener's files, or None for plain TCP."""
    certificate, key = options[f"{prefix}_cert"], options[f"{prefix}_key"]
    if certificate:
        return TLSFiles(certificate, key, client_ca)
    if key or client_ca:
        raise OptionError(
            f"--{f'{prefix}_key' if key else 'callback_client_ca'}"
            f" needs --{prefix}_cert"
        )
    return None


def callback_url(external: str | None, listener: Listener) -> str | None:
    """How the backend reaches the callbacks, without a trailing slash.

    None where nothing was given and the address is a wildcard.
    """
    if not external:
        return None if listener.is_wildcard else listener.url("http")
    scheme = "https" if listener.has_tls else "http"
    url = external if "://" in external else f"{scheme}://{external}"
    # There may be a password in it.
    what = "--externalhostandport" + ("" if "@" in external else f"={external}")
    try:
        parts = urlsplit(url)
        netloc = parts.netloc
        if netloc.count(":") > 1 and "[" not in netloc:
            netloc = in_brackets(netloc)
        if not netloc.isascii():
            netloc = with_encoded_host(netloc, what)
        if netloc != parts.netloc:  # geturl() would lose an empty query
            url = url.replace(parts.netloc, netloc, 1)
            parts = urlsplit(url)
        host = parts.hostname or ""
        if ":" in host:
            ipaddress.IPv6Address(host)
        wrong = (
            parts.scheme not in ("http", "https")
            or not HOST.fullmatch(host)
            or parts.netloc.endswith(":")
            or parts.port == 0
            or re.search(r"[@?#\\]", url)
            or re.search(r"[^!-~]", url)
        )
    except ValueError:
        wrong = True
    if wrong:
        raise OptionError(
            f"{what} is neither host:port nor an http(s) URL; an IPv6 address stands"
            " in brackets, [fd00::1]:8765"
        )
    if is_wildcard(host):
        raise OptionError(f"{what} is every address, so none that can be called")
    return url.rstrip("/")


def in_brackets(netloc: str) -> str:
    """Return `[fd00::1]:8765` for `fd00::1:8765`, which `$(POD_IP):8765` becomes.

    It might be an address without a port, but a port is asked for. Raises
    `ValueError` where what comes before the last colon is no IPv6 address.
    """
    address, _, port = netloc.rpartition(":")
    return f"[{ipaddress.IPv6Address(address)}]:{port}"


def with_encoded_host(netloc: str, what: str) -> str:
    """Return `xn--bcher-kva.example:80` for `b\u00fccher.example:80`.

    Raises `OptionError`, which begins with `what`, where it has no certain encoding.
    """
    host, colon, port = netloc.partition(":")
    try:
        return encoded_host(host) + colon + port
    except ValueError as error:
        raise OptionError(f"{what}: {error}") from None


def clients_of(
    to_clients: Listener, to_backend: Listener, paths: ClientPaths
) -> Clients:
    """Where the console's page finds the clients' listener."""
    if to_clients is to_backend:
        return Clients(paths.first)
    address = None if to_clients.is_wildcard else to_clients.address
    return Clients(paths.first, to_clients.has_tls, address, to_clients.port)


async def serve(log: Log) -> int:
    """Start, relay until a signal, and drain. Returns the exit status.

    Raises `OptionError` where an option keeps it from starting.
    """
    stop = stop_signal()  # before anybody can know that this has started
    systemd = SystemdNotifier(os.environ)
    policy = make_policy()
    paths = make_paths()
    tokens = CallbackTokens(options.callback_token, options.callback_token_file)
    to_clients, to_backend = bind_listeners()
    external = callback_url(options.externalhostandport, to_backend)
    name = options.instance_name or socket.gethostname()
    instance = f"{name}/{secrets.token_hex(8)}"
    observers = Observers()
    tracing = make_tracing(instance)
    if tracing is not None:
        observers.add(tracing)
    backend: Backend = backends.load(options.backend).make_backend(
        Relay(
            external,
            instance,
            __version__,
            observers,
            tracing.sample if tracing is not None else None,
        )
    )
    if not backend.observes:
        backend = ObservedBackend(backend, observers)

    claim_descriptors(options.max_connections + backend.descriptors + DESCRIPTORS)
    descriptors = Descriptors.shared(backend.descriptors, to_clients is to_backend)
    admission = Admission(
        options.max_connections,
        options.max_connections_per_ip,
        options.handshakes_per_second,
        descriptors.websocket,
    )
    connections = Connections(
        Backlog(options.max_pending, options.max_queued_bytes), admission, observers
    )
    heartbeat = Heartbeat(options.ping_interval, options.ping_timeout)
    lifetimes = Lifetimes(options.idle_timeout, options.max_lifetime)
    tickets = Tickets()
    readiness = Readiness(connections, backend, options.ready_breaker_timeout)
    collector = make_collector(connections, backend, observers)
    shared = {"connections": connections, "backend": backend}
    for_clients = {
        "context": ClientContext(connections, backend, heartbeat, lifetimes, policy),
        "tickets": tickets,
        "tracer": tracing,
    }
    guard = OperatorGuard(tokens, to_backend.is_loopback)
    prefix = urlsplit(external or "").path
    for_backend = callback_routes(
        prefix,
        tokens,
        readiness,
        max_message_size=policy.max_message_size,
        **shared,
    ) + operator_routes(
        guard,
        Status(
            connections,
            readiness,
            backend,
            __version__,
            instance,
            options.backend,
            limits(),
        ),
        collector,
    )
    tail = Tail(
        observers,
        connections,
        backend,
        options.console_bodies,
        {"version": __version__, "instance": instance, "backend": options.backend},
    )
    if options.console:
        clients = clients_of(to_clients, to_backend, paths)
        for_backend += console_routes(
            guard, connections, tail, tickets, clients, policy.max_message_size
        )
    listeners = {to_clients, to_backend}
    kept = KeptBodies(max(MAX_KEPT_BODIES, 2 * policy.max_message_size))
    quick: Callable[[Request], Quick | None] = QuickSend(
        prefix, tokens, connections, backend, policy.max_message_size
    )
    if tracing is not None:
        quick = tracing.quick(quick, "https" if to_backend.has_tls else "http")
    if to_clients is to_backend:
        to_clients.serve(
            make_server(
                client_routes(paths, for_backend, **for_clients),
                bounds(kept, policy),
                observers,
                quick,
                tracing,
            ),
            descriptors.client,
        )
    else:
        to_clients.serve(
            make_server(
                client_routes(paths, [], **for_clients),
                bounds(kept),
                observers,
            ),
            descriptors.client,
        )
        to_backend.serve(
            make_server(
                for_backend, bounds(kept, policy), observers, quick, tracing
            ),
            descriptors.callback,
        )
    log.begin()
    reload_on_signal(systemd, log, *listeners, tokens, backend)
    if not (tokens.required or to_backend.is_loopback):
        logger.warning("callbacks need no token: set --callback_token, or keep"
                       " everybody but the backend from %s", to_backend.url("http"))
    logger.info(
        "SocketDock %s: clients at %s%s, callbacks at %s, backend %s",
        __version__,
        to_clients.url("ws"),
        paths.first,
        to_backend.url("http"),
        options.backend,
    )
    if options.console and (tokens.required or to_backend.is_loopback):
        logger.info("console at %s/", to_backend.url("http"))
    if not UNMASKS_IN_C:
        logger.warning("frames are unmasked in Python, which is slow: this Tornado"
                       " lacks its speedups module; install one of its wheels")
    readiness.started = True
    save_collecting()
    systemd.ready()

    await stop.wait()
    systemd.stopping()
    longest = options.drain_delay + options.drain_spread + options.drain_timeout
    end_at = time.monotonic() + longest + END_GRACE
    hard_end = end_within(longest + END_GRACE, 1)
    reporting = asyncio.create_task(report_stop(connections, backend))
    drained = await connections.drain(
        options.drain_delay,
        options.drain_spread,
        options.drain_timeout,
        # With a port of its own each process would refuse what nobody else can take.
        to_clients.leave
        if options.reuse_port and to_clients is not to_backend
        else lambda: None,
        settle=backend.drain,
    )
    reporting.cancel()
    status = 0 if drained else 1
    hard_end.cancel()
    end_within(max(0.0, end_at - time.monotonic()), status)
    if collector is not None:
        collector.close()
    await tail.close()
    heartbeat.close()
    lifetimes.close()
    policy.stalls.close()
    connections.refusals.sum_up()
    await backend.close()
    for listener in listeners:
        await listener.close()
    if tracing is not None:
        await tracing.close()
    systemd.close()
    log.close()
    logger.info("stopped")
    return status


async def report_stop(connections: Connections, backend: Backend) -> None:
    """Say every few seconds what the stop waits for, until it is cancelled."""
    while True:
        await asyncio.sleep(STOP_REPORT_INTERVAL)
        away = backend.condition().away
        logger.info(
            "stopping: %d connections and %d events for the backend%s are waited for;"
            " a second signal stops at once",
            len(connections),
            connections.backlog.events,
            "" if away is None else f" (away for {away:.0f} s)",
        )


def save_collecting() -> None:
    """Have the garbage collector look at less, and less often.

    It stops everything: for 10 ms to look at what was made at the start, which
    stays to the end, and for 50 ms with 10,000 clients, whose messages on their way
    would call it once a second, as if they were garbage. What a visit leaves needs
    no collector (test/garbage_test.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def claim_descriptors(wanted: int) -> None:
    """Raise this process's limit of open files; warn where that can't be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        logger.warning(
            "at most %d files may be open here (ulimit -n), and --max_connections=%d"
            " with what the backend needs takes %d",
            hard,
            options.max_connections,
            wanted,
        )
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bounds(kept: KeptBodies, policy: ClientPolicy | None = None) -> RequestBounds:
    """Of a listener's requests; bodies may be messages where a policy is given."""
    return RequestBounds(
        options.header_timeout,
        options.body_timeout,
        options.max_header_size,
        policy.max_message_size if policy is not None else options.max_header_size,
        kept,
    )


def stop_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; from then on another one exits at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            logger.warning("stopped by a second signal")
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # Until there is something to read again: by default it would end the process.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    return stop


class Reloadable(Protocol):
    """What reads files that may change: level, certificates, tokens, secrets."""

    def reload(self) -> None:
        """Read them again. Raises `OptionError`, and what it had stays."""


def reload_on_signal(systemd: SystemdNotifier, *reloadables: Reloadable) -> None:
    """Have SIGHUP read every file again that is named by an option."""

    def on_signal() -> None:
        systemd.reloading()
        failed = False
        for reloadable in reloadables:
            try:
                reloadable.reload()
            except OptionError as error:
                failed = True
                logger.error("not read again, what was read before stays: %s", error)
        logger.info(
            "read again: %s",
            "what was not wrong" if failed else "level, certificates, tokens, secrets",
        )
        systemd.ready()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop of that name; None: asyncio's own.

    Raises `OptionError` where there is none of that name, or it is not installed.
    """
    if name not in ("auto", "uvloop", "asyncio"):
        raise OptionError(
            f"--event_loop must be auto, uvloop or asyncio, not {name!r}"
        )
    if name == "asyncio":
        return None
    try:
        uvloop = importlib.import_module("uvloop")  # not on every platform
    except ImportError:
        if name == "uvloop":
            raise OptionError("--event_loop=uvloop: uvloop is not installed") from None
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def check(warnings: Sequence[str]) -> int:
    """Print what would keep the relay from its work, and how to mend it.

    `warnings` are those of the options. Returns the exit status, 1 where
    anything is wrong.
    """
    found = [Finding("warning", warning) for warning in warnings]
    with _found_wrong(found):
        make_policy()
    with _found_wrong(found):
        make_paths()
    with _found_wrong(found):
        if options.log_config:
            read_log_config(options.log_config)
    with _found_wrong(found):
        if options.otel:
            load_tracing()
    found += [port_finding("--bindport", bindable(options.bindip), options.bindport,
                           options.reuse_port)]
    if options.callbackport is not None:
        address = bindable(options.callbackip or options.bindip)
        found += [port_finding("--callbackport", address, options.callbackport)]
    with _found_wrong(found):
        await _check_ends(found)
    with contextlib.suppress(BrokenPipeError):  # the exit status says the same
        for finding in found:
            print(f"{finding.level + ':':<9}{finding.text}")
    return int(any(finding.level == "error" for finding in found))


async def _check_ends(found: list[Finding]) -> None:
    # To listen at their own ports would take clients from a relay that runs.
    to_clients, to_backend = bind_listeners(elsewhere=True)
    on_loopback = to_backend.is_loopback
    external = callback_url(options.externalhostandport, to_backend)
    for listener in {to_clients, to_backend}:
        await listener.close()
    for path in filter(None, (options.tls_cert, options.callback_tls_cert)):
        found.append(certificate_finding(path))
    with _found_wrong(found):
        tokens = CallbackTokens(options.callback_token, options.callback_token_file)
        if not (tokens.required or on_loopback):
            found.append(
                Finding(
                    "error",
                    f"callbacks need no token, and {to_backend.address or '*'} can be"
                    " reached from elsewhere; set --callback_token_file",
                )
            )
    backend = Check()
    with _found_wrong(found):
        module = backends.load(options.backend)
        if hasattr(module, "make_check"):
            backend = module.make_check(Relay(external, "check", __version__))
        for path in backend.certificates:
            found.append(certificate_finding(path))
        found += [finding async for finding in backend.findings()]
    found.append(
        descriptors_finding(
            options.max_connections + backend.descriptors + DESCRIPTORS,
            options.max_connections,
        )
    )


@contextlib.contextmanager
def _found_wrong(found: list[Finding]) -> Iterator[None]:
    try:
        yield
    except OptionError as error:
        found.append(Finding("error", str(error)))


def health() -> int:
    """Say whether the relay with these options serves. Returns the exit status."""
    host = bindable(options.bindip)
    if is_wildcard(host):
        host = "::1" if ":" in host else "127.0.0.1"
    where = f"port {options.bindport} of {host}"
    if not options.bindport:
        why: str | None = "--bindport=0 says not where it listens"
    else:
        why = probe(host, options.bindport, bool(options.tls_cert))
    with contextlib.suppress(BrokenPipeError):
        print(f"{where}: {why or 'ok'}")
    return int(why is not None)


def words_of(process: str) -> list[str]:
    """The relay's command line in a process, without the program's name.

    Or in one that it has started, as a shell does. In a container that is how its
    health check knows the flags that it was started with. Raises `OptionError`.
    """
    for number, pid in enumerate(_with_children(process)):
        try:
            content = Path("/proc", pid, "cmdline").read_bytes()
        except (OSError, ValueError):
            if number == 0:
                raise OptionError(
                    f"--pid={process}: there is no such process"
                ) from None
            continue  # a child that has ended
        words = os.fsdecode(content).split("\0")[:-1]
        for place, word in enumerate(words):
            if Path(word).name in ("socketdock", "socketdock.py"):
                return words[place + 1 :]
    raise OptionError(f"--pid={process}: it is not SocketDock")


def _with_children(process: str) -> Iterator[str]:
    """Yield a process, and all that it has started, but for this one itself."""
    waiting = [process]
    while waiting:
        pid = waiting.pop(0)
        if pid == str(os.getpid()):
            continue
        yield pid
        with contextlib.suppress(OSError, ValueError):
            waiting += Path("/proc", pid, "task", pid, "children").read_text().split()


def run(command: str, words: list[str]) -> int:
    """Do what a command asks for. Returns the exit status; raises `OptionError`."""
    if "--version" in words:
        print(f"SocketDock {__version__}")
        return 0
    if {"--help", "-h", "--help-all", "--help_all"} & set(words):
        load_backends(words, os.environ)
        print_help(all_options=not {"--help", "-h"} & set(words))
        return 0
    if command == "health" and words[:1] and words[0].startswith("--pid="):
        words = words_of(words[0].removeprefix("--pid=")) + words[1:]
    warnings = parse_options(words, os.environ)
    if command == "health":
        return health()
    factory = loop_factory(options.event_loop)
    if command == "check":
        return asyncio.Runner(loop_factory=factory).run(check(warnings))
    log = make_log(words, os.environ)
    for warning in warnings:
        logger.warning(warning)
    return asyncio.Runner(loop_factory=factory).run(serve(log))


def main() -> None:
    """The console script `socketdock`."""
    open_standard_streams()
    words = sys.argv[1:]
    command = words.pop(0) if words[:1] in (["check"], ["health"]) else ""
    try:
        status = run(command, words)
    except OptionError as error:
        print(f"socketdock: {error}", file=sys.stderr)
        # Docker knows 0 and 1 only.
        passing = isinstance(error, Unavailable) or command == "health"
        status = 1 if passing else USAGE_ERROR
    except KeyboardInterrupt:  # before there was anything to drain
        status = 1
    except BrokenPipeError:  # `head` has seen enough
        status = 0
    except OSError as error:  # a full disk, say, which help is printed to
        print(f"socketdock: {error}", file=sys.stderr)
        status = 1
    leave(status)


if __name__ == "__main__":
    main()
