"""Receipts: a send is answered when the client has read the frame."""

import asyncio
import contextlib
import json
import sys
import time

import pytest
import websockets
from interop_test import BACKENDS_CLOSE, CLIENTS, Page, Task
from service import DEADLINE, RecordingBackend, Service, eventually, withhold
from slow import SlowClient
from wire import BINARY, CLOSE, PING, PONG, TEXT, frame, handshake

from backends import ConnectionClosed
from backends.commands import CommandError, Send, command_steps, parse_commands
from handlers.clients.receipts import MAX_AWAITED, ReceiptLate, Receipts
from handlers.clients.reception import Reception

pytestmark = pytest.mark.gen_test(timeout=90)

TOKEN = "0123456789abcdef"
LARGE = 16 * 2**20  # bytes, more than the kernel takes for a client that does not read
RECEIPT = "receipt=pong&timeout=60"

servers = pytest.mark.parametrize("server", ["fast", "tornado"])


class Peer:
    """A client that answers only what the test says."""

    async def connect(self, url):
        address, _, port = url.split("/")[2].rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(address, int(port))
        self.writer.write(handshake())
        async with asyncio.timeout(DEADLINE):
            assert b" 101 " in await self.reader.readuntil(b"\r\n\r\n")
        return self

    async def read(self):
        """Opcode and payload of the next frame, which is short."""
        async with asyncio.timeout(DEADLINE):
            head, size = await self.reader.readexactly(2)
            return head & 0xF, await self.reader.readexactly(size)

    def pong(self, payload):
        self.writer.write(frame(PONG, payload))


@contextlib.asynccontextmanager
async def opened(*flags):
    """A relay, its backend, a peer, and the URL of its connection."""
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            peer = await Peer().connect(service.ws_url)
            (event,) = await backend.wait_for("connect", 1)
            url = event["meta"]["send"].removesuffix("/send")
            await is_open(backend, url)
            yield service, backend, peer, url
            peer.writer.close()


async def is_open(backend, url):
    """Wait until the handshake is answered."""
    async with asyncio.timeout(DEADLINE):
        while json.loads((await backend.call(url, "GET")).body)["state"] != "open":
            await asyncio.sleep(0.01)


def sending(backend, url, body=b"x", query=RECEIPT, **headers):
    """Begin a send with a receipt."""
    return asyncio.create_task(
        backend.call(
            f"{url}/send?{query}", body=body, headers=headers, request_timeout=DEADLINE
        )
    )


async def answer(call):
    return await asyncio.wait_for(call, DEADLINE)


# One receipt.


@servers
@pytest.mark.parametrize("flags", [(), ("--compression",)], ids=["", "compressed"])
async def test_client_confirms_what_it_has_read(io_loop, server, flags):
    """Python's `websockets` answers pings by itself."""
    async with RecordingBackend() as backend:
        flags = (*backend.flags(), *flags, f"--http_server={server}")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"].removesuffix("/send")
                await is_open(backend, url)
                for query, message in (
                    ("receipt=pong", b"one"),
                    ("receipt=pong&timeout=0.1&timeout=30", b"two"),
                    ("type=text&receipt=pong&timeout=60", "three"),
                ):
                    body = message if isinstance(message, bytes) else message.encode()
                    confirmed = await answer(sending(backend, url, body, query))
                    assert (confirmed.code, confirmed.body) == (200, b"OK")
                    assert await asyncio.wait_for(client.recv(), DEADLINE) == message


