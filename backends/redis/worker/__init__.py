"""`socketdock worker`: takes events from Redis to a backend that speaks only HTTP.

To the rest of the process it is a backend without clients: so it has the relay's
listener, probes, metrics and drain. `leases` divides the partitions among workers,
`partition` reads one, `conversation` delivers the events of one connection, `remote`
sends commands to their instances.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable
from typing import Literal

from tornado.options import Error as OptionError
from tornado.options import options

from backends import (
    Attempt,
    Backend,
    BackendError,
    Condition,
    Connection,
    ConnectionRefused,
    EventName,
    Handshake,
    Observer,
    Outcome,
    Relay,
)
from backends.breaker import Breaker, breaker_settings
from backends.client import make_client
from backends.commands import CommandName, CommandOutcome, Source
from backends.events import EventWriter
from backends.http import credential_sources
from backends.http.attempts import Attempts
from backends.http.credentials import CredentialSources
from backends.http.decisions import Decisions
from backends.http.deliveries import delivery_limits
from backends.http.delivery import SingleDeliveries
from backends.http.disconnects import DisconnectDelivery
from backends.http.replies import make_replies
from backends.http.request import RequestWriter
from backends.http.targets import target_of
from backends.redis import make_keys, make_redis_client
from backends.redis.keys import Keys, count_in
from backends.redis.worker.conversation import BackendContext
from backends.redis.worker.dead import replay
from backends.redis.worker.leases import Leases
from backends.redis.worker.partition import PartitionReader
from backends.redis.worker.remote import RemoteExecutor, Streams
from backends.redis_client import RedisAway, RedisClient, RedisError

logger = logging.getLogger(__name__)

DELIVERY_TIMEOUT = 86_400.0  # seconds, unless --delivery_timeout is set
REPLY = 5.0  # seconds for each reply
RETRY = 1.0  # seconds, while Redis is away at the start


def option_defaults() -> dict[str, float]:
    """Return the values of options that are not set."""
    return {"delivery_timeout": DELIVERY_TIMEOUT}


class Settling(Observer):
    """Passes on what it observes, and tells conversations what became of attempts."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.context: BackendContext | None = None

    def attempted(self, attempt: Attempt) -> None:
        self._observer.attempted(attempt)
        if self.context is not None:
            self.context.on_attempted(attempt)

    def ended(
        self, event: EventName, connection_id: str, outcome: Outcome, count: int = 1
    ) -> None:
        self._observer.ended(event, connection_id, outcome, count)

    def given_up(self, event_id: str) -> None:
        self._observer.given_up(event_id)

    def commanded(
        self,
        source: Source,
        command: CommandName | Literal["none"],
        outcome: CommandOutcome,
        connection_id: str,
    ) -> None:
        self._observer.commanded(source, command, outcome, connection_id)


