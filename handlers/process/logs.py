"""Configures the log: where its lines go, its level, and --log_config.

`make_log` makes a `Log` from the options. All other modules use loggers of the
standard library, and pass fields for programs in `extra`, such as `event`,
`connection_id` and `code`. `log_format` has the formatters; `log_limit` counts lines
that repeat.
"""

import contextlib
import errno
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from tornado.log import enable_pretty_logging
from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Unavailable
from backends.files import read_text
from handlers.process.log_format import JSONFormatter, TextFormatter
from handlers.process.log_limit import LogLimit
from handlers.process.log_lines import SILENT, level_name

logger = logging.getLogger(__name__)

define("log_format", default="auto", metavar="FORMAT",
       help="text, json, or auto: text on a terminal, JSON elsewhere")
define("log_config", type=str, metavar="PATH",
       help="file for Python's logging.config, in JSON or YAML; replaces all log "
            "options except --logging")

# The options of Tornado's log file.
LOG_FILE = ("log_file_prefix", "log_file_max_size", "log_file_num_backups",
            "log_rotate_mode", "log_rotate_when", "log_rotate_interval")

REPORT_INTERVAL = 60.0  # seconds without a failure before the next report


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes each line immediately; lines that cannot be written are lost."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def write(self, line: bytes) -> None:
        """Write one line of JSON, which has no line end yet."""
        with self.lock or contextlib.nullcontext():
            try:
                buffer = self.stream.buffer
                buffer.write(line + b"\n")
                buffer.flush()
            except (OSError, ValueError, AttributeError):
                pass

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: there is no other place to report it."""


class FailureReport:
    """Reports on stderr that the log cannot be written, once until it recovers.

    Replaces a handler's `handleError`, which prints a traceback for each line.
    """

    def __init__(self) -> None:
        self._failed_at = float("-inf")  # seconds, monotonic

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        failed_at, self._failed_at = self._failed_at, time.monotonic()
        if self._failed_at - failed_at < REPORT_INTERVAL:
            return
        with contextlib.suppress(OSError, ValueError):
            print(
                f"socketdock: can't write to the log, lines are lost:"
                f" {_why(error or ValueError(record.msg))}",
                file=sys.stderr,
                flush=True,
            )


def log_event(to: logging.Logger, message: str, fields: Mapping[str, Any]) -> None:
    """Do the same as `to.info(message, extra=fields)`; the level must be enabled.

    For the lines of every connection. If the log goes to stderr alone, in JSON, this
    makes no record, and takes a third of the time.
    """
    handlers = logging.root.handlers
    if len(handlers) == 1 and type(handler := handlers[0]) is StderrHandler:
        formatter = handler.formatter
        if type(formatter) is JSONFormatter:
            line = formatter.lines.line(
                time.time(), logging.INFO, to.name, message, fields
            )
            handler.write(line)
            return
    to.info(message, extra=fields, stacklevel=2)


class Log:
    """Configures the root logger: handlers, level and formatters.

    `settings` returns where the level is set, and to what, as pairs; the last one
    counts. `reload()` calls it again. Lines go to `channels`, and to stderr if
    `to_stderr`. `config` is the path of a file for `logging.config`, which replaces
    both. Raises `OptionError`.
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
        self._limit = LogLimit()
        self._failure_report = FailureReport()
        if config is None:
            _write_to([*channels, *[StderrHandler()] * to_stderr], format_name)
        self._apply()
        self._attach()
        logging.captureWarnings(True)
        logging.getLogger("tornado.general").addFilter(hide_peer_details)

    def _apply(self) -> Sequence[tuple[str, str]]:
        settings = self._settings()
        config = read_log_config(self._path) if self._path is not None else None
        before = logging.root.level
        logging.root.setLevel(logging.INFO)  # the default
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
        from logging.config import dictConfig

        try:
            with contextlib.ExitStack() as held:
                for path in _paths_of_handlers(config):
                    held.enter_context(_held_open(path))
                dictConfig(config)
        except Exception as error:  # raised by any class that the file names
            if self._config is not None:
                dictConfig(self._config)
                self._attach()
            cause = error.__cause__ or error
            kind = Unavailable if isinstance(cause, OSError) else OptionError
            raise kind(f"--log_config={self._path}: {_why(error)}") from None
        self._config = config

    def _attach(self) -> None:
        """Add the limit and the failure report to each current handler."""
        for each in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(each, "handlers", ()):
                handler.addFilter(self._limit)
                if type(handler).handleError is logging.Handler.handleError:
                    handler.handleError = self._failure_report

    def reload(self) -> None:
        """Read the level and the file for `logging.config` again.

        Raises `OptionError`, and then changes nothing.
        """
        before = logging.root.level
        settings = self._apply()
        self._attach()
        after = logging.root.level
        if after != before:
            logging.root.setLevel(min(before, after))  # so that this is logged
            logger.info("level %s, before %s", level_name(after), level_name(before))
            logging.root.setLevel(after)
        if settings:
            *others, (place, level) = settings
            for other, unheard in others:
                if unheard.lower() != level.lower() and other != place:
                    logger.info(
                        "%s says %s, and is overridden: %s says %s",
                        other, unheard, place, level,
                    )

    def begin(self) -> None:
        """Start the summaries of lines that repeat, on the running loop."""
        self._limit.begin()

    def close(self) -> None:
        """Log the last summary."""
        self._limit.close()


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
            sys.stderr.reconfigure(encoding="utf-8")  # independent of the locale
    # Without any handler, `logging` would use its own.
    logging.root.handlers[:] = handlers or [logging.NullHandler()]