@servers
async def test_answer_waits_for_the_pong_of_its_ping(io_loop, server):
    """The ping follows the frame and has an unguessable payload; no other pong counts.

    Pongs that nobody asked for are legal (RFC 6455, section 5.5.3).
    """
    async with opened(f"--http_server={server}") as (_, backend, peer, url):
        call = sending(backend, url, b"hello")
        assert await peer.read() == (BINARY, b"hello")
        opcode, payload = await peer.read()
        assert opcode == PING
        assert 8 <= len(payload) <= 125
        number, mac = payload[:8], payload[8:]
        later = (int.from_bytes(number) + 1).to_bytes(8)
        for wrong in (
            b"",
            payload[:-1],
            payload + b"x",
            bytes(len(payload)),
            b"\xff" * len(payload),
            number + bytes(8),
            later + mac,
            bytes(8) + mac,
            b"x" * 125,
        ):
            peer.pong(wrong)
        peer.writer.write(frame(TEXT, b"behind the pongs"))
        await backend.wait_for("message", 1)
        assert not call.done()
        peer.pong(payload)
        assert (await answer(call)).code == 200
        # Another ping has another payload, and the old pong does not confirm it.
        call = sending(backend, url, b"again")
        assert await peer.read() == (BINARY, b"again")
        opcode, other = await peer.read()
        assert opcode == PING and other != payload
        peer.pong(payload)
        peer.writer.write(frame(TEXT, b"behind the old pong"))
        await backend.wait_for("message", 2)
        assert not call.done()
        peer.pong(other)
        assert (await answer(call)).code == 200


@servers
async def test_late_receipt_is_504(io_loop, server):
    """At the timeout, not before; the connection stays, and the frame has arrived."""
    async with opened(f"--http_server={server}") as (service, backend, peer, url):
        began = time.monotonic()
        late = await answer(sending(backend, url, b"x", "receipt=pong&timeout=0.5"))
        assert time.monotonic() - began > 0.45
        assert late.code == 504
        assert late.headers["Content-Type"] == "application/problem+json"
        assert json.loads(late.body)["status"] == 504
        assert await peer.read() == (BINARY, b"x")
        _, payload = await peer.read()
        peer.pong(payload)  # too late, and without effect
        assert (await backend.call(f"{url}/send", body=b"y")).code == 200
        assert await peer.read() == (BINARY, b"y")
        metrics = await backend.call(f"{service.callback_url}/metrics", "GET")
        assert b'socketdock_sends_total{status="504"} 1.0' in metrics.body
    assert not [line for line in service.log if ": 504" in line]


async def test_pong_that_arrived_during_a_stall_counts(io_loop):
    """The process was stopped for longer than the timeout."""
    async with opened() as (service, backend, peer, url):
        call = sending(backend, url, b"x", "receipt=pong&timeout=4")
        await peer.read()
        _, payload = await peer.read()
        async with service.stalled(4.2):
            peer.pong(payload)
        assert (await answer(call)).code == 200


@servers
async def test_end_of_the_connection_is_410(io_loop, server):
    """Before the pong: closed by the client, cut, or closed by the backend."""
    flags = ("--ping_interval=0", f"--http_server={server}")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            for number, how in enumerate(("close", "cut", "disconnect"), 1):
                peer = await Peer().connect(service.ws_url)
                event = (await backend.wait_for("connect", number))[-1]
                url = event["meta"]["send"].removesuffix("/send")
                await is_open(backend, url)
                call = sending(backend, url)
                await peer.read()
                await peer.read()
                if how == "close":
                    peer.writer.write(frame(CLOSE, b"\x03\xe8"))
                elif how == "cut":
                    peer.writer.transport.abort()
                else:
                    assert (await backend.call(f"{url}/disconnect")).code == 200
                    opcode, _ = await peer.read()
                    assert opcode == CLOSE
                    peer.writer.write(frame(CLOSE, b"\x03\xe8"))
                gone = await answer(call)
                assert (gone.code, json.loads(gone.body)["status"]) == (410, 410), how
                assert (await answer(sending(backend, url))).code == 410
                peer.writer.close()


async def test_pong_counts_while_the_relay_closes(io_loop):
    """The client answers the ping before it answers the close frame."""
    async with opened() as (_, backend, peer, url):
        call = sending(backend, url)
        await peer.read()
        _, payload = await peer.read()
        assert (await backend.call(f"{url}/disconnect")).code == 200
        assert (await peer.read())[0] == CLOSE
        peer.pong(payload)
        peer.writer.write(frame(CLOSE, b"\x03\xe8"))
        assert (await answer(call)).code == 200


