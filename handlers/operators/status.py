"""`GET /status`: a summary of this instance for operators, as JSON."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from backends import Backend
from handlers.clients.connection import Connections
from handlers.operators.guard import OperatorGuard, OperatorHandler
from handlers.probes import Readiness
from handlers.process.form import form


class Status:
    """The content of `/status` for this run, which begins when this object is made.

    `backend_name` is the value of `--backend`; `limits` are options by name, none of
    them a secret. `cluster` returns the state of leases, where there are any.
    """

    def __init__(
        self,
        connections: Connections,
        readiness: Readiness,
        backend: Backend,
        version: str,
        instance: str,
        backend_name: str,
        limits: Mapping[str, float | str],
        cluster: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:
        self._connections = connections
        self._readiness = readiness
        self._backend = backend
        self._backend_name = backend_name
        self._named = {"version": version, "form": form(), "instance": instance}
        self._limits = dict(limits)
        self._cluster = cluster
        self._started_at = datetime.now(UTC)
        self._began = time.monotonic()  # seconds; the system's clock may be set

    def rename(self, instance: str) -> None:
        """Show another instance: this run was taken for dead."""
        self._named["instance"] = instance

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values; `uptime`, `away` and `oldest` are in seconds."""
        connections, backend = self._connections, self._backend.condition()
        return {
            **self._named,
            "started_at": self._started_at.isoformat(),
            "uptime": round(time.monotonic() - self._began, 3),
            "state": self._readiness.state,
            "ready": self._readiness.why_not() is None,
            "backend": {
                "name": self._backend_name,
                "away": None if backend.away is None else round(backend.away, 3),
                "cause": backend.cause,
                "held": backend.held,
                "connections": backend.connections,
                "entries": backend.entries,
            },
            "connections": {"open": connections.open, "total": connections.total},
            "pending": {
                "events": connections.backlog.events,
                "bytes": connections.backlog.bytes,
                "oldest": round(connections.oldest_pending, 3),
            },
            "limits": self._limits,
            **({} if self._cluster is None else {"cluster": dict(self._cluster())}),
        }


class StatusHandler(OperatorHandler):
    """`GET /status`."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, status: Status
    ) -> None:
        super().initialize(guard)
        self.status = status

    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(json.dumps(self.status.describe()))

    head = get
