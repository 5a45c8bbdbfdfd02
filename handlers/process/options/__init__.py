"""Sets the options from flags, environment, file and defaults, in that precedence.

Each is defined beside the code that it controls, and read where that code is made:
in `handlers.program` and in a backend's `make_backend()`. `sources` reads them,
`values` checks them, `help` lists them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tornado.options import Error as OptionError
from tornado.options import options

import backends
from handlers.process.options.help import module_of
from handlers.process.options.names import nearest, option_of
from handlers.process.options.sources import (
    ENVIRONMENT_PREFIX,
    Setting,
    config_path,
    last_of,
    read_config,
    read_environment,
    read_flags,
)
from handlers.process.options.values import checked

# Units of options that limit something.
LIMIT_UNITS = ("BYTES", "COUNT", "RATE", "SECONDS")


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Set `tornado.options` from flags, environment, file and defaults.

    In that precedence. `argv` is without the program's name. Returns warnings
    to be logged. Raises `OptionError` with one sentence.
    """
    warnings: list[str] = []
    given: list[Any] = []
    for setting in load_backends(argv, environ):
        if option_of(setting.name) is None:
            raise OptionError(
                f"{setting.where}: there is no option"
                f" {setting.name}{nearest(setting.name, '')}"
            )
        given.append(
            _set(setting.name, setting.value, f"{setting.where}: {setting.name}")
        )
    for variable, name, value in read_environment(environ):
        if option_of(name) is not None:
            given.append(_set(name, value, variable))
        else:
            warnings.append(
                f"Ignoring unknown variable {variable}"
                f"{nearest(name.upper(), ENVIRONMENT_PREFIX)}"
            )
    for name, value in read_flags(argv):
        given.append(_set(name, value, f"--{name}"))
    _set_defaults(given)
    return warnings + _unused(given)


def settings_of(
    name: str, argv: Sequence[str], environ: Mapping[str, str]
) -> list[tuple[str, Any]]:
    """Return where an option is set now, and to what; the last one counts.

    Reads the sources again, and sets nothing. Raises `OptionError`.
    """
    path = config_path(argv, environ)
    found = [
        (f"{setting.where}: {setting.name}", setting.name, setting.value)
        for setting in (read_config(path) if path is not None else ())
    ]
    found += read_environment(environ)
    for spelling, value in read_flags(argv):
        found.append((f"--{spelling}", spelling, value))
    wanted = option_of(name)
    return [
        (where, checked(spelling, value, where))
        for where, spelling, value in found
        if option_of(spelling) is wanted
    ]


def load_backends(argv: Sequence[str], environ: Mapping[str, str]) -> list[Setting]:
    """Import the built-in backends and the one that is selected.

    A backend defines its options when it is imported, so this must precede setting
    any. Returns the settings of the options file. Raises `OptionError`.
    """
    for name in backends.names():
        backends.load(name)
    path = config_path(argv, environ)
    from_file = list(read_config(path)) if path is not None else []
    chosen = last_of("backend", argv)
    for _, name, value in read_environment(environ):
        if name == "backend" and not chosen:
            chosen = value
    for setting in reversed(from_file):
        if setting.name == "backend" and not chosen:
            chosen = setting.value
    if isinstance(chosen, str) and chosen:
        backends.load(chosen)
    return from_file


def _set(name: str, value: Any, where: str) -> Any:
    """Set one option, a string as on the command line, and return it.

    Raises `OptionError`.
    """
    option = option_of(name)
    option.set(checked(name, value, where))
    return option


def _set_defaults(given: Sequence[Any]) -> None:
    """Set the selected backend's own defaults of options that are not `given`."""
    module = backends.load(options.backend)
    for name, value in getattr(module, "option_defaults", dict)().items():
        option = option_of(name)
        if option not in given:
            option.set(value)


def _unused(given: Sequence[Any]) -> list[str]:
    """Return a warning for each other backend whose options have no effect.

    None if the selected backend is not built in: it may use a built-in one.
    """
    chosen = backends.built_in(options.backend)
    if chosen is None:
        return []
    users_of: dict[str, list[str]] = {}
    for option in dict.fromkeys(given):
        users = backends.users_of_options(module_of(option.group_name))
        if users and chosen not in users and option.value() != option.default:
            users_of[f"--{option.name}"] = users
    # Several backends share options; who uses most of these was probably meant.
    uses = Counter(user for users in users_of.values() for user in users)
    found: dict[str, list[str]] = {}
    for name, users in users_of.items():
        found.setdefault(max(users, key=uses.__getitem__), []).append(name)
    return [
        f"--backend={chosen} does not use {', '.join(names)}; did you mean"
        f" --backend={user}?"
        for user, names in found.items()
    ]


def limits() -> dict[str, float | str]:
    """Return the options that limit something, by name; none is a secret."""
    found = {
        option.name.replace("-", "_"): option.value()
        for option in options._options.values()
        if option.metavar in LIMIT_UNITS
    }
    # JSON has no infinity.
    return {name: "inf" if v == float("inf") else v for name, v in found.items()}