async def test_while_connecting_there_is_no_receipt(io_loop):
    """202 at once, and no ping after the frame."""
    async with RecordingBackend() as backend:
        release = withhold(backend, "connect")
        async with Service(*backend.flags()) as service:
            connecting = asyncio.create_task(Peer().connect(service.ws_url))
            (event,) = await backend.wait_for("connect", 1)
            url = event["meta"]["send"].removesuffix("/send")
            early = await answer(sending(backend, url, b"early"))
            assert early.code == 202
            release.set()
            peer = await connecting
            assert await peer.read() == (BINARY, b"early")
            assert (await backend.call(f"{url}/send", body=b"next")).code == 200
            assert await peer.read() == (BINARY, b"next")
            peer.writer.close()


@servers
async def test_malformed_receipt_is_400(io_loop, server):
    """Nothing is sent. Without a receipt a valid timeout has no effect."""
    async with opened(f"--http_server={server}") as (_, backend, peer, url):
        for query in (
            "timeout=x",
            "receipt=",
            "receipt=ping",
            "receipt=PONG",
            "receipt=pong&receipt=no",
            *(
                f"receipt=pong&timeout={timeout}"
                for timeout in (
                    "", "0", "0.09", "60.1", "61", "-1", "1e1", "nan", "inf", "1,5",
                    "%2B1", "1_0", "0x1", "1s", "10.", ".5", "%20%201", "9" * 400,
                    "%EF%BC%91", "%D9%A1",
                )
            ),
        ):
            refused = await answer(sending(backend, url, query=query))
            assert refused.code == 400, query
            detail = json.loads(refused.body)["detail"]
            assert detail.startswith(("receipt must", "timeout must")), query
        assert (await answer(sending(backend, url, b"y", "timeout=5"))).code == 200
        assert await peer.read() == (BINARY, b"y")


# Several receipts.


async def test_pong_confirms_the_pings_before_it(io_loop):
    """A client may answer only the latest ping (RFC 6455, section 5.5.3)."""
    async with opened() as (_, backend, peer, url):
        calls, payloads = [], []
        for _ in range(4):
            calls.append(sending(backend, url))
            assert await peer.read() == (BINARY, b"x")
            opcode, payload = await peer.read()
            assert opcode == PING
            payloads.append(payload)
        assert len(set(payloads)) == 4
        peer.pong(payloads[1])
        for call in calls[:2]:
            assert (await answer(call)).code == 200
        peer.pong(payloads[1])
        peer.pong(payloads[0])
        peer.writer.write(frame(TEXT, b"behind"))
        await backend.wait_for("message", 1)
        assert not any(call.done() for call in calls[2:])
        peer.pong(payloads[3])
        for call in calls[2:]:
            assert (await answer(call)).code == 200


async def test_pong_of_a_later_heartbeat_confirms(io_loop):
    """Its ping is an ordinary one, except while receipts are awaited."""
    async with opened("--ping_interval=0.3") as (_, backend, peer, url):
        assert await peer.read() == (PING, b"")
        call = sending(backend, url, b"x")
        payloads = []
        async with asyncio.timeout(DEADLINE):
            while len(payloads) < 2:  # that of the receipt, and of the heartbeat
                opcode, payload = await peer.read()
                if opcode == PING and payload:
                    payloads.append(payload)
                elif opcode == PING:
                    peer.pong(payload)
        peer.pong(b"")
        peer.writer.write(frame(TEXT, b"behind"))
        await backend.wait_for("message", 1)
        assert not call.done()
        peer.pong(payloads[1])
        assert (await answer(call)).code == 200
        async with asyncio.timeout(DEADLINE):
            while await peer.read() != (PING, b""):
                pass


