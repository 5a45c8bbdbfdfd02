"""What `socketdock check` reports: findings, and the checks that make them.

A backend's `make_check(relay)` returns a `Check`, and `make_trial(relay)` a `Trial`;
`handlers.process.findings` makes the findings about this machine.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

EXPIRES_SOON = 14 * 24 * 3600  # seconds


class Finding(NamedTuple):
    """One line of `socketdock check`.

    An error prevents the relay from working; a warning means that it will fail, or
    may. The text of both says how to fix it.
    """

    level: Literal["ok", "warning", "error"]
    text: str


def expiry_finding(what: str, not_after: float) -> Finding:
    """Return the finding for a certificate that is valid until `not_after`.

    `not_after` is in seconds since 1970; `what` is the beginning of the text.
    """
    left = not_after - time.time()
    day = time.strftime("%Y-%m-%d", time.gmtime(not_after))
    if left < 0:
        return Finding("error", f"{what} has expired on {day}; renew it")
    if left < EXPIRES_SOON:
        return Finding("warning", f"{what} expires on {day}; renew it")
    return Finding("ok", f"{what} is good until {day}")


class Check:
    """Checks what a backend needs, before there is one.

    `make_check(relay)` raises `OptionError` as `make_backend(relay)` would, but
    starts nothing: a relay with the same options may be running. `descriptors`
    is the same as the `Backend`'s. `certificates` are paths of PEM files; the relay
    reports when they expire.
    """

    descriptors = 0
    certificates: Sequence[str] = ()

    async def findings(self) -> AsyncIterator[Finding]:
        """Yield what was found. Sends no event and changes nothing."""
        return
        yield  # type: ignore[unreachable]  # makes this function a generator


class Trial(ABC):
    """Sends a test event to each URL of a backend, for `socketdock check --send`.

    `make_trial(relay)` makes it, from the same options. Events have the mark
    `meta.test`, and the instance `relay.instance`, which no running relay has.
    """

    @abstractmethod
    def findings(self) -> AsyncIterator[Finding]:
        """Yield what came back from each URL. Shows no secret and no body."""
