"""The log: lines for people on a terminal, lines of JSON for programs.

`make_log` makes a `Log` of the options. All others write to a logger of the
standard library, and name in `extra` what a program may look for: `event`,
`connection_id`, `code`. What repeats itself is counted (`handlers.process.log_limit`).
"""

import contextlib
import errno
import importlib
import json
import logging
import logging.config
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, TextIO

import orjson
from tornado.log import LogFormatter, enable_pretty_logging
from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Unavailable
from backends.files import read_text
from handlers.process.log_limit import Repeats

logger = logging.getLogger(__name__)

define("log_format", default="auto", metavar="FORMAT",
       help="text, json, or auto: text on a terminal, JSON elsewhere")
define("log_config", type=str, metavar="PATH",
       help="file for Python's logging.config, in JSON or YAML; replaces all log "
            "options except --logging")

# What Tornado's log file is made of.
LOG_FILE = ("log_file_prefix", "log_file_max_size", "log_file_num_backups",
            "log_rotate_mode", "log_rotate_when", "log_rotate_interval")

MAX_LINE = 16 * 1024  # bytes; Docker and containerd cut longer ones in pieces
UNFILLED = " (can't be filled in)"  # behind a message with the wrong arguments
COMPLAINT_INTERVAL = 60.0  # seconds that all was written before there is a new one
SILENT = logging.CRITICAL + 1  # the level of `none`