async def test_pong_of_a_receipt_that_is_late_confirms_earlier_ones(io_loop):
    """Its ping was a later one for these."""
    async with opened() as (_, backend, peer, url):
        first = sending(backend, url)
        await peer.read()
        await peer.read()
        second = sending(backend, url, query="receipt=pong&timeout=0.2")
        await peer.read()
        _, payload = await peer.read()
        assert (await answer(second)).code == 504
        assert not first.done()
        peer.pong(payload)
        assert (await answer(first)).code == 200


@servers
async def test_too_many_awaited_receipts_are_429(io_loop, server):
    """No frame is sent then; sends without a receipt and other clients go on."""
    async with opened(f"--http_server={server}") as (service, backend, peer, url):
        calls, payload = [], b""
        for _ in range(MAX_AWAITED):
            calls.append(sending(backend, url))
            assert await peer.read() == (BINARY, b"x")
            _, payload = await peer.read()
        full = await answer(sending(backend, url, b"no"))
        assert full.code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert str(MAX_AWAITED) in json.loads(full.body)["detail"]
        assert (await backend.call(f"{url}/send", body=b"plain")).code == 200
        assert await peer.read() == (BINARY, b"plain")
        async with websockets.connect(service.ws_url):
            event = (await backend.wait_for("connect", 2))[-1]
            other = event["meta"]["send"].removesuffix("/send")
            await is_open(backend, other)
            assert (await answer(sending(backend, other))).code == 200
        assert not any(call.done() for call in calls)
        peer.pong(payload)
        for call in calls:
            assert (await answer(call)).code == 200
        call = sending(backend, url, b"again")
        assert await peer.read() == (BINARY, b"again")
        peer.pong((await peer.read())[1])
        assert (await answer(call)).code == 200


# Clients that do not read, and clients that are not read.


async def test_client_that_stops_reading_is_504_and_then_410(io_loop):
    """504 while it stays, 410 when the relay has cut it."""
    flags = (f"--max_message_size={LARGE}", "--max_send_buffer=100000000")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            with await SlowClient.connect(service.ws_url, 4096):
                (event,) = await backend.wait_for("connect", 1)
                url = event["meta"]["send"].removesuffix("/send")
                await is_open(backend, url)
                large = sending(backend, url, bytes(LARGE))
                short = sending(backend, url, query="receipt=pong&timeout=0.5")
                assert (await answer(short)).code == 504
                assert (await answer(large)).code == 410
                (event,) = await backend.wait_for("disconnect", 1)
                assert event["meta"]["code"] == 1008
                assert (await answer(sending(backend, url))).code == 410


async def test_pong_behind_paused_reading_is_not_seen(io_loop):
    """504: the client sends more than the backend takes. It confirms later."""
    flags = (
        "--connection_queue_messages=1", "--order_wait=inf", "--backend_timeout=60"
    )
    async with RecordingBackend() as backend:
        release = withhold(backend, "message")
        async with Service(*backend.flags(), *flags) as service:
            peer = await Peer().connect(service.ws_url)
            (event,) = await backend.wait_for("connect", 1)
            url = event["meta"]["send"].removesuffix("/send")
            for _ in range(8):  # more than is read ahead
                peer.writer.write(frame(BINARY, bytes(60_000)))
            await backend.wait_for("message", 1)
            call = sending(backend, url, query="receipt=pong&timeout=1")
            assert await peer.read() == (BINARY, b"x")
            peer.pong((await peer.read())[1])
            assert (await answer(call)).code == 504
            release.set()
            await backend.wait_for("message", 8)
            call = sending(backend, url)
            assert await peer.read() == (BINARY, b"x")
            peer.pong((await peer.read())[1])
            assert (await answer(call)).code == 200
            peer.writer.close()


