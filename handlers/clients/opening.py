"""The way of a handshake: checked, decided by the backend, and answered.

`handlers.clients.handshake` reads and answers it by a handler of Tornado,
`handlers.clients.fast_handshake` without.
"""

import logging
import re
from collections.abc import Awaitable, Coroutine
from http import HTTPStatus
from typing import Any, Protocol

from tornado.httputil import HTTPHeaders

from backends import (
    BackendError,
    ConnectionRefused,
    Handshake,
    HandshakeOutcome,
    Initiator,
    TraceContext,
)
from backends.waiting import RAISED
from handlers.clients.checks import Rejection, malformed
from handlers.clients.connection import ClientConnection, ClientContext
from handlers.clients.headers import forwarded_fields, forwarded_headers
from handlers.clients.request import HandshakeRequest
from handlers.clients.tickets import Claim, Tickets
from handlers.http.access_log import PEER_LEFT
from handlers.http.problem import PROBLEM_TYPE, SpeltHeaders, problem_document
from handlers.http.sockets import TakenSocket
from handlers.telemetry.trace_context import HandshakeSpan, Tracer, trace_context
from handlers.websocket.frames import Close, CloseCode
from handlers.websocket.negotiation import subprotocols
from handlers.websocket.upgrade import negotiate_compression, switching_fields

logger = logging.getLogger(__name__)

# RFC 9110, section 5.5.
FIELD_VALUE = re.compile(r"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*"
                         r"[\x21-\x7e\x80-\xff])?|")
# The server sets these itself. A backend may pass on all headers of a response.
FRAMING = frozenset({"connection", "content-length", "keep-alive", "transfer-encoding"})


class Answer(Protocol):
    """How a handshake is answered."""

    @property
    def gone(self) -> bool:
        """Whether the client has left, so that there is nobody to be answered."""

    def respond(self, status: int, headers: HTTPHeaders, body: bytes) -> None:
        """Answer with another status than 101. `headers` lacks those of the body."""

    def switch(self, fields: list[tuple[str, str]]) -> TakenSocket | None:
        """Answer 101 with these headers; return the socket, or None if it is gone."""


class Openings:
    """What all handshakes of this process share."""

    __slots__ = ("context", "tickets", "tracer")

    def __init__(
        self, context: ClientContext, tickets: Tickets, tracer: Tracer | None = None
    ) -> None:
        self.context = context
        self.tickets = tickets
        self.tracer = tracer


