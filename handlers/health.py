"""What operators' probes ask."""

from handlers.problem import ProblemHandler


class LiveHandler(ProblemHandler):
    """`GET /livez`: 200 while the process serves at all."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish("ok\n")

    head = get
