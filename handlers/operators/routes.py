"""Lists the operators' routes, without those of the console."""

from typing import TYPE_CHECKING

from handlers.http.application import Routes
from handlers.operators.guard import OperatorGuard
from handlers.operators.status import Status, StatusHandler

if TYPE_CHECKING:
    from handlers.operators.prometheus import RelayCollector


def operator_routes(
    guard: OperatorGuard, status: Status, collector: "RelayCollector | None"
) -> Routes:
    """Return the routes of status and metrics; `guard` protects both."""
    routes: Routes = [
        (r"/status", StatusHandler, {"guard": guard, "status": status})
    ]
    if collector is not None:
        from handlers.operators.prometheus import MetricsHandler

        found = {"guard": guard, "registry": collector.registry()}
        routes.append((r"/metrics", MetricsHandler, found))
    return routes
