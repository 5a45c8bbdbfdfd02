"""Reads options from their sources: flags, environment and file. Checks no values."""

import ast
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tornado.options import Error as OptionError

from backends.files import read_text
from handlers.process.options.names import is_secret, nearest, option_of

DEFAULT_CONFIG = Path(__file__).resolve().parents[3] / "conf" / "socketdock.conf"

ENVIRONMENT_PREFIX = "SOCKETDOCK_"
# What Kubernetes injects for services called socketdock, socketdock-metrics and so
# on (kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
INJECTED = re.compile(
    r"(\w+_)??SERVICE_(HOST|PORT(_\w+)?)=.*"
    r"|(\w+_)??PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*"
    r"|(\w+_)??PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)

TRUTHS = {"true": True, "1": True, "yes": True, "on": True, "t": True,
          "false": False, "0": False, "no": False, "off": False, "f": False}


class Setting(NamedTuple):
    """A line of an options file, read but not checked; `where` is for errors."""

    where: str
    name: str
    value: Any


def read_environment(
    environ: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Yield variable, option name and value of each `SOCKETDOCK_` variable.

    Skips empty ones, which count as not set, and those that Kubernetes injects, even
    if an option has that name.
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
            if is_secret(option):  # the rest of the line may be another secret
                raise OptionError(
                    "the argument after a secret is not an option: options start"
                    " with --, and several secrets are separated by commas"
                )
            raise OptionError(f"{word!r} is not an option: options start with --")
        name, equals, value = word[2:].partition("=")
        option = option_of(name)
        if option is None:
            raise OptionError(f"there is no option --{name}{nearest(name)}")
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

    Values are Python literals: the file is parsed, never executed. Names may contain
    dashes instead of underscores.
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


def config_path(argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    """Return the path of the options file; None: there is none."""
    given = last_of("config", argv)
    for _, name, value in read_environment(environ):
        if name == "config" and not given:
            given = value.strip()
    if given:
        # Only --config accepts /dev/null, which selects no file.
        return None if given == os.devnull else Path(given)
    try:
        DEFAULT_CONFIG.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass  # to read it fails, too, and says why
    return DEFAULT_CONFIG


def last_of(name: str, argv: Sequence[str]) -> str | None:
    """Return the last value of a flag, without checking the others."""
    found = None
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found
