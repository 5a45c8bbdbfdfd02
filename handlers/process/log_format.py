"""Formats log lines: JSON for programs, text for people.

`handlers.process.logs` chooses one of the two.
"""

import logging
import time
from collections.abc import Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

import orjson
from tornado.log import LogFormatter

MAX_LINE = 16 * 1024  # bytes; Docker and containerd split longer lines
UNFORMATTED = " (can't be formatted)"  # follows a message with the wrong arguments
SILENT = logging.CRITICAL + 1  # the level of `none`

# Fields that every record has, or that are internal. The others came in `extra`.
NO_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {
    "_allowed", "asctime", "color", "end_color", "message", "taskName",
    "time", "level", "logger", "exception",
}
LEVELS = {
    number: logging.getLevelName(number).lower()
    for number in (
        logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL
    )
} | {SILENT: "none"}

_ExcInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None]
    | tuple[None, None, None]
)


class JSONFormatter(logging.Formatter):
    """Formats a record as one JSON object, in one line of at most `MAX_LINE` bytes.

    It has `time` (RFC 3339, UTC), `level`, `logger` and `message`, the record's own
    fields, and `exception`, a traceback in one string.
    """

    _second = -1
    _stamp = ""

    def format(self, record: logging.LogRecord) -> str:
        own = {n: v for n, v in record.__dict__.items() if n not in NO_FIELDS}
        if record.exc_info:
            own["exception"] = self.formatException(record.exc_info)
        line = self.line(
            record.created, record.levelno, record.name, _message(record), own
        )
        return line.decode()

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
            "time": f"{self._stamp}.{int((created - second) * 1000):03d}Z",
            "level": level_name(level),
            "logger": name,
            "message": message,
            **own,
        }
        line = _dumped(fields)
        return line if len(line) <= MAX_LINE else _fitting(fields)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # of the `str()` of any argument
        return f"{record.msg}{UNFORMATTED}"


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
        line = _dumped({name: _cut(value, longest) for name, value in fields.items()})
        if len(line) <= MAX_LINE:
            return line
    standing = ("time", "level", "logger", "message")
    return _dumped({name: _cut(fields[name], longest) for name in standing})


def _cut(value: Any, longest: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else _text(value)
    if len(text) <= longest:
        return text
    # The end of a traceback names the error.
    return f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"


TEXT_LINE = (
    "%(color)s[%(levelname)1.1s %(asctime)s %(name)s]%(end_color)s %(message)s"
)


class TextFormatter(LogFormatter):
    """Tornado's lines, with colors on a terminal; only tracebacks take several.

    They name the logger instead of a line of code, which compiled modules do not know.
    Unprintable characters are escaped, so that no peer's bytes reach a terminal.
    """

    def __init__(self, color: bool) -> None:
        super().__init__(TEXT_LINE, color=color)

    def format(self, record: logging.LogRecord) -> str:
        message = _message(record)
        if (
            not message.isprintable()
            or len(message) > MAX_LINE
            or message.endswith(UNFORMATTED)
        ):
            record = logging.makeLogRecord(record.__dict__)
            record.msg, record.args = _printable(message), None
        return super().format(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return local time in ISO 8601: 2026-11-25T09:30:00.123+01:00."""
        local = datetime.fromtimestamp(record.created).astimezone()
        return local.isoformat(timespec="milliseconds")

    def formatException(self, ei: _ExcInfo) -> str:
        return _printable(super().formatException(ei), kept="\n")


def _printable(text: str, kept: str = "") -> str:
    """Escape unprintable characters except `kept`, and shorten to `MAX_LINE`."""
    escaped = "".join(
        c if c.isprintable() or c in kept else ascii(c)[1:-1]
        for c in _cut(text, MAX_LINE)
    )
    shortened: str = _cut(escaped, MAX_LINE)
    return shortened


def level_name(level: int) -> str:
    """Return a level's name in lower case."""
    return LEVELS.get(level) or str(logging.getLevelName(level)).lower()
