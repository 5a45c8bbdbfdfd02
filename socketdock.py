"""SocketDock: lets WebSocket clients talk to backends that speak only HTTP.

    python socketdock.py --backend=http --messageuri=http://127.0.0.1:8000/message

Here the options are read and the service starts, relays and drains. Both ends
of the relay are in `handlers`, what stands behind it is in `backends`.
"""

import ast
import asyncio
import difflib
import logging
import os
import re
import secrets
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.options import Error as OptionError
from tornado.options import define, options
from tornado.web import Application, RequestHandler

import backends
from backends import Backend, Relay
from handlers.callback import ConnectionHandler, DisconnectHandler, SendHandler
from handlers.connections import ConnectionMap
from handlers.health import LiveHandler, ReadyHandler
from handlers.heartbeat import Heartbeat
from handlers.problem import ProblemHandler
from handlers.protocol import Compression
from handlers.websocket import ClientPolicy, ClientSocketHandler, split_origin

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

DEFAULT_CONFIG = Path(__file__).resolve().parent / "conf" / "socketdock.conf"

# The spellings of the existing SocketDock's deployments.
OTHER_SPELLINGS = {
    "message-uri": "messageuri",
    "disconnect-uri": "disconnecturi",
    "connect-uri": "connecturi",
    "endpoint": "externalhostandport",
    "log-level": "logging",
}

ENVIRONMENT_PREFIX = "SOCKETDOCK_"
# What Kubernetes injects for a service called socketdock.
INJECTED = re.compile(
    r"(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*|PORT=\w+://.*"
)

LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "none")
TRUTHS = {"true": True, "1": True, "yes": True, "on": True, "t": True,
          "false": False, "0": False, "no": False, "off": False, "f": False}

BACKLOG = 4096  # connections that the kernel holds until they are accepted
MAX_HEADER_SIZE = 64 * 1024  # bytes of a request's line and headers
IDLE_CONNECTION_TIMEOUT = 120.0  # seconds between two requests of one connection
BODY_TIMEOUT = 60.0  # seconds for a request's body
USAGE_ERROR = 2  # exit status


# Options, from every source.


@dataclass(frozen=True)
class Setting:
    """A line of an options file, read but not checked; `where` is for errors."""

    where: str
    name: str
    value: Any


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Set `tornado.options` from flags, environment, file and defaults.

    In that precedence. `argv` is without the program's name. Returns warnings
    to be logged. Raises `OptionError` with one sentence.
    """
    warnings: list[str] = []
    for setting in load_backends(argv, environ):
        if _option_of(setting.name) is None:
            raise OptionError(
                f"{setting.where}: there is no option"
                f" {setting.name}{_nearest(setting.name, '')}"
            )
        _set(setting.name, setting.value, f"{setting.where}: {setting.name}")
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        spelling = variable.removeprefix(ENVIRONMENT_PREFIX)
        if _option_of(spelling.lower()) is not None:
            _set(spelling.lower(), value, variable)
        elif not INJECTED.fullmatch(f"{spelling}={value}"):
            warnings.append(
                f"{variable} is no option{_nearest(spelling.lower(), '')}: ignored"
            )
    for name, value in read_flags(argv):
        _set(name, value, f"--{name}")
    return warnings


def load_backends(argv: Sequence[str], environ: Mapping[str, str]) -> list[Setting]:
    """Import those that ship and the one that is asked for, by whatever source.

    A backend defines its options when it is imported, so this comes before any
    is set. Returns the settings of the options file. Raises `OptionError`.
    """
    for name in backends.names():
        backends.load(name)
    path = _config_path(argv, environ)
    from_file = list(read_config(path)) if path is not None else []
    chosen = _last_of("backend", argv) or environ.get("SOCKETDOCK_BACKEND")
    for setting in reversed(from_file):
        if setting.name == "backend" and not chosen:
            chosen = setting.value
    if isinstance(chosen, str) and chosen:
        backends.load(chosen)
    return from_file


def read_flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each flag: `--name=value`, `--name value`."""
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if not word.startswith("--") or word == "--":
            raise OptionError(f"{word!r} is not an option: options start with --")
        name, equals, value = word[2:].partition("=")
        option = _option_of(name)
        if option is None:
            raise OptionError(f"there is no option --{name}{_nearest(name)}")
        if not equals:
            if option.type is bool:
                value = words.pop() if words and words[-1] in TRUTHS else "true"
            elif words:
                value = words.pop()
            else:
                raise OptionError(f"--{name} needs a value")
        yield name, value


