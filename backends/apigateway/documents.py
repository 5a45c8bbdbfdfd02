"""Parses JSON of clients and functions as JavaScript does.

A string that was cut between the two halves of a character ends with a lone surrogate.
`JSON.stringify` escapes it, and `JSON.parse` accepts it, but UTF-8 cannot contain it,
so `orjson` rejects it. Here it becomes U+FFFD, as in a frame that JavaScript sends.
"""

import re
from typing import Any

from backends.http.content import parsed_json

# A pair of surrogates, a lone one as the group, or another escape.
ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\.",
    re.DOTALL,
)


def parsed(document: bytes) -> Any:
    """Parse JSON with `parsed_json`, with U+FFFD instead of lone surrogates.

    Raises `ValueError` if it is invalid.
    """
    try:
        return parsed_json(document)
    except ValueError:
        repaired = ESCAPES.sub(_repaired, document)
        if repaired == document:
            raise
    return parsed_json(repaired)


def _repaired(escape: re.Match[bytes]) -> bytes:
    return escape[0] if escape[1] is None else rb"\ufffd"
