"""The `redis` backend: events go into streams of Redis, commands come from streams.

`writer` adds the events, by `partition`; `delivery` has a connection's messages,
`single` other events; `commands` reads commands, `janitor` trims. Decisions on
handshakes are those of the `http` backend.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from pathlib import Path

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import (
    LOST,
    Backend,
    BackendError,
    Closure,
    Condition,
    Connection,
    ConnectionRefused,
    Handshake,
    Outcome,
    Relay,
)
from backends.deadlines import RunningTime
from backends.events import Ended, Event, EventWriter
from backends.http.disconnects import DisconnectNotification
from backends.http.open_connections import OpenConnections
from backends.journal import StateDirectory
from backends.redis.check import RedisCheck
from backends.redis.commands import CommandStream, Undelivered
from backends.redis.delivery import StreamDelivery
from backends.redis.entry import NotAdded, Reports
from backends.redis.growth import grow
from backends.redis.janitor import Janitor
from backends.redis.keys import Keys
from backends.redis.single import SingleEvent, StreamDisconnects
from backends.redis.verdicts import Verdicts, make_verdicts, make_verdicts_check
from backends.redis.writer import StreamWriter
from backends.redis_client import RedisClient
from backends.redis_url import read_address

logger = logging.getLogger(__name__)

# The shared modules whose options this backend reads.
OPTION_MODULES = (
    "backends.breaker",
    "backends.client",
    "backends.http.credentials",
    "backends.http.decisions",
    "backends.http.deliveries",
    "backends.http.disconnects",
    "backends.http.replies",
    "backends.journal",
)

define("redis_url", type=str, metavar="URL",
       help="Redis for --backend=redis: redis://[user:password@]host[:port][/db],"
            " rediss:// with TLS, redis+sentinel:// or redis+cluster://")
define("redis_url_file", type=str, metavar="PATH",
       help="file with --redis_url, which may contain a password")
define("redis_prefix", default="socketdock", metavar="NAME",
       help="beginning of the names of all keys in Redis")
define("redis_partitions", default=16, metavar="COUNT",
       help="streams that the events of all connections are divided among; the same "
            "for all instances")
define("redis_backlog", default=100_000, metavar="COUNT",
       help="most entries of a stream; with more, clients are treated as if Redis were "
            "unreachable")
define("redis_group", default="socketdock-worker", metavar="NAME",
       help="socketdock worker: the group of consumers that workers share")
define("event_timeout", default=60.0, metavar="SECONDS",
       help="socketdock worker: how long an event may fail while others are accepted, "
            "until it is dead")
define("replay_dead", default=False,
       help="socketdock worker: send dead events again, at the start")

RETRY_AFTER = "1"  # seconds, for clients rejected during an outage
START_TIMEOUT = 5.0  # seconds for the first connection to Redis
MAX_UNDELIVERED = 1000  # commands that wait to be returned; more are dropped


class RedisBackend(Backend):
    """Adds events to streams, and carries out the commands of this instance's one."""

    observes = True
    takes_many = True
    descriptors = 8  # its connections to Redis, and those of Sentinels and a Cluster

    def __init__(
        self,
        relay: Relay,
        client: RedisClient,
        keys: Keys,
        verdicts: Verdicts | None,
    ) -> None:
        """Raises `OptionError` for invalid options."""
        self._observer = relay.observer
        self._client = client
        self._keys = keys
        self._verdicts = verdicts
        commands = keys.commands(relay.instance)
        self._events = EventWriter(relay, commands)
        self._reports = Reports(relay.observer)
        self._delivery_timeout = options.delivery_timeout
        count = options.redis_partitions
        self._writer = StreamWriter(
            client,
            keys,
            count,
            options.redis_backlog,
            min(options.delivery_timeout, options.disconnect_timeout),
            relay.hold,
        )
        self._disconnects = StreamDisconnects(
            self._writer, options.disconnect_timeout, relay.observer
        )
        self._open_connections = OpenConnections(
            StateDirectory(Path(options.state_dir), relay.instance)
            if options.state_dir
            else None,
            self._events,
            self._disconnects,
            relay.dead_runs,
        )
        assert relay.executor is not None
        self._commands = CommandStream(
            client, commands, relay.executor, relay.observer, self._return
        )
        self._commands.on_failed = self._writer.probe
        self._janitor = Janitor(client, keys, relay.instance, count)
        # By id of each connection that has sent a message.
        self._by_id: dict[str, StreamDelivery] = {}
        self._undelivered = 0  # commands that wait to be returned
        self.reload()

    async def start(self) -> None:
        """Connect, and compare the number of partitions.

        Raises `OptionError` if it differs. If Redis cannot be reached, the relay starts
        nevertheless, and rejects clients.
        """
        self._writer.begin()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT):
                await asyncio.shield(self._writer.tried)
        if (stored := self._writer.wrong_count) is not None:
            await self.close()
            raise OptionError(
                f"--redis_partitions={options.redis_partitions}, but"
                f" {self._keys.partitions} is {stored}: give the same number, or grow"
                " it with `socketdock redis-partitions`"
            )
        await self._commands.begin()
        self._janitor.begin()
        self._open_connections.start_recovery()

    # Events.

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Ask `--connecturi`, or add a connect event; reject during an outage."""
        if self._writer.away_for() is not None:
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER})
        event = self._events.connect(connection.id, handshake)
        outcome: Outcome = "failed"
        try:
            subprotocol = None
            if self._verdicts is None:
                await self._add_connect(connection.id, event)
            else:
                subprotocol = await self._verdicts.ask(
                    connection.id, event, handshake.subprotocols, self._open_connections
                )
            outcome = "delivered"
            return subprotocol
        except ConnectionRefused:
            outcome = "refused"
            raise
        finally:
            self._observer.ended("connect", connection.id, outcome)

    async def _add_connect(self, connection_id: str, event: Event) -> None:
        """Add a connect event.

        Raises `ConnectionRefused` if it was certainly not added, and `BackendError` if
        it may have been.
        """
        self._open_connections.add(connection_id)
        single = SingleEvent("connect", connection_id, 0.0, self._reports)
        try:
            async with RunningTime(self._writer.loop, options.handshake_timeout):
                await single.send(self._writer, event)
        except NotAdded:
            self._open_connections.remove(connection_id)
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER}) from None
        except TimeoutError:
            error = BackendError("Redis has not added the connect event in time")
            single.give_up(error)
            raise error from None

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Add to the stream; see `Backend.message` for the returned value."""
        delivery = self._by_id.get(connection.id)
        if delivery is None:
            delivery = self._by_id[connection.id] = StreamDelivery(
                connection, self._writer, self._delivery_timeout, self._reports
            )
        delivery.number += 1
        return delivery.post(
            self._events.message(
                connection.id,
                delivery.number,
                message,
                connection.trace,
                connection.backend_state,
            )
        )

    async def disconnect(self, connection: Connection, closure: Closure) -> None:
        """Add a disconnect event: all messages are added or given up."""
        self._by_id.pop(connection.id, None)
        ended = Ended(
            connection.id, closure, connection.trace, connection.backend_state
        )
        try:
            await self._disconnects.deliver(DisconnectNotification(self._events, ended))
        except BackendError:
            if self._disconnects.closing:
                raise  # the next start sends it
            self._open_connections.remove(connection.id)
            raise
        self._open_connections.remove(connection.id)

    async def lost(self, connection_id: str, instance: str) -> None:
        """Add the disconnect event of a dead run's connection."""
        ended = Ended(connection_id, LOST, instance=instance)
        await self._disconnects.deliver(DisconnectNotification(self._events, ended))

    def abandon(self, connection_id: str) -> None:
        """Add no more events of a connection."""
        self._open_connections.remove(connection_id)
        delivery = self._by_id.pop(connection_id, None)
        if delivery is not None:
            delivery.end()

    def rename(self, instance: str) -> None:
        """Name another instance in events; the stream of commands stays the same."""
        self._events.rename(instance)
        self._open_connections.rename(instance)

    def _return(self, command: Undelivered) -> None:
        """Add an event for a command that could not be carried out."""
        logger.info(
            "connection %s: %s of the command stream was not carried out: %d",
            command.connection_id, command.command, command.status,
            extra={"event": "undelivered", "connection_id": command.connection_id,
                   "status": command.status},
        )
        if self._undelivered >= MAX_UNDELIVERED:
            logger.warning("commands that were not carried out are dropped: %d wait to"
                           " be returned already", MAX_UNDELIVERED)
            return
        self._undelivered += 1
        single = SingleEvent("undelivered", command.connection_id, float("inf"))
        single.outcome.add_done_callback(self._on_returned)
        single.send(
            self._writer,
            self._events.undelivered(
                command.event_id,
                command.connection_id,
                command.command,
                command.status,
            ),
        )

    def _on_returned(self, outcome: "asyncio.Future[None]") -> None:
        self._undelivered -= 1

    # The relay's other questions.

    def condition(self) -> Condition:
        """Return the condition; `away` is set during an outage."""
        away = self._writer.away_for()
        return Condition(
            away,
            connections=int(self._writer.connected),
            cause=None if away is None else self._writer.why,
            entries=self._writer.longest,
        )

    def reload(self) -> None:
        """Read the credentials for `--connecturi` again."""
        if self._verdicts is not None:
            self._verdicts.reload()

    async def drain(self, timeout: float) -> int:
        """Return what is left in the stream of commands, and add the last events."""
        deadline = self._writer.loop.time() + timeout
        await self._commands.end(timeout)
        await self._open_connections.stop(
            max(0.0, deadline - self._writer.loop.time())
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._writer.emptied()
        return self._undelivered

    async def close(self) -> None:
        """Close every connection. The next start sends the remaining events."""
        self._disconnects.closing = True
        await self._commands.end(0.0)
        await self._janitor.end()
        await self._open_connections.cancel()
        await self._writer.close()
        await self._client.close()
        if self._verdicts is not None:
            await self._verdicts.close()
        self._open_connections.close()


def make_keys() -> Keys:
    """Return the keys from the options. Raises `OptionError`."""
    prefix = options.redis_prefix
    if not prefix or any(character in prefix for character in "{}"):
        raise OptionError(f"--redis_prefix={prefix} is empty or has a brace")
    return Keys(prefix)


def make_redis_client() -> RedisClient:
    """Return the client from the options. Raises `OptionError`."""
    address = read_address("redis_url", options.redis_url, options.redis_url_file)
    return RedisClient(address, "--backend=redis")


async def grow_partitions(number: int) -> str:
    """Store a larger number of partitions; see `growth.grow`."""
    return await grow(make_redis_client(), make_keys(), number)


def make_check(relay: Relay) -> RedisCheck:
    """Make the checks of `socketdock check`, from the options."""
    return RedisCheck(
        make_redis_client(),
        make_keys(),
        options.redis_partitions,
        Path(options.state_dir) if options.state_dir else None,
        make_verdicts_check(),
    )


def make_backend(relay: Relay) -> RedisBackend:
    """Make the backend for `--backend=redis`, from the options."""
    return RedisBackend(relay, make_redis_client(), make_keys(), make_verdicts(relay))
