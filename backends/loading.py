"""Finds backends by name, and imports them.

A module of this package, or any importable one with a dot in its name.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tornado.options import Error as OptionError

PACKAGE = "backends"
# Listed, since this package also has modules that backends share; the most usual first.
BUILT_IN = ("http", "loopback", "apigateway", "redis")


def names() -> list[str]:
    """Return the names of the built-in backends, sorted."""
    return sorted(BUILT_IN)


def built_in(name: str) -> str | None:
    """Return the built-in backend that `name` is, or to which this module belongs."""
    module = f"{name}." if "." in name else f"{PACKAGE}.{name}."
    return next(
        (each for each in BUILT_IN if module.startswith(f"{PACKAGE}.{each}.")), None
    )


def users_of_options(module: str) -> list[str]:
    """Return the names of the built-in backends that read the options of `module`.

    The most usual one is the first. `module` is a full name. Options belong to the
    backend in whose package they are defined, or to those that list a shared module in
    `OPTION_MODULES`.
    """
    return [
        name
        for name in BUILT_IN
        if f"{module}.".startswith(f"{PACKAGE}.{name}.")
        or module in getattr(load(name), "OPTION_MODULES", ())
    ]


def load(name: str) -> ModuleType:
    """Import the backend called `name`, which defines its options.

    A name with a dot is looked for in the current folder, too, after all of
    Python's path: nothing there can take the place of an installed module.

    Raises `OptionError` with one sentence: there is no such module, it can't
    be imported, or it is no backend.
    """
    module_name = name
    if "." not in name:
        module_name = f"{PACKAGE}.{name}"
    elif "" not in sys.path:
        sys.path.append("")  # the current folder
    try:
        found = importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError as error:
        # A missing parent is a wrong name; a parent that misses something is not.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise OptionError(_import_failure(name, error)) from error
        found = False
    except ValueError:
        found = False
    except Exception as error:
        raise OptionError(_import_failure(name, error)) from error
    if not found:
        raise OptionError(f"there is no backend {name!r}: {_where_to_look(name)}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise OptionError(_import_failure(name, error)) from error
    if not callable(getattr(module, "make_backend", None)):
        raise OptionError(
            f"module {module_name} is no backend: no make_backend() in it"
        )
    return module


def _where_to_look(name: str) -> str:
    """What to write instead of a name that no backend has, or where its file is."""
    if name in BUILT_IN:
        return f"its file in {Path(__file__).parent} is missing or may not be read"
    if "." in name:
        return (
            f"no module {name} in the current folder or on Python's path"
            " (PYTHONPATH adds folders to it);"
            f" the built-in ones are {', '.join(names())}"
        )
    return (
        f"choose one of {', '.join(names())},"
        " or give a module's full name, with a dot"
    )


def _import_failure(name: str, error: Exception) -> str:
    return f"backend {name!r} failed to import: {type(error).__name__}: {error}"
