"""The `http` backend: each event becomes a POST.

A message's way: `HTTPBackend.message` → `event` writes the request →
`delivery` keeps the order → `client` sends it.
"""

import asyncio
import itertools
import logging
import re
from collections.abc import Awaitable, Coroutine
from functools import partial
from pathlib import Path

import orjson
from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import (
    Attempt,
    Backend,
    BackendAway,
    BackendError,
    Closure,
    Condition,
    Connection,
    ConnectionRefused,
    EventName,
    Handshake,
    Outcome,
    Relay,
)
from backends.http.breaker import Breaker, Tripping
from backends.http.check import HTTPCheck
from backends.http.client import Answer, Client, Target
from backends.http.credentials import Credentials, CredentialSources
from backends.http.delivery import (
    HELD_AFTER_DISCONNECT,
    Deliveries,
    Delivery,
    Patience,
    attempt_outcome,
    backoff,
    is_away,
    is_failure,
    is_success,
    retry_after,
)
from backends.http.event import Event, EventWriter
from backends.http.journal import DeadRun, StateDirectory

logger = logging.getLogger(__name__)

define("messageuri", type=str, metavar="URL",
       help="each client message is POSTed here; required")
define("disconnecturi", type=str, metavar="URL",
       help="told of every closed connection; none: not told")
define("connecturi", type=str, metavar="URL",
       help="asked before a connection is accepted; none: all are accepted")
define("handshake_timeout", default=10.0, metavar="SECONDS",
       help="longest wait for the verdict of --connecturi; then 503")
define("order_wait", default=1.0, metavar="SECONDS",
       help="after that long without an answer the next message is sent all the "
            "same; inf: strictly one at a time, which needs --backend_timeout")
define("max_unanswered", default=16, metavar="COUNT",
       help="most message requests of one connection that are open at once")
define("backend_timeout", default=0.0, metavar="SECONDS",
       help="longest wait for a message's answer; 0: as long as the connection "
            "to the backend lives, since answers may be held")
define("delivery_timeout", default=60.0, metavar="SECONDS",
       help="longest that a message is retried after its first failure, or waits "
            "for a backend without a sign of life; then its client gets 1013")
define("disconnect_timeout", default=300.0, metavar="SECONDS",
       help="longest that a disconnect event is retried after its first failure")
define("backend_connect_timeout", default=5.0, metavar="SECONDS",
       help="longest wait for a connection to the backend: name, TCP and TLS")
define("backend_dead_after", default=60.0, metavar="SECONDS",
       help="a backend's host that vanished without a word is noticed by then")
define("max_backend_connections", default=4096, metavar="COUNT",
       help="most connections to the backend at once, held answers included")

define("state_dir", type=str, metavar="PATH",
       help="folder where the ids of open connections survive a crash, so that "
            "the next start tells of them; none: not kept")
define("breaker_window", default=10.0, metavar="SECONDS",
       help="the circuit breaker looks back that long")
define("breaker_attempts", default=20, metavar="COUNT",
       help="it opens at so many attempts in its window, not before")
define("breaker_share", default=0.5, metavar="SHARE",
       help="and where that share of them found the backend away, 0 to 1")
define("breaker_connections", default=5, metavar="COUNT",
       help="and where these were events of so many connections")
define("breaker_first_probe", default=0.5, metavar="SECONDS",
       help="while it is open, one attempt goes after that time")
define("breaker_last_probe", default=5.0, metavar="SECONDS",
       help="and then in longer and longer intervals, up to this")

DISCONNECT_TIMEOUT = 30.0  # seconds for the answer to a disconnect event
MAX_FAREWELLS_OF_DEAD_RUNS = 64  # under way at once
FAREWELLS_TIMEOUT = 2.0  # seconds for those to end at the stop
RETRY_AFTER = "1"  # seconds; the backend may be back by then
LOST = Closure(1006, "instance lost", "relay", 0.0)
MAX_REFUSAL_BODY = 4096  # bytes of a refusal's body that the client gets

# A verdict that is passed on to the client; any other is no verdict.
REFUSALS = frozenset({401, 403, 404, 429})
REFUSAL_HEADERS = ("content-type", "www-authenticate", "retry-after")