def read_config(path: Path) -> Iterator[Setting]:
    """Yield each `name = value` of an options file.

    Values are Python literals, so that nothing in the file is ever run. Names
    may be spelt with dashes.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise OptionError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"can't read {path}: it is not UTF-8") from None
    text = re.sub(
        r"^[A-Za-z][\w-]*(?=\s*=)", lambda m: m[0].replace("-", "_"), text, flags=re.M
    )
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise OptionError(f"{path}, line {line}: not name = value") from None
    for statement in statements:
        where = f"{path}, line {statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                raise OptionError(f"{where}: not name = value")
        try:
            yield Setting(where, name, ast.literal_eval(value))
        except (ValueError, TypeError):
            raise OptionError(
                f"{where}: {name} is not a plain value,"
                " such as 'text', 8765, 2.5, True or ['a', 'b']"
            ) from None


def _config_path(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    given = _last_of("config", argv) or environ.get("SOCKETDOCK_CONFIG")
    if given:
        return Path(given)
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _last_of(name: str, argv: Sequence[str]) -> str | None:
    found = None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def _option_of(name: str) -> Any:
    """tornado's record of an option (type, metavar), by any of its spellings."""
    name = name.replace("_", "-")
    return options._options.get(OTHER_SPELLINGS.get(name, name))


def _nearest(name: str, dashes: str = "--") -> str:
    known = [option.replace("-", "_") for option in options._options]
    known += OTHER_SPELLINGS
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _set(name: str, value: Any, where: str) -> None:
    """Set one option, a string as on the command line. Raises `OptionError`."""
    option = _option_of(name)
    try:
        if value is None and option.default is None:
            pass
        elif option.multiple:
            if isinstance(value, str):
                value = value.split(",")
            if not isinstance(value, list | tuple):
                raise ValueError("a list")
            value = [_converted(option, part) for part in value if part != ""]
        else:
            value = _converted(option, value)
            _check(option.name, option.metavar or "", value)
    except ValueError as error:
        raise OptionError(f"{where} must be {error}, not {value!r}") from None
    option.set(value)


def _converted(option: Any, value: Any) -> Any:
    """`value` in the option's type. Raises `ValueError` with what it must be."""
    kind = option.type
    if isinstance(value, str):
        value = value.strip()
        if kind is bool:
            if value.lower() not in TRUTHS:
                raise ValueError("true or false")
            return TRUTHS[value.lower()]
        if kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                raise ValueError(
                    "a whole number" if kind is int else "a number"
                ) from None
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError({str: "text", int: "a whole number", float: "a number",
                          bool: "True or False"}.get(kind, f"a {kind.__name__}"))
    return value


def _check(name: str, metavar: str, value: Any) -> None:
    """Check a value's range; the metavar says what it is.

    Raises `ValueError` with what it must be.
    """
    if metavar == "PORT" and not 0 <= value <= 65535:
        raise ValueError("a port, 0 to 65535")
    if metavar in ("BYTES", "COUNT") and value < 1:
        raise ValueError("at least 1")
    if metavar == "SHARE" and not 0 <= value <= 1:
        raise ValueError("0 to 1")
    if metavar == "LEVEL" and not 1 <= value <= 9:
        raise ValueError("1 to 9")
    if metavar == "SECONDS":
        if not value >= 0:  # nan is not
            raise ValueError("0 or more seconds")
        if value == float("inf") and name != "order_wait":
            raise ValueError("a finite number of seconds")
    if name == "logging" and value.lower() not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)}")