@pytest.mark.parametrize("client", ["websockets", "ws", "chromium"])
async def test_real_clients_confirm(io_loop, client):
    """Each frame that they wait for, before they send the next message."""
    messages = [("one",), (b"\xfftwo",), ("three 🦆" * 10_000,)]
    async with RecordingBackend() as backend, Page() as page:
        origins = [f"--allowed_origins={page.origin}"] if client == "chromium" else []
        async with Service(*backend.flags(), *origins) as service:
            run = asyncio.create_task(
                CLIENTS[client](Task(service.ws_url, page, messages, None))
            )
            statuses = []
            for number in range(1, len(messages) + 1):
                waiting = asyncio.create_task(backend.wait_for("message", number))
                await asyncio.wait(
                    (run, waiting), return_when=asyncio.FIRST_COMPLETED
                )
                if run.done():  # it is missing, or failed
                    waiting.cancel()
                    run.result()
                meta = (await waiting)[-1]["meta"]
                (message,) = messages[number - 1]
                url = meta["send"].removesuffix("/send")
                kind = "text" if isinstance(message, str) else "binary"
                body = message.encode() if isinstance(message, str) else message
                call = sending(backend, url, body, f"{RECEIPT}&type={kind}")
                statuses.append((await answer(call)).code)
            assert statuses == [200] * len(messages)
            event = (await backend.wait_for("message", len(messages) + 1))[-1]
            code, reason = BACKENDS_CLOSE
            closing = json.dumps({"code": code, "reason": reason})
            await backend.call(event["meta"]["disconnect"], body=closing)
            result = await asyncio.wait_for(run, DEADLINE)
            assert result.received == [message for (message,) in messages]


# With keys, and in bulk.


async def test_receipts_and_keys(io_loop):
    """A 504 is remembered, and another kind of answer is another request."""
    async with opened() as (_, backend, peer, url):
        key = {"Idempotency-Key": "one"}
        query = "receipt=pong&timeout=0.2"
        late = await answer(sending(backend, url, query=query, **key))
        again = await answer(sending(backend, url, query=query, **key))
        assert (late.code, again.code) == (504, 504)
        assert "Idempotent-Replayed" not in late.headers
        assert again.headers["Idempotent-Replayed"] == "true"
        plain = await backend.call(f"{url}/send", body=b"x", headers=key)
        assert plain.code == 422
        # A repeat waits as long as the first.
        key = {"Idempotency-Key": "two"}
        calls = [sending(backend, url, b"y", **key) for _ in range(5)]
        frames = [await peer.read() for _ in range(4)]
        assert [payload for opcode, payload in frames if opcode != PING] == [b"x", b"y"]
        assert not any(call.done() for call in calls)
        peer.pong(frames[-1][1])
        assert {(await answer(call)).code for call in calls} == {200}
        assert (await backend.call(f"{url}/send", body=b"last")).code == 200
        assert await peer.read() == (BINARY, b"last")


async def bulk(backend, service, *commands, status=200):
    """The statuses of a bulk callback, or the detail of a 400."""
    response = await backend.call(
        f"{service.callback_url}/commands",
        body=json.dumps({"commands": commands}),
        headers={
            "Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"
        },
        request_timeout=DEADLINE,
    )
    assert response.code == status, response.body
    document = json.loads(response.body)
    if status != 200:
        return document["detail"]
    return [result["status"] for result in document["results"]]


