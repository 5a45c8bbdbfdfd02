"""Logs what Redis rejects again and again."""

import logging

from backends.redis_client import RedisAway, RedisError

logger = logging.getLogger(__name__)


class FailureLog:
    """Logs the first of equal failures in a row, and that they have ended.

    `what` names what fails. An outage of Redis is not logged, since the client does.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._latest = ""

    def failed(self, error: RedisError) -> None:
        """Record a failure."""
        logger.debug("%s: %s", self._what, error)
        if isinstance(error, RedisAway) or error.code == self._latest:
            return
        self._latest = error.code
        logger.error("%s: Redis rejects a command, which is repeated: %s",
                     self._what, error)

    def succeeded(self) -> None:
        """Record a success."""
        if self._latest:
            self._latest = ""
            logger.warning("%s: works again", self._what)