def set_up_logging() -> None:
    """As the options say. Raises `OptionError` where that can't be."""
    try:
        options.run_parse_callbacks()
    except (OSError, ValueError) as error:
        raise OptionError(f"can't log as --log_* say: {error}") from None


def print_help() -> None:
    """Print every option, grouped by the module that defines it."""
    print("Usage: socketdock [--option=value ...]\n")
    print("Relays WebSocket clients to a backend that speaks only HTTP. Every option")
    print(f"can be set in the environment as {ENVIRONMENT_PREFIX}<OPTION>, too, and in")
    print("the file that --config names; the flag beats both.")
    groups: dict[str, list[Any]] = {}
    for option in options._options.values():
        groups.setdefault(_module_of(option.group_name), []).append(option)
    for module in sorted(groups, key=lambda name: (name != "socketdock", name)):
        print(f"\n{module}:\n")
        for option in sorted(groups[module], key=lambda option: option.name):
            flag = f"--{option.name}" + (f"={option.metavar}" if option.metavar else "")
            default = "" if option.default in (None, "", []) else (
                f" [{option.default}]"
            )
            lines = textwrap.wrap((option.help or "") + default, 50)
            print(f"  {flag:<37} {lines[0]}")
            for line in lines[1:]:
                print(f"{'':40}{line}")


def _module_of(file_name: str) -> str:
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == file_name:
            return "socketdock" if module.__name__ == "__main__" else module.__name__
    return "tornado.options"


# The service.


def client_routes(**shared: Any) -> list[tuple[str, type[RequestHandler], Any]]:
    """What clients may ask for."""
    return [(r"/ws", ClientSocketHandler, shared), (r"/livez", LiveHandler, {})]


def callback_routes(
    prefix: str, **shared: Any
) -> list[tuple[str, type[RequestHandler], Any]]:
    """What the backend may ask for, with and without its path prefix."""
    start = f"(?:{re.escape(prefix)})?/socket/([0-9a-f]{{32}})"
    return [
        (rf"{start}/send", SendHandler, shared),
        (rf"{start}/disconnect", DisconnectHandler, shared),
        (start, ConnectionHandler, shared),
        (r"/livez", LiveHandler, {}),
        (r"/readyz", ReadyHandler, {"connections": shared["connections"]}),
    ]


def make_server(
    routes: Sequence[Any], sockets: Sequence[socket.socket], max_body_size: int
) -> HTTPServer:
    """Serve `routes` on `sockets`; a body is held in memory, so it is bounded."""
    application = Application(
        list(routes),
        default_handler_class=ProblemHandler,
        log_function=log_request,
    )
    server = HTTPServer(
        application,
        max_header_size=MAX_HEADER_SIZE,
        idle_connection_timeout=IDLE_CONNECTION_TIMEOUT,
        body_timeout=BODY_TIMEOUT,
        max_body_size=max_body_size,
        max_buffer_size=2 * MAX_HEADER_SIZE,
    )
    server.add_sockets(sockets)
    return server


def log_request(handler: RequestHandler) -> None:
    """One line for each request, without its query."""
    status = handler.get_status()
    logger.log(
        logging.WARNING if status >= 500 else logging.DEBUG,
        "%s %s: %d",
        handler.request.method,
        handler.request.path,
        status,
    )


def make_policy() -> ClientPolicy:
    """What clients are held to, from the options."""
    for origin in options.allowed_origins:
        if origin != "*" and split_origin(origin) is None:
            raise OptionError(
                f"--allowed_origins: {origin} is no origin, such as"
                " https://app.example.com or https://*.example.com, nor *"
            )
    return ClientPolicy(
        max_message_size=options.max_message_size,
        allowed_origins=tuple(options.allowed_origins),
        require_origin=options.require_origin,
        subprotocols=tuple(options.subprotocols),
        compression=(
            Compression(options.compression_level) if options.compression else None
        ),
        max_send_buffer=options.max_send_buffer,
        send_timeout=options.send_timeout,
        queue_messages=options.connection_queue_messages,
        queue_bytes=options.connection_queue_bytes,
    )


