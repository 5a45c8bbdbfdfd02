"""Decides from a response whether to retry an event, and after what time.

`delivery` and `disconnects` retry; `decisions` makes one attempt only.
"""

import random
import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple

from backends import AttemptOutcome, BackendAway, BackendError
from backends.client import Response

MIN_BACKOFF = 0.2  # seconds before the first retry, at most
MAX_BACKOFF = 5.0  # seconds between two retries, at most
MAX_DOUBLINGS = 16  # more than MAX_BACKOFF needs, and too few to overflow
MAX_DATE_LENGTH = 64  # characters; those of RFC 9110, section 5.6.7, have 24 to 33

# A gateway's statuses for an unreachable backend (RFC 9110, section 15.6).
GATEWAY_FAILURES = frozenset(
    {
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)

RETRYABLE = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)

# What an operator should check if an event is refused.
HINTS = {
    401: "; check --backend_headers_file and --webhook_secret",
    403: "; check --backend_headers_file and --webhook_secret",
    404: "; check that this path exists",
    405: "; check that this path accepts POST",
    413: "; it accepts less than --max_message_size",
}


def is_success(status: int) -> bool:
    """Whether the backend accepted the event."""
    return 200 <= status < 300


def attempt_outcome(outcome: Response | BackendError) -> AttemptOutcome:
    """Classify an attempt; unless delivered or refused, it may be retried."""
    if isinstance(outcome, BackendError):
        return "unreachable" if isinstance(outcome, BackendAway) else "timeout"
    if is_success(outcome.status):
        return "delivered"
    if outcome.status in GATEWAY_FAILURES:
        return "unreachable"
    return "error" if is_retryable(outcome.status) else "refused"


def answered(response: Response) -> str:
    """Say for the log why a response is a failure."""
    return f"answered {response.status}"


class AnswerRules(NamedTuple):
    """What responses mean: the outcome of an attempt, and why it is a failure."""

    outcome_of: Callable[[Response | BackendError], AttemptOutcome]
    why_failed: Callable[[Response], str]


BY_STATUS = AnswerRules(attempt_outcome, answered)


def unreachable_cause(
    became: AttemptOutcome, url: str, outcome: Response | BackendError
) -> str | None:
    """Say for operators why an attempt did not reach the backend; None: it did."""
    if became != "unreachable":
        return None
    if isinstance(outcome, Response):
        return f"POST {url}: answered {outcome.status}"
    return str(outcome)


def is_retryable(status: int) -> bool:
    """Whether the backend may accept the event in a retry; otherwise it is refused."""
    return status >= 500 or status in RETRYABLE


def hint(status: int) -> str:
    """Return "; " and what to check if the backend refuses with `status`; or ""."""
    if 300 <= status < 400:
        return "; redirects are not followed: give the URL that it leads to"
    return HINTS.get(status, "")


def backoff(attempts: int) -> float:
    """Return the seconds before the next attempt: exponential, with full jitter."""
    doublings = min(attempts - 1, MAX_DOUBLINGS)
    return random.uniform(0.0, min(MAX_BACKOFF, MIN_BACKOFF * 2**doublings))


def retry_after(response: Response) -> float | None:
    """Return the seconds of Retry-After (RFC 9110, section 10.2.3), or None.

    A date is relative to the response's own Date, since clocks differ. The result is
    infinite if a number is too large for a float.
    """
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    until = seconds_of(value)
    if until is None:
        return None
    now = seconds_of(response.headers.get("date", ""))
    return max(0.0, until - (time.time() if now is None else now))


def seconds_of(date: str) -> float | None:
    """Parse an HTTP date (RFC 9110, section 5.6.7): seconds since 1970, or None."""
    if len(date) > MAX_DATE_LENGTH:
        return None
    try:
        parsed = parsedate_to_datetime(date)
        if parsed.tzinfo is None:  # asctime's format, which is in UTC
            parsed = parsed.replace(tzinfo=UTC)
        return parsed.timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):  # each can occur
        return None
