"""Forwards callbacks to the instance that owns the connection, each once.

`handlers.owners` reads the owner from the connection's id. There `received_hops`
verifies the request, and never forwards it again. `forwarded` has its parts.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from backends import BackendError, ForwardOutcome
from backends.client import Client, Refused
from backends.client import Response as Answer
from backends.deadlines import after_reading
from handlers.callbacks.actions import OK
from handlers.callbacks.peers.forwarded import (
    INSTANCE_GONE,
    OWN_KEY,
    UNANSWERED,
    UNREACHABLE,
    Forwarded,
    Leases,
    NoLeases,
    OwnersResponse,
    PeerTarget,
    is_answer,
)
from handlers.callbacks.peers.hops import HEADER, Hops, digest_of_body
from handlers.callbacks.responses import Response, response_of
from handlers.clients.connection import Connections
from handlers.http.fast import LaterResponse
from handlers.owners import Address

logger = logging.getLogger(__name__)

# Connections to all instances together; each has one callback under way. Those to a
# silent host are given up after `--peer_timeout`.
MAX_CONNECTIONS = 512
DEAD_AFTER = 15.0  # seconds until a dead host is detected on an open connection
CONNECTION_AGE = 300.0  # seconds
LEASE_TIMEOUT = 1.0  # seconds for the cluster to say whether an instance is alive
MAX_ANSWER = 4 * 1024 * 1024  # bytes; the results of the largest bulk callback
HOP = HEADER.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """How other instances are reached; times in seconds.

    `timeout` bounds connecting, and is added to the time that a callback may take:
    `send_timeout` without a receipt. With `tls` their certificates are for
    `certificate_name`; None: for their addresses.
    """

    timeout: float
    send_timeout: float
    tls: bool = False
    certificate_name: str | None = None


class Forwarder:
    """Forwards callbacks to other instances, over connections of its own."""

    def __init__(
        self, connections: Connections, hops: Hops, settings: PeerSettings
    ) -> None:
        self.client = Client(
            MAX_CONNECTIONS, settings.timeout, DEAD_AFTER, CONNECTION_AGE
        )
        self.leases: Leases = NoLeases()
        self.timeout = settings.timeout
        self.send_timeout = settings.send_timeout
        self.observer = connections.observer
        self._connections = connections
        self._hops = hops
        self._settings = settings
        # By the owner's digits in ids. The client forgets unused addresses, too.
        self._targets: dict[str, PeerTarget] = {}
        self._asking: set[asyncio.Task[None]] = set()  # the cluster
        # Callbacks under way, oldest first, until they are late; one timer for all.
        self._under_way: dict[_Forwarding, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        # Begins the keys of this run; see `OWN_KEY`.
        self._own_key = f"{OWN_KEY}{secrets.token_hex(12)}-"
        self._numbers = count(1)

    def owner_of(self, connection_id: str) -> Address | None:
        """Return the other instance that has a connection.

        None: it is here, or gone.
        """
        if self._connections.get(connection_id) is not None:
            return None
        return self._connections.owners.elsewhere(connection_id)

    def forward(
        self, owner: Address, callback: Forwarded
    ) -> LaterResponse[Response]:
        """Send `callback` to `owner`; await it for the response."""
        forwarding = _Forwarding(self, owner, callback)
        self._under_way[forwarding] = None
        if self._timer is None:
            self._watch(self.client.loop.time())
        return forwarding

    def new_key(self) -> str:
        """Return a key for a callback that has none."""
        return f"{self._own_key}{next(self._numbers)}"

    def on_ended(self, forwarding: "_Forwarding") -> None:
        """A callback has its answer."""
        self._under_way.pop(forwarding, None)

    def _watch(self, began: float) -> None:
        loop = self.client.loop
        self._timer = loop.call_at(
            began + self.timeout, after_reading, loop, self._on_time
        )

    def _on_time(self) -> None:
        """Handle the callbacks that have no answer after `--peer_timeout`."""
        self._timer = None
        latest = self.client.loop.time() - self.timeout
        for forwarding in list(self._under_way):
            if forwarding.began > latest:
                self._watch(forwarding.began)
                return
            del self._under_way[forwarding]
            self.ask(forwarding)

    def target(self, owner: Address) -> PeerTarget:
        """Return where callbacks for the connections of `owner` go."""
        target = self._targets.get(owner.digits)
        if target is None:
            if len(self._targets) >= MAX_CONNECTIONS:
                self._targets.clear()
            scheme = "https" if self._settings.tls else "http"
            target = PeerTarget(owner, scheme, self._settings.certificate_name)
            self._targets[owner.digits] = target
        return target

    def request(self, owner: Address, callback: Forwarded, key: bytes) -> bytes:
        """Return the whole request, signed now."""
        method, target = callback.method.encode(), callback.target.encode("latin-1")
        content_type = callback.content_type.encode("latin-1")
        body = callback.body
        digest = digest_of_body(body)
        hop = self._hops.sign((method, target, content_type, key, digest))
        more = b""
        if content_type:
            more += b"Content-Type: %b\r\n" % content_type
        if callback.traceparent:
            more += b"traceparent: %b\r\n" % callback.traceparent.encode("latin-1")
        return (
            # `FastHop` recognizes a forwarded send by its first header.
            b"%b %b HTTP/1.1\r\n%b: %b\r\nIdempotency-Key: %b\r\nHost: %b\r\n"
            b"%bContent-Length: %d\r\n\r\n%b"
        ) % (
            method, target, HOP, hop, key, owner.text.encode(), more, len(body), body
        )

    def ask(self, forwarding: "_Forwarding") -> None:
        """Ask the cluster whether the owner is alive, and tell `forwarding`."""
        task = self.client.loop.create_task(self._ask(forwarding))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, forwarding: "_Forwarding") -> None:
        alive = None
        try:
            async with asyncio.timeout(LEASE_TIMEOUT):
                alive = await self.leases.has_lease(forwarding.owner.text)
        except TimeoutError:
            pass
        forwarding.on_asked(alive)

    async def close(self) -> None:
        """Close all connections; callbacks under way are answered."""
        if self._timer is not None:
            self._timer.cancel()
        await self.client.close()
        await asyncio.gather(*self._asking)


class _Forwarding(LaterResponse[Response]):
    """One callback on its way to the owner, until there is an answer.

    `began` is on the loop's clock.

    While there is none, the cluster is asked after each `--peer_timeout` whether the
    owner is alive: one whose machine is gone takes no connection, or nothing on an old
    one.
    """

    def __init__(
        self, forwarder: Forwarder, owner: Address, callback: Forwarded
    ) -> None:
        super().__init__()
        self.owner = owner
        self._forwarder = forwarder
        self._callback = callback
        self._key = (callback.key or forwarder.new_key()).encode()
        client = forwarder.client
        self._ended = False
        self._sent = False  # whether the request was written, at least in part
        self.began = client.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._exchange = client.post(
            forwarder.target(owner), self._write, self._on_done, keep=_keep
        )

    def _write(self) -> bytes:
        self._sent = True
        return self._forwarder.request(self.owner, self._callback, self._key)

    def on_asked(self, alive: bool | None) -> None:
        """Handle whether the owner is alive; None: nobody knows."""
        if self._ended:
            return
        if alive is False:
            self._end("gone", response_of(INSTANCE_GONE))
        elif self._sent and self._exchange.pending:
            self._wait_on()
        else:
            logger.warning("instance %s is unreachable: a callback was not sent to it",
                           self.owner)
            self._end("unreachable", response_of(UNREACHABLE))

    def _on_done(self, outcome: Answer | BackendError) -> None:
        if isinstance(outcome, Refused):
            self._end("gone", response_of(INSTANCE_GONE))
        elif isinstance(outcome, Answer) and is_answer(outcome):
            self._answer(outcome)
        elif self._sent:
            self._fail()
        else:
            self._forwarder.ask(self)

    def _wait_on(self) -> None:
        """Ask again after `--peer_timeout`, or give up if that is too late."""
        loop, timeout = self._forwarder.client.loop, self._forwarder.timeout
        ends_at = self.began + self._callback.seconds + timeout
        ask_at = loop.time() + timeout
        if ask_at < ends_at:
            self._timer = loop.call_at(ask_at, self._forwarder.ask, self)
        else:
            self._timer = loop.call_at(ends_at, after_reading, loop, self._fail)

    def _fail(self) -> None:
        if not self._ended:
            logger.warning("instance %s has not answered a callback", self.owner)
            self._end("unanswered", response_of(UNANSWERED))

    def _answer(self, answer: Answer) -> None:
        if answer.status == 401:
            logger.warning("instance %s rejects forwarded callbacks: compare"
                           " --peer_secret_file, and the clocks", self.owner)
        plain = (
            answer.status == 200
            and answer.body == b"OK"
            and "idempotent-replayed" not in answer.headers
        )
        self._end("answered", response_of(OK) if plain else OwnersResponse(answer))

    def _end(self, outcome: ForwardOutcome, response: Response) -> None:
        self._ended = True
        self._forwarder.on_ended(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._exchange.pending:
            self._exchange.abandon()
        self._forwarder.observer.forwarded(
            self._callback.connection_id, self.owner.text, outcome, response.status
        )
        self.respond(response)


def _keep(status: int, headers: Mapping[str, str]) -> int:
    return MAX_ANSWER
