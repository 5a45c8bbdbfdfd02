"""Parses the body of a callback: a message, or a close request."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from http import HTTPStatus

from handlers.callbacks.actions import Outcome
from handlers.callbacks.responses import Response
from handlers.websocket.frames import MAX_CLOSE_REASON, CloseCode

# Cached content types. Backends send few, each many times; one takes at most 64 KiB,
# as a header.
MAX_REMEMBERED = 64

# The charsets of text types that are valid UTF-8.
TEXT_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
# One parameter of a media type (RFC 9110, section 5.6.6), with optional spaces.
_PARAMETER = re.compile(
    r"""\s*;\s*(?:([^\s;="]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"]*)|[^;="]*)"""
)

ENCODED = Response(
    Outcome(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "Content-Encoding is not supported: send the body uncompressed.",
    ),
    {"Accept-Encoding": "identity"},  # RFC 9110, section 15.5.16
)
NOT_UTF8 = Response(
    Outcome(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The charset of a text type must be UTF-8."
    )
)


def unsupported(content_type: str, codings: Sequence[str]) -> Response | None:
    """Return the 415 for an encoded body, or None.

    `codings` are its Content-Encoding headers.
    """
    for coding in ",".join(codings).split(","):
        if coding.strip().lower() not in ("", "identity"):
            return ENCODED
    return None if has_text_charset(content_type) else NOT_UTF8


@lru_cache(MAX_REMEMBERED)
def has_text_charset(content_type: str) -> bool:
    """Return whether a text type has no charset but UTF-8 or a subset of it."""
    parameters = content_type[len(content_type.partition(";")[0]) :].lower()
    if "charset" not in parameters or not is_text_type(content_type):
        return True
    position = 0
    while parameter := _PARAMETER.match(parameters, position):
        name, value = parameter.groups()
        if name == "charset" and value.strip(" \t\"'") not in TEXT_CHARSETS:
            return False
        position = parameter.end()
    return position == len(parameters)


def message_of(body: bytes, content_type: str, types: Sequence[str]) -> str | bytes:
    """Return the message of a send; `types` are the values of `?type=`.

    Raises `ValueError` with the detail for a 400.
    """
    text = is_text(content_type, types)
    if text is None:
        raise ValueError("type must be text or binary.")
    if not text:
        return body
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise ValueError("A text frame must be UTF-8.") from None


def is_text(content_type: str, overrides: Sequence[str]) -> bool | None:
    """Return whether the frame is text; None for an invalid `?type=`."""
    if overrides:
        return {"text": True, "binary": False}.get(overrides[-1])
    return is_text_type(content_type)


@lru_cache(MAX_REMEMBERED)
def is_text_type(content_type: str) -> bool:
    """Return whether a content type makes a text frame."""
    media_type = content_type.partition(";")[0].strip().lower()
    return (
        media_type.startswith("text/")
        or media_type == "application/json"
        or media_type.endswith("+json")
    )


def parse_closing(body: bytes) -> tuple[int, str]:
    """Return code and reason of a disconnect callback; 1000 and "" by default.

    Raises `ValueError` with the detail for a 400.
    """
    if not body.strip():
        return CloseCode.NORMAL_CLOSURE, ""
    try:
        # Decoded first: for bytes json.loads guesses the encoding (RFC 8259, 8.1).
        closing = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("The body must be JSON in UTF-8.") from None
    if not isinstance(closing, dict):
        raise ValueError("The body must be a JSON object.")
    code = closing.get("code", CloseCode.NORMAL_CLOSURE)
    if isinstance(code, float) and code.is_integer():
        code = int(code)  # 1000.0 equals 1000 in JSON (RFC 8259, section 6)
    if not isinstance(code, int) or isinstance(code, bool) or not (
        code in (1000, 1001, 1008) or 1011 <= code <= 1014 or 3000 <= code <= 4999
    ):
        raise ValueError("code must be 1000, 1001, 1008, 1011-1014 or 3000-4999.")
    reason = closing.get("reason", "")
    try:
        fits = len(reason.encode()) <= MAX_CLOSE_REASON
    except (AttributeError, UnicodeEncodeError):
        raise ValueError("reason must be a string of UTF-8.") from None
    if not fits:
        raise ValueError(f"reason must be at most {MAX_CLOSE_REASON} bytes of UTF-8.")
    return code, reason
