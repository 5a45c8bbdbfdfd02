"""Signed events, verified by the public libraries of Standard Webhooks."""

import asyncio
import base64
import json
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import pytest
import websockets
from programs import by_node
from service import RecordingBackend, Service, eventually
from standardwebhooks import Webhook, WebhookVerificationError
from tornado.web import RequestHandler

pytestmark = pytest.mark.gen_test(timeout=60)

FIRST = f"whsec_{base64.b64encode(b'the first secret, 32 bytes long!').decode()}"
SECOND = base64.b64encode(bytes(range(0xC0, 0x100))).decode()  # 64 bytes, no prefix
OTHER = f"whsec_{base64.b64encode(b'nobody has given me away').decode()}"  # 24 bytes

MESSAGES = (
    "hello",
    "",
    'grüße 🦆 "quoted" \\ \0 \u2028',
    b"binary that is UTF-8: \xf0\x9f\xa6\x86",
    b"\x00\x01\xfe\xff, which is not UTF-8",
    "🦆" * 2**18,
)


class Signed(NamedTuple):
    """An attempt as the backend got it, and the secret to verify it with."""

    headers: dict[str, str]
    body: bytes
    secret: str = FIRST

    @property
    def event_id(self) -> str:
        """The same on every attempt of an event."""
        return self.headers["webhook-id"]


class Recorder:
    """Keeps each attempt of a backend's events with the bytes of its body."""

    def __init__(self, backend: RecordingBackend) -> None:
        self.attempts: list[Signed] = []
        self.next_statuses: list[int] = []  # statuses for the next messages
        for kind in backend.KINDS:
            backend.answers[kind] = self.record

    async def record(self, handler: RequestHandler, event: dict) -> None:
        fields = handler.request.headers.items()
        headers = {name.lower(): value for name, value in fields}
        self.attempts.append(Signed(headers, handler.request.body))
        if "message" in event and self.next_statuses:
            handler.set_status(self.next_statuses.pop(0))
            handler.set_header("Retry-After", "1")


async def by_python(attempts: Sequence[Signed]) -> list[bool]:
    """PyPI's `standardwebhooks`: which of them are verified."""
    verified = []
    for attempt in attempts:
        try:
            Webhook(attempt.secret).verify(attempt.body, attempt.headers)
            verified.append(True)
        except WebhookVerificationError:
            verified.append(False)
    return verified


async def by_npm(attempts: Sequence[Signed]) -> list[bool]:
    """npm's `standardwebhooks`."""
    events = [
        attempt._asdict() | {"body": base64.b64encode(attempt.body).decode()}
        for attempt in attempts
    ]
    return json.loads(
        await by_node("verify.mjs", "standardwebhooks", json.dumps(events).encode())
    )


def tampered(attempt: Signed) -> list[Signed]:
    """The event as an attacker in between might change it."""
    later = int(attempt.headers["webhook-timestamp"]) + 1
    return [
        attempt._replace(body=attempt.body.replace(b'"meta"', b'"Meta"', 1)),
        attempt._replace(body=attempt.body + b" "),
        attempt._replace(headers=attempt.headers | {"webhook-id": "another"}),
        attempt._replace(headers=attempt.headers | {"webhook-timestamp": str(later)}),
        attempt._replace(secret=OTHER),
    ]


@pytest.mark.parametrize("verify", [by_python, by_npm])
async def test_every_event_is_verified(
    io_loop, verify: Callable[[Sequence[Signed]], Awaitable[list[bool]]]
):
    """Of each kind, with any content; a modified one is rejected."""
    async with RecordingBackend() as backend:
        recorder = Recorder(backend)
        async with Service(*backend.flags(), f"--webhook_secret={FIRST}") as service:
            async with websockets.connect(service.ws_url, compression=None) as client:
                for message in MESSAGES:
                    await client.send(message)
            await backend.wait_for("disconnect", 1)
    kinds = [kind for kind, _, _ in backend.events]
    assert kinds == ["connect", *["message"] * len(MESSAGES), "disconnect"]
    assert await verify(recorder.attempts) == [True] * len(kinds)
    for attempt in (recorder.attempts[0], recorder.attempts[1], recorder.attempts[-1]):
        assert await verify(tampered(attempt)) == [False] * 5


async def test_several_secrets_sign_each_event(io_loop):
    """A backend verifies with any one of them, with `whsec_` or without."""
    async with RecordingBackend() as backend:
        recorder = Recorder(backend)
        secrets = f"--webhook_secret={FIRST},{SECOND}"
        async with Service(*backend.flags(), secrets) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
            await backend.wait_for("disconnect", 1)
    assert len(recorder.attempts) == 3
    for attempt in recorder.attempts:
        assert len(attempt.headers["webhook-signature"].split(" ")) == 2
        known = [attempt._replace(secret=secret) for secret in (FIRST, SECOND, OTHER)]
        assert await by_python(known) == [True, True, False]