def listen(address: str, port: int) -> list[socket.socket]:
    """Bind and listen. Raises `OptionError` where that can't be."""
    try:
        return bind_sockets(port, address, backlog=BACKLOG)
    except (OSError, ValueError) as error:  # no address, or not even a host's name
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"can't listen at port {port} of {address or '*'}: {reason}"
        ) from None


def url_of(scheme: str, address: str, port: int) -> str:
    """A listener's URL, without a path."""
    host = f"[{address}]" if ":" in address else address
    return f"{scheme}://{host}:{port}"


def callback_url(external: str | None, address: str, port: int) -> str | None:
    """How the backend reaches the callbacks, without a trailing slash.

    None where nothing was given and the address is a wildcard.
    """
    if not external:
        if address in ("", "0.0.0.0", "::"):
            return None
        return url_of("http", address, port)
    url = external if "://" in external else f"http://{external}"
    try:
        parts = urlsplit(url)
        wrong = (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or (parts.port or 1) < 1
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
            or not url.isascii()
            or re.search(r"[\s\x00-\x1f\x7f]", url)
        )
    except ValueError:
        wrong = True
    if wrong:
        raise OptionError(
            f"--externalhostandport={external} is neither host:port nor an http(s) URL"
        )
    return url.rstrip("/")


async def serve() -> int:
    """Start, relay until a signal, and drain. Returns the exit status.

    Raises `OptionError` where an option keeps it from starting.
    """
    stop = stop_signal()  # before anybody can know that this has started
    policy = make_policy()
    client_sockets = listen(options.bindip, options.bindport)
    address, port = options.bindip, client_sockets[0].getsockname()[1]
    clients = url_of("ws", address, port)
    callback_sockets = []
    if options.callbackport is not None:
        address = options.callbackip or options.bindip
        callback_sockets = listen(address, options.callbackport)
        port = callback_sockets[0].getsockname()[1]
    elif options.callbackip is not None:
        raise OptionError("--callbackip needs --callbackport")

    external = callback_url(options.externalhostandport, address, port)
    name = options.instance_name or socket.gethostname()
    instance = f"{name}/{secrets.token_hex(8)}"
    backend: Backend = backends.load(options.backend).make_backend(
        Relay(external, instance, __version__)
    )

    connections = ConnectionMap(options.max_pending, options.max_queued_bytes)
    heartbeat = Heartbeat(options.ping_interval, options.ping_timeout)
    shared = {"connections": connections, "backend": backend}
    to_clients = client_routes(heartbeat=heartbeat, policy=policy, **shared)
    to_backend = callback_routes(
        urlsplit(external or "").path,
        max_message_size=policy.max_message_size,
        **shared,
    )
    if callback_sockets:
        servers = [
            make_server(to_clients, client_sockets, MAX_HEADER_SIZE),
            make_server(to_backend, callback_sockets, policy.max_message_size),
        ]
    else:
        servers = [
            make_server(
                [*to_clients, *to_backend], client_sockets, policy.max_message_size
            )
        ]
    logger.info(
        "SocketDock %s: clients at %s/ws, callbacks at %s, backend %s",
        __version__,
        clients,
        url_of("http", address, port),
        options.backend,
    )

    await stop.wait()
    drained = await connections.drain(
        options.drain_delay, options.drain_spread, options.drain_timeout
    )
    heartbeat.close()
    await backend.close()
    for server in servers:
        server.stop()
        await server.close_all_connections()
    logger.info("stopped")
    return 0 if drained else 1


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
    return stop


def main() -> None:
    """The console script `socketdock`."""
    if "--version" in sys.argv[1:]:
        print(f"SocketDock {__version__}")
        return
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            load_backends(sys.argv[1:], os.environ)
            print_help()
            return
        warnings = parse_options(sys.argv[1:], os.environ)
        set_up_logging()
        for warning in warnings:
            logger.warning(warning)
        status = asyncio.run(serve())
    except OptionError as error:
        print(f"socketdock: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    sys.exit(status)


if __name__ == "__main__":
    main()
