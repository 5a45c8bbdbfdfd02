"""The options, from every source: flags, environment, file and defaults.

Each is defined beside the code that it steers, and read where that code is made:
in `socketdock.py` and in a backend's `make_backend()`. Here they get their values,
which are checked by what the metavar says they are.
"""

import ast
import difflib
import ipaddress
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado.options import Error as OptionError
from tornado.options import options

import backends
from backends.files import read_text

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "conf" / "socketdock.conf"

# The spellings of the existing SocketDock's deployments.
OTHER_SPELLINGS = {
    "message-uri": "messageuri",
    "disconnect-uri": "disconnecturi",
    "connect-uri": "connecturi",
    "endpoint": "externalhostandport",
    "log-level": "logging",
}

# What --help shows; --help-all shows all.
EVERYDAY = frozenset({
    "allowed_origins", "backend", "bindip", "bindport", "callback_token_file",
    "callbackip", "callbackport", "config", "connecturi", "disconnecturi",
    "externalhostandport", "help", "log_format", "logging", "max_message_size",
    "messageuri", "state_dir", "tls_cert", "tls_key", "trusted_proxies",
    "webhook_secret_file", "ws_path",
})
USAGE = """\
Usage: socketdock [--option=value ...]
       socketdock check [--option=value ...]   finds problems before the start
       socketdock health [--option=value ...]  asks whether this relay serves
       socketdock --version | --help | --help-all

Relays WebSocket clients to a backend that speaks only HTTP. An echo server:

    socketdock --bindport=8765

Each message is POSTed to a backend, which replies by callbacks:

    socketdock --backend=http --messageuri=http://127.0.0.1:8000/message

Options can also be set in the environment (SOCKETDOCK_<OPTION>) and in the file that
--config names. A flag overrides the environment, the environment the file."""

