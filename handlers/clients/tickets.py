"""Handshakes that the console's playground may make, each of them once.

With two listeners its page has the origin of the operators' one, which is not the
clients'. That origin is not allowed for good: whoever got past the operators'
guard asks for one handshake at a time.
"""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_TICKETS = 64  # that wait to be used; then the oldest is of no use any more
TICKET_LIFETIME = 30.0  # seconds

QUERY = re.compile(r"console=([0-9a-f]{32})(?:&|$)")


@dataclass(frozen=True, slots=True)
class Ticket:
    """One handshake by a page of `origin`, whose connection will have that id."""

    secret: str
    origin: str
    connection_id: str
    issued_at: float


@dataclass(frozen=True, slots=True)
class Claim:
    """What a ticket was used for; `query` is the handshake's without it."""

    connection_id: str
    query: str


class Tickets:
    """Those that were issued and not used yet; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, Ticket] = {}

    def issue(self, origin: str) -> Ticket:
        """One for a page of that origin, whose query has to begin with its secret."""
        ticket = Ticket(
            secrets.token_hex(16), origin, secrets.token_hex(16), self._clock()
        )
        while len(self._waiting) >= MAX_TICKETS:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[ticket.secret] = ticket
        return ticket

    def claim(self, query: str, origins: Sequence[str]) -> Claim | None:
        """Use the ticket that a handshake's query begins with.

        None where there is none, it is too old, or the page is of another origin:
        then the handshake is one like any other.
        """
        if not self._waiting or (found := QUERY.match(query)) is None:
            return None
        ticket = self._waiting.pop(found[1], None)
        if (
            ticket is None
            or list(origins) != [ticket.origin]
            or self._clock() > ticket.issued_at + TICKET_LIFETIME
        ):
            return None
        return Claim(ticket.connection_id, query[found.end() :])
