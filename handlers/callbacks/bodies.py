"""Parses the body of a callback: a message, or a close request."""

import json
import re
from collections.abc import Sequence
from http import HTTPStatus

from backends.commands import (
    NORMAL_CLOSURE,
    PONG,
    RECEIPT_TIMEOUT,
    closing_of,
    receipt_timeout,
)
from backends.media_types import has_text_charset, is_text_type
from handlers.callbacks.actions import Outcome
from handlers.callbacks.responses import Response

SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

OVERRIDES = {"text": True, "binary": False}  # values of `?type=`: is it text?

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


def message_of(body: bytes, content_type: str, types: Sequence[str]) -> str | bytes:
    """Return the message of a send; `types` are the values of `?type=`.

    Raises `ValueError` with the detail for a 400.
    """
    text = OVERRIDES.get(types[-1]) if types else is_text_type(content_type)
    if text is None:
        raise ValueError("type must be text or binary.")
    if not text:
        return body
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise ValueError("A text frame must be UTF-8.") from None


def receipt_of(receipts: Sequence[str], timeouts: Sequence[str]) -> float | None:
    """Return the timeout of a receipt in seconds; None: none is wanted.

    `receipts` and `timeouts` are the values of `?receipt=` and `?timeout=`. Raises
    `ValueError` with the detail for a 400.
    """
    seconds = RECEIPT_TIMEOUT
    if timeouts:
        is_number = SECONDS.fullmatch(timeouts[-1]) is not None
        seconds = receipt_timeout(float(timeouts[-1]) if is_number else 0.0)
    if not receipts:
        return None
    if receipts[-1] != PONG:
        raise ValueError(f"receipt must be {PONG}.")
    return seconds


def parse_closing(body: bytes) -> tuple[int, str]:
    """Return code and reason of a disconnect callback; 1000 and "" by default.

    Raises `ValueError` with the detail for a 400.
    """
    if not body.strip():
        return NORMAL_CLOSURE, ""
    try:
        # Decoded first: for bytes json.loads guesses the encoding (RFC 8259, 8.1).
        closing = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("The body must be JSON in UTF-8.") from None
    if not isinstance(closing, dict):
        raise ValueError("The body must be a JSON object.")
    return closing_of(closing)
