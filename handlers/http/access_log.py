"""Logs one line for each request."""

import logging

from tornado.web import RequestHandler

logger = logging.getLogger(__name__)


def log_request(handler: RequestHandler) -> None:
    """One line for each request."""
    log_access(
        handler.request.method or "", handler.request.path, handler.get_status()
    )


def log_access(method: str, target: str, status: int) -> None:
    """Log a request by its path, without the query.

    A target that is not a path is left out: that of a proxy request may contain a
    user name.
    """
    # 503 is logged where it is decided, and clients control how often it occurs.
    level = logging.WARNING if status >= 500 and status != 503 else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    path = target.partition("?")[0]
    shown = ascii(path)[1:-1] if path.startswith("/") else "(no path)"
    logger.log(level, "%s %s: %d", method, shown, status)
