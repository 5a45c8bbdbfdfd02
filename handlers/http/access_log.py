"""One line for each request."""

import logging

from tornado.web import RequestHandler

logger = logging.getLogger(__name__)


def log_request(handler: RequestHandler) -> None:
    """One line for each request."""
    log_access(
        handler.request.method or "", handler.request.path, handler.get_status()
    )


def log_access(method: str, target: str, status: int) -> None:
    """One line for a request, without its query.

    Nor what is no path: the target of a proxy's request may name a user.
    """
    # Who answers 503 has told why, and how often it does is up to the clients.
    level = logging.WARNING if status >= 500 and status != 503 else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    path = target.partition("?")[0]
    shown = ascii(path)[1:-1] if path.startswith("/") else "(no path)"
    logger.log(level, "%s %s: %d", method, shown, status)
