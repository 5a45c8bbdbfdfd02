"""What the console's data routes share: the guard, and what keeps browsers apart."""

import json
from http import HTTPStatus
from typing import Any

from handlers.operators.guard import OperatorHandler

# For every answer, errors too: nothing of it is another site's to read or to show.
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OWN_SITE = ("same-origin", "none")  # of Sec-Fetch-Site; none: typed by a person

MAX_WISH = 4096  # bytes of JSON that the page sends


class GuardedHandler(OperatorHandler):
    """A route for operators, and for no page but the console's own."""

    max_body_size = MAX_WISH

    def set_default_headers(self) -> None:
        super().set_default_headers()
        for name, value in SAFE_HEADERS.items():
            self.set_header(name, value)

    async def prepare(self) -> None:
        await super().prepare()
        sites = self.request.headers.get_list("Sec-Fetch-Site")
        if not self._finished and any(site not in OWN_SITE for site in sites):
            # It could read nothing of the answer, but take a viewer's place.
            self.problem(HTTPStatus.FORBIDDEN, "This is for the console's own page.")

    def take_wish(self) -> dict[str, Any] | None:
        """The body, a JSON object; None where it is none, which has been answered."""
        body = self.take_body()
        if body is None:
            return None
        try:
            wish = json.loads(body)
        except (ValueError, RecursionError):
            wish = None
        if not isinstance(wish, dict):
            self.problem(HTTPStatus.BAD_REQUEST, "The body is not a JSON object.")
            return None
        return wish

    def answer(self, document: dict[str, Any]) -> None:
        """Finish with JSON."""
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(json.dumps(document))