class HTTPBackend(Backend):
    """POSTs events to an HTTP service."""

    observes = True

    def __init__(
        self,
        relay: Relay,
        message_target: Target,
        disconnect_target: Target | None,
        connect_target: Target | None,
        client: Client,
        sources: CredentialSources,
        credentials: Credentials,
        patience: Patience,
        handshake_timeout: float,
        disconnect_timeout: float,
        breaker: Breaker,
        state: StateDirectory | None = None,
    ) -> None:
        self._events = EventWriter(relay)
        self._observer = relay.observer
        self._breaker = breaker
        self._state = state
        self._message_target = message_target
        self._disconnect_target = disconnect_target
        self._connect_target = connect_target
        self._client = client
        self.descriptors = client.max_connections
        self._sources = sources
        self._present(credentials)
        self._handshake_timeout = handshake_timeout
        self._disconnect_timeout = disconnect_timeout
        self._deliveries = Deliveries(
            client, self._events, breaker, message_target, patience, relay.observer
        )
        # Of connections that have sent a message, by id, until all is told.
        self._by_id: dict[str, Delivery] = {}
        # Held requests of closed connections, and the farewells of dead runs;
        # cancelled by close().
        self._ending: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._telling: asyncio.Task[None] | None = None
        if state is not None:
            self._telling = self._keep(self._tell_of_dead_runs(state))

    async def connect(
        self, connection: Connection, handshake: Handshake
    ) -> str | None:
        """Ask `--connecturi`; accepted where there is none."""
        target = self._connect_target
        if target is None:
            self._remember(connection.id)
            return None
        if not self._breaker.take():  # it was never asked, so nothing else is told
            raise ConnectionRefused(503, {"retry-after": RETRY_AFTER})
        self._remember(connection.id)
        outcome: Outcome = "failed"
        try:
            answer = await self._attempt(
                "connect",
                connection.id,
                target,
                self._events.connect(connection.id, handshake),
                self._handshake_timeout,
                keep=True,
            )
            if answer.status in REFUSALS:
                outcome = "refused"
                self._forget(connection.id)
                raise verdict_of(answer)
            if not is_success(answer.status):
                raise BackendError(f"POST {target}: answered {answer.status}")
            subprotocol = chosen_subprotocol(answer.body)
            outcome = "delivered"
            return subprotocol
        finally:
            self._observer.ended("connect", connection.id, outcome)

    def message(
        self, connection: Connection, message: str | bytes
    ) -> Awaitable[None] | None:
        """Post to `--messageuri`; the next may follow once this is answered."""
        delivery = self._by_id.get(connection.id)
        if delivery is None:
            delivery = self._by_id[connection.id] = Delivery(
                self._deliveries, connection
            )
        delivery.number += 1
        return delivery.post(
            self._events.message(
                connection.id, delivery.number, message, connection.trace
            )
        )

    async def disconnect(self, connection: Connection, closure: Closure) -> None:
        """Post to `--disconnecturi`; held requests end a little later."""
        delivery = self._by_id.get(connection.id)
        if delivery is None:
            await self._tell(connection, closure, None)
            return
        delivery.disconnected = True
        failures = delivery.failures
        try:
            await self._tell(connection, closure, delivery)
        finally:
            if delivery.holding or delivery.failures != failures:
                self._keep(self._end_held(connection, closure, delivery, failures))
            else:
                del self._by_id[connection.id]

    async def _tell(
        self, connection: Connection, closure: Closure, delivery: Delivery | None
    ) -> None:
        """Deliver the disconnect event; raises `BackendError` if it can't be."""
        undelivered, refused = closure.undelivered, 0
        if delivery is not None:
            undelivered += delivery.undelivered
            refused = delivery.refused
        event = self._events.disconnect(
            connection.id, closure, undelivered, refused, connection.trace
        )
        try:
            await self._deliver_disconnect(connection.id, event)
        except BackendError:
            if not self._deliveries.closing:  # else the next start tells
                self._forget(connection.id)
            raise
        self._forget(connection.id)

    async def _deliver_disconnect(self, connection_id: str, event: Event) -> None:
        if self._disconnect_target is None:
            return
        try:
            refused = await self._retry_disconnect(
                self._disconnect_target, connection_id, event
            )
        except BackendError:
            if not self._deliveries.closing:  # else the next start tells
                self._observer.given_up(event.id)
                self._observer.ended("disconnect", connection_id, "failed")
            raise
        if refused is None:
            self._observer.ended("disconnect", connection_id, "delivered")
        else:
            self._observer.ended("disconnect", connection_id, "refused")
            raise refused

    async def _retry_disconnect(
        self, target: Target, connection_id: str, event: Event
    ) -> BackendError | None:
        """Until it is taken, or refused: then the error for the log is returned.

        Raises `BackendError` where it is given up.
        """
        loop = asyncio.get_running_loop()
        deadline = float("inf")
        for attempt in itertools.count(1):
            wait = 0.0
            if not self._breaker.take():
                deadline = min(deadline, loop.time() + self._disconnect_timeout)
                if not await self._turn(deadline):
                    raise BackendAway(f"POST {target}: the backend is away")
            try:
                answer = await self._attempt(
                    "disconnect", connection_id, target, event, DISCONNECT_TIMEOUT
                )
            except BackendError as failure:
                error = failure
            else:
                if is_success(answer.status):
                    return None
                error = BackendError(f"POST {target}: answered {answer.status}")
                if not is_failure(answer.status):
                    return error
                wait = retry_after(answer) or 0.0
            if self._deliveries.closing:
                raise error
            deadline = min(deadline, loop.time() + self._disconnect_timeout)
            left = deadline - loop.time()
            if left <= 0:
                raise error
            await asyncio.sleep(min(left, max(backoff(attempt), wait)))
        raise AssertionError("it never stops counting")

    def _keep(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def _turn(self, deadline: float) -> bool:
        """Wait for the breaker to let an attempt go; False at the deadline."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def call() -> None:
            # Taken here: the permit is for whoever is called.
            if not turn.done() and self._breaker.take():
                turn.set_result(None)

        self._breaker.wait(call)
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(turn)
            return True
        except TimeoutError:
            return turn.done()  # the permit may have come with the deadline
        finally:
            self._breaker.leave(call)

    def _remember(self, connection_id: str) -> None:
        """Before the first event: a crash from here on is told of at the next start."""
        if self._state is not None and self._disconnect_target is not None:
            self._state.journal.add(connection_id)

    def _forget(self, connection_id: str) -> None:
        if self._state is not None:
            self._state.journal.remove(connection_id)

    async def _tell_of_dead_runs(self, state: StateDirectory) -> None:
        """Say farewell for each connection that an earlier run lost."""
        room = asyncio.Semaphore(MAX_FAREWELLS_OF_DEAD_RUNS)

        async def tell(run: DeadRun, connection_id: str) -> None:
            event = self._events.disconnect(
                connection_id, LOST, 0, 0, None, instance=run.instance
            )
            try:
                async with room:
                    if self._stopping:
                        return  # the next start tells
                    await self._deliver_disconnect(connection_id, event)
            except BackendError as error:
                if self._deliveries.closing:
                    return
                logger.error(
                    "connection %s: disconnect not told: %s", connection_id, error,
                    extra={"event": "untold", "connection_id": connection_id},
                )
            run.remove(connection_id)

        async with asyncio.TaskGroup() as telling:
            for run in state.dead:
                logger.warning(
                    "telling of %d connections lost by %s", len(run.ids), run.instance
                )
                for connection_id in run.ids:
                    telling.create_task(tell(run, connection_id))

    async def _end_held(
        self,
        connection: Connection,
        closure: Closure,
        delivery: Delivery,
        failures: int,
    ) -> None:
        """Let held requests go; what fails before is delivered all the same."""
        try:
            while await delivery.until_failure(failures, HELD_AFTER_DISCONNECT):
                failures = delivery.failures
                await delivery.quiet()
                # The backend may have cleaned up before that message came.
                await self._tell(connection, closure, delivery)
        except BackendError as error:
            logger.error("connection %s: disconnect not told: %s", connection.id, error,
                         extra={"event": "untold", "connection_id": connection.id})
        finally:
            delivery.end()
            self._by_id.pop(connection.id, None)

    def called_back(self, connection: Connection) -> None:
        """A sign of life from the backend of this connection."""
        if (delivery := self._by_id.get(connection.id)) is not None:
            delivery.called_back()

    def condition(self) -> Condition:
        """Away while the breaker is open."""
        return Condition(
            self._breaker.open_for(),
            self._breaker.untried,
            self._deliveries.held,
            self._client.open,
        )

    def reload(self) -> None:
        """Read secrets, headers and certificates: all of them count, or none."""
        self._present(self._sources.read())

    def _present(self, credentials: Credentials) -> None:
        self._events.present(credentials.headers, credentials.signer)
        self._client.trust(credentials.tls)

    async def close(self) -> None:
        """Close every connection to the backend.

        Farewells of dead runs that are under way may end first, so that the
        next start does not repeat them.
        """
        self._stopping = True
        if self._telling is not None:
            await asyncio.wait({self._telling}, timeout=FAREWELLS_TIMEOUT)
        self._deliveries.closing = True
        for ending in list(self._ending):
            ending.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._client.close()
        if self._state is not None:
            self._state.close()

    async def _attempt(
        self,
        name: EventName,
        connection_id: str,
        target: Target,
        event: Event,
        timeout: float,
        keep: bool = False,
    ) -> Answer:
        """One attempt; the breaker and the observer learn what became of it."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        outcome: Answer | BackendError
        try:
            outcome = await self._post(target, event, timeout, keep)
        except BackendError as error:
            outcome = error
        self._breaker.record(connection_id, is_away(outcome))
        answer = outcome if isinstance(outcome, Answer) else None
        self._observer.attempted(
            Attempt(
                name,
                connection_id,
                event.id,
                event.traceparent,
                attempt_outcome(outcome),
                answer.status if answer is not None else None,
                loop.time() - began,
                str(target),
                event.trace,
            )
        )
        if isinstance(outcome, BackendError):
            raise outcome
        return outcome

    async def _post(
        self, target: Target, event: Event, timeout: float, keep: bool
    ) -> Answer:
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def on_done(outcome: Answer | BackendError) -> None:
            if done.done():
                return
            if isinstance(outcome, BackendError):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)

        exchange = self._client.post(
            target,
            partial(self._events.request, target, event),
            on_done,
            timeout=timeout,
            keep=keep,
        )
        try:
            return await done
        finally:
            if not done.done() or done.cancelled():
                exchange.let_go()


