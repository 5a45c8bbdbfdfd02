"""Prints conf/socketdock.conf as it ships, for `socketdock config`.

The file is the only place of its texts. In a checkout it may have been edited, since it
is the default options file: what it sets is printed at the default.
"""

import ast
from pathlib import Path
from typing import Any

from backends import Unavailable
from backends.files import read_text
from handlers.process.options.names import option_of
from handlers.process.options.sources import DEFAULT_CONFIG, read_config

# Where setup.py installs it, in the environment's folder, which has lib/, too.
INSTALLED = "share/socketdock/conf/socketdock.conf"


def print_template() -> None:
    """Print the options file, in which each line is a comment.

    Raises `OptionError`, for example if the file of a checkout is no options file.
    """
    path = DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else _installed()
    settings = list(read_config(path))  # raises if it is not
    lines = read_text(path, f"can't read {path}").splitlines()
    if settings:
        _unset(lines)
    print("\n".join(lines))


def _unset(lines: list[str]) -> None:
    """Replace each setting, which may take several lines, with a comment."""
    for statement in reversed(ast.parse("\n".join(lines)).body):
        assert isinstance(statement, ast.Assign)
        assert isinstance(statement.targets[0], ast.Name)
        name = statement.targets[0].id
        lines[statement.lineno - 1 : statement.end_lineno] = [
            f"# {name} = {_default(option_of(name))!r}"
        ]


def _default(option: Any) -> object:
    if option is None:
        return None
    return option.default or [] if option.multiple else option.default


def _installed() -> Path:
    for folder in Path(__file__).resolve().parents:  # that of site-packages, and above
        if (path := folder / INSTALLED).exists():
            return path
    raise Unavailable(f"the installation has no {INSTALLED}; install it again")
