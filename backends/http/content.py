"""Decodes the body of a response.

Requests contain `Accept-Encoding: identity`, but some proxies and frameworks compress
the response nevertheless. A body that cannot be decoded is malformed, and is never
passed on as it is. `decisions` uses this module.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import orjson

from backends.client.response import MalformedResponse

MAX_CODINGS = 2  # per body; the size limit applies to the result of each
# Values for zlib.decompressobj: gzip, zlib's own format, and raw deflate.
GZIP, ZLIB, RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def decoded(headers: Mapping[str, str], body: bytes, limit: int) -> bytes:
    """Return the body without its content codings (RFC 9110, section 8.4.1).

    Raises `MalformedResponse` if a coding is unknown, or the body is invalid in it, is
    incomplete, or decodes to more than `limit` bytes.
    """
    codings = headers.get("content-encoding")
    if codings is None or not body:
        return body
    names = [
        name
        for part in codings.lower().split(",")
        if (name := part.strip()) not in ("", "identity")
    ]
    if len(names) > MAX_CODINGS:
        raise MalformedResponse("the response has too many content codings")
    for name in reversed(names):
        if name in ("gzip", "x-gzip"):
            body = _inflated(body, GZIP, limit)
        elif name == "deflate":  # zlib's format; some servers omit its header
            has_header = body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0
            body = _inflated(body, ZLIB if has_header else RAW, limit)
        else:
            raise MalformedResponse("the response has an unknown content coding")
    return body


def _inflated(data: bytes, window_bits: int, limit: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    try:
        inflated = inflater.decompress(data, limit + 1)
    except zlib.error:
        raise MalformedResponse("the response is not in its content coding") from None
    if len(inflated) > limit:
        raise MalformedResponse(f"the decoded response is larger than {limit} bytes")
    if not inflater.eof:
        raise MalformedResponse("the coded response body is incomplete")
    return inflated


def parsed_json(body: bytes) -> Any:
    """Parse JSON with `orjson`; accepts a byte order mark, UTF-16 and UTF-32, too.

    Raises `ValueError` if it is invalid.
    """
    try:
        return orjson.loads(body)
    except ValueError:
        encoding = json.detect_encoding(body)
        if encoding == "utf-8":
            raise
    return orjson.loads(body.decode(encoding))
