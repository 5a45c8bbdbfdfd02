"""SocketDock: relays between WebSocket clients and a backend that speaks only HTTP.

    python socketdock.py --backend=http --messageuri=http://127.0.0.1:8000/message

This module sets the options and runs a command; without one, it serves.
`handlers.program` has what the commands do.
"""

from handlers.process.form import form, require_unchanged_sources

require_unchanged_sources()

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from tornado.options import Error as OptionError
from tornado.options import define, options

import backends
from backends import Unavailable
from handlers.process.command_line import arguments_of
from handlers.process.event_loop import loop_factory
from handlers.process.lifecycle import exit_now, open_standard_streams
from handlers.process.logs import make_log
from handlers.process.options import (
    limits,
    load_backends,
    parse_options,
    settings_of,
)
from handlers.process.options.help import print_help
from handlers.process.options.template import print_template
from handlers.program.service import serve

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

USAGE_ERROR = 2  # exit status: an invalid option
COMMANDS = ("check", "config", "dev", "health", "redis-partitions", "worker")


async def grow_partitions(number: str) -> int:
    """Grow the number of partitions in Redis. Returns the exit status."""
    if not number.isdecimal():
        raise OptionError("redis-partitions needs a number: the new one of partitions")
    print(await backends.load("redis").grow_partitions(int(number)))
    return 0


def run(command: str, words: list[str]) -> int:
    """Run a command. Returns the exit status; raises `OptionError`."""
    if "--version" in words:
        print(f"SocketDock {__version__} ({form()})")
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
        from handlers.http.development import (
            DevelopmentAuthority,
            named_hosts,
            set_development_options,
        )

        folder = set_development_options(os.environ)
    if command == "health":
        from handlers.program.health import health

        return health()
    factory = loop_factory(options.event_loop)
    if command == "check":
        from handlers.program.check import check

        return asyncio.Runner(loop_factory=factory).run(
            check(__version__, warnings, sends)
        )
    log = make_log(lambda: settings_of("logging", words, os.environ))
    for warning in warnings:
        logger.warning(warning)
    variables: Sequence[str] = ()
    if develops:
        authority = DevelopmentAuthority(folder, named_hosts(), os.environ)
        variables = authority.variables
    return asyncio.Runner(loop_factory=factory).run(
        serve(__version__, limits(), log, variables)
    )


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
