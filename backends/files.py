"""Reads the files that options name: options, tokens, secrets, headers, log settings.

`handlers` and `backends.http` use it; it imports only the backends' interface.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tornado.options import Error as OptionError

from backends import Unavailable

MAX_FILE_SIZE = 1024 * 1024  # bytes; a caller may set another limit


def require_regular(path: str | Path, where: str) -> None:
    """Raise `Unavailable` unless `path` is a regular file.

    Its text begins with `where`. Opening a FIFO would block, and opening a device may
    have any effect.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise Unavailable(f"{where}: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise Unavailable(f"{where}: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(mode):
        raise Unavailable(f"{where}: it is not a regular file")


def read_text(path: str | Path, where: str, max_size: int = MAX_FILE_SIZE) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Raises `Unavailable` if it cannot be read or is not a regular file, and
    `OptionError` if it is larger than `max_size` bytes or not UTF-8. The text of both
    begins with `where`.
    """
    require_regular(path, where)
    try:
        # O_NONBLOCK, in case the file was replaced with a FIFO since the check.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb") as opened:
            content = opened.read(max_size + 1) or b""
    except OSError as error:
        raise Unavailable(f"{where}: {_reason(error)}") from None
    if len(content) > max_size:
        raise OptionError(f"{where}: it is larger than {max_size} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError(f"{where}: it is not UTF-8") from None


def read_lines(
    path: str | Path, where: str, max_size: int = MAX_FILE_SIZE
) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is neither blank nor a # comment.

    Raises as `read_text`, and `Unavailable` if there is no such line: probably the file
    is being written.
    """
    found = False
    # Not splitlines(), which also splits at form feeds.
    lines = re.split("\r\n|\n", read_text(path, where, max_size))
    for number, line in enumerate(lines, start=1):
        stripped = line.strip(" \t")
        if stripped and not stripped.startswith("#"):
            found = True
            yield number, stripped
    if not found:
        raise Unavailable(f"{where}: it is empty")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
