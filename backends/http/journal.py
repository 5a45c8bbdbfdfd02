"""The ids of open connections on disk, so that they survive `kill -9`.

One file per run, appended to: `+<id>` before the first event of a connection
leaves, `-<id>` when its disconnect event was accepted or given up. A line is
one `write` that the kernel has when it returns: a crash of the process loses
nothing, and no fsync is owed. The next start reads the files of dead runs.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from backends import Unavailable

logger = logging.getLogger(__name__)

SUFFIX = ".journal"
COMPACT_ABOVE = 4 * 1024 * 1024  # bytes; a journal that has grown to it is rewritten
_LINE = re.compile(rb"([+-])([0-9a-f]{32})")
_HEAD = re.compile(rb"socketdock journal 1 (\S.*)")


class Journal:
    """One run's connections, in one file."""

    def __init__(self, path: Path, instance: str) -> None:
        self.instance = instance
        self._path = path
        self._ids: dict[str, None] = {}
        self._file = -1
        self._size = 0

    @classmethod
    def create(cls, directory: Path, instance: str) -> "Journal":
        """A new journal in `directory`, for the run called `instance`."""
        boot_id = instance.rpartition("/")[2]
        journal = cls(directory / f"{boot_id}{SUFFIX}", instance)
        journal._write_anew()
        return journal

    @classmethod
    def read(cls, path: Path) -> "Journal | None":
        """A dead run's journal; None where nothing in it can be used.

        A torn or corrupt one is reported, and a copy of it set aside.
        """
        head, *lines = path.read_bytes().split(b"\n")
        match = _HEAD.fullmatch(head)
        journal = cls(path, match[1].decode(errors="replace") if match else "")
        corrupt = match is None or lines[-1:] != [b""]
        for line in lines[:-1]:
            entry = _LINE.fullmatch(line)
            if entry is None:
                corrupt = True
            elif entry[1] == b"+":
                journal._ids[entry[2].decode()] = None
            else:
                journal._ids.pop(entry[2].decode(), None)
        if corrupt:
            aside = path.with_suffix(f".corrupt-{time.time_ns()}")
            path.rename(aside)
            logger.error(
                "journal %s is torn or corrupt: set aside as %s, %d connections read",
                path,
                aside.name,
                len(journal._ids) if match else 0,
            )
            if match is None:
                return None
        journal._write_anew()
        return journal

    @property
    def ids(self) -> list[str]:
        """Of the connections whose end has not been told, oldest first."""
        return list(self._ids)

    def add(self, connection_id: str) -> None:
        """A connection's first event is about to leave."""
        self._ids[connection_id] = None
        self._append(b"+", connection_id)

    def remove(self, connection_id: str) -> None:
        """A connection's end has been told, or can't be."""
        if connection_id in self._ids:
            del self._ids[connection_id]
            self._append(b"-", connection_id)

    def close(self) -> None:
        """Done with: an empty journal leaves no file."""
        os.close(self._file)
        if not self._ids:
            self._path.unlink(missing_ok=True)

    def _append(self, sign: bytes, connection_id: str) -> None:
        line = b"%b%b\n" % (sign, connection_id.encode())
        self._size += len(line)
        try:
            os.write(self._file, line)
            if self._size > max(COMPACT_ABOVE, 4 * len(line) * len(self._ids)):
                self._write_anew()
        except OSError as error:  # a full disk must not stop the relay
            logger.error("journal %s: %s", self._path, error.strerror)

    def _write_anew(self) -> None:
        lines = [f"socketdock journal 1 {self.instance}"]
        lines += [f"+{connection_id}" for connection_id in self._ids]
        data = "".join(f"{line}\n" for line in lines).encode()
        fresh = self._path.with_suffix(".fresh")
        fresh.write_bytes(data)
        file = os.open(fresh, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        fresh.rename(self._path)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = file, len(data)


class StateDirectory:
    """`--state_dir`: this run's journal, and those of dead runs."""

    def __init__(self, path: Path, instance: str) -> None:
        """Raises `OptionError` where it can't be used, or another process does."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.dead = list(self._read_dead(path))
            self.journal = Journal.create(path, instance)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and hasattr(
                self, "_lock"
            ):
                raise Unavailable(
                    f"--state_dir={path} is used by another process"
                ) from None
            raise Unavailable(f"--state_dir={path}: {error.strerror}") from None

    @staticmethod
    def _read_dead(path: Path) -> Iterator[Journal]:
        for found in sorted(path.glob(f"*{SUFFIX}")):
            if (journal := Journal.read(found)) is not None:
                yield journal

    def close(self) -> None:
        """Free it for another process."""
        for journal in [self.journal, *self.dead]:
            with contextlib.suppress(OSError):
                journal.close()
        os.close(self._lock)
