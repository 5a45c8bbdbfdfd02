"""Reads the files that options name: options, tokens, secrets, headers, log settings.

`handlers.process.options`, `handlers` and `backends.http` all read such files, so this
module imports only the interface.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tornado.options import Error as OptionError

from backends import Unavailable

MAX_FILE_SIZE = 1024 * 1024  # bytes, where a caller sets no limit of its own


def require_regular(path: str | Path, where: str) -> None:
    """Raise `Unavailable`, after `where`, unless `path` is a regular file.

    To open a FIFO would block, and to open a device may do anything.
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
    """Return a file's text: UTF-8, a byte order mark in front of it is left out.

    Raises `Unavailable`, whose sentence begins with `where`, if it can't be read or
    is not a regular file, `OptionError` if it is larger than `max_size` bytes or not
    UTF-8.
    """
    require_regular(path, where)
    try:
        # Not to block, should it have become a FIFO since.
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

    Raises as `read_text`, and `Unavailable` where there is no such line: the file
    is only half written, more likely than meant to be empty.
    """
    found = False
    # Not splitlines(): for it a form feed ends a line, too.
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
