"""The callbacks as an OpenAPI 3.1 document, at `GET /openapi.json`.

`openapi.json` describes `handlers.callbacks.routes` and `handlers.operators.status`;
the tests check it against a running relay. It holds no secret, so everybody who can
reach the listener may read it.
"""

import json
from pathlib import Path
from typing import Any

from handlers.callbacks.tokens import CallbackTokens
from handlers.http.problem import ProblemHandler

DOCUMENT = Path(__file__).with_suffix(".json").read_text("utf-8")

# Members, at any depth, that exist only because of tokens.
OF_TOKENS = frozenset({"security", "securitySchemes", "401", "Unauthorized"})

Document = dict[str, Any]


def openapi_document(version: str, needs_token: bool) -> Document:
    """Return the document of everything on the callback listener but client routes.

    `needs_token` says whether tokens are configured, so that callbacks need one.
    """
    document: Document = json.loads(DOCUMENT)
    document["info"]["version"] = version
    for operations in document["paths"].values():
        if "get" in operations:
            operations["head"] = _as_head(operations["get"])
    return document if needs_token else _without_tokens(document)


class OpenAPIHandler(ProblemHandler):
    """`GET /openapi.json`."""

    def initialize(self, version: str, tokens: CallbackTokens) -> None:
        self.version = version
        self.tokens = tokens

    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        document = openapi_document(self.version, self.tokens.required)
        self.finish(json.dumps(document))

    head = get


def _as_head(operation: Document) -> Document:
    """Return the operation for HEAD: the same, with an id of its own."""
    name = operation["operationId"].removeprefix("get")
    return {**operation, "operationId": f"head{name[0].upper()}{name[1:]}"}


def _without_tokens(part: Any) -> Any:
    """Return a part of the document without the members of `OF_TOKENS`."""
    if isinstance(part, list):
        return [_without_tokens(member) for member in part]
    if not isinstance(part, dict):
        return part
    return {
        name: _without_tokens(member)
        for name, member in part.items()
        if name not in OF_TOKENS
    }
