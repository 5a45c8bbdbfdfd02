"""Limits of requests, which both HTTP servers apply."""

from dataclasses import dataclass, field

from handlers.http.body_budget import BodyBudget

IDLE_TIMEOUT = 120.0  # seconds between two requests of one connection
ANSWER_TIMEOUT = 60.0  # seconds for a peer to read a response
MAX_HEADERS = 1000  # of one request, trailers included: each costs processor time
# Lines of a chunked body that are parsed at once: a chunk of one byte costs as much
# time as any.
LINES_PER_PIECE = 16


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """Limits of each request: timeouts in seconds, sizes in bytes.

    `body_budget` limits the bodies of all requests together.
    """

    header_timeout: float
    body_timeout: float
    max_header_size: int
    max_body_size: int
    body_budget: BodyBudget = field(default_factory=BodyBudget)
