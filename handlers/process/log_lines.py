"""Writes log lines in JSON: `handlers.process.log_format` formats records with it.

Each connection has a line at its beginning and one at its end, so this is compiled.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import orjson

MAX_LINE = 16 * 1024  # bytes; Docker and containerd split longer lines
SILENT = logging.CRITICAL + 1  # the level of `none`

# The time of a line: the second and milliseconds. One format for both takes less time
# than one for each.
TIME = "%s.%03dZ"
LEVELS = {
    number: logging.getLevelName(number).lower()
    for number in (
        logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL
    )
} | {SILENT: "none"}


class JSONLines:
    """Makes lines that are one JSON object each, of at most `MAX_LINE` bytes.

    They have `time` (RFC 3339, UTC), `level`, `logger`, `message`, and other fields.
    """

    __slots__ = ("_second", "_stamp")

    def __init__(self) -> None:
        self._second = -1
        self._stamp = ""  # of that second

    def line(
        self,
        created: float,
        level: int,
        name: str,
        message: str,
        own: Mapping[str, Any],
    ) -> bytes:
        """Return a line without its line end; `own` are the record's own fields."""
        second = int(created)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        fields = {
            "time": TIME % (self._stamp, int((created - second) * 1000)),
            "level": level_name(level),
            "logger": name,
            "message": message,
            **own,
        }
        line = _dumped(fields)
        return line if len(line) <= MAX_LINE else _fitting(fields)


def _dumped(fields: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields, default=str)
    except TypeError:  # for example a lone surrogate, or too large a number
        return orjson.dumps({name: _text(value) for name, value in fields.items()})


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


def _fitting(fields: Mapping[str, Any]) -> bytes:
    """Return the line with its texts shortened to fit into `MAX_LINE`."""
    longest = MAX_LINE
    while longest > 32:
        longest //= 2
        line = _dumped({name: cut(value, longest) for name, value in fields.items()})
        if len(line) <= MAX_LINE:
            return line
    standing = ("time", "level", "logger", "message")
    return _dumped({name: cut(fields[name], longest) for name in standing})


def cut(value: Any, longest: int) -> Any:
    """Shorten a text to `longest` characters; numbers stay."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else _text(value)
    if len(text) <= longest:
        return text
    # The end of a traceback names the error.
    return f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"


def level_name(level: int) -> str:
    """Return a level's name in lower case."""
    return LEVELS.get(level) or str(logging.getLevelName(level)).lower()
