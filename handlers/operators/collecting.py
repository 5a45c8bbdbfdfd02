"""Makes what counts for `GET /metrics`, from the options.

The library of Prometheus, which is large, is imported only with `--metrics`.
"""

from typing import TYPE_CHECKING

from tornado.options import define, options

from backends import Backend
from handlers.clients.connection import Connections
from handlers.operators.metrics import Metrics
from handlers.process.form import form
from handlers.telemetry.observers import Observers

if TYPE_CHECKING:
    from handlers.operators.prometheus import Described, RelayCollector

define("metrics", default=True,
       help="collect metrics and serve GET /metrics; off: the path does not exist")


def make_collector(
    connections: Connections,
    backend: Backend,
    observers: Observers,
    version: str,
    cluster: "Described | None" = None,
) -> "RelayCollector | None":
    """Return the collector, and start counting; None with --metrics=off.

    `cluster` has the leases of --cluster.
    """
    if not options.metrics:
        return None
    from handlers.operators.prometheus import RelayCollector

    metrics = Metrics()
    observers.add(metrics)
    build = {"version": version, "form": form(), "backend": options.backend}
    most = {"connections": options.max_connections, "pending": options.max_pending}
    return RelayCollector(metrics, connections, backend, build, most, cluster)
