"""permessage-deflate as real clients use it: kept contexts, unusual offers."""

import gc
import os
import zlib

import pytest
from faults import send_raw
from service import DEADLINE, RecordingBackend, Service
from wire import CLOSE, DEFLATE, TEXT, deflated, frame, handshake

from handlers.websocket.deflate import WINDOW, BadStream, Contexts, Inflater

pytestmark = pytest.mark.gen_test(timeout=60)

RSV1 = 4
NORMAL = frame(CLOSE, b"\x03\xe8")


class KeepingClient:
    """Compresses as Mojolicious does: one stream, whatever was negotiated."""

    def __init__(self) -> None:
        self._deflater = zlib.compressobj(8, zlib.DEFLATED, -15)

    def payload(self, message: bytes) -> bytes:
        data = self._deflater.compress(message)
        return (data + self._deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


async def test_client_that_keeps_its_context_is_understood(io_loop):
    """Although negotiation forbids it. Without context, it works as well."""
    texts = ["hello", "hello", '{"type": "ping"}', '{"type": "pong"}', ""]
    texts += [f'{{"type": "ping", "number": {n}}}' for n in range(200)]
    texts += ["x" * 100_000, os.urandom(30_000).hex(), "x" * 100_000, "hello again"]
    async with RecordingBackend() as backend:
        flags = (*backend.flags("message", "disconnect"), "--compression")
        async with Service(*flags) as service:
            for visit, payload in enumerate((KeepingClient().payload, deflated), 1):
                frames = [frame(TEXT, payload(text.encode()), rsv=RSV1)
                          for text in texts]
                # Uncompressed messages are not part of the context.
                frames.insert(1, frame(TEXT, b"hello"))
                received = await send_raw(
                    service.ws_url,
                    handshake(*DEFLATE),
                    b"".join(frames),
                    NORMAL,
                    deadline=DEADLINE,
                )
                assert b"client_no_context_takeover" in received.data
                assert received.data.endswith(b"\x88\x02\x03\xe8")
                ends = await backend.wait_for("disconnect", visit)
                assert ends[-1]["meta"]["code"] == 1000
                got = [event["message"] for event in backend.of("message")]
                assert got[-len(texts) - 1 :] == [texts[0], "hello", *texts[1:]]


async def test_stream_that_is_invalid_with_its_context_is_1007(io_loop):
    """A reference to bytes that were never sent, or an invalid stream."""
    client = KeepingClient()
    first = client.payload(b"hello hello")
    client.payload(b"something that the relay does not get to see")
    late = client.payload(b"something that the relay does not get to see")
    async with Service("--compression") as service:
        for bad in (late, b"\x07\xff"):
            received = await send_raw(
                service.ws_url,
                handshake(*DEFLATE),
                frame(TEXT, first, rsv=RSV1),
                frame(TEXT, bad, rsv=RSV1),
                deadline=DEADLINE,
            )
            assert b"\x88\x15\x03\xefbad compressed data" in received.data


def test_context_is_kept_only_for_clients_that_need_it():
    """Contexts of clients that have not referred back are dropped first."""
    contexts = Contexts(4 * WINDOW)
    noise = [os.urandom(WINDOW) for _ in range(6)]
    shown = [(Inflater(contexts), KeepingClient()) for _ in range(2)]
    for (inflater, client), text in zip(shown, noise, strict=False):
        for _ in range(2):
            message = inflater.inflate(client.payload(text[:1000]), WINDOW)
            assert message == text[:1000]
    presumed = [Inflater(contexts) for _ in range(6)]
    for inflater, text in zip(presumed, noise, strict=True):
        assert inflater.inflate(deflated(text), WINDOW) == text
    kept = [len(inflater.context) for inflater in presumed]
    assert kept == [0, 0, 0, WINDOW, WINDOW, WINDOW]
    assert contexts.kept == sum(kept) + 2 * 2000
    for (inflater, client), text in zip(shown, noise, strict=False):
        assert inflater.inflate(client.payload(text[:1000]), WINDOW) == text[:1000]


def test_context_of_a_closed_client_is_freed_at_once():
    """Without an explicit call, and without the garbage collector."""
    contexts = Contexts(2 * WINDOW)
    gc.disable()
    try:
        for _ in range(10):
            inflater = Inflater(contexts)
            inflater.inflate(deflated(os.urandom(WINDOW)), WINDOW)
        stays, client = Inflater(contexts), KeepingClient()
        for _ in range(3):
            assert stays.inflate(client.payload(b"a message"), WINDOW) == b"a message"
    finally:
        gc.enable()
    del inflater
    assert contexts.kept == len(stays.context)


def test_client_without_context_takeover_is_detected():
    """After a window's worth of bytes no context is kept."""
    contexts = Contexts()
    inflater, client = Inflater(contexts), KeepingClient()
    for _ in range(3):
        inflater.inflate(deflated(os.urandom(WINDOW)), WINDOW)
    assert (contexts.kept, inflater.context) == (0, b"")
    client.payload(b"a message")
    with pytest.raises(BadStream):
        inflater.inflate(client.payload(b"a message"), WINDOW)


async def test_without_compression_extensions_are_ignored(io_loop):
    """Valid and invalid offers."""
    async with Service() as service:
        for offer in (
            "permessage-deflate; client_max_window_bits; client_max_window_bits",
            "permessage-deflate; =1",
            'x; y="1 2"',
            "permessage deflate",
            ";" * 1000,
            "x; y=\xb2",
        ):
            request = handshake(f"Sec-WebSocket-Extensions: {offer}")
            received = await send_raw(
                service.ws_url, request, answers=1, deadline=DEADLINE
            )
            ((status, headers, _),) = received.answers()
            assert status == 101, offer
            assert "sec-websocket-extensions" not in headers
