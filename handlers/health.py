"""What probes ask, and what operators see at a glance."""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from handlers.authorization import OperatorGuard, OperatorHandler
from handlers.connections import ConnectionMap
from handlers.problem import ProblemHandler


class LiveHandler(ProblemHandler):
    """`GET /livez`: 200 while the process serves at all."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish("ok\n")

    head = get


class ReadyHandler(LiveHandler):
    """`GET /readyz`: 503 from the stop signal on, so that balancers look away."""

    def initialize(self, connections: ConnectionMap) -> None:
        self.connections = connections

    def get(self) -> None:
        if self.connections.stopping:
            self.problem(HTTPStatus.SERVICE_UNAVAILABLE, "This instance is stopping.")
        else:
            super().get()

    head = get


class Status:
    """What `/status` tells of this run, which begins when it is made.

    `limits` are options by name, none of them a secret.
    """

    def __init__(
        self,
        connections: ConnectionMap,
        version: str,
        instance: str,
        backend: str,
        limits: Mapping[str, float | str],
    ) -> None:
        self._connections = connections
        self._named = {"version": version, "instance": instance}
        self._backend = backend
        self._limits = dict(limits)
        self._started_at = datetime.now(UTC)
        self._began = time.monotonic()  # seconds; the time of day may jump

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it; `uptime` is in seconds."""
        connections = self._connections
        return {
            **self._named,
            "started_at": self._started_at.isoformat(),
            "uptime": round(time.monotonic() - self._began, 3),
            "state": "draining" if connections.stopping else "serving",
            "backend": self._backend,
            "connections": {
                "open": sum(connection.state == "open" for connection in connections),
                "total": connections.total,
            },
            "pending": {
                "events": connections.pending,
                "bytes": connections.pending_bytes,
            },
            "limits": self._limits,
        }


class StatusHandler(OperatorHandler):
    """`GET /status`: what this instance is and does."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, status: Status
    ) -> None:
        super().initialize(guard)
        self.status = status

    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(json.dumps(self.status.describe()))

    head = get