class WorkerBackend(Backend):
    """Reads partitions of events, and POSTs them; accepts no clients."""

    observes = True

    def __init__(self, relay: Relay, client: RedisClient, keys: Keys) -> None:
        """Raises `OptionError` for invalid options."""
        self._redis = client
        self._keys = keys
        self._relay = relay
        self._partitions = 0  # from `start` on
        self._away: RedisAway | None = None
        self._lost_since = 0.0  # on the loop's clock, while `_away` is set
        self._pipeline = client.pipeline(self._on_connected, self._on_lost)
        self._http = make_client()
        self.descriptors = self._http.max_connections + 8
        self._breaker = Breaker(breaker_settings())
        self._requests = RequestWriter(relay.version)
        self._context, self._credentials = self._make_context(relay)
        self._leases: Leases | None = None
        self._starting: asyncio.Task[None] | None = None  # cancelled by `drain`
        self.reload()

    def _make_context(self, relay: Relay) -> tuple[BackendContext, CredentialSources]:
        message = target_of("messageuri")
        if message is None:
            raise OptionError("socketdock worker needs --messageuri")
        disconnect, connect = target_of("disconnecturi"), target_of("connecturi")
        observer = Settling(relay.observer)
        streams = Streams()
        assert relay.executor is not None
        executor = RemoteExecutor(relay.executor, self._pipeline, streams, observer)
        relay = dataclasses.replace(relay, observer=observer, executor=executor)
        replies = make_replies(relay)
        attempts = Attempts(self._http, self._requests, self._breaker, observer)
        limits = dataclasses.replace(
            delivery_limits(), delivery_timeout=options.event_timeout
        )
        context = BackendContext(
            SingleDeliveries(
                self._http,
                self._requests,
                self._breaker,
                message,
                limits,
                observer,
                None if replies.mode == "off" else replies,
            ),
            DisconnectDelivery(
                disconnect, attempts, self._breaker, options.event_timeout, observer
            ),
            Decisions(connect, attempts, replies, options.handshake_timeout),
            executor,
            streams,
            EventWriter(relay),
            options.event_timeout,
            options.delivery_timeout,
            options.max_queued_bytes,
        )
        observer.context = context
        return context, credential_sources(message, disconnect, connect)

    async def start(self) -> None:
        """Take partitions as soon as Redis can be reached."""
        self._pipeline.connect()
        self._starting = asyncio.create_task(self._begin())

    async def _begin(self) -> None:
        while True:
            try:
                stored = await self._redis.execute(
                    "GET", self._keys.partitions, timeout=REPLY
                )
                # Before the first relay has started there is nothing to read.
                if stored is not None:
                    self._partitions = count_in(stored.decode(errors="replace"))
                    if self._partitions:
                        await self._replay()
                        break
                    logger.error("%s is no number of partitions", self._keys.partitions)
            except RedisError as error:
                logger.warning("Redis can't be used: %s", error)
            await asyncio.sleep(RETRY)
        self._leases = Leases(
            self._redis,
            self._keys,
            self._relay.instance,
            self._partitions,
            lambda number: PartitionReader(
                self._redis, self._pipeline, self._keys, options.redis_group, number,
                self._context,
            ),
        )  # fmt: skip
        self._leases.begin()

    async def _replay(self) -> None:
        if options.replay_dead:
            moved = await replay(self._redis, self._keys, self._partitions)
            logger.info("%d dead events are sent again", moved)

    def _on_connected(self) -> None:
        if self._away is not None:
            logger.warning("Redis is available again")
        self._away = None

    def _on_lost(self, error: RedisAway) -> None:
        if self._away is None:
            logger.error("Redis is unavailable: %s", error)
            self._lost_since = self._http.loop.time()
        self._away = error

    # The relay's questions.

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Reject every client."""
        raise ConnectionRefused(404)

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """There are no clients."""
        raise BackendError("a worker has no clients")

    def condition(self) -> Condition:
        """Return the condition of the backend, or of Redis if that is away."""
        away = self._breaker.open_for()
        cause = None
        if self._away is not None:
            away, cause = self._http.loop.time() - self._lost_since, str(self._away)
        return Condition(
            away,
            self._away is None and self._breaker.untried,
            self._context.deliveries.overdue,
            self._http.open,
            cause,
        )

    def reload(self) -> None:
        """Read secrets, headers and certificates again; if one fails, change none."""
        credentials = self._credentials.read()
        self._requests.set_credentials(credentials.headers, credentials.signer)
        self._http.trust(credentials.tls)

    async def drain(self, timeout: float) -> int:
        """Finish what is under way, and release the partitions.

        What is not acknowledged stays in Redis, for another worker.
        """
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._leases is not None:
            away = self._breaker.open or self._away is not None
            await self._leases.end(0.0 if away else timeout)
        return 0

    async def close(self) -> None:
        """Close every connection."""
        self._context.deliveries.close()
        self._context.disconnects.closing = True
        self._context.executor.closing = True
        if self._leases is not None:
            await self._leases.end(0.0)
        await self._pipeline.close()
        await self._redis.close()
        await self._http.close()


def make_backend(relay: Relay) -> WorkerBackend:
    """Make the worker from the options."""
    return WorkerBackend(relay, make_redis_client(), make_keys())