# What every record has, and what is not for others; the rest is of its line alone.
NO_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {
    "_told", "asctime", "color", "end_color", "message", "taskName",
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
    """One JSON object for each record, in one line of at most `MAX_LINE` bytes.

    `time` (RFC 3339, UTC), `level`, `logger` and `message`, then what the record
    has of its own, and `exception`, a traceback in one string.
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
        """A line, without its end; `own` is what it has besides what all have."""
        second = int(created)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        fields = {
            "time": f"{self._stamp}.{int((created - second) * 1000):03d}Z",
            "level": _level_name(level),
            "logger": name,
            "message": message,
            **own,
        }
        line = _dumped(fields)
        return line if len(line) <= MAX_LINE else _fitting(fields)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # of whatever is shown in it
        return f"{record.msg}{UNFILLED}"


def _dumped(fields: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields, default=str)
    except TypeError:  # half a surrogate, say, or too large a number
        return orjson.dumps({name: _text(value) for name, value in fields.items()})


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


def _fitting(fields: Mapping[str, Any]) -> bytes:
    """With its texts cut so that it is no longer than a line may be."""
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
    # A traceback's end says what it was.
    return f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"


class TextFormatter(LogFormatter):
    """Tornado's lines, in colours on a terminal; only tracebacks take several.

    What can't be printed is escaped, so that no peer's bytes get to a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = _message(record)
        if (
            not message.isprintable()
            or len(message) > MAX_LINE
            or message.endswith(UNFILLED)
        ):
            record = logging.makeLogRecord(record.__dict__)
            record.msg, record.args = _printable(message), None
        return super().format(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """In local time, as ISO 8601 has it: 2026-11-25T09:30:00.123+01:00."""
        local = datetime.fromtimestamp(record.created).astimezone()
        return local.isoformat(timespec="milliseconds")

    def formatException(self, ei: _ExcInfo) -> str:
        return _printable(super().formatException(ei), kept="\n")


def _printable(text: str, kept: str = "") -> str:
    """With all but `kept` escaped that is not, and no longer than a line may be."""
    escaped = "".join(
        c if c.isprintable() or c in kept else ascii(c)[1:-1]
        for c in _cut(text, MAX_LINE)
    )
    shortened: str = _cut(escaped, MAX_LINE)
    return shortened


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes each line at once; where nobody can read it, it is lost."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def write(self, line: bytes) -> None:
        """Write a line of JSON, without its end, as one."""
        with self.lock or contextlib.nullcontext():
            try:
                buffer = self.stream.buffer
                buffer.write(line + b"\n")
                buffer.flush()
            except (OSError, ValueError, AttributeError):
                pass

    def handleError(self, record: logging.LogRecord) -> None:
        """There is no other place to tell of it."""


class Complaint:
    """Says on stderr that lines can't be written, once while that lasts.

    In place of a handler's `handleError`, which prints a traceback for each line.
    """

    def __init__(self) -> None:
        self._failed_at = float("-inf")  # seconds, monotonic

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        failed_at, self._failed_at = self._failed_at, time.monotonic()
        if self._failed_at - failed_at < COMPLAINT_INTERVAL:
            return
        with contextlib.suppress(OSError, ValueError):
            print(
                f"socketdock: can't write to the log, lines are lost:"
                f" {_why(error or ValueError(record.msg))}",
                file=sys.stderr,
                flush=True,
            )


def tell(about: logging.Logger, message: str, fields: Mapping[str, Any]) -> None:
    """As `about.info(message, extra=fields)`, which has to be enabled.

    For the lines that each connection has: where nobody but stderr is to have
    them, and in JSON, they are made without a record, at a third of the price.
    """
    handlers = logging.root.handlers
    if len(handlers) == 1 and type(handler := handlers[0]) is StderrHandler:
        formatter = handler.formatter
        if type(formatter) is JSONFormatter:
            handler.write(
                formatter.line(time.time(), logging.INFO, about.name, message, fields)
            )
            return
    about.info(message, extra=fields, stacklevel=2)


class Log:
    """Where the lines go, from which level on, and what they look like.

    `settings` gives what the level is set to, as pairs of a place and a level, of
    which the last one counts; `reload()` asks it again. Lines go to `channels`,
    and to stderr where `to_stderr`. With `config`, the path of a file for
    `logging.config`, they go where that says. Raises `OptionError`.
    """

    def __init__(
        self,
        settings: Callable[[], Sequence[tuple[str, str]]],
        format_name: str = "auto",
        channels: Sequence[logging.Handler] = (),
        to_stderr: bool = True,
        config: str | None = None,
    ) -> None:
        self._settings = settings
        self._path = config
        self._config: dict[str, Any] | None = None
        self._repeats = Repeats()
        self._complaint = Complaint()
        if config is None:
            _write_to([*channels, *[StderrHandler()] * to_stderr], format_name)
        self._apply()
        self._attach()
        logging.captureWarnings(True)
        logging.getLogger("tornado.general").addFilter(hush_peers)

    def _apply(self) -> Sequence[tuple[str, str]]:
        settings = self._settings()
        config = read_log_config(self._path) if self._path is not None else None
        before = logging.root.level
        logging.root.setLevel(logging.INFO)  # where nobody says anything else
        if config is not None:
            try:
                self._configure(config)
            except OptionError:
                logging.root.setLevel(before)
                raise
        if settings:
            _, level = settings[-1]
            logging.root.setLevel(getattr(logging, level.upper(), SILENT))
        return settings

    def _configure(self, config: dict[str, Any]) -> None:
        try:
            with contextlib.ExitStack() as held:
                for path in _paths_of_handlers(config):
                    held.enter_context(_held_open(path))
                logging.config.dictConfig(config)
        except Exception as error:  # of whatever class the file names
            if self._config is not None:
                logging.config.dictConfig(self._config)
                self._attach()
            cause = error.__cause__ or error
            kind = Unavailable if isinstance(cause, OSError) else OptionError
            raise kind(f"--log_config={self._path}: {_why(error)}") from None
        self._config = config

    def _attach(self) -> None:
        """Have each handler count repeats, and complain once when it can't write."""
        for each in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(each, "handlers", ()):
                handler.addFilter(self._repeats)
                if type(handler).handleError is logging.Handler.handleError:
                    handler.handleError = self._complaint

    def reload(self) -> None:
        """Read the level again, and the file for `logging.config`.

        Raises `OptionError`, and all stays as it was.
        """
        before = logging.root.level
        settings = self._apply()
        self._attach()
        after = logging.root.level
        if after != before:
            logging.root.setLevel(min(before, after))  # so that it is told
            logger.info("level %s, before %s", _level_name(after), _level_name(before))
            logging.root.setLevel(after)
        if settings:
            *others, (place, level) = settings
            for other, unheard in others:
                if unheard.lower() != level.lower() and other != place:
                    logger.info(
                        "%s says %s, and is not heard: %s says %s",
                        other, unheard, place, level,
                    )

    def begin(self) -> None:
        """From now on a loop runs, by which repeats are summed up."""
        self._repeats.begin()

    def close(self) -> None:
        """Tell what was only counted so far."""
        self._repeats.close()


def _write_to(handlers: Sequence[logging.Handler], format_name: str) -> None:
    for handler in handlers:
        on_terminal = _is_terminal(handler)
        name = format_name
        if name == "auto":
            name = "text" if on_terminal else "json"
        if name == "text":
            handler.setFormatter(TextFormatter(color=on_terminal))
            continue
        handler.setFormatter(JSONFormatter())
        if isinstance(sys.stderr, TextIOWrapper):
            sys.stderr.reconfigure(encoding="utf-8")  # whatever the locale
    # Where there is none at all, `logging` has one of its own.
    logging.root.handlers[:] = handlers or [logging.NullHandler()]


def _is_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and bool(stream.isatty())


def _level_name(level: int) -> str:
    return LEVELS.get(level) or str(logging.getLevelName(level)).lower()


def file_channels(settings: Mapping[str, Any]) -> list[logging.Handler]:
    """Tornado's log file, by the values of its `log_file_*` and `log_rotate_*`.

    Raises `OptionError` where it can't be opened.
    """
    owner = logging.Logger("")
    try:
        with _held_open(settings["log_file_prefix"]):
            enable_pretty_logging(
                SimpleNamespace(**settings, logging="info", log_to_stderr=False), owner
            )
    except (OSError, ValueError) as error:
        kind = Unavailable if isinstance(error, OSError) else OptionError
        raise kind(f"can't log as --log_* say: {error}") from None
    return owner.handlers


def _paths_of_handlers(config: Mapping[str, Any]) -> Iterator[str]:
    """Whatever may be the path of a file that a handler of `config` opens."""
    handlers = config.get("handlers")
    for settings in handlers.values() if isinstance(handlers, dict) else ():
        for value in settings.values() if isinstance(settings, dict) else ():
            if isinstance(value, str) and os.path.exists(value):
                yield value


@contextlib.contextmanager
def _held_open(path: str) -> Iterator[None]:
    """Hold open what is a FIFO: to open it once more does not block.

    Raises `OSError` for one that nobody reads.
    """
    if not Path(path).is_fifo():
        yield
        return
    try:
        fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            error.strerror = "nobody reads this FIFO"
        raise
    try:
        yield
    finally:
        os.close(fifo)


def read_log_config(path: str) -> dict[str, Any]:
    """What a file for `logging.config` says, in JSON or YAML. Raises `OptionError`."""
    where = f"--log_config={path}"
    text = read_text(path, where)
    kind = Path(path).suffix.lower()
    if kind == ".json" or (
        kind not in (".yaml", ".yml") and text.lstrip().startswith("{")
    ):
        config = _of_json(text, where)
    else:
        config = _of_yaml(text, where)
    if not isinstance(config, dict):
        raise OptionError(f"{where}: it holds no names and values")
    # Those of every module would be, that is, all.
    config.setdefault("disable_existing_loggers", False)
    return config


def _of_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where}: it is not JSON: {_why(error)}") from None


def _of_yaml(text: str, where: str) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise OptionError(
            f"{where}: YAML needs PyYAML, which socketdock[yaml] brings; JSON does not"
        ) from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{where}: it is not YAML: {_why(error)}") from None


def _why(error: BaseException) -> str:
    """In one line, with what is behind it."""
    parts = [error] if error.__cause__ is None else [error, error.__cause__]
    text = ": ".join(str(part) or type(part).__name__ for part in parts)
    return " ".join(text.split())


def hush_peers(record: logging.LogRecord) -> bool:
    """A filter of Tornado's log: what peers do wrong is told at `debug` only.

    Not in their words, either: Tornado quotes header values of malformed requests.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(value).__name__ if isinstance(value, Exception) else value
            for value in record.args
        )
    own = logging.getLogger(record.name)
    return record.levelno >= logging.ERROR or own.isEnabledFor(logging.DEBUG)


def make_log(levels: Callable[[], list[tuple[str, Any]]]) -> Log:
    """The log, from now on; `levels` looks again where its level is set, and to what.

    Raises `OptionError`.
    """
    to_file = bool(options.log_file_prefix)
    if options.log_config:
        for name in ("log_format", "log_to_stderr", "log_file_prefix"):
            if options[name] not in (None, "", "auto"):
                raise OptionError(f"--log_config leaves nothing for --{name} to say")
    return Log(
        levels,
        options.log_format,
        file_channels({n: options[n] for n in LOG_FILE}) if to_file else (),
        options.log_to_stderr if options.log_to_stderr is not None else not to_file,
        options.log_config or None,
    )
