"""The handshake of a client: checked, decided by the backend, and answered."""

import contextlib
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from tornado.websocket import WebSocketHandler

from backends import (
    BackendError,
    ConnectionRefused,
    Handshake,
    HandshakeOutcome,
    Initiator,
    TraceContext,
)
from handlers.clients.connection import ClientConnection, ClientContext
from handlers.clients.headers import (
    forwarded_fields,
    forwarded_headers,
    is_key,
    malformed_reason,
    members,
    written_as_usual,
)
from handlers.clients.tickets import Claim, Tickets
from handlers.http.problem import ProblemHandler
from handlers.telemetry.trace_context import HandshakeSpan, Tracer, trace_context
from handlers.websocket.frames import Close, CloseCode
from handlers.websocket.negotiation import subprotocols
from handlers.websocket.upgrade import negotiate_compression, upgrade

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # as nginx logs a client that closed before the response


class ClientSocketHandler(ProblemHandler, WebSocketHandler):
    """Handles a handshake until it is rejected or its `ClientConnection` is open."""

    def initialize(
        self,
        context: ClientContext,
        tickets: Tickets,
        tracer: Tracer | None = None,
    ) -> None:
        self.context = context
        self.policy = context.policy
        self._asked = self.policy.trusted_proxies.read(
            self.request.remote_ip or "",
            self.request.headers,
            self.request.host,
            self.request.protocol == "https",
        )
        self.remote_ip = self._asked.remote_ip
        self._tickets = tickets
        self._claim: Claim | None = None
        self._tracer = tracer
        self._span: HandshakeSpan | None = None
        self._connection_id: str | None = None
        self._peer_gone = False

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Check the request, ask the backend, and only then accept.

        Not in `prepare()`, which runs before the checks.
        """
        trace = self._trace()
        if not self._is_acceptable():
            return
        handshake = self._handshake(trace)
        connection = ClientConnection(
            self.remote_ip,
            self.request.headers.get("User-Agent", ""),
            # Later events are not part of a trace that starts here.
            trace and handshake.trace,
            self.context,
            None if self._claim is None else self._claim.connection_id,
        )
        self._connection_id = connection.id
        self.context.connections.add(connection)
        try:
            await self._decide(connection, handshake)
        except BaseException:  # a bug here or in the backend, which may have accepted
            if connection.state == "connecting":
                self._abandon(connection, "relay")
                self._record_outcome("no_decision", HTTPStatus.INTERNAL_SERVER_ERROR)
            raise

    async def _decide(
        self, connection: ClientConnection, handshake: Handshake
    ) -> None:
        """Ask the backend, and answer the handshake accordingly."""
        try:
            subprotocol = await self.context.backend.connect(connection, handshake)
            if subprotocol is not None and subprotocol not in handshake.subprotocols:
                raise BackendError(
                    "the backend chose a subprotocol that was not offered"
                )
        except ConnectionRefused as refused:
            connection.end()
            self._record_outcome("refused", refused.status)
            self._refuse(connection, refused)
            return
        except BackendError as error:
            logger.warning("connection %s has no decision: %s", connection.id, error,
                           extra={"connection_id": connection.id})
            self._abandon(connection, "relay")
            self._record_outcome("no_decision", HTTPStatus.SERVICE_UNAVAILABLE)
            self.problem(
                HTTPStatus.SERVICE_UNAVAILABLE, "No decision from the backend."
            )
            return
        if self._peer_gone or self.request.connection is None:
            self._leave(connection)
            return
        if subprotocol is None:
            subprotocol = next(
                (p for p in handshake.subprotocols if p in self.policy.subprotocols),
                None,
            )
        compression = negotiate_compression(self, self.policy.compression)
        taken = upgrade(self, subprotocol)
        if taken is None:
            self._leave(connection)
            return
        self._record_outcome("opened", HTTPStatus.SWITCHING_PROTOCOLS)
        connection.begin(taken, subprotocol, compression)

    def _leave(self, connection: ClientConnection) -> None:
        """End a connection whose client left before the 101."""
        self._abandon(connection, "client")
        self._record_outcome("left", CLIENT_LEFT)

    def _abandon(self, connection: ClientConnection, initiator: Initiator) -> None:
        """End a connection that never opened; the backend may have accepted it."""
        connection.end(Close(CloseCode.ABNORMAL_CLOSURE, ""), initiator)

    def _is_acceptable(self) -> bool:
        """Check headers and Origin (RFC 6455, section 4.2.1), then the limits."""
        headers = self.request.headers
        if headers.get("Upgrade", "").lower() != "websocket" or (
            "upgrade" not in members(headers, "Connection")
        ):
            self._reject(
                HTTPStatus.UPGRADE_REQUIRED,
                "WebSocket upgrade required.",
                {"Upgrade": "websocket", "Connection": "Upgrade"},
            )
        elif headers.get("Sec-WebSocket-Version") != "13":
            self._reject(
                HTTPStatus.UPGRADE_REQUIRED,
                "WebSocket version 13 required.",
                {"Sec-WebSocket-Version": "13"},
            )
        elif self.request.version != "HTTP/1.1":
            self._reject(HTTPStatus.BAD_REQUEST, "HTTP/1.1 required.")
        elif not is_key(headers.get("Sec-WebSocket-Key", "")):
            self._reject(
                HTTPStatus.BAD_REQUEST, "Sec-WebSocket-Key must be 16 bytes in base64."
            )
        elif reason := malformed_reason(
            self.request, self.policy.compression is not None
        ):
            self._reject(HTTPStatus.BAD_REQUEST, reason)
        elif not self._is_origin_allowed(headers.get_list("Origin")):
            self._reject(HTTPStatus.FORBIDDEN, "Origin not allowed.")
        elif refusal := self.context.connections.refusal(
            self.remote_ip, self._descriptor
        ):
            self._reject(
                refusal.status,
                refusal.detail,
                {"Retry-After": str(refusal.retry_after)},
            )
        else:
            return True
        return False

    @property
    def _descriptor(self) -> int:
        connection: Any = self.request.connection
        descriptor: int = connection.descriptor
        return descriptor

    def _reject(
        self, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.context.connections.refusals.add(self.remote_ip, status, detail)
        self._record_outcome("rejected", status)
        for name, value in (headers or {}).items():
            self.set_header(name, value)
        self.problem(status, detail)

    def _is_origin_allowed(self, origins: list[str]) -> bool:
        self._claim = self._tickets.claim(self.request.query, origins)
        if self._claim is not None:
            return True
        if not origins:
            return not self.policy.require_origin
        if len(origins) > 1:
            return False
        return self.policy.allowed_origins.allow(
            origins[0], self._asked.host, self._asked.scheme
        )

    def _trace(self) -> TraceContext | None:
        """Return the client's trace; start a span if tracing is on."""
        trace = None
        if self.policy.trust_traceparent:
            trace = trace_context(self.request.headers.get_list("traceparent"))
        if self._tracer is not None:
            self._span = self._tracer.handshake(
                trace,
                self.request.protocol,
                self.request.path,
                self.request.request_time(),
            )
        return trace

    def _handshake(self, trace: TraceContext | None) -> Handshake:
        headers = self.request.headers
        return Handshake(
            headers=forwarded_headers(headers, self.policy.withheld_headers),
            path=self.request.path,
            query=self.request.query if self._claim is None else self._claim.query,
            remote_ip=self.remote_ip,
            subprotocols=subprotocols(headers.get_list("Sec-WebSocket-Protocol")),
            trace=trace if self._span is None else self._span.trace,
            fields=self._fields() if self.context.backend.wants_fields else (),
        )

    def _fields(self) -> list[tuple[str, str]]:
        """Return the header fields as they were sent."""
        fields = getattr(self.request.connection, "fields", None)
        if fields is None:  # Tornado's server does not keep the case of names
            fields = written_as_usual(self.request.headers.get_all())
        return forwarded_fields(fields, self.policy.withheld_headers)

    def _refuse(
        self, connection: ClientConnection, refused: ConnectionRefused
    ) -> None:
        logger.debug("connection %s rejected with %d", connection.id, refused.status,
                     extra={"connection_id": connection.id})
        self.context.connections.refusals.add(
            self.remote_ip, refused.status, "Rejected by the backend."
        )
        if self._peer_gone:
            return
        self.set_status(refused.status)
        self.clear_header("Content-Type")
        for name, value in refused.headers.items():
            with contextlib.suppress(ValueError):  # it is not a valid header value
                self.set_header(name, value)
        self.finish(refused.body or None)  # some statuses have no body

    def _record_outcome(self, outcome: HandshakeOutcome, status: int) -> None:
        self.context.observer.handshake_ended(
            outcome, status, self.remote_ip, self.request.request_time()
        )
        if self._span is not None:
            self._span.end(outcome, status, self.remote_ip, self._connection_id)

    def on_connection_close(self) -> None:
        """Note that the client left before the handshake was answered."""
        self._peer_gone = True

    def on_finish(self) -> None:
        """Break a reference cycle once the handshake is answered.

        Tornado keeps the template namespace of a `WebSocketHandler`, which refers to
        the handler. Without this each handler would wait for the garbage collector.
        """
        self.ui.clear()


class UnknownPathHandler(ClientSocketHandler):
    """Rejects a handshake to a path where no clients connect."""

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Answer 403."""
        self._reject(HTTPStatus.FORBIDDEN, "No clients connect at this path.")
