"""`--help` and `--help-all`: options by purpose."""

import sys
import textwrap
from typing import Any

from tornado.options import options

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
       socketdock dev [--option=value ...]     serves functions written for AWS
       socketdock check [--option=value ...]   finds problems before the start
       socketdock check --send ...             sends the backend test events, too
       socketdock health [--option=value ...]  asks whether this relay serves
       socketdock config                       prints an options file to edit
       socketdock worker [--option=value ...]  takes events from Redis to a backend
       socketdock redis-partitions N ...       adds streams of the redis backend
       socketdock --version | --help | --help-all

Relays WebSocket clients to a backend that speaks only HTTP. An echo server:

    socketdock --bindport=8765

Each message is POSTed to a backend, which replies by callbacks:

    socketdock --backend=http --messageuri=http://127.0.0.1:8000/message

Options can also be set in the environment (SOCKETDOCK_<OPTION>) and in the file that
--config names. A flag overrides the environment, the environment the file."""

# Headings of --help-all, in order, with the modules whose options they have. The
# longest name that fits counts, of a module or of a package.
PURPOSES = (
    ("Service", ("socketdock", "handlers.process", "handlers.connections")),
    ("Delivery to the backend", ("backends", "handlers.backlog")),
    ("Client connections and limits",
     ("handlers.clients", "handlers.admission", "handlers.rates")),
    ("Listeners and TLS", ("handlers.http",)),
    ("Callbacks, operators and console",
     ("handlers.callbacks", "handlers.operators", "handlers.owners")),
    ("Metrics, tracing and probes",
     ("handlers.operators.collecting", "handlers.probes",
      "handlers.telemetry")),
    ("Log", ("handlers.process.logs", "tornado.log")),
    ("Help", ("tornado.options",)),
)
COMMON = "Common options"


def print_help(all_options: bool) -> None:
    """Print the options that most relays need, or all of them by purpose."""
    print(USAGE)
    headings = [COMMON, *(heading for heading, _ in PURPOSES)]
    groups: dict[str, list[Any]] = {heading: [] for heading in headings}
    for option in options._options.values():
        if all_options:
            heading = purpose_of(module_of(option.group_name))
            groups.setdefault(heading, []).append(option)
        elif option.name.replace("-", "_") in EVERYDAY:
            groups[COMMON].append(option)
    for heading, listed in groups.items():
        if listed:
            print(f"\n{heading}:\n")
        for option in sorted(listed, key=lambda option: option.name):
            _print_option(option)
    if not all_options:
        print("\n--help-all prints all options.")


def _print_option(option: Any) -> None:
    flag = f"--{option.name}" + (f"={option.metavar}" if option.metavar else "")
    default = "" if option.default in (None, "", []) else f" [{option.default}]"
    lines = textwrap.wrap((option.help or "") + default, 50)
    print(f"  {flag:<37} {lines[0]}")
    for line in lines[1:]:
        print(f"{'':40}{line}")


def purpose_of(module: str) -> str:
    """Return the heading of a module's options.

    For a module outside this project, such as a backend of one's own, it has the
    module's name.
    """
    fitting = [
        (len(name), heading)
        for heading, names in PURPOSES
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(fitting)[1] if fitting else f"Options of {module}"


def module_of(group: str) -> str:
    """Return the name of the module that defines an option, by the option's group.

    That is the module's file, or its name if that can be compiled: Tornado cannot find
    the file of a compiled module.
    """
    if group in sys.modules:
        return group
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == group:
            return "socketdock" if module.__name__ == "__main__" else module.__name__
    return "tornado.options"
