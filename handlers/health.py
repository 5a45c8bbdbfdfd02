"""What operators' probes ask."""

from http import HTTPStatus

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
