"""Bodies of responses: unrequested codings, and byte order marks."""

import asyncio
import gzip
import zlib

import pytest
import websockets
from faults import ScriptedBackend
from service import Service

from backends.client.response import MalformedResponse
from backends.http.content import decoded, parsed_json

pytestmark = pytest.mark.gen_test(timeout=60)

JSON = b'{"subprotocol": "b"}'
RAW = zlib.compressobj(wbits=-15)
CODED = {
    "identity": ("identity", JSON),
    "gzip": ("gzip", gzip.compress(JSON)),
    "x-gzip": ("X-GZip", gzip.compress(JSON)),
    "deflate": ("deflate", zlib.compress(JSON)),
    "raw-deflate": ("deflate", RAW.compress(JSON) + RAW.flush()),
    "two": ("deflate, gzip", gzip.compress(zlib.compress(JSON))),
}
BAD = {
    "unknown": ("br", JSON),
    "not-gzip": ("gzip", JSON),
    "not-deflate": ("deflate", b"\xff" + JSON),
    "cut-off": ("gzip", gzip.compress(JSON)[:-9]),
    "bomb": ("gzip", gzip.compress(bytes(2**24))),
    "bomb-in-a-bomb": ("gzip, gzip", gzip.compress(gzip.compress(bytes(2**24)))),
    "too-many": ("gzip, gzip, gzip", JSON),
}


@pytest.mark.parametrize("row", CODED)
def test_coding_is_decoded(row):
    """In any spelling; identity is not a coding."""
    coding, body = CODED[row]
    assert decoded({"content-encoding": coding}, body, 1000) == JSON
    assert decoded({"content-encoding": coding}, b"", 1000) == b""


@pytest.mark.parametrize("row", BAD)
def test_body_that_cannot_be_decoded_is_malformed(row):
    """Decoding needs no more memory than the limit."""
    coding, body = BAD[row]
    with pytest.raises(MalformedResponse):
        decoded({"content-encoding": coding}, body, 1000)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_json_is_parsed_with_and_without_a_byte_order_mark(encoding):
    """RFC 8259, section 8.1: a parser may ignore it."""
    assert parsed_json(JSON.decode().encode(encoding)) == {"subprotocol": "b"}
    with pytest.raises(ValueError):
        parsed_json("OK".encode(encoding))
    with pytest.raises(ValueError):
        parsed_json(b"\xff\xfe\x00")


def answer(body: bytes, *lines: str, status: int = 200) -> bytes:
    """A response with these headers and that body."""
    head = "".join(f"{line}\r\n" for line in lines)
    return (
        f"HTTP/1.1 {status} So\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


async def decision(said: bytes) -> tuple[int, str | bytes | None]:
    """Return what a client gets: a status, and a subprotocol or a body."""
    async with ScriptedBackend(lambda kind: said) as backend:
        async with Service(*backend.flags("connect", "message")) as service:
            offers = [websockets.Subprotocol(name) for name in "ab"]
            try:
                client = await websockets.connect(service.ws_url, subprotocols=offers)
            except websockets.InvalidStatus as refused:
                return refused.response.status_code, refused.response.body
            async with client:
                return 101, client.subprotocol


async def test_encoded_decision_is_decoded(io_loop):
    """An acceptance, and a refusal."""
    coded = gzip.compress(JSON)
    assert await decision(answer(coded, "Content-Encoding: gzip")) == (101, "b")
    assert await decision(answer(b"\xef\xbb\xbf" + JSON)) == (101, "b")
    no = answer(gzip.compress(b"no"), "Content-Encoding: gzip", status=403)
    assert await decision(no) == (403, b"no")


@pytest.mark.parametrize("status", [200, 204])
async def test_acceptance_without_a_body_needs_no_decoding(io_loop, status):
    """The status alone accepts; there is nothing that could name a subprotocol."""
    lines = "Content-Encoding: br, gzip, x, y", "Content-Type: application/json"
    assert await decision(answer(b"", *lines, status=status)) == (101, None)


async def test_undecodable_response_is_no_decision(io_loop):
    """But a refusal without its body is still a refusal."""
    assert (await decision(answer(JSON, "Content-Encoding: br")))[0] == 503
    no = answer(b"no", "Content-Encoding: br", status=403)
    assert await decision(no) == (403, b"")


async def test_request_asks_for_no_coding(io_loop):
    """For each event."""
    heads = []

    async def on_relay(reader, writer):
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    server = await asyncio.start_server(on_relay, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    flags = ("--backend=http", f"--messageuri=http://127.0.0.1:{port}/",
             f"--connecturi=http://127.0.0.1:{port}/")
    async with server, Service(*flags) as service:
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(service.ws_url)
    assert b"\r\nAccept-Encoding: identity\r\n" in heads[0]
