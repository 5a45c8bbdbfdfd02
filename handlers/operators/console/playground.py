"""The console's playground: the page connects to the relay as a client."""

from http import HTTPStatus

from handlers.clients.tickets import Tickets
from handlers.operators.console.assets import Clients
from handlers.operators.console.guarded import GuardedHandler
from handlers.operators.guard import OperatorGuard


class PlaygroundHandler(GuardedHandler):
    """`POST /console/playground`: permits one handshake from the page's origin.

    Answers with the `ticket` for that handshake, the `connection_id` that it will have,
    and `origin` and `path` where clients connect; a null `origin` is the page's own.
    """

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, tickets: Tickets, clients: Clients
    ) -> None:
        super().initialize(guard)
        self.tickets = tickets
        self.clients = clients

    def post(self) -> None:
        origins = self.request.headers.get_list("Origin")
        if len(origins) != 1:
            self.problem(HTTPStatus.BAD_REQUEST, "An Origin header is required.")
            return
        ticket = self.tickets.issue(origins[0])
        self.answer(
            {
                "ticket": ticket.secret,
                "connection_id": ticket.connection_id,
                "origin": self.clients.origin(self.request),
                "path": self.clients.path,
            }
        )