async def test_each_attempt_is_signed_anew(io_loop):
    """A retry has the same id, the current time, and a signature of both."""
    async with RecordingBackend() as backend:
        recorder = Recorder(backend)
        recorder.next_statuses = [503]
        flags = (*backend.flags("message"), f"--webhook_secret={FIRST}")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                first, again = await attempts_of(recorder, 2)
    assert first.event_id == again.event_id
    assert first.body == again.body
    times = [int(attempt.headers["webhook-timestamp"]) for attempt in (first, again)]
    assert times[0] < times[1]
    assert await by_python([first, again]) == [True, True]
    assert first.headers["webhook-signature"] != again.headers["webhook-signature"]


async def test_event_is_signed_when_it_is_sent(io_loop):
    """Its timestamp is the time of sending, also after a wait in a queue."""
    async with RecordingBackend() as backend:
        recorder = Recorder(backend)
        answer = asyncio.Event()

        async def record_late(handler: RequestHandler, event: dict) -> None:
            await recorder.record(handler, event)
            if event["message"] == "first":
                await answer.wait()

        backend.answers["message"] = record_late
        flags = (*backend.flags(), f"--webhook_secret={FIRST}", "--order_wait=30")
        async with Service(*flags, "--max_backend_connections=1") as service:
            async with websockets.connect(service.ws_url) as client:
                other = await websockets.connect(service.ws_url)
                third = await websockets.connect(service.ws_url)
                await client.send("first")
                await attempts_of(recorder, 4)
                await other.send("second")
                await third.close()
                joining = asyncio.ensure_future(connect(service))
                in_line = time.time()
                await eventually(lambda: time.time() > in_line + 2)
                released = int(time.time())
                answer.set()
                await attempts_of(recorder, 7)
                await asyncio.gather(other.close(), (await joining).close())
    late = recorder.attempts[4:]
    assert {attempt.event_id.partition("-")[2] for attempt in late[:3]} == {
        "1", "connect", "disconnect"
    }
    assert all(int(a.headers["webhook-timestamp"]) >= released for a in late)
    assert all(await by_python(late))


async def test_secrets_are_read_again_on_sighup(io_loop, tmp_path):
    """The next event uses the new one; an invalid file changes nothing."""
    path = tmp_path / "secrets"
    path.write_text(f"# the old one\n\n  {FIRST}\n")
    async with RecordingBackend() as backend:
        recorder = Recorder(backend)
        flags = (*backend.flags("message"), f"--webhook_secret_file={path}")
        async with Service(*flags) as service:
            async with websockets.connect(service.ws_url) as client:
                for text, signed_by in (
                    (FIRST, FIRST),
                    (SECOND, SECOND),
                    (OTHER[:-1], SECOND),
                    ("# nothing", SECOND),
                    (f"{OTHER}\r\n{FIRST}", FIRST),
                ):
                    path.write_text(text)
                    recorder.attempts.clear()
                    await reload(service)
                    await client.send("hello")
                    (attempt,) = await attempts_of(recorder, 1)
                    known = [attempt._replace(secret=s) for s in (FIRST, SECOND)]
                    assert await by_python(known) == [
                        secret == signed_by for secret in (FIRST, SECOND)
                    ]
        wrong = [line for line in service.log if " values stay: " in line]
        assert len(wrong) == 2
        assert f"{path}, line 1" in wrong[0]
        assert "empty" in wrong[1]
        assert not any(secret[8:] in "".join(service.log) for secret in (FIRST, OTHER))


async def test_without_a_secret_nothing_is_signed(io_loop):
    """There is no signature header."""
    async with RecordingBackend() as backend:
        recorder = Recorder(backend)
        async with Service(*backend.flags("message")) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                (attempt,) = await attempts_of(recorder, 1)
    assert "webhook-signature" not in attempt.headers


async def connect(service: Service) -> websockets.ClientConnection:
    """A client, once its handshake has been answered."""
    return await websockets.connect(service.ws_url)


async def attempts_of(recorder: Recorder, number: int) -> list[Signed]:
    """All, once there are so many of them."""
    await eventually(lambda: len(recorder.attempts) >= number)
    return recorder.attempts


async def reload(service: Service) -> None:
    """Have the relay read its files again, and wait until it has."""

    def times() -> int:
        return sum("reloaded: " in line for line in service.log)

    before = times()
    service.process.send_signal(signal.SIGHUP)
    await eventually(lambda: times() > before)
