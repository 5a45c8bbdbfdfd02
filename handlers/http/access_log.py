"""Logs one line for each request."""

import logging
import re

from handlers.http.problem import ProblemHandler

logger = logging.getLogger(__name__)

PEER_LEFT = 499  # instead of a status, as nginx logs a peer that closed before one
# A key of a callback URL that a mistake has made a part of the path.
KEY = re.compile(r"key[=%].*", re.IGNORECASE)


def log_request(handler: ProblemHandler) -> None:
    """One line for each request."""
    request = handler.request
    status = PEER_LEFT if handler.peer_left else handler.get_status()
    log_access(request.method or "", request.path, status)


def log_access(method: str, target: str, status: int) -> None:
    """Log a request by its path, without the query and without a key.

    A target that is not a path is left out: that of a proxy request may contain a
    user name.
    """
    # 503 is logged where it is decided, 504 says that a client has not confirmed a
    # frame, and clients control how often these occur.
    is_fault = status >= 500 and status not in (503, 504)
    level = logging.WARNING if is_fault else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    path = KEY.sub("key...", target.partition("?")[0])
    shown = ascii(path)[1:-1] if path.startswith("/") else "(no path)"
    logger.log(level, "%s %s: %d", method, shown, status)