ENVIRONMENT_PREFIX = "SOCKETDOCK_"
# What Kubernetes injects for services called socketdock, socketdock-metrics and so
# on (kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
INJECTED = re.compile(
    r"(\w+_)??SERVICE_(HOST|PORT(_\w+)?)=.*"
    r"|(\w+_)??PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*"
    r"|(\w+_)??PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)

# Of options whose values are never shown, and of those that bound something.
SECRET_METAVARS = ("TOKENS", "SECRETS")
LIMIT_METAVARS = ("BYTES", "BYTES0", "COUNT", "COUNT0", "RATE", "SECONDS")

HOST_NAME = re.compile(r"[\w.-]+")

# The surrogates stand for bytes of the environment that are not UTF-8.
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

# Options in which 0 seconds would leave no time for anything.
NEVER_ZERO = frozenset({
    "backend_connect_timeout", "backend_dead_after", "body_timeout",
    "breaker_first_probe", "breaker_last_probe", "breaker_window", "handshake_timeout",
    "header_timeout", "send_timeout",
})
LEAST_TIME = 0.001  # seconds
# The least that others can mean. No handshake fits into fewer bytes of headers.
LEAST = {
    "log_file_max_size": 0,
    "log_file_num_backups": 0,
    "log_rotate_interval": 1,
    "max_header_size": 1024,
}

MAX_NUMBER = 2**48  # of whatever is counted; the system's calls take more
MAX_SHOWN = 100  # characters of a wrong value
LOG_FORMATS = ("auto", "text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "none")
TRUTHS = {"true": True, "1": True, "yes": True, "on": True, "t": True,
          "false": False, "0": False, "no": False, "off": False, "f": False}


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
    given: list[Any] = []
    for setting in load_backends(argv, environ):
        if _option_of(setting.name) is None:
            raise OptionError(
                f"{setting.where}: there is no option"
                f" {setting.name}{_nearest(setting.name, '')}"
            )
        given.append(
            _set(setting.name, setting.value, f"{setting.where}: {setting.name}")
        )
    for variable, name, value in read_environment(environ):
        if _option_of(name) is not None:
            given.append(_set(name, value, variable))
        else:
            warnings.append(
                f"Ignoring unknown variable {variable}"
                f"{_nearest(name.upper(), ENVIRONMENT_PREFIX)}"
            )
    for name, value in read_flags(argv):
        given.append(_set(name, value, f"--{name}"))
    return warnings + _unused(given)


def settings_of(
    name: str, argv: Sequence[str], environ: Mapping[str, str]
) -> list[tuple[str, Any]]:
    """Where an option is set, as the sources are now, and to what.

    The last one counts. Nothing is set by this. Raises `OptionError`.
    """
    path = _config_path(argv, environ)
    found = [
        (f"{setting.where}: {setting.name}", setting.name, setting.value)
        for setting in (read_config(path) if path is not None else ())
    ]
    found += read_environment(environ)
    for spelling, value in read_flags(argv):
        found.append((f"--{spelling}", spelling, value))
    wanted = _option_of(name)
    return [
        (where, _checked(spelling, value, where))
        for where, spelling, value in found
        if _option_of(spelling) is wanted
    ]


def load_backends(argv: Sequence[str], environ: Mapping[str, str]) -> list[Setting]:
    """Import those that ship and the one that is asked for, by whatever source.

    A backend defines its options when it is imported, so this comes before any
    is set. Returns the settings of the options file. Raises `OptionError`.
    """
    for name in backends.names():
        backends.load(name)
    path = _config_path(argv, environ)
    from_file = list(read_config(path)) if path is not None else []
    chosen = _last_of("backend", argv)
    for _, name, value in read_environment(environ):
        if name == "backend" and not chosen:
            chosen = value
    for setting in reversed(from_file):
        if setting.name == "backend" and not chosen:
            chosen = setting.value
    if isinstance(chosen, str) and chosen:
        backends.load(chosen)
    return from_file


def read_environment(
    environ: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Yield variable, option's name and value of each variable that may be meant.

    An empty one counts as not set, and what Kubernetes injects was meant by nobody,
    even where an option has that name.
    """
    for variable, value in environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if (
            name != variable
            and value.strip()
            and not INJECTED.fullmatch(f"{name}={value}")
        ):
            yield variable, name.lower(), value


def read_flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each flag: `--name=value`, `--name value`."""
    words = list(reversed(argv))
    option = None
    while words:
        word = words.pop()
        if not word.startswith("--") or word == "--":
            if _is_secret(option):  # it may be one more secret
                raise OptionError(
                    "what stands after a secret is not an option: options start"
                    " with --, and several secrets are separated by commas"
                )
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
    text = re.sub(
        r"^[A-Za-z][\w-]*(?=\s*=)",
        lambda m: m[0].replace("-", "_"),
        read_text(path, f"can't read {path}"),
        flags=re.M,
    )
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else str(path)
        raise OptionError(f"{where}: not name = value") from None
    for statement in statements:
        where = f"{path}, line {statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                raise OptionError(f"{where}: not name = value")
        try:
            yield Setting(where, name, ast.literal_eval(value))
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise OptionError(
                f"{where}: {name} is not a plain value,"
                " such as 'text', 8765, 2.5, True or ['a', 'b']"
            ) from None


def _config_path(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    given = _last_of("config", argv)
    for _, name, value in read_environment(environ):
        if name == "config" and not given:
            given = value.strip()
    if given:
        # No other option takes it: elsewhere an empty file means nothing.
        return None if given == os.devnull else Path(given)
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _last_of(name: str, argv: Sequence[str]) -> str | None:
    found = None
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def _option_of(name: str) -> Any:
    """tornado's record of an option (type, metavar), by any of its spellings."""
    name = name.replace("_", "-")
    return options._options.get(OTHER_SPELLINGS.get(name, name))


def _is_secret(option: Any) -> bool:
    return option is not None and option.metavar in SECRET_METAVARS


def _nearest(name: str, start: str = "--") -> str:
    """A question for whoever meant another option, in the case of `name`."""
    known = {option.replace("-", "_"): option.replace("-", "_")
             for option in options._options}
    known |= {other.replace("-", "_"): other for other in OTHER_SPELLINGS}
    given = name.lower().replace("-", "_")
    longer = [option for option in known if option.startswith(f"{given}_")]
    near = difflib.get_close_matches(given, longer, n=1, cutoff=0.0) or (
        difflib.get_close_matches(given, known, n=1)
    )
    if not near:
        return ""
    meant = near[0].upper() if name.isupper() else known[near[0]]
    return f"; did you mean {start}{meant}?"


def _set(name: str, value: Any, where: str) -> Any:
    """Set one option, a string as on the command line, and return it.

    Raises `OptionError`.
    """
    option = _option_of(name)
    option.set(_checked(name, value, where))
    return option


def _unused(given: Sequence[Any]) -> list[str]:
    """A warning for each other backend whose options `given` are, changed in vain.

    None for a backend that does not ship: it may be made of one that does.
    """
    chosen = options.backend
    if chosen not in backends.names():
        return []
    found: dict[str, list[str]] = {}
    for option in dict.fromkeys(given):
        package, _, module = _module_of(option.group_name).partition(".")
        owner = module.partition(".")[0]
        if package == "backends" and owner != chosen and (
            option.value() != option.default
        ):
            found.setdefault(owner, []).append(f"--{option.name}")
    return [
        f"--backend={chosen} does not use {', '.join(names)}; did you mean"
        f" --backend={owner}?"
        for owner, names in found.items()
    ]


def _checked(name: str, value: Any, where: str) -> Any:
    """An option's value, a string as on the command line. Raises `OptionError`."""
    option = _option_of(name)
    shown = repr(value)
    try:
        if value is None and option.default is None:
            pass
        elif option.multiple:
            if isinstance(value, str):
                value = value.split(",")
            if not isinstance(value, list | tuple):
                raise ValueError("a list")
            # An empty secret is an error, not none: its module says so.
            value = [
                _converted(option, part)
                for part in value
                if part != "" or _is_secret(option)
            ]
        else:
            value = _converted(option, value)
            _check(option.name, option.metavar or "", value)
    except ValueError as error:
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}..."
        given = "" if _is_secret(option) else f", not {shown}"
        raise OptionError(f"{where} must be {error}{given}") from None
    return value


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
                # Python takes the digits of every script.
                return kind(value.encode("ascii"))
            except ValueError:
                raise ValueError(
                    "a whole number" if kind is int else "a number"
                ) from None
        if NO_TEXT.search(value):
            raise ValueError("text in UTF-8, without control characters")
        return value
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError("a number that is not that large") from None
    if type(value) is not kind:
        raise ValueError({str: "text", int: "a whole number", float: "a number",
                          bool: "True or False"}.get(kind, f"a {kind.__name__}"))
    return value


def _check(name: str, metavar: str, value: Any) -> None:
    """Check a value's range; the metavar says what it is.

    Raises `ValueError` with what it must be.
    """
    if type(value) is int and value > MAX_NUMBER:
        raise ValueError(f"at most {MAX_NUMBER}")
    if metavar == "ADDRESS" and value is not None and not _is_host(value):
        raise ValueError(
            "an address, such as 127.0.0.1 or ::1, or a host's name; 0.0.0.0 and ::"
            " are all addresses"
        )
    if value is not None and value < LEAST.get(name, value):
        raise ValueError(f"at least {LEAST[name]}")
    if metavar == "PORT" and not 0 <= value <= 65535:
        raise ValueError("a port, 0 to 65535")
    if metavar in ("BYTES", "COUNT") and value < 1:
        raise ValueError("at least 1")
    if metavar in ("BYTES0", "COUNT0") and value < 0:
        raise ValueError("0 or more")
    # A slower one would leave a client unread for minutes.
    if metavar == "RATE" and value != 0 and not 0.01 <= value < float("inf"):
        raise ValueError("0, or 0.01 or more in a second")
    if metavar == "SHARE" and not 0 < value <= 1:
        raise ValueError("above 0, and at most 1")
    if metavar == "LEVEL" and not 1 <= value <= 9:
        raise ValueError("1 to 9")
    if metavar == "SECONDS":
        if not value >= 0:  # nan is not
            raise ValueError("0 or more seconds")
        if value < LEAST_TIME and name in NEVER_ZERO:
            raise ValueError(f"more than 0 seconds, at least {LEAST_TIME}")
        if value == float("inf") and name != "order_wait":
            raise ValueError("a finite number of seconds")
    if name == "http_server" and value not in ("fast", "tornado"):
        raise ValueError("fast or tornado")
    if name == "log_format" and value not in LOG_FORMATS:
        raise ValueError(f"one of {', '.join(LOG_FORMATS)}")
    if name == "logging" and value.lower() not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)}")


def _is_host(value: str) -> bool:
    """Whether it is written as an address or a name is; nothing would be any address.

    Neither has brackets or a port, nor are there several of them.
    """
    if ":" not in value:
        return HOST_NAME.fullmatch(value) is not None
    try:
        ipaddress.IPv6Address(value)
    except ValueError:
        return False
    return True


def limits() -> dict[str, float | str]:
    """The options that bound something, by name; none of them is a secret."""
    found = {
        option.name.replace("-", "_"): option.value()
        for option in options._options.values()
        if option.metavar in LIMIT_METAVARS
    }
    # JSON knows no infinity.
    return {name: "inf" if v == float("inf") else v for name, v in found.items()}


def print_help(all_options: bool) -> None:
    """Print the options that most relays need, or each one by its purpose."""
    print(USAGE)
    groups: dict[str, list[Any]] = {}
    for option in options._options.values():
        everyday = option.name.replace("-", "_") in EVERYDAY
        if everyday or all_options:
            module = _module_of(option.group_name) if all_options else "options"
            groups.setdefault(module, []).append(option)
    for module in sorted(groups, key=lambda name: (name != "socketdock", name)):
        print(f"\n{_purpose_of(module)}:\n")
        for option in sorted(groups[module], key=lambda option: option.name):
            metavar = (option.metavar or "").rstrip("0")  # of "0 or more"
            flag = f"--{option.name}" + (f"={metavar}" if metavar else "")
            default = "" if option.default in (None, "", []) else (
                f" [{option.default}]"
            )
            lines = textwrap.wrap((option.help or "") + default, 50)
            print(f"  {flag:<37} {lines[0]}")
            for line in lines[1:]:
                print(f"{'':40}{line}")
    if not all_options:
        print("\n--help-all prints all options.")


def _purpose_of(module: str) -> str:
    """The first line of what a module says of itself, and its name."""
    if module == "options":
        return "Common options"
    if module == "socketdock":
        return "The service (socketdock)"
    told = (getattr(sys.modules.get(module), "__doc__", None) or "").strip()
    purpose = told.partition("\n")[0].rstrip(".:,")
    return f"{purpose} ({module})" if purpose else module


def _module_of(file_name: str) -> str:
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == file_name:
            return "socketdock" if module.__name__ == "__main__" else module.__name__
    return "tornado.options"