def verdict_of(answer: Answer) -> ConnectionRefused:
    """The backend's no, with what of it the client gets."""
    return ConnectionRefused(
        answer.status,
        {
            name: answer.headers[name]
            for name in REFUSAL_HEADERS
            if name in answer.headers
        },
        answer.body[:MAX_REFUSAL_BODY],
    )


def chosen_subprotocol(body: bytes) -> str | None:
    """The `subprotocol` of a connect answer's JSON body, if there is one."""
    try:
        verdict = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None  # "OK", or nothing: a verdict all the same
    if not isinstance(verdict, dict) or verdict.get("subprotocol") is None:
        return None
    if not isinstance(verdict["subprotocol"], str):
        raise BackendError("the backend's subprotocol is not a string")
    return verdict["subprotocol"]


def target_of(option: str) -> Target | None:
    """The URL that an option holds. Raises `OptionError` where it is none."""
    if not options[option]:
        return None
    try:
        return Target.parse(options[option])
    except ValueError as error:
        # Without a password or a key that stands in it.
        shown = re.sub(r"(?s)//.*@", "//", options[option]).partition("?")[0]
        raise OptionError(f"--{option}={shown}: {error}") from None


def targets_of(relay: Relay) -> tuple[Target, Target | None, Target | None]:
    """Where messages, disconnect events and connect events go, from the options.

    Raises `OptionError` where options don't go together, too.
    """
    message_target = target_of("messageuri")
    if message_target is None:
        raise OptionError("--backend=http needs --messageuri")
    if relay.callback_url is None:
        raise OptionError(
            "--backend=http needs --externalhostandport, since callbacks are bound"
            " to a wildcard address"
        )
    if options.order_wait == float("inf") and not options.backend_timeout:
        raise OptionError("--order_wait=inf needs --backend_timeout")
    if options.breaker_first_probe > options.breaker_last_probe:
        raise OptionError("--breaker_first_probe is above --breaker_last_probe")
    return message_target, target_of("disconnecturi"), target_of("connecturi")


