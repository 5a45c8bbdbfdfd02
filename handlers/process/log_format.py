"""Formats log lines: JSON for programs, text for people.

`handlers.process.logs` chooses one of the two.
"""

import logging
from datetime import datetime
from types import TracebackType

from tornado.log import LogFormatter

from handlers.process.log_lines import MAX_LINE, JSONLines, cut

UNFORMATTED = " (can't be formatted)"  # follows a message with the wrong arguments

# Fields that every record has, or that are internal. The others came in `extra`.
NO_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {
    "_allowed", "asctime", "color", "end_color", "message", "taskName",
    "time", "level", "logger", "exception",
}

_ExcInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None]
    | tuple[None, None, None]
)


class JSONFormatter(logging.Formatter):
    """Formats a record as one of `JSONLines`.

    Its other fields are the record's own, and `exception`, a traceback in one string.
    """

    lines = JSONLines()

    def format(self, record: logging.LogRecord) -> str:
        own = {n: v for n, v in record.__dict__.items() if n not in NO_FIELDS}
        if record.exc_info:
            own["exception"] = self.formatException(record.exc_info)
        line = self.lines.line(
            record.created, record.levelno, record.name, _message(record), own
        )
        return line.decode()


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # of the `str()` of any argument
        return f"{record.msg}{UNFORMATTED}"


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
        for c in cut(text, MAX_LINE)
    )
    shortened: str = cut(escaped, MAX_LINE)
    return shortened
