"""The callbacks as an OpenAPI 3.1 document, at `GET /openapi.json`.

It holds no secret, so everybody may read it who reaches the listener. What it
says of `handlers.callbacks.routes` and `handlers.operators.status`, the tests ask
the relay.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from handlers.callbacks.tokens import CallbackTokens
from handlers.http.problem import PROBLEM_TYPE, ProblemHandler
from handlers.websocket.frames import MAX_CLOSE_REASON

DESCRIPTION = """\
How a backend reaches the clients of a SocketDock instance. Each event that it is
sent names the URLs of its connection in `meta.send` and `meta.disconnect`; use
these, since an instance may be reached by another address or below a path.
"""

Document = dict[str, Any]


def openapi_document(version: str, needs_token: bool) -> Document:
    """All that the callbacks' listener answers, but for what clients ask there.

    `needs_token` says that there are tokens, one of which callbacks have to bring.
    """
    document: Document = {
        "openapi": "3.1.0",
        "info": {
            "title": "SocketDock callbacks",
            "version": version,
            "description": DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "connections", "description": "For the backend."},
            {"name": "instance", "description": "For operators and probes."},
        ],
        "paths": {
            "/socket/{connection_id}": {
                "parameters": [CONNECTION_ID],
                "get": GET_CONNECTION,
                "head": {**GET_CONNECTION, "operationId": "headConnection"},
                "delete": DELETE_CONNECTION,
            },
            "/socket/{connection_id}/send": {
                "parameters": [CONNECTION_ID],
                "post": SEND,
            },
            "/socket/{connection_id}/disconnect": {
                "parameters": [CONNECTION_ID],
                "post": DISCONNECT,
            },
            "/livez": {"get": LIVEZ, "head": {**LIVEZ, "operationId": "headLivez"}},
            "/readyz": {
                "get": READYZ,
                "head": {**READYZ, "operationId": "headReadyz"},
            },
            "/status": {"get": STATUS, "head": {**STATUS, "operationId": "headStatus"}},
            "/metrics": {
                "get": METRICS,
                "head": {**METRICS, "operationId": "headMetrics"},
            },
            "/openapi.json": {
                "get": OPENAPI,
                "head": {**OPENAPI, "operationId": "headOpenapi"},
            },
        },
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "One of --callback_token.",
                }
            },
            "schemas": {
                "Problem": PROBLEM,
                "Connection": CONNECTION,
                "Closing": CLOSING,
                "Status": STATUS_SCHEMA,
            },
            "responses": {
                "BadRequest": _problem("What is wrong with the request."),
                "Unauthorized": _problem(
                    "No valid token.",
                    {"WWW-Authenticate": {"schema": {"type": "string"}}},
                ),
                "Forbidden": _problem("Without tokens: local requests only."),
                "NotFound": _problem("Not the path of a connection."),
                "Gone": _problem("Connection is not open on this instance."),
                "TooLarge": _problem("The body is larger than --max_message_size."),
                "Unsupported": _problem(
                    "The body has a Content-Encoding, or a text type's charset is"
                    " neither UTF-8 nor US-ASCII."
                ),
                "Full": _problem(
                    "Send buffer of this client is full.",
                    {"Retry-After": {"schema": {"type": "string"}}},
                ),
            },
        },
    }
    return document if needs_token else _without_token(document)


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


# The parts.


def _answers(*names: str, **others: Document) -> Document:
    """Responses by status: those of `components`, and `others`, such as _200."""
    named = {status.removeprefix("_"): answer for status, answer in others.items()}
    for name in names:
        reference = {"$ref": f"#/components/responses/{name}"}
        named[str(int(STATUSES[name]))] = reference
    return dict(sorted(named.items()))


def _problem(
    description: str, headers: Mapping[str, Document] | None = None
) -> Document:
    schema = {"$ref": "#/components/schemas/Problem"}
    answer: Document = {
        "description": description,
        "content": {PROBLEM_TYPE: {"schema": schema}},
    }
    return answer | ({"headers": dict(headers)} if headers else {})


def _text(description: str, *texts: str) -> Document:
    schema = {"type": "string", "enum": list(texts)}
    return {"description": description, "content": {"text/plain": {"schema": schema}}}


def _json(description: str, schema: str) -> Document:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {
        "description": description,
        "content": {"application/json": {"schema": reference}},
    }


def _without_token(part: Any) -> Any:
    """A part of the document as it is where no token is needed, and none checked."""
    if isinstance(part, list):
        return [_without_token(member) for member in part]
    if not isinstance(part, dict):
        return part
    return {
        name: _without_token(member)
        for name, member in part.items()
        if name not in OF_TOKENS
    }


# Members, wherever they are, that only tokens are the reason for.
OF_TOKENS = frozenset({"security", "securitySchemes", "401", "Unauthorized"})

STATUSES = {
    "BadRequest": HTTPStatus.BAD_REQUEST,
    "Unauthorized": HTTPStatus.UNAUTHORIZED,
    "Forbidden": HTTPStatus.FORBIDDEN,
    "NotFound": HTTPStatus.NOT_FOUND,
    "Gone": HTTPStatus.GONE,
    "TooLarge": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "Unsupported": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "Full": HTTPStatus.TOO_MANY_REQUESTS,
}

NEEDS_TOKEN: Document = {"security": [{"token": []}]}
OK = _text("Done.", "OK")
ACCEPTED = _text(
    "The handshake is still being decided; done right after it.", "Accepted"
)

CONNECTION_ID: Document = {
    "name": "connection_id",
    "in": "path",
    "required": True,
    "description": "`meta.connection_id` of an event.",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "example": "0f6c2f1d9be84c3ea7d05c1b8e42f963",
}

PROBLEM: Document = {
    "type": "object",
    "description": "RFC 9457.",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}

CONNECTION: Document = {
    "type": "object",
    "required": [
        "connection_id", "state", "connected_at", "last_active_at", "remote_ip",
        "user_agent", "subprotocol", "messages_in", "messages_out", "bytes_in",
        "bytes_out",
    ],
    "properties": {
        "connection_id": {"type": "string"},
        "state": {"type": "string", "enum": ["connecting", "open"]},
        "connected_at": {"type": "string", "format": "date-time"},
        "last_active_at": {"type": "string", "format": "date-time"},
        "remote_ip": {"type": "string"},
        "user_agent": {"type": ["string", "null"]},
        "subprotocol": {"type": ["string", "null"]},
        "messages_in": {"type": "integer", "minimum": 0},
        "messages_out": {"type": "integer", "minimum": 0},
        "bytes_in": {"type": "integer", "minimum": 0},
        "bytes_out": {"type": "integer", "minimum": 0},
    },
}

CLOSING: Document = {
    "type": "object",
    "properties": {
        "code": {
            "description": "The close code (RFC 6455, section 7.4).",
            "default": 1000,
            "type": "integer",
            "anyOf": [
                {"enum": [1000, 1001, 1008]},
                {"minimum": 1011, "maximum": 1014},
                {"minimum": 3000, "maximum": 4999},
            ],
        },
        "reason": {
            "description": f"At most {MAX_CLOSE_REASON} bytes of UTF-8.",
            "default": "",
            "type": "string",
            "maxLength": MAX_CLOSE_REASON,
        },
    },
}

STATUS_SCHEMA: Document = {
    "type": "object",
    "required": ["version", "instance", "started_at", "uptime", "state", "ready",
                 "backend", "connections", "pending", "limits"],
    "properties": {
        "version": {"type": "string"},
        "instance": {"type": "string"},
        "started_at": {"type": "string", "format": "date-time"},
        "uptime": {"type": "number", "description": "seconds"},
        "state": {"type": "string", "enum": ["starting", "serving", "draining"]},
        "ready": {"type": "boolean", "description": "As /readyz."},
        "backend": {
            "type": "object",
            "required": ["name", "away", "held", "connections"],
            "properties": {
                "name": {"type": "string"},
                "away": {
                    "type": ["number", "null"],
                    "description": "seconds; null: it is there",
                },
                "held": {
                    "type": "integer",
                    "description": "Messages whose answer is overdue.",
                },
                "connections": {"type": "integer"},
            },
        },
        "connections": {
            "type": "object",
            "required": ["open", "total"],
            "properties": {
                "open": {"type": "integer"},
                "total": {"type": "integer"},
            },
        },
        "pending": {
            "type": "object",
            "required": ["events", "bytes", "oldest"],
            "properties": {
                "events": {"type": "integer"},
                "bytes": {"type": "integer"},
                "oldest": {"type": "number", "description": "seconds"},
            },
        },
        "limits": {"type": "object", "description": "Options by name."},
    },
}

SEND: Document = {
    "operationId": "send",
    "tags": ["connections"],
    "summary": "Send the client one frame: the body, as it is",
    "description": (
        "text/*, application/json and +json types make a text frame, every other"
        " type, or none, a binary one. Answered when the kernel has taken the"
        " frame's last byte."
    ),
    **NEEDS_TOKEN,
    "parameters": [
        {
            "name": "type",
            "in": "query",
            "description": "The frame's type, whatever the body's is.",
            "schema": {"type": "string", "enum": ["text", "binary"]},
        }
    ],
    "requestBody": {
        "content": {
            "text/plain": {"schema": {"type": "string"}, "example": "you said: Hello"},
            "application/json": {"schema": {}, "example": {"you said": "Hello"}},
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"}
            },
        }
    },
    "responses": _answers(
        "BadRequest", "Unauthorized", "NotFound", "Gone", "TooLarge", "Unsupported",
        "Full", _200=OK, _202=ACCEPTED,
    ),
}

DISCONNECT: Document = {
    "operationId": "disconnect",
    "tags": ["connections"],
    "summary": "Close the connection, with a code and a reason",
    **NEEDS_TOKEN,
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/Closing"},
                "example": {"code": 4000, "reason": "until tomorrow"},
            }
        }
    },
    "responses": _answers(
        "BadRequest", "Unauthorized", "NotFound", "Gone", "TooLarge", "Unsupported",
        _200=OK, _202=ACCEPTED,
    ),
}

GET_CONNECTION: Document = {
    "operationId": "getConnection",
    "tags": ["connections"],
    "summary": "Tell of the connection",
    **NEEDS_TOKEN,
    "responses": _answers(
        "Unauthorized", "NotFound", "Gone",
        _200=_json("It is open, or being decided on.", "Connection"),
    ),
}

DELETE_CONNECTION: Document = {
    "operationId": "deleteConnection",
    "tags": ["connections"],
    "summary": "Close the connection with 1000",
    **NEEDS_TOKEN,
    "responses": _answers(
        "Unauthorized", "NotFound", "Gone", _204={"description": "Done."}
    ),
}

LIVEZ: Document = {
    "operationId": "livez",
    "tags": ["instance"],
    "summary": "Whether the process serves at all",
    "responses": _answers(_200=_text("It does.", "ok\n")),
}

READYZ: Document = {
    "operationId": "readyz",
    "tags": ["instance"],
    "summary": "Whether clients should be sent here",
    "responses": _answers(
        _200=_text("They should.", "ok\n"), _503=_problem("They should not.")
    ),
}

STATUS: Document = {
    "operationId": "status",
    "tags": ["instance"],
    "summary": "What this instance is and does",
    **NEEDS_TOKEN,
    "responses": _answers(
        "Unauthorized", "Forbidden", _200=_json("At this moment.", "Status")
    ),
}

METRICS: Document = {
    "operationId": "metrics",
    "tags": ["instance"],
    "summary": "What was counted, for Prometheus",
    **NEEDS_TOKEN,
    "responses": _answers(
        "Unauthorized", "Forbidden",
        _200={
            "description": "In the format that Accept asks for.",
            "content": {
                media_type: {"schema": {"type": "string"}}
                for media_type in ("text/plain", "application/openmetrics-text")
            },
        },
        _404=_problem("With --metrics=off."),
    ),
}

OPENAPI: Document = {
    "operationId": "openapi",
    "tags": ["instance"],
    "summary": "This document",
    "responses": _answers(
        _200={
            "description": "OpenAPI 3.1.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    ),
}
