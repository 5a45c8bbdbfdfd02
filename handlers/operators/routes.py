"""Lists the operators' routes, without those of the console."""

from handlers.http.application import Routes
from handlers.operators.guard import OperatorGuard
from handlers.operators.prometheus import MetricsHandler, RelayCollector
from handlers.operators.status import Status, StatusHandler


def operator_routes(
    guard: OperatorGuard, status: Status, collector: RelayCollector | None
) -> Routes:
    """Return the routes of status and metrics; `guard` protects both."""
    routes: Routes = [
        (r"/status", StatusHandler, {"guard": guard, "status": status})
    ]
    if collector is not None:
        found = {"guard": guard, "registry": collector.registry()}
        routes.append((r"/metrics", MetricsHandler, found))
    return routes
