"""What the body of a response holds, in spite of codings that were not asked for.

Requests say `Accept-Encoding: identity`; proxies and frameworks compress all the
same. What cannot be decoded is malformed, never passed on as it is.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import orjson

from backends.client.response import MalformedResponse

MAX_CODINGS = 2  # of one body; each is decoded within the limit
# For zlib.decompressobj: gzip, zlib's own format, and bare deflate.
GZIP, ZLIB, RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def decoded(headers: Mapping[str, str], body: bytes, limit: int) -> bytes:
    """The body without its content codings (RFC 9110, section 8.4.1).

    Raises `MalformedResponse` where a coding is unknown, the body is none of it,
    is cut off, or decodes to more than `limit` bytes.
    """
    names = [
        name
        for part in headers.get("content-encoding", "").lower().split(",")
        if (name := part.strip()) not in ("", "identity")
    ]
    if not body:
        return body
    if len(names) > MAX_CODINGS:
        raise MalformedResponse("the answer has too many content codings")
    for name in reversed(names):
        if name in ("gzip", "x-gzip"):
            body = _inflated(body, GZIP, limit)
        elif name == "deflate":  # with zlib's header, which some leave out
            has_header = body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0
            body = _inflated(body, ZLIB if has_header else RAW, limit)
        else:
            raise MalformedResponse("the answer has an unknown content coding")
    return body


def _inflated(data: bytes, window_bits: int, limit: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    try:
        inflated = inflater.decompress(data, limit + 1)
    except zlib.error:
        raise MalformedResponse("the answer is not coded as it says") from None
    if len(inflated) > limit:
        raise MalformedResponse(f"the answer decodes to more than {limit} bytes")
    if not inflater.eof:
        raise MalformedResponse("the answer's coded body is cut off")
    return inflated


def parsed_json(body: bytes) -> Any:
    """JSON as `orjson` reads it, also with a byte order mark, in UTF-16 or UTF-32.

    Raises `ValueError` where it is none.
    """
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return orjson.loads(body)
    return orjson.loads(body.decode(encoding))
