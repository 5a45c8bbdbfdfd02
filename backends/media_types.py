"""Media types (RFC 9110, section 8.3): which bodies are text, and in which charset.

Callbacks and replies decide by them between a text and a binary frame.
"""

import re
from functools import lru_cache

# Cached content types. Backends send few, each many times; one takes at most 64 KiB,
# as a header.
MAX_REMEMBERED = 64

# The charsets of text types that are valid UTF-8.
TEXT_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
# One parameter of a media type (RFC 9110, section 5.6.6), with optional spaces.
_PARAMETER = re.compile(
    r"""\s*;\s*(?:([^\s;="]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"]*)|[^;="]*)"""
)


@lru_cache(MAX_REMEMBERED)
def is_text_type(content_type: str) -> bool:
    """Return whether a content type makes a text frame."""
    media_type = media_type_of(content_type)
    return (
        media_type.startswith("text/")
        or media_type == "application/json"
        or media_type.endswith("+json")
    )


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


@lru_cache(MAX_REMEMBERED)
def media_type_of(content_type: str) -> str:
    """Return a content type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()
