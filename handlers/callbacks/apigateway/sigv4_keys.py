"""The keys whose signatures are accepted (`--sigv4_keys_file`)."""

import re
from collections.abc import Iterator, Mapping

from tornado.options import Error as OptionError

from backends.files import read_lines

MIN_SECRET_LENGTH = 16  # characters
MAX_KEYS_FILE = 64 * 1024  # bytes

# A slash would end it in the scope of a signature.
KEY_ID = re.compile(r"[\w.@+-]{1,128}", re.ASCII)


class SigningKeys:
    """Secrets by key id. Raises `OptionError` for an invalid file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._secrets: Mapping[str, str] = {}
        self.reload()

    def reload(self) -> None:
        """Re-read the file.

        Raises `OptionError` if it is unreadable, invalid or empty, and keeps the old
        keys.
        """
        where = f"--sigv4_keys_file={self._path}"
        secrets: dict[str, str] = {}
        for line, key_id, secret in _read_pairs(self._path, where):
            if key_id in secrets:
                raise OptionError(f"{line}: an earlier line has the same key id")
            secrets[key_id] = secret
        self._secrets = secrets

    def secret_of(self, key_id: str) -> str | None:
        """Return the secret of a key, or None."""
        return self._secrets.get(key_id)


def _read_pairs(path: str, where: str) -> Iterator[tuple[str, str, str]]:
    """Yield where a line is, its key id and its secret.

    Raises `OptionError`, which shows neither.
    """
    for number, text in read_lines(path, where, MAX_KEYS_FILE):
        line = f"{where}, line {number}"
        words = text.split()
        if len(words) != 2 or not KEY_ID.fullmatch(words[0]):
            raise OptionError(f"{line}: expected a key id, a space and a secret")
        if len(words[1]) < MIN_SECRET_LENGTH:
            raise OptionError(
                f"{line}: a secret has {MIN_SECRET_LENGTH} characters or more"
            )
        yield line, words[0], words[1]