def _is_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and bool(stream.isatty())


def file_channels(settings: Mapping[str, Any]) -> list[logging.Handler]:
    """Make the handler of Tornado's log file, from `log_file_*` and `log_rotate_*`.

    Raises `OptionError` if the file cannot be opened.
    """
    owner = logging.Logger("")
    try:
        with _held_open(settings["log_file_prefix"]):
            enable_pretty_logging(
                SimpleNamespace(**settings, logging="info", log_to_stderr=False), owner
            )
    except (OSError, ValueError) as error:
        kind = Unavailable if isinstance(error, OSError) else OptionError
        raise kind(f"can't open the log file (--log_*): {error}") from None
    return owner.handlers


def _paths_of_handlers(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield each string of a handler in `config` that may be a file's path."""
    handlers = config.get("handlers")
    for settings in handlers.values() if isinstance(handlers, dict) else ():
        for value in settings.values() if isinstance(settings, dict) else ():
            if isinstance(value, str) and os.path.exists(value):
                yield value


@contextlib.contextmanager
def _held_open(path: str) -> Iterator[None]:
    """Keep a FIFO open, so that opening it again does not block.

    Raises `OSError` for a FIFO without a reader.
    """
    if not Path(path).is_fifo():
        yield
        return
    try:
        fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            error.strerror = "no process reads this FIFO"
        raise
    try:
        yield
    finally:
        os.close(fifo)


def read_log_config(path: str) -> dict[str, Any]:
    """Read a file for `logging.config`, in JSON or YAML. Raises `OptionError`."""
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
        raise OptionError(f"{where}: it is not a mapping of names to values")
    # By default, `dictConfig` disables the loggers of all modules.
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
    """Describe an error and its cause in one line."""
    parts = [error] if error.__cause__ is None else [error, error.__cause__]
    text = ": ".join(str(part) or type(part).__name__ for part in parts)
    return " ".join(text.split())


def hide_peer_details(record: logging.LogRecord) -> bool:
    """Filter Tornado's log: log faults of peers at `debug` only, and without details.

    Tornado quotes header values of malformed requests.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(
            type(value).__name__ if isinstance(value, Exception) else value
            for value in record.args
        )
    own = logging.getLogger(record.name)
    return record.levelno >= logging.ERROR or own.isEnabledFor(logging.DEBUG)


def make_log(levels: Callable[[], list[tuple[str, Any]]]) -> Log:
    """Configure the log from the options; `levels` is `settings` of `Log`.

    Raises `OptionError`.
    """
    to_file = bool(options.log_file_prefix)
    if options.log_config:
        for name in ("log_format", "log_to_stderr", "log_file_prefix"):
            if options[name] not in (None, "", "auto"):
                raise OptionError(f"--{name} has no effect with --log_config")
    return Log(
        levels,
        options.log_format,
        file_channels({n: options[n] for n in LOG_FILE}) if to_file else (),
        options.log_to_stderr if options.log_to_stderr is not None else not to_file,
        options.log_config or None,
    )
