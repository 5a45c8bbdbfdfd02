"""Shared by the console's data routes: the guard, and headers against other sites."""

import json
from http import HTTPStatus
from typing import Any

from handlers.operators.guard import OperatorHandler

# On every response, errors included: no other site may read or embed it.
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OWN_SITE = ("same-origin", "none")  # of Sec-Fetch-Site; none: typed by a person

MAX_REQUEST = 4096  # bytes of JSON that the page sends


class GuardedHandler(OperatorHandler):
    """A route for operators that only the console's own page may use in a browser."""

    max_body_size = MAX_REQUEST

    def set_default_headers(self) -> None:
        super().set_default_headers()
        for name, value in SAFE_HEADERS.items():
            self.set_header(name, value)

    async def prepare(self) -> None:
        await super().prepare()
        sites = self.request.headers.get_list("Sec-Fetch-Site")
        if not self._finished and any(site not in OWN_SITE for site in sites):
            # Another site could not read the response, but could use up the viewers.
            self.problem(
                HTTPStatus.FORBIDDEN, "Only the console's page may request this."
            )

    def take_json(self) -> dict[str, Any] | None:
        """Return the body, a JSON object; None if it was rejected and answered."""
        body = self.take_body()
        if body is None:
            return None
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            self.problem(HTTPStatus.BAD_REQUEST, "The body must be a JSON object.")
            return None
        return document

    def answer(self, document: dict[str, Any]) -> None:
        """Finish with `document` as JSON."""
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(json.dumps(document))
