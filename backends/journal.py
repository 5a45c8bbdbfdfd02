"""Records the ids of open connections on disk, so that they survive `kill -9`.

Each run appends to one file: `+<id>` before the first event of a connection is sent,
`-<id>` when its disconnect event was accepted or given up. Each line is one `write`,
after which the kernel has it: a crash of the process loses nothing, without fsync. The
next start reads the files of dead runs (`backends.http.open_connections`).
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tornado.options import define

from backends import Unavailable

logger = logging.getLogger(__name__)

define("state_dir", type=str, metavar="PATH",
       help="folder that keeps the ids of open connections over a crash, so that the "
            "next start can send their disconnect events; none: not kept")

SUFFIX = ".journal"
FRESH = ".fresh"  # a journal that is being rewritten
COMPACT_ABOVE = 4 * 1024 * 1024  # bytes; a journal of this size is rewritten
MAX_UNWRITTEN = 64 * 1024  # bytes of lines that are kept while the disk is full
RETRY_INTERVAL = 1.0  # seconds between two attempts to write lines after a failure
KEPT_ASIDE = 10  # the latest corrupt journals, kept for an operator to examine
LINE_LENGTH = len("+\n") + 84  # bytes, at most
# See `handlers.owners` for ids: with --peer_address they are longer.
_LINE = re.compile(rb"([+-])([0-9a-f]{32}(?:[0-9a-f]{28}|[0-9a-f]{52})?)")
_ASIDE = re.compile(r"\.corrupt-([0-9]{1,20})")
_HEAD = re.compile(rb"socketdock journal 1 (\S.*)")
# After these errors a file still has its previous content.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Journal:
    """The open connections of this run, in one file.

    Lines that cannot be written are kept and written later: a full disk must not stop
    the relay. Raises `OSError` if the file cannot be created.
    """

    def __init__(self, directory: Path, instance: str) -> None:
        self.instance = instance
        self._path = directory / f"{instance.rpartition('/')[2]}{SUFFIX}"
        self._ids: dict[str, None] = {}
        self._unwritten = b""  # complete lines
        self._stale = False  # whether the file must be rewritten
        self._retry: asyncio.TimerHandle | None = None
        self._size = _replace(self._path, instance, ())
        self._file = _open_to_append(self._path)

    def rename(self, instance: str) -> None:
        """Name another run as that of the connections."""
        self.instance = instance
        self._stale = True
        if self._retry is None:
            self._try_to_write()

    def add(self, connection_id: str) -> None:
        """Record a connection before its first event is sent."""
        self._ids[connection_id] = None
        self._append(_line(b"+", connection_id))

    def remove(self, connection_id: str) -> None:
        """Remove a connection when its disconnect event was accepted or given up."""
        if connection_id in self._ids:
            del self._ids[connection_id]
            self._append(_line(b"-", connection_id))

    def close(self) -> None:
        """Write the remaining lines and close; an empty journal is deleted."""
        if self._retry is not None:
            self._retry.cancel()
        with contextlib.suppress(OSError):
            self._write()
        os.close(self._file)
        if not self._ids:
            self._path.unlink(missing_ok=True)

    def _append(self, line: bytes) -> None:
        self._unwritten += line
        if len(self._unwritten) > MAX_UNWRITTEN:
            self._stale, self._unwritten = True, b""
        if self._retry is None or not self._stale:
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:
            # Retry by a timer: there may be no further connection.
            if self._retry is None:
                logger.error(
                    "journal %s: %s; what is not written is kept, and written later",
                    self._path,
                    error.strerror,
                )
                loop = asyncio.get_running_loop()
                self._retry = loop.call_later(RETRY_INTERVAL, self._on_retry)
        else:
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
                logger.warning("journal %s: all is written again", self._path)

    def _on_retry(self) -> None:
        assert self._retry is not None
        self._retry = asyncio.get_running_loop().call_later(
            RETRY_INTERVAL, self._on_retry
        )
        self._try_to_write()

    def _write(self) -> None:
        """Write all kept lines. Raises `OSError`, and then the file is unchanged."""
        if not self._stale:
            self._write_lines()
            if self._size <= max(COMPACT_ABOVE, 4 * LINE_LENGTH * len(self._ids)):
                return
        self._rewrite()

    def _write_lines(self) -> None:
        if self._unwritten:
            try:
                _write_whole(self._file, self._unwritten)
            except OSError as error:
                self._stale = error.errno not in _FULL
                raise
            self._size += len(self._unwritten)
            self._unwritten = b""

    def _rewrite(self) -> None:
        self._size = 0  # so that a failure is not repeated with the next line
        self._size = _replace(self._path, self.instance, self._ids)
        file = _open_to_append(self._path)
        os.close(self._file)
        self._file, self._stale, self._unwritten = file, False, b""


class DeadRun:
    """The connections that an earlier run left in its journal.

    The file is open only while a line is written: there may be more journals than a
    process may open files.
    """

    def __init__(self, path: Path, instance: str, ids: Iterable[str]) -> None:
        self.instance = instance
        self._path = path
        self._ids = dict.fromkeys(ids)

    @property
    def ids(self) -> list[str]:
        """Ids of the connections whose disconnect event is due, oldest first."""
        return list(self._ids)

    def remove(self, connection_id: str) -> None:
        """Remove a connection; with the last one, remove the file."""
        self._ids.pop(connection_id, None)
        try:
            if not self._ids:
                self._path.unlink(missing_ok=True)
                return
            file = _open_to_append(self._path)
            try:
                _write_whole(file, _line(b"-", connection_id))
            finally:
                os.close(file)
        except OSError as error:  # the next start sends this connection's event again
            logger.error("journal %s: %s", self._path, error.strerror)


class StateDirectory:
    """`--state_dir`: this run's journal, and those of dead runs."""

    def __init__(self, path: Path, instance: str) -> None:
        """Raises `Unavailable` if `path` cannot be used, or another process uses it."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(
                path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            )
        except OSError as error:
            raise _unavailable(path, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in path.glob(f"*{FRESH}"):
                with contextlib.suppress(OSError):
                    left.unlink()
            self.dead = list(_read_dead(path))
            _remove_old(path)
            self.journal = Journal(path, instance)
        except BlockingIOError:
            os.close(self._lock)
            raise Unavailable(
                f"--state_dir={path} is used by another process"
            ) from None
        except OSError as error:
            os.close(self._lock)
            raise _unavailable(path, error) from None

    def close(self) -> None:
        """Release the directory for another process."""
        with contextlib.suppress(OSError):
            self.journal.close()
        os.close(self._lock)


def _unavailable(path: Path, error: OSError) -> Unavailable:
    what, why = error.filename, error.strerror
    if isinstance(error, FileExistsError):  # raised by mkdir: not a directory
        why = os.strerror(errno.ENOTDIR)
    where = f"--state_dir={path}"
    if what is not None and os.fspath(what) != os.fspath(path):
        where += f": {os.fspath(what)}"
    return Unavailable(f"{where}: {why}")


def _read_dead(directory: Path) -> Iterator[DeadRun]:
    """Yield each dead run whose journal names connections; delete other journals.

    One that cannot be read is logged and left unchanged: it must not prevent the start.
    """
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            run = _read(path)
            if run is not None and not run.ids:
                path.unlink()
        except OSError as error:
            logger.error("journal %s can't be used: %s", path, error.strerror)
            continue
        if run is not None and run.ids:
            yield run


def _remove_old(directory: Path) -> None:
    """Delete corrupt journals except the latest ones: each crash may leave one."""
    found = [
        (int(match[1]), aside)
        for aside in directory.iterdir()
        if (match := _ASIDE.fullmatch(aside.suffix)) is not None
    ]
    old = sorted(found)[:-KEPT_ASIDE]
    for _, aside in old:
        with contextlib.suppress(OSError):
            aside.unlink()
    if old:
        logger.warning(
            "%d older corrupt journals are removed from %s, the latest %d stay",
            len(old), directory, KEPT_ASIDE,
        )


def _read(path: Path) -> DeadRun | None:
    """Read a dead run's journal; None if its first line is invalid.

    A torn or corrupt journal is logged and renamed, for an operator to examine, and
    replaced with the lines that are valid. Raises `OSError`.
    """
    head, *lines = _content(path).split(b"\n")
    match = _HEAD.fullmatch(head)
    corrupt = match is None or lines[-1:] != [b""]
    ids: dict[str, None] = {}
    for line in lines[:-1]:
        entry = _LINE.fullmatch(line)
        if entry is None:
            corrupt = True
        elif entry[1] == b"+":
            ids[entry[2].decode()] = None
        else:
            ids.pop(entry[2].decode(), None)
    instance = match[1].decode(errors="replace") if match else ""
    if corrupt:
        aside = path.with_suffix(f".corrupt-{time.time_ns()}")
        path.rename(aside)
        logger.error(
            "journal %s is torn or corrupt: set aside as %s, %d connections read",
            path,
            aside.name,
            len(ids) if match else 0,
        )
        if match is None:
            return None
        try:
            _replace(path, instance, ids)
        except OSError:  # keep the original, so that the next start reads it again
            aside.rename(path)
            raise
    return DeadRun(path, instance, ids)


def _content(path: Path) -> bytes:
    """Read a regular file; do not block if it is something else."""
    file = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    )
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file")
    with open(file, "rb") as opened:
        return opened.read()


def _line(sign: bytes, connection_id: str) -> bytes:
    return b"%b%b\n" % (sign, connection_id.encode())


def _replace(path: Path, instance: str, ids: Iterable[str]) -> int:
    """Replace a journal, and return its size in bytes.

    Raises `OSError`, and then the old file stays.
    """
    lines = [f"socketdock journal 1 {instance}\n".encode()]
    lines += [_line(b"+", connection_id) for connection_id in ids]
    data = b"".join(lines)
    fresh = path.with_suffix(FRESH)
    file = os.open(
        fresh,
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW,
        0o666,
    )
    try:
        with open(file, "wb") as opened:
            opened.write(data)
        fresh.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()  # frees its disk space
        raise
    return len(data)


def _open_to_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)


def _write_whole(file: int, data: bytes) -> None:
    """Append all of `data`, or none of it. Raises `OSError`."""
    written = os.write(file, data)
    if written < len(data):  # the disk is full
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
