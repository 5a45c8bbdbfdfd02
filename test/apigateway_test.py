"""`--backend=apigateway`: messages invoke functions, whose answers become frames."""

import asyncio
import base64
import json

import pytest
import websockets
from lambda_server import OK, Gateway, Result, begin, kind
from service import DEADLINE
from tornado.ioloop import IOLoop

pytestmark = pytest.mark.gen_test(timeout=60)


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests, which share a relay."""
    return module_io_loop


@pytest.fixture(scope="module")
def shared_gateway(io_loop, shared) -> Gateway:
    """A relay with two functions, strict about the order."""

    async def start() -> Gateway:
        return await begin(
            shared, "--routes=join,move={url}other/invocations", "--order_wait=60"
        )

    return io_loop.run_sync(start)


@pytest.fixture
def gateway(shared_gateway) -> Gateway:
    return shared_gateway.reset()


async def receive(client):
    """Return the next frame."""
    return await asyncio.wait_for(client.recv(), DEADLINE)


def echo(event):
    """A function that returns the body of a message."""
    if kind(event) != "MESSAGE":
        return OK
    body, is_base64 = event["body"], event["isBase64Encoded"]
    return {"statusCode": 200, "body": body, "isBase64Encoded": is_base64}


def on_message(answer):
    """A function that answers messages by `answer(event)`, and others with 200."""
    return lambda event: answer(event) if kind(event) == "MESSAGE" else OK


# Routes.


@pytest.mark.parametrize(
    "message, route",
    [
        ('{"action": "join"}', "join"),
        ('{"action": "move", "to": [1, 2]}', "move"),
        (r'{"action": "join", "cut": "\ud83d"}', "join"),
        (r'{"\udfff": "\ude00\ud83d", "action": "join"}', "join"),
        (r'{"action": "join", "smile": "\ud83d\ude00\ud83d"}', "join"),
        (r'{"action": "jo\ud83din"}', "$default"),
        (r'{"action": "join", "cut": "\\ud83d"', "$default"),
        (r'{"action": "join", "cut": \ud83d}', "$default"),
        (r'{"action": "join", "cut": "\ud83"}', "$default"),
        ('{"action": "unknown", "action": "join"}', "join"),
        ('{"action": "join", "deep": ' + "[" * 1000 + "]" * 1000 + "}", "join"),
        ('{"action": "join", "deep": ' + "[" * 1100 + "]" * 1100 + "}", "$default"),
        ('{"action": "join", "number": 1e400}', "$default"),
        ('{"action": "join", "number": NaN}', "$default"),
        ('{"action": "unknown"}', "$default"),
        ('{"action": "Join"}', "$default"),
        ('{"action": ""}', "$default"),
        ('{"action": null}', "$default"),
        ('{"action": 7}', "$default"),
        ('{"action": ["join"]}', "$default"),
        ('{"action": {"join": 1}}', "$default"),
        ('{"message": "join"}', "$default"),
        ('["join"]', "$default"),
        ('"join"', "$default"),
        ("join", "$default"),
        ("", "$default"),
        ("[" * 2000, "$default"),
        ('{"action": "$connect"}', "$default"),
        ('{"action": "$disconnect"}', "$default"),
        ('{"action": "$default"}', "$default"),
        (b'{"action": "join"}', "$default"),
        (b"\xff\x00", "$default"),
        (b"", "$default"),
    ],
)
async def test_message_selects_its_route(gateway, message, route):
    """By the value of `action`. Others are $default; none selects $connect."""
    async with websockets.connect(gateway.url) as client:
        await client.send(message)
        (event,) = await gateway.functions.wait_for(1, lambda e: kind(e) == "MESSAGE")
    assert event["requestContext"]["routeKey"] == route
    name = "other" if route == "move" else "chat"
    assert (name, event) in [(n, e) for n, e, _ in gateway.functions.invoked]
    if isinstance(message, bytes):
        assert event["isBase64Encoded"] is True
        assert base64.b64decode(event["body"]) == message
    else:
        assert (event["body"], event["isBase64Encoded"]) == (message, False)


# Answers.


@pytest.mark.parametrize("message", ["h\u00e4llo", b"\x00\xff", "{}"])
async def test_body_of_an_answer_becomes_a_frame(gateway, message):
    """Text as text, and base64 as binary."""
    gateway.functions.functions["chat"] = echo
    async with websockets.connect(gateway.url) as client:
        await client.send(message)
        assert await receive(client) == message


@pytest.mark.parametrize(
    "written, frame",
    [
        (r"cut \ud83d", "cut \ufffd"),
        (r"\ude00\ud83d\ude00\ud83d", "\ufffd\U0001f600\ufffd"),
        (r"\\ud83d \ud83d", "\\ud83d \ufffd"),
    ],
)
async def test_half_of_a_character_is_replaced_in_a_frame(gateway, written, frame):
    """Functions in JavaScript can return it, but a frame cannot contain it."""
    answer = Result(f'{{"statusCode": 200, "body": "{written}"}}'.encode())
    gateway.functions.functions["chat"] = on_message(lambda event: answer)
    async with websockets.connect(gateway.url) as client:
        await client.send("go")
        assert await receive(client) == frame


@pytest.mark.parametrize(
    "answer", [OK, {"statusCode": 200, "body": ""}, Result(b""), Result(b"", 204)]
)
async def test_answer_without_a_body_sends_nothing(gateway, answer):
    """The next frame is that of the next message."""
    gateway.functions.functions["chat"] = on_message(
        lambda event: echo(event) if event["body"] == "loud" else answer
    )
    async with websockets.connect(gateway.url) as client:
        await client.send("silent")
        await client.send("loud")
        assert await receive(client) == "loud"


async def test_status_of_an_answer_to_a_message_changes_nothing(gateway):
    """Its body is sent nevertheless, and the connection stays."""
    gateway.functions.functions["chat"] = on_message(
        lambda event: {"statusCode": 500, "body": event["body"]}
    )
    async with websockets.connect(gateway.url) as client:
        for message in ("one", "two"):
            await client.send(message)
            assert await receive(client) == message


FAILURE = {"errorMessage": "no", "errorType": "ValueError", "stackTrace": []}


@pytest.mark.parametrize(
    "answer",
    [
        Result(json.dumps(FAILURE).encode(), headers={
            "X-Amz-Function-Error": "Unhandled"
        }),
        Result(b'{"statusCode": 200}', headers={"X-Amz-Function-Error": "Handled"}),
        FAILURE,  # of the runtime interface emulator, which answers 200
        {"errorMessage": None},
        Result(b"busy", 500),
        Result(b"busy", 502),
        Result(b'{"statusCode": 200, "body": "no"}', 404),
        Result(b"", 307, {"Location": "/elsewhere"}),
        Result(b"null"),
        Result(b"Task timed out after 3.00 seconds"),  # of the emulator
        Result(b"OK"),
        {"body": "no status"},
        {"statusCode": True},
        {"statusCode": 200, "body": {"not": "a string"}},
        {"statusCode": 200, "body": "no base64!", "isBase64Encoded": True},
        {"statusCode": 200, "body": "x" * (128 * 1024 + 1)},
        None,  # the connection ends
    ],
    ids=lambda answer: str(answer)[:40],
)
async def test_function_error_is_one_frame(gateway, answer):
    """The client stays, the function is not invoked again, and the next message is."""
    gateway.functions.functions["chat"] = on_message(
        lambda event: echo(event) if event["body"] == "good" else answer
    )
    async with websockets.connect(gateway.url) as client:
        await client.send("good")  # so that the connection to the server is kept
        assert await receive(client) == "good"
        await client.send("bad")
        frame = json.loads(await receive(client))
        await client.send("good")
        assert await receive(client) == "good"
    _, bad, _ = gateway.functions.of_kind("MESSAGE")
    context = bad["requestContext"]
    assert frame == {
        "message": "Internal server error",
        "connectionId": context["connectionId"],
        "requestId": context["requestId"],
    }


async def test_error_message_beside_a_status_is_no_error(gateway):
    """A function may return any members."""
    gateway.functions.functions["chat"] = on_message(
        lambda event: {"statusCode": 200, "errorMessage": "no", "body": "yes"}
    )
    async with websockets.connect(gateway.url) as client:
        await client.send("go")
        assert await receive(client) == "yes"


async def test_messages_of_a_client_are_in_order(gateway):
    """One is sent when the one before was answered; clients run in parallel."""
    release = asyncio.Event()

    async def wait(event):
        if event["body"] == "first":
            await release.wait()
        return echo(event)

    gateway.functions.functions["chat"] = on_message(wait)
    async with (
        websockets.connect(gateway.url) as client,
        websockets.connect(gateway.url) as other,
    ):
        await client.send("first")
        await client.send("second")
        await other.send("other")
        assert await receive(other) == "other"
        release.set()
        assert [await receive(client), await receive(client)] == ["first", "second"]


# Limits.


async def test_large_frame_of_a_client_is_1009(gateway):
    """Above 32 KiB; a message may have more."""
    gateway.functions.functions["chat"] = on_message(
        lambda event: {"statusCode": 200, "body": str(len(event["body"]))}
    )
    async with websockets.connect(gateway.url) as client:
        await client.send("x" * 32 * 1024)
        assert await receive(client) == str(32 * 1024)
        await client.send(["x" * 32 * 1024] * 4)
        assert await receive(client) == str(128 * 1024)
        await client.send("x" * (32 * 1024 + 1))
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 1009


async def test_large_message_of_a_client_is_1009(gateway):
    """Above 128 KiB, in however many frames."""
    async with websockets.connect(gateway.url) as client:
        await client.send(["x" * 30_000] * 5)
        await asyncio.wait_for(client.wait_closed(), DEADLINE)
        assert client.close_code == 1009


@pytest.mark.parametrize("size", [32 * 1024, 32 * 1024 + 1, 64 * 1024, 128 * 1024])
async def test_large_answer_is_fragmented(gateway, size):
    """Frames to clients have at most 32 KiB."""
    body = "\u00e4" * (size // 2) + "x" * (size % 2)
    gateway.functions.functions["chat"] = on_message(
        lambda event: {"statusCode": 200, "body": body}
    )
    async with websockets.connect(gateway.url) as client:
        await client.send("go")
        parts = [part.encode() if isinstance(part, str) else part
                 async for part in client.recv_streaming(decode=False)]
    assert sum(map(len, parts)) == size
    assert max(map(len, parts)) <= 32 * 1024
