"""Responses in each unusual but readable form, and ambiguous ones."""

from collections.abc import Iterable, Mapping

import pytest

from backends.client.response import (
    MAX_KEPT_BODY,
    KnownHeads,
    MalformedResponse,
    ResponseReader,
)


def keep_beginning(status: int, headers: Mapping[str, str]) -> int:
    """Keep the beginning of each body."""
    return MAX_KEPT_BODY


OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"Content-Length: 2\r\n\r\nOK"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n"

# Every client reads these in the same way: the connection stays usable.
PLAIN = {
    "usual": OK + BODY,
    "chunked": OK + CHUNKED,
    "value-of-several-lines": OK + b"X: default-src a;\n script-src b\r\n" + BODY,
    "folded-value": OK + b"X: one\r\n\ttwo\r\n" + BODY,
    "lf-only": b"HTTP/1.1 200 OK\nX: y\nContent-Length: 2\n\nOK",
    "lf-only-chunked": b"HTTP/1.1 200 OK\n" + CHUNKED,
    "control-characters": OK + bytes(range(1, 9)).join([b"X: a", b"b\r\n"]) + BODY,
    "nul": OK + b"X: a\0b\r\n" + BODY,
    "delete": OK + b"X: a\x7fb\r\n" + BODY,
    "latin-1": OK + b"X: \xe9\xff\r\n" + BODY,
    "empty-value": OK + b"X:\r\n" + BODY,
    "no-space": OK + b"X:y\r\nContent-Length:2\r\n\r\nOK",
    "no-reason": b"HTTP/1.1 200\r\n" + BODY,
    "no-reason-but-a-space": b"HTTP/1.1 200 \r\n" + BODY,
    "reason-in-utf-8": b"HTTP/1.1 200 \xc3\xa9\r\n" + BODY,
    "empty-line-first": b"\r\n" + OK + BODY,
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + BODY,
    "folded-interim": b"HTTP/1.1 103 Hints\r\nLink: a\r\n b\r\n\r\n" + OK + BODY,
    "many-headers": OK + b"X: y\r\n" * 10_000 + BODY,
    "long-header": OK + b"X: " + b"y" * 60_000 + b"\r\n" + BODY,
}

# The status and the body count, then the connection ends.
DOUBTFUL = {
    "value-of-several-lines-that-are-not-folded": OK + b"X: one;\ntwo\r\n" + BODY,
    "carriage-return": OK + b"X: a\rb\r\n" + BODY,
    "space-before-colon": OK + b"X : y\r\n" + BODY,
    "space-in-name": OK + b"X Y: z\r\n" + BODY,
    "separators-in-name": OK + b"X(Y)[z]@: a\r\n" + BODY,
    "latin-1-in-name": OK + b"X\xe9: a\r\n" + BODY,
    "no-colon": OK + b"nonsense\r\n" + BODY,
    "no-name": OK + b": value\r\n" + BODY,
    "lower-case-protocol": b"http/1.1 200 ok\r\n" + BODY,
    "minor-version": b"HTTP/1.2 200 OK\r\n" + BODY,
    "version-without-minor": b"HTTP/1 200 OK\r\n" + BODY,
    "two-spaces": b"HTTP/1.1  200  OK\r\n" + BODY,
    "http-1.0": b"HTTP/1.0 200 OK\r\n" + BODY,
    "odd-interim": b"HTTP/1.1 103 Hints\r\nLink : a\r\n\r\n" + OK + BODY,
    "interim-then-odd": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"a b: c\r\n" + BODY,
    "length-twice": OK + b"Content-Length: 2\r\n" + BODY,
    "length-as-list": OK + b"Content-Length: 2, 2\r\n\r\nOK",
    "space-before-colon-of-length": OK + b"Content-Length : 2\r\n\r\nOK",
    "coding-twice": OK + b"Transfer-Encoding: chunked\r\n" + CHUNKED,
    "space-before-colon-of-coding": OK + CHUNKED.replace(b":", b" :", 1),
    "length-and-coding": OK + b"Content-Length: 5\r\n" + CHUNKED,
    "coding-and-length": OK + CHUNKED.replace(b"\r\n", b"\r\nContent-Length: 5\r\n", 1),
    "coding-of-http-1.0": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + CHUNKED
    ),
    "empty-coding": OK + b"Transfer-Encoding:\r\n" + BODY,
    "length-of-no-use-and-coding": OK + b"Content-Length: x\r\n" + CHUNKED,
    "carriage-returns-at-the-end": OK + BODY.replace(b"\r\n\r\n", b"\r\n\r\r\n"),
    "identity": OK + b"Transfer-Encoding: identity\r\n" + BODY,
    "end": OK + b"Connection: close\r\n" + BODY,
    "odd-end": OK + b"Connection : close\r\n" + BODY,
    "more-than-announced": OK + BODY + b"OK",
    "second-response": OK + BODY + b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    "second-behind-an-odd-one": OK + b"a b: c\r\n" + BODY + OK + BODY,
}

