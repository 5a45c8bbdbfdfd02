"""A callback that is forwarded, and what may become of it.

`forward` sends it to the instance that owns the connection.
"""

import re
from functools import cached_property
from http import HTTPStatus
from typing import NamedTuple, Protocol

from backends.client import Response as Answer
from backends.target import Target
from handlers.callbacks.actions import OK, Outcome
from handlers.callbacks.responses import Response
from handlers.owners import Address

RETRY_AFTER = 2  # seconds
# Begins the Idempotency-Key of a callback that has none. With a key it is carried out
# once, also if its request is sent again, or was recorded and is replayed. No key of a
# backend has a space.
OWN_KEY = "hop "

# Headers of an owner's answer that the backend gets.
PASSED_ON = (
    "Content-Type",
    "Cache-Control",
    "Idempotent-Replayed",
    "Retry-After",
    "WWW-Authenticate",
)

VALUE = re.compile("[ -~]*")  # of a header that is passed on
STATUSES = range(200, 600)  # of an answer to a callback

INSTANCE_GONE = Outcome(
    HTTPStatus.GONE,
    "The instance that had this connection does not run.",
    problem="instance-gone",
)
UNREACHABLE = Outcome(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "The instance that has this connection cannot be reached.",
    retry_after=RETRY_AFTER,
)
UNANSWERED = Outcome(
    HTTPStatus.GATEWAY_TIMEOUT,
    "The instance that has this connection has not answered; it may have carried out"
    " the request.",
)


class Leases(Protocol):
    """Knows which instances are alive; a cluster (`--cluster`) has them."""

    async def has_lease(self, peer_address: str) -> bool | None:
        """Return whether a live instance has this `--peer_address`.

        `peer_address` is `str(Address)`: `10.0.0.3:8765`, `[fd00::3]:8765`, the same
        text for equal addresses, however the option spells them. None: not known,
        since there is no cluster, or it does not answer. Is called when that instance
        was not reached, or has not answered a callback within `--peer_timeout`;
        possibly for many callbacks at once. Cancelled after `LEASE_TIMEOUT`. Must not
        raise.
        """


class NoLeases:
    """Without a cluster nobody knows."""

    async def has_lease(self, peer_address: str) -> bool | None:
        return None


class Forwarded(NamedTuple):
    """A callback for a connection of another instance.

    `target` is the path, and the query without the connection's key. `key` is its
    Idempotency-Key; empty: it has none. `seconds` are those that the callback itself
    may take. `connection_id` is empty for a bulk callback.
    """

    method: str
    target: str
    content_type: str
    seconds: float
    key: str = ""
    body: bytes = b""
    connection_id: str = ""
    traceparent: str = ""


def is_answer(answer: Answer) -> bool:
    """Whether an owner has answered a callback, completely."""
    return answer.complete and answer.status in STATUSES


class OwnersResponse(Response):
    """The answer of an owner, as the backend gets it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(OK)
        headers = {name: answer.headers.get(name.lower()) for name in PASSED_ON}
        vars(self).update(
            status=answer.status,
            headers={
                name: value
                for name, value in headers.items()
                if value and VALUE.fullmatch(value)
            },
            body=answer.body or b"",
        )

    @cached_property
    def start(self) -> bytes:
        """The status line."""
        return b"HTTP/1.1 %d \r\n" % self.status


class PeerTarget(Target):
    """An instance's callback listener, whose certificate is for `certificate_name`."""

    def __init__(self, address: Address, scheme: str, certificate_name: str | None):
        super().__init__(scheme, address.host, address.port, "/")
        vars(self)["certificate_name"] = certificate_name or address.host

    @property
    def server_name(self) -> str:
        name: str = vars(self)["certificate_name"]
        return name


def without_key(path: str, query: str) -> str:
    """Return the target of a callback without the key of its connection."""
    rest = "&".join(part for part in query.split("&") if not part.startswith("key="))
    return f"{path}?{rest}" if rest else path
