"""The base of all callback handlers: takes the body, and answers with an outcome."""

from handlers.callbacks.actions import Outcome
from handlers.callbacks.bodies import unsupported
from handlers.callbacks.responses import Response, response_of
from handlers.http.body import BodyHandler


class OutcomeHandler(BodyHandler):
    """A handler whose responses are those of outcomes."""

    def send_outcome(self, outcome: Outcome) -> None:
        """Finish with the response for `outcome`."""
        self.respond(response_of(outcome))

    def respond(self, response: Response) -> None:
        """Finish with `response`."""
        self.set_status(response.status)
        for name, value in response.headers.items():
            self.set_header(name, value)
        self.finish(response.body)

    def take_body(self) -> bytes | None:
        """Return the whole body; None if it was rejected and answered."""
        body = super().take_body()
        if body is None:
            return None
        headers = self.request.headers
        refusal = unsupported(
            headers.get("Content-Type", ""), headers.get_list("Content-Encoding")
        )
        if refusal is not None:
            self.respond(refusal)
            return None
        return body