# Their bodies end only with the connection.
UNENDED = {
    "no-length": OK + b"\r\nOK",
    "unknown-coding": OK + b"Transfer-Encoding: xchunked\r\n\r\nOK",
    "coding-with-a-nul": OK + b"Transfer-Encoding: chunked\0\r\n\r\nOK",
    "odd-and-no-length": OK + b"a b: c\r\n\r\nOK",
}

NONE = {
    "another-protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "no-status": b"HTTP/1.1 OK\r\n" + BODY,
    "status-of-two-digits": b"HTTP/1.1 20 OK\r\n" + BODY,
    "status-of-four-digits": b"HTTP/1.1 2000 OK\r\n" + BODY,
    "status-below-100": b"HTTP/1.1 099 OK\r\n" + BODY,
    "endless-interim": b"HTTP/1.1 103 Hints\r\n\r\n" * 10_000,
    "endless-first-line": b"HTTP/1.1 " + b" " * 2**17,
}

# The status counts; the end of the body is ambiguous.
STATUS_ALONE = {
    "different-lengths": OK + b"Content-Length: 3\r\n" + BODY,
    "different-lengths-as-list": OK + b"Content-Length: 2, 3\r\n\r\nOK",
    "list-with-an-empty-length": OK + b"Content-Length: 2,\r\n\r\nOK",
    "negative-length": OK + b"Content-Length: -2\r\n\r\nOK",
    "length-with-a-sign": OK + b"Content-Length: +2\r\n\r\nOK",
    "length-with-a-unit": OK + b"Content-Length: 2 bytes\r\n\r\nOK",
    "length-with-a-space-within": OK + b"Content-Length: 2 2\r\n\r\nOK",
    "length-of-words": OK + b"Content-Length: two\r\n\r\nOK",
    "length-in-quotes": OK + b'Content-Length: "2"\r\n\r\nOK',
    "hexadecimal-length": OK + b"Content-Length: 0x2\r\n\r\nOK",
    "length-of-letters-that-int-reads": OK + b"Content-Length: 0_2\r\n\r\nOK",
    "length-beyond-64-bits": OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nOK",
    "empty-length": OK + b"Content-Length:\r\n\r\nOK",
    "chunk-size-of-letters": OK + CHUNKED.replace(b"2\r", b"zz\r"),
    "chunk-size-beyond-64-bits": OK + CHUNKED.replace(b"2\r", b"f" * 40 + b"\r"),
    "endless-header": OK + b"X: " + b"x" * 2**17,
    "endless-odd-header": OK + b"a b: " + b"x" * 2**17,
}


def read(
    data: bytes, *, size: int, keep: bool = True, heads: KnownHeads | None = None
) -> ResponseReader:
    """A reader that was fed all of it, in pieces of that size."""
    reader = ResponseReader(heads or KnownHeads())
    reader.begin(keep_beginning if keep else None)
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
        if reader.complete:
            break
    return reader


