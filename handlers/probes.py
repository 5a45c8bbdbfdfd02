"""What probes ask: `/livez` and `/readyz`."""

from http import HTTPStatus
from typing import Any

from tornado.options import define

from backends import Backend
from handlers.connections import ConnectionMap
from handlers.http.problem import ProblemHandler

define("ready_breaker_timeout", default=0.0, metavar="SECONDS",
       help="/readyz returns 503 when the backend has been unreachable for this long; "
            "0: never")


class LiveHandler(ProblemHandler):
    """`GET /livez`: 200 while the process serves."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish("ok\n")

    head = get


class Readiness:
    """Whether this instance should get new clients, and if not, why.

    `breaker_timeout` is how many seconds the backend may be unreachable; 0: no limit.
    """

    def __init__(
        self, connections: ConnectionMap[Any], backend: Backend, breaker_timeout: float
    ) -> None:
        self._connections = connections
        self._backend = backend
        self._breaker_timeout = breaker_timeout
        self.started = False  # set when everything has started

    @property
    def state(self) -> str:
        """starting, serving or draining."""
        if self._connections.stopping:
            return "draining"
        return "serving" if self.started else "starting"

    def why_not(self) -> str | None:
        """Return the reason for a 503, or None if new clients are welcome."""
        if self._connections.stopping:
            return "This instance is shutting down."
        if not self.started:
            return "This instance is starting."
        backend = self._backend.condition()
        if not self._breaker_timeout or (backend.away or 0) < self._breaker_timeout:
            return None
        if backend.untried and not self._connections.backlog.events:
            return None  # a new client must probe the backend
        return f"The backend has been unreachable for {backend.away:.0f} s."


class ReadyHandler(LiveHandler):
    """`GET /readyz`: 503 with the reason if it should get no new clients."""

    def initialize(self, readiness: Readiness) -> None:
        self.readiness = readiness

    def get(self) -> None:
        if (reason := self.readiness.why_not()) is not None:
            self.set_header("Cache-Control", "no-store")
            self.problem(HTTPStatus.SERVICE_UNAVAILABLE, reason)
        else:
            super().get()

    head = get
