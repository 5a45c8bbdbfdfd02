"""Checks the values of options, independently of their source."""

import re
from typing import Any

from tornado.options import Error as OptionError

from backends.hosts import is_host
from handlers.process.options.names import is_secret, option_of
from handlers.process.options.sources import TRUTHS

# Surrogates represent bytes of the environment that are not UTF-8.
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

# Options for which 0 seconds would always expire immediately.
NEVER_ZERO = frozenset({
    "backend_connect_timeout", "backend_dead_after", "body_timeout",
    "breaker_first_probe", "breaker_last_probe", "breaker_window", "function_timeout",
    "handshake_timeout", "header_timeout", "send_timeout",
})
LEAST_TIME = 0.001  # seconds
# The minimum of other options. No handshake fits into fewer bytes of headers.
LEAST = {
    "log_file_max_size": 0,
    "log_file_num_backups": 0,
    "log_rotate_interval": 1,
    "max_header_size": 1024,
}
# Options for which 0 means no limit, or never.
MAY_BE_ZERO = frozenset({
    "bytes_per_second", "function_retries", "max_connections_per_ip", "max_frame_size"
})

MAX_NUMBER = 2**48  # the largest value of any count; system calls accept more
MAX_SHOWN = 100  # characters of a wrong value
LOG_FORMATS = ("auto", "text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "none")


def checked(name: str, value: Any, where: str) -> Any:
    """Return the checked value of an option. Raises `OptionError`.

    `value` is a string as on the command line, or a literal of the options file;
    `where` is its source, for the error.
    """
    option = option_of(name)
    shown = repr(value)
    try:
        if value is None and option.default is None:
            pass
        elif option.multiple:
            if isinstance(value, str):
                value = value.split(",")
            if not isinstance(value, list | tuple):
                raise ValueError("a list")
            # An empty secret is an error, not an absent one: the module that uses it
            # reports that.
            value = [
                _converted(option, part)
                for part in value
                if part != "" or is_secret(option)
            ]
        else:
            value = _converted(option, value)
            _check(option.name, option.metavar or "", value)
    except ValueError as error:
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}..."
        given = "" if is_secret(option) else f", not {shown}"
        raise OptionError(f"{where} must be {error}{given}") from None
    return value


def _converted(option: Any, value: Any) -> Any:
    """Convert `value` to the option's type.

    Raises `ValueError` with what the value must be.
    """
    kind = option.type
    if isinstance(value, str):
        value = value.strip()
        if kind is bool:
            if value.lower() not in TRUTHS:
                raise ValueError("true or false")
            return TRUTHS[value.lower()]
        if kind in (int, float):
            try:
                # Python's number types accept the digits of every script.
                return kind(value.encode("ascii"))
            except ValueError:
                raise ValueError(
                    "a whole number" if kind is int else "a number"
                ) from None
        if NO_TEXT.search(value):
            raise ValueError("text in UTF-8, without control characters")
        return value
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError("a number that is not that large") from None
    if type(value) is not kind:
        raise ValueError({str: "text", int: "a whole number", float: "a number",
                          bool: "True or False"}.get(kind, f"a {kind.__name__}"))
    return value


def _check(name: str, metavar: str, value: Any) -> None:
    """Check the range of a value. `metavar` is its unit.

    Raises `ValueError` with what the value must be.
    """
    if type(value) is int and value > MAX_NUMBER:
        raise ValueError(f"at most {MAX_NUMBER}")
    if metavar == "ADDRESS" and value is not None and not is_host(value):
        raise ValueError(
            "an address, such as 127.0.0.1 or ::1, or a host's name; 0.0.0.0 and ::"
            " are all addresses"
        )
    if value is not None and value < LEAST.get(name, value):
        raise ValueError(f"at least {LEAST[name]}")
    if metavar == "PORT" and not 0 <= value <= 65535:
        raise ValueError("a port, 0 to 65535")
    if metavar in ("BYTES", "COUNT"):
        if name in MAY_BE_ZERO:
            if value < 0:
                raise ValueError("0 or more")
        elif value < 1:
            raise ValueError("at least 1")
    # With a lower rate a client would not be read for minutes.
    if metavar == "RATE" and value != 0 and not 0.01 <= value < float("inf"):
        raise ValueError("0, or 0.01 or more in a second")
    if metavar == "SHARE" and not 0 < value <= 1:
        raise ValueError("above 0, and at most 1")
    if metavar == "LEVEL" and not 1 <= value <= 9:
        raise ValueError("1 to 9")
    if metavar == "SECONDS":
        if not value >= 0:  # negative, or NaN
            raise ValueError("0 or more seconds")
        if value < LEAST_TIME and name in NEVER_ZERO:
            raise ValueError(f"more than 0 seconds, at least {LEAST_TIME}")
        if value == float("inf") and name != "order_wait":
            raise ValueError("a finite number of seconds")
    if name == "http_server" and value not in ("fast", "tornado"):
        raise ValueError("fast or tornado")
    if name == "reply" and value not in ("commands", "body", "off"):
        raise ValueError("commands, body or off")
    if name == "log_format" and value not in LOG_FORMATS:
        raise ValueError(f"one of {', '.join(LOG_FORMATS)}")
    if name == "logging" and value.lower() not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)}")