def body_of(reader: ResponseReader) -> tuple[int, bytes | None]:
    response = reader.response()
    return response.status, response.body


@pytest.fixture(params=[1, 7, 2**20])
def size(request) -> int:
    """Each response comes whole, and byte by byte."""
    return request.param


@pytest.mark.parametrize("row", PLAIN)
def test_tolerable_response_is_read_and_another_may_follow(row, size):
    """Its faults do not concern the framing."""
    reader = read(PLAIN[row], size=max(size, len(PLAIN[row]) // 1000))
    assert body_of(reader) == (200, b"OK")
    assert reader.complete and reader.reusable


@pytest.mark.parametrize("row", DOUBTFUL)
def test_ambiguous_response_is_read_and_none_may_follow(row, size):
    """Another reader may see its end in another place."""
    reader = read(DOUBTFUL[row], size=size)
    assert body_of(reader) == (200, b"OK")
    assert reader.complete
    # Unrequested bytes in another segment end the connection.
    assert not reader.reusable or row.startswith(("more", "second-response"))


@pytest.mark.parametrize("row", UNENDED)
def test_response_without_an_end_is_read_until_the_connections(row, size):
    """If the head is malformed and the body unused, the body is not awaited."""
    reader = read(UNENDED[row], size=size)
    assert body_of(reader) == (200, b"OK")
    assert reader.has_head and not reader.complete
    if row.startswith("odd"):
        assert read(UNENDED[row], size=size, keep=False).complete


@pytest.mark.parametrize("row", NONE)
def test_invalid_response_is_malformed(row, size):
    """It has no usable status, or too many headers."""
    with pytest.raises(MalformedResponse):
        read(NONE[row], size=max(size, len(NONE[row]) // 1000))


@pytest.mark.parametrize("row", STATUS_ALONE)
def test_status_counts_where_the_body_cannot_be_read(row, size):
    """The body is not awaited, and no other response may follow."""
    reader = read(STATUS_ALONE[row], size=max(size, len(STATUS_ALONE[row]) // 1000))
    response = reader.response()
    assert (response.status, response.body) == (200, b"")
    assert not response.complete  # whoever needs the body has to know
    assert reader.complete and not reader.reusable


SWITCHING = {
    "usual": b"HTTP/1.1 101 Yes\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    "bare": b"HTTP/1.1 101 Yes\r\n\r\n",
    "with-a-length": b"HTTP/1.1 101 Yes\r\nContent-Length: 0\r\n\r\n",
    "odd": b"HTTP/1.1 101 Yes\r\na b: c\r\n\r\n",
}


@pytest.mark.parametrize("row", SWITCHING)
@pytest.mark.parametrize("behind", [b"", b"\0\0\0\4", OK + BODY])
def test_switching_protocols_is_a_final_status(row, behind, size):
    """It was not requested, so no HTTP follows."""
    reader = read(SWITCHING[row] + behind, size=size)
    assert body_of(reader) == (101, b"")
    assert reader.complete and not reader.reusable


@pytest.mark.parametrize(
    ("head", "headers"),
    [
        (OK, {}),
        (b"HTTP/1.1 200 OK\n", {}),
        (OK + b"X: y\r\n", {"x": "y"}),
        (OK + b"a b: c\r\nX: y\r\n", {"x": "y"}),
        (b"HTTP/1.1 103 Hints\r\nX: hint\r\n\r\n" + OK, {}),
    ],
)
def test_head_that_lacks_its_empty_line_has_its_status(head, headers, size):
    """After the end of the connection."""
    reader = read(head, size=size)
    assert not reader.has_head
    assert reader.cut()
    assert (*body_of(reader), reader.reusable) == (200, b"", False)
    del reader.headers["connection"]
    assert reader.headers == headers


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 2",
        b"HTTP/1.1 200 O",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Hints\r\nX: y\r\n",
        OK + b"Retry-After: 1",
        OK + b"a b: c\r\nX: y\r",
        b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200",
    ],
)
def test_head_that_ends_within_a_line_has_no_status(head, size):
    """Nor has an interim response without a final one."""
    assert not read(head, size=size).cut()


def test_headers_of_a_malformed_response_are_read():
    """Without surrounding spaces; repeated ones become one list."""
    odd = b"a b: c\r\nX : \t one \t\r\nx: t\0w\ro\r\nRetry-After:  3 \r\n"
    headers = read(OK + odd + BODY, size=2**20).headers
    assert (headers["x"], headers["retry-after"]) == ("one, t w o", "3")


def test_white_space_around_header_values_is_stripped():
    """RFC 9110, section 5.5."""
    headers = read(OK + b"Retry-After: \t3 \t\r\n" + BODY, size=2**20).headers
    assert headers["retry-after"] == "3"


def test_headers_of_an_interim_response_are_dropped():
    """The headers of a 103 are not those of the final response."""
    hints = b"HTTP/1.1 103 Hints\r\nX: hint\r\na b: c\r\n\r\n"
    headers = read(hints + OK + BODY, size=2**20).headers
    assert "x" not in headers


def outcomes(parts: Iterable[bytes], heads: KnownHeads, keep: bool) -> list[object]:
    """What a new reader says about a response after each of its parts."""
    reader = ResponseReader(heads)
    reader.begin(keep_beginning if keep else None)
    seen: list[object] = []
    for part in parts:
        try:
            reader.feed(part)
        except MalformedResponse as error:
            return [*seen, str(error)]
        if not reader.has_head:
            seen.append(None)
            continue
        got = reader.response()
        seen.append((got.status, dict(got.headers), got.body, got.complete))
        seen.append((reader.complete, reader.reusable))
        if reader.complete:
            break
    return seen


EVERY = [
    *PLAIN.values(),
    *DOUBTFUL.values(),
    *UNENDED.values(),
    *STATUS_ALONE.values(),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nOK",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    b"HTTP/1.0 204 No Content\r\n\r\n",
    b"HTTP/1.1 103 Hints\r\nContent-Length: 38\r\n\r\n" + OK + BODY,
    b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    OK + b"Content-Length: 40\r\n\r\n" + bytes(40),
    OK + b"Content-Length: 2\n\nO\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
]
EVERY = [each for each in EVERY if len(each) < 2**12]


@pytest.mark.parametrize("keep", [False, True])
def test_known_head_means_what_it_meant_before(keep):
    """Behind each response, each one is read as if it were the first, however cut."""
    for before in EVERY:
        heads = KnownHeads()
        outcomes([before], heads, keep)
        latest = heads.latest
        if latest is None:
            continue
        changed = before.replace(b"OK", b"KO")
        for data in [*EVERY, changed, before + b"x", before[:-1]]:
            for at in (len(data), 20, len(data) - 1):
                parts = [part for part in (data[:at], data[at:]) if part]
                heads.latest = latest
                assert outcomes(parts, heads, keep) == outcomes(
                    parts, KnownHeads(), keep
                )


def test_equal_head_is_not_parsed_again():
    """Even with another body, which is kept as before."""
    heads = KnownHeads()
    read(OK + BODY, size=2**20, heads=heads)
    latest = heads.latest
    reader = read(OK + BODY.replace(b"OK", b"no"), size=2**20, heads=heads)
    assert body_of(reader) == (200, b"no")
    assert latest is not None and heads.latest is latest
    assert reader.headers is latest.headers


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + BODY,
        OK + b"Connection: close\r\n" + BODY,
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n",
        OK + b"X: " + b"x" * 1024 + b"\r\n" + BODY,
        OK + b"a b: c\r\n" + BODY,
    ],
)
def test_head_is_known_only_if_it_gives_the_length(data):
    """Nor is one that is long, repaired, or the last of its connection."""
    heads = KnownHeads()
    assert body_of(read(data, size=2**20, heads=heads)) == (200, b"OK")
    assert heads.latest is None
