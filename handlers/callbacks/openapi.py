"""The callbacks as an OpenAPI 3.1 document, at `GET /openapi.json`.

`openapi.json` describes `handlers.callbacks.routes` and `handlers.operators.status`,
and in its `webhooks` the events that a backend gets and its responses to them;
the tests check it against a running relay. It holds no secret, so everybody who can
reach the listener may read it.
"""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from handlers.callbacks.access import CallbackAccess
from handlers.http.problem import ProblemHandler
from handlers.owners import ID

DOCUMENT = Path(__file__).with_suffix(".json").read_text("utf-8")
# What `--backend=apigateway` adds.
CONNECTIONS = (
    Path(__file__).with_name("apigateway") / "openapi.json"
).read_text("utf-8")

Document = dict[str, Any]


def openapi_document(
    version: str, schemes: Set[str], pattern: str = ID, stage: str | None = None
) -> Document:
    """Return the document of everything on the callback listener but client routes.

    `schemes` are the security schemes in use, as in `CallbackAccess.schemes`. `pattern`
    is that of the ids of connections. `/@connections` is described for a `stage`.
    """
    document: Document = json.loads(DOCUMENT.replace(f"^{ID}$", f"^{pattern}$"))
    document["info"]["version"] = version
    if "token" not in schemes:
        del document["paths"]["/commands"]
    if schemes == {"sigv4"}:  # nobody may use the others
        for path in [each for each in document["paths"] if "/socket/" in each]:
            del document["paths"][path]
    for operations in document["paths"].values():
        for operation in operations.values():
            if "security" in operation:
                _limit_security(operation, schemes)
        if "get" in operations:
            operations["head"] = _as_head(operations["get"])
    if stage is not None:
        _add_connections(document, stage, schemes)
    components = document["components"]
    components["securitySchemes"] = {
        name: scheme
        for name, scheme in components["securitySchemes"].items()
        if name in schemes
    }
    if not schemes:
        del components["securitySchemes"], components["responses"]["Unauthorized"]
    return document


class OpenAPIHandler(ProblemHandler):
    """`GET /openapi.json`."""

    def initialize(
        self,
        version: str,
        access: CallbackAccess,
        pattern: str = ID,
        stage: str | None = None,
    ) -> None:
        self.version = version
        self.access = access
        self.pattern = pattern
        self.stage = stage

    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        document = openapi_document(
            self.version, self.access.schemes, self.pattern, self.stage
        )
        self.finish(json.dumps(document))

    head = get


def _as_head(operation: Document) -> Document:
    """Return the operation for HEAD: the same, with an id of its own."""
    name = operation["operationId"].removeprefix("get")
    return {**operation, "operationId": f"head{name[0].upper()}{name[1:]}"}


def _add_connections(document: Document, stage: str, schemes: Set[str]) -> None:
    """Add the callbacks of AWS's SDKs."""
    more: Document = json.loads(CONNECTIONS)
    for method in ("post", "get", "delete"):
        operation = more["path"][method]
        if "sigv4" in schemes:  # whoever does not sign gets 403
            del operation["responses"]["401"]
        _limit_security(operation, schemes)
    document["paths"][f"/{stage}/@connections/{{connectionId}}"] = more["path"]
    for kind, named in more["components"].items():
        document["components"][kind].update(named)


def _limit_security(operation: Document, schemes: Set[str]) -> None:
    """Leave only `schemes` to an operation; without any, it needs no authorization."""
    operation["security"] = [
        each for each in operation["security"] if each.keys() <= schemes
    ]
    if not operation["security"]:
        del operation["security"], operation["responses"]["401"]