class Opening:
    """One handshake, until its connection is open or it is rejected."""

    __slots__ = (
        "_answer",
        "_claim",
        "_connection",
        "_context",
        "_offered",
        "_request",
        "_span",
        "_tickets",
        "_trace",
        "remote_ip",
    )

    def __init__(
        self, shared: Openings, request: HandshakeRequest, answer: Answer
    ) -> None:
        self._context = context = shared.context
        self._tickets = shared.tickets
        self._request = request
        self._answer = answer
        self._connection: ClientConnection | None = None
        self._claim: Claim | None = None
        self._offered: list[str] = []  # subprotocols
        self._trace: TraceContext | None = None
        self._span: HandshakeSpan | None = None
        if context.policy.trust_traceparent:
            self._trace = trace_context(request.lines("traceparent"))
        if shared.tracer is not None:
            scheme = "https" if request.has_tls else "http"
            self._span = shared.tracer.handshake(
                self._trace, scheme, request.path, request.seconds
            )
        self.remote_ip = request.peer

    def begin(self) -> Coroutine[Any, Any, None] | None:
        """Check the request, ask the backend, and only then accept.

        Returns None if that is done, or a coroutine that waits for the backend.
        """
        rejection = self._rejection()
        if rejection is not None:
            self.reject(rejection)
            return None
        return self._ask()

    def _rejection(self) -> Rejection | None:
        """Check the headers, the Origin, then the limits."""
        request, policy = self._request, self._context.policy
        asked = policy.trusted_proxies.read(request)
        self.remote_ip = asked.remote_ip
        rejection = malformed(request, policy.compression is not None)
        if rejection is not None:
            return rejection
        origins = request.lines("origin")
        self._claim = self._tickets.claim(request.query, origins)
        if self._claim is None and not (
            policy.allows(origins, asked.host, asked.scheme)
        ):
            return Rejection(HTTPStatus.FORBIDDEN, "Origin not allowed.")
        refusal = self._context.connections.refusal(
            self.remote_ip, request.descriptor
        )
        if refusal is None:
            return None
        after = {"Retry-After": str(refusal.retry_after)}
        return Rejection(refusal.status, refusal.detail, after)

    def reject(self, rejection: Rejection) -> None:
        """Answer without a connection."""
        status, detail, _ = rejection
        self._context.connections.refusals.add(self.remote_ip, status, detail)
        self._record("rejected", status)
        self._respond(rejection)

    def _ask(self) -> Coroutine[Any, Any, None] | None:
        """List the connection, and ask the backend."""
        context, request = self._context, self._request
        handshake = self._handshake()
        self._connection = connection = ClientConnection(
            self.remote_ip,
            request.text("user-agent"),
            # Later events are not part of a trace that starts here.
            self._trace and handshake.trace,
            context,
            None if self._claim is None else self._claim.connection_id,
        )
        context.connections.add(connection)
        try:
            choice = context.backend.connect(connection, handshake)
            if choice is not None and not isinstance(choice, str):
                return self._when_chosen(choice)
            self._accept(choice)
        except RAISED as error:
            self._fail(error)
        return None

    async def _when_chosen(self, choice: Awaitable[str | None]) -> None:
        try:
            self._accept(await choice)
        except Exception as error:
            self._fail(error)
        except BaseException:  # the task is cancelled
            self._end_undecided()
            raise

    def _handshake(self) -> Handshake:
        request, context = self._request, self._context
        withheld = context.policy.withheld_headers
        self._offered = subprotocols(request.lines("sec-websocket-protocol"))
        return Handshake(
            headers=(
                forwarded_headers(request.headers, withheld)
                if context.backend.wants_headers
                else {}
            ),
            path=request.path,
            query=request.query if self._claim is None else self._claim.query,
            remote_ip=self.remote_ip,
            subprotocols=self._offered,
            trace=self._trace if self._span is None else self._span.trace,
            fields=forwarded_fields(request.fields, withheld) if request.fields else (),
        )

    def _accept(self, subprotocol: str | None) -> None:
        """Answer 101: the backend has accepted, and chose a subprotocol or None."""
        connection, policy = self._connection, self._context.policy
        assert connection is not None
        if subprotocol is not None and subprotocol not in self._offered:
            raise BackendError("the backend chose a subprotocol that was not offered")
        if self._answer.gone:
            self._leave(connection)
            return
        if subprotocol is None and self._offered:
            subprotocol = next(
                (name for name in self._offered if name in policy.subprotocols), None
            )
        request = self._request
        accepted = negotiate_compression(
            request.lines("sec-websocket-extensions"), policy.compression
        )
        taken = self._answer.switch(
            switching_fields(request.text("sec-websocket-key"), subprotocol, accepted)
        )
        if taken is None:
            self._leave(connection)
            return
        self._record("opened", HTTPStatus.SWITCHING_PROTOCOLS)
        connection.begin(
            taken, subprotocol, None if accepted is None else accepted.compression
        )

    def _leave(self, connection: ClientConnection) -> None:
        """End a connection whose client left before the 101."""
        abandon(connection, "client")
        self._record("left", PEER_LEFT)

    def _fail(self, error: BaseException) -> None:
        """Answer a handshake that the backend refused, or did not decide."""
        connection = self._connection
        assert connection is not None
        if isinstance(error, ConnectionRefused):
            connection.end()
            self._record("refused", error.status)
            self._refuse(connection, error)
        elif isinstance(error, BackendError):
            logger.warning("connection %s has no decision: %s", connection.id, error,
                           extra={"connection_id": connection.id})
            abandon(connection, "relay")
            self._record("no_decision", HTTPStatus.SERVICE_UNAVAILABLE)
            self._respond(
                Rejection(
                    HTTPStatus.SERVICE_UNAVAILABLE, "No decision from the backend."
                )
            )
        else:  # a bug here or in the backend
            logger.error("bug in GET %s", self._request.path, exc_info=error)
            self._end_undecided()

    def _end_undecided(self) -> None:
        """Answer 500, unless the connection is open; the backend may have accepted."""
        connection = self._connection
        assert connection is not None
        if connection.state == "connecting":
            abandon(connection, "relay")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            self._record("no_decision", status)
            self._respond(Rejection(status, status.description))

    def _refuse(self, connection: ClientConnection, refused: ConnectionRefused) -> None:
        logger.debug("connection %s rejected with %d", connection.id, refused.status,
                     extra={"connection_id": connection.id})
        self._context.connections.refusals.add(
            self.remote_ip, refused.status, "Rejected by the backend."
        )
        headers = SpeltHeaders()
        for name, value in refused.headers.items():
            if FIELD_VALUE.fullmatch(value) and name.lower() not in FRAMING:
                headers[name] = value
        body = b"" if refused.status == HTTPStatus.NOT_MODIFIED else refused.body
        if not self._answer.gone:
            self._answer.respond(refused.status, headers, body)

    def _respond(self, rejection: Rejection) -> None:
        if not self._answer.gone:
            status, detail, headers = rejection
            self._answer.respond(
                status,
                SpeltHeaders({"Content-Type": PROBLEM_TYPE, **headers}),
                problem_document(status, detail),
            )

    def _record(self, outcome: HandshakeOutcome, status: int) -> None:
        self._context.observer.handshake_ended(
            outcome, status, self.remote_ip, self._request.seconds
        )
        if self._span is not None:
            connection = self._connection
            self._span.end(
                outcome,
                status,
                self.remote_ip,
                None if connection is None else connection.id,
            )


def abandon(connection: ClientConnection, initiator: Initiator) -> None:
    """End a connection that never opened; the backend may have accepted it."""
    connection.end(Close(CloseCode.ABNORMAL_CLOSURE, ""), initiator)