async def test_receipts_in_bulk_callbacks(io_loop):
    """Each by its own timeout; the answer waits for all."""
    tokens = f"--callback_token={TOKEN}"
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), tokens) as service:
            good = [await websockets.connect(service.ws_url) for _ in range(2)]
            silent, leaving = [await Peer().connect(service.ws_url) for _ in range(2)]
            for client in good:
                await client.send("good")
            silent.writer.write(frame(TEXT, b"silent"))
            leaving.writer.write(frame(TEXT, b"leaving"))
            events = await backend.wait_for("message", 4)
            ids = {}
            for event in events:
                ids.setdefault(event["message"], []).append(
                    event["meta"]["connection_id"]
                )
            call = asyncio.create_task(
                bulk(
                    backend,
                    service,
                    {"send": "a", "receipt": "pong", "connection_ids": ids["good"]},
                    {"send": "b", "receipt": "pong", "timeout": 0.5,
                     "connection_id": ids["silent"][0]},
                    {"send": "c", "receipt": "pong", "timeout": 60,
                     "connection_id": ids["leaving"][0]},
                    {"send": "d", "connection_id": ids["silent"][0]},
                    {"send": "e", "receipt": "pong", "connection_id": "0" * 32},
                )
            )
            assert await leaving.read() == (TEXT, b"c")
            leaving.writer.transport.abort()
            assert await answer(call) == [200, 200, 504, 410, 200, 410]
            for client in good:
                assert await asyncio.wait_for(client.recv(), DEADLINE) == "a"
                await client.close()
            assert await silent.read() == (TEXT, b"b")
            assert (await silent.read())[0] == PING
            assert await silent.read() == (TEXT, b"d")
            for wrong in (
                {"timeout": "x"},
                {"receipt": "ping"}, {"receipt": None}, {"receipt": True},
                {"receipt": "pong", "timeout": 0}, {"receipt": "pong", "timeout": 61},
                {"receipt": "pong", "timeout": "1"},
                {"receipt": "pong", "timeout": True},
                {"receipt": "pong", "timeout": None},
                {"receipt": "pong", "timeout": 1e300},
            ):
                command = {"send": "no", "connection_id": ids["silent"][0], **wrong}
                detail = await bulk(backend, service, command, status=400)
                assert "receipt must" in detail or "timeout must" in detail, wrong
            many = [{"send": "m", "receipt": "pong", "timeout": 3,
                     "connection_id": ids["silent"][0]}] * (MAX_AWAITED + 2)
            assert await bulk(backend, service, *many) == (
                [504] * MAX_AWAITED + [429] * 2
            )
            silent.writer.close()


def test_receipt_in_a_reply_is_ignored():
    """There it is a member that is not known: nobody waits for it."""
    command = {"send": "x", "receipt": "ping", "timeout": "x"}
    (parsed,) = parse_commands([command])
    assert parsed.action == Send("x")
    with pytest.raises(CommandError):
        list(command_steps([{**command, "connection_id": "0" * 32}], [], named=True))


# What they cost.


async def test_receipts_cost_nothing_when_there_are_none(io_loop):
    """The object of an idle connection keeps its size, and none stays behind."""
    reception, loop = Reception(0.0), asyncio.get_running_loop()
    assert sys.getsizeof(reception) <= 88  # 80 in pure form
    assert reception.receipts is None
    reception.receipts = receipts = Receipts(loop)
    payload = receipts.next_ping()
    receipt = receipts.expect(60)
    reception.on_pong(payload)
    await receipt
    assert reception.receipts is None


async def test_receipts_end_once(io_loop):
    """By a pong, at the timeout, or at the end of the connection."""
    loop = asyncio.get_running_loop()
    receipts = Receipts(loop)
    payloads, awaited = [], []
    for timeout in (60, 0.01, 60):
        payloads.append(receipts.next_ping())
        awaited.append(receipts.expect(timeout))
    await eventually(awaited[1].done)
    with pytest.raises(ReceiptLate):
        await awaited[1]
    receipts.on_pong(payloads[1])
    assert awaited[0].done() and not awaited[2].done()
    awaited[2].cancel()  # nobody waits any more
    receipts.on_pong(payloads[2])
    receipts.next_ping()
    last = receipts.expect(60)
    receipts.fail()
    with pytest.raises(ConnectionClosed):
        await last
    assert len(receipts) == 0
    other = Receipts(loop)
    other.next_ping()
    receipt = other.expect(60)
    other.on_pong(payloads[0])  # of another connection, with the same number
    assert not receipt.done()
    other.fail()
