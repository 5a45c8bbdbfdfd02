"""Single-use permissions for handshakes of the console's playground.

With two listeners the page has the origin of the callback listener, not that of the
client listener. That origin is not allowed permanently: an authorized operator
requests one handshake at a time.
"""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from handlers.owners import Owners

MAX_TICKETS = 64  # unused ones; beyond this the oldest becomes invalid
TICKET_LIFETIME = 30.0  # seconds

QUERY = re.compile(r"console=([0-9a-f]{32})(?:&|$)")


class Ticket(NamedTuple):
    """Permission for one handshake of a page of `origin`, with a fixed id."""

    secret: str
    origin: str
    connection_id: str
    issued_at: float


class Claim(NamedTuple):
    """A used ticket; `query` is the handshake's query without it."""

    connection_id: str
    query: str


class Tickets:
    """Issued and unused tickets; `clock` is in seconds, `owners` makes the ids."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        owners: Owners | None = None,
    ) -> None:
        self._clock = clock
        self._owners = owners or Owners()
        self._waiting: dict[str, Ticket] = {}

    def issue(self, origin: str) -> Ticket:
        """Issue a ticket for a page of `origin`, whose query starts with the secret."""
        ticket = Ticket(
            secrets.token_hex(16), origin, self._owners.new_id(), self._clock()
        )
        while len(self._waiting) >= MAX_TICKETS:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[ticket.secret] = ticket
        return ticket

    def claim(self, query: str, origins: Sequence[str]) -> Claim | None:
        """Use the ticket at the start of a handshake's query.

        Returns None if there is none, it is too old, or the page has another
        origin: then the handshake gets no special treatment.
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