def credential_sources(*targets: Target | None) -> CredentialSources:
    """Secrets and files for events to `targets`, from the options."""
    return CredentialSources(
        https=any(target and target.scheme == "https" for target in targets),
        webhook_secrets=options.webhook_secret,
        webhook_secret_file=options.webhook_secret_file,
        headers_file=options.backend_headers_file,
        ca=options.backend_ca,
        cert=options.backend_cert,
        key=options.backend_key,
    )


def make_check(relay: Relay) -> HTTPCheck:
    """What `socketdock check` looks at, from the options."""
    targets = targets_of(relay)
    names = ("--messageuri", "--disconnecturi", "--connecturi")
    return HTTPCheck(
        {name: t for name, t in zip(names, targets, strict=True) if t is not None},
        credential_sources(*targets).read().tls,
        connect_timeout=options.backend_connect_timeout,
        certificates=[options.backend_cert] if options.backend_cert else [],
        state_dir=Path(options.state_dir) if options.state_dir else None,
        descriptors=options.max_backend_connections,
    )


def make_backend(relay: Relay) -> HTTPBackend:
    """The backend for `--backend=http`, from the options."""
    message_target, disconnect_target, connect_target = targets_of(relay)
    sources = credential_sources(message_target, disconnect_target, connect_target)
    return HTTPBackend(
        relay,
        message_target,
        disconnect_target,
        connect_target,
        Client(
            options.max_backend_connections,
            options.backend_connect_timeout,
            options.backend_dead_after,
        ),
        sources,
        sources.read(),
        Patience(
            options.order_wait,
            options.max_unanswered,
            options.backend_timeout or None,
            options.delivery_timeout,
            options.max_queued_bytes,
        ),
        options.handshake_timeout,
        options.disconnect_timeout,
        Breaker(
            Tripping(
                options.breaker_window,
                options.breaker_attempts,
                options.breaker_share,
                options.breaker_connections,
                options.breaker_first_probe,
                options.breaker_last_probe,
            )
        ),
        StateDirectory(Path(options.state_dir), relay.instance)
        if options.state_dir
        else None,
    )
