"""`--backend=apigateway`: its options."""

import asyncio
import json
from contextlib import AsyncExitStack, ExitStack
from unittest.mock import patch

import pytest
import websockets
from lambda_server import OK, Result, begin, kind
from service import DEADLINE
from tornado.httpclient import AsyncHTTPClient
from tornado.options import Error as OptionError
from tornado.options import options

import handlers.backlog
import handlers.clients.policy  # noqa: F401 (defines options of the relay)
from backends import Relay, apigateway
from backends.apigateway.settings import domain_name

pytestmark = pytest.mark.gen_test(timeout=60)

async def limits_of(gateway):
    """Return the limits in /status."""
    response = await AsyncHTTPClient().fetch(f"{gateway.service.callback_url}/status")
    return json.loads(response.body)["limits"]


async def receive(client):
    """Return the next frame."""
    return await asyncio.wait_for(client.recv(), DEADLINE)


async def test_routes_may_be_absent(io_loop):
    """With `=` and no URL; without $default a client gets API Gateway's error."""
    async with AsyncExitStack() as stack:
        gateway = await begin(
            stack,
            "--routes=join,$default=,$connect=,$disconnect={url}end/invocations",
            "--route_selection=${request.body.message.kind}",
            "--stage=prod",
            "--domain_name=api.example",
            "--max_message_size=300000",
        )
        gateway.functions.records_all = True
        gateway.functions.functions["chat"] = lambda event: {
            "statusCode": 200, "body": event["requestContext"]["domainName"]
        }
        url = gateway.url.removesuffix("/local") + "/prod"
        async with websockets.connect(url) as client:
            await client.send('{"message": {"kind": "join"}}')
            assert await receive(client) == "api.example"
            await client.send('{"message": "join"}')
            frame = json.loads(await receive(client))
            await client.send('{"message": {"kind": "join"}}')
            assert await receive(client) == "api.example"
        (end,) = await gateway.functions.wait_for(1, lambda e: kind(e) == "DISCONNECT")
        assert frame.keys() == {"message", "connectionId", "requestId"}
        assert frame["message"] == "Forbidden"
        assert frame["connectionId"] == end["requestContext"]["connectionId"]
        names = [name for name, _, _ in gateway.functions.invoked]
        assert names == ["chat", "chat", "end"]
        # What is set counts, the other limits are API Gateway's.
        limits = await limits_of(gateway)
        assert limits["max_message_size"] == 300_000
        assert limits["max_frame_size"] == 32 * 1024
        assert limits["idle_timeout"] == 600
        assert limits["max_lifetime"] == 7200


async def test_without_route_response_nothing_is_sent(io_loop):
    """Except errors. The relay's own limits hold where API Gateway's are off."""
    async with AsyncExitStack() as stack:
        gateway = await begin(
            stack, "--route_response=off", "--apigateway_limits=off"
        )
        gateway.functions.functions["chat"] = lambda event: (
            Result(b"", 500)
            if event.get("body") == "bad"
            else {"statusCode": 200, "body": "unseen"}
        )
        async with websockets.connect(gateway.url) as client:
            await client.send("x" * 200_000)
            await client.send("bad")
            assert json.loads(await receive(client))["message"] == (
                "Internal server error"
            )
        limits = await limits_of(gateway)
        assert limits["max_message_size"] == 4 * 1024 * 1024
        assert limits["max_frame_size"] == limits["idle_timeout"] == 0


async def test_failed_invocations_may_be_repeated(io_loop):
    """As often as --function_retries says, for messages and `$disconnect`."""
    async with AsyncExitStack() as stack:
        gateway = await begin(stack, "--function_retries=2")
        answers = {"MESSAGE": [500, 502], "DISCONNECT": [500, 500]}

        def fail(event):
            left = answers.get(kind(event))
            if left:
                return Result(b"", left.pop())
            return {"statusCode": 200, "body": event.get("body")}

        gateway.functions.functions["chat"] = fail
        async with websockets.connect(gateway.url) as client:
            await client.send("one")
            assert await receive(client) == "one"
            answers["MESSAGE"] = [500] * 3
            await client.send("two")
            assert json.loads(await receive(client))["message"] == (
                "Internal server error"
            )
        await gateway.functions.wait_for(3, lambda e: kind(e) == "DISCONNECT")
        ones = [e for e in gateway.functions.of_kind("MESSAGE") if e["body"] == "one"]
        assert len(ones) == 3
        assert len({event["requestContext"]["requestId"] for event in ones}) == 1


async def test_message_that_fails_after_the_end_sends_no_other_event(io_loop):
    """`$disconnect` is sent once, although an invocation outlives the connection."""
    async with AsyncExitStack() as stack:
        gateway = await begin(stack, "--order_wait=0.1")
        release = asyncio.Event()

        async def fail(event):
            if kind(event) == "MESSAGE":
                await release.wait()
                return Result(b"", 500)
            return OK

        gateway.functions.functions["chat"] = fail
        async with websockets.connect(gateway.url) as client:
            await client.send("slow")
            await gateway.functions.wait_for(1, lambda e: kind(e) == "MESSAGE")
        await gateway.functions.wait_for(1, lambda e: kind(e) == "DISCONNECT")
        release.set()
        gateway.service.process.terminate()
        await asyncio.wait_for(gateway.service.process.wait(), DEADLINE)
        assert len(gateway.functions.of_kind("DISCONNECT")) == 1
        assert len(gateway.functions.of_kind("MESSAGE")) == 1


async def test_concurrency_is_limited_for_any_function(io_loop):
    """By --function_concurrency; another invocation waits."""
    async with AsyncExitStack() as stack:
        gateway = await begin(stack, "--function_concurrency=2")
        both, release = asyncio.Event(), asyncio.Event()

        async def wait(event):
            if kind(event) != "MESSAGE":
                return OK
            if gateway.functions.running == 2:
                both.set()
            await release.wait()
            return {"statusCode": 200, "body": event["body"]}

        gateway.functions.functions["chat"] = wait
        clients = [
            await stack.enter_async_context(websockets.connect(gateway.url))
            for _ in range(4)
        ]
        for number, client in enumerate(clients):
            await client.send(str(number))
        await asyncio.wait_for(both.wait(), DEADLINE)
        release.set()
        for number, client in enumerate(clients):
            assert await receive(client) == str(number)
        assert gateway.functions.most_running == 2


async def test_slow_function_delays_nothing(io_loop):
    """After --order_wait the next message goes, and after --function_timeout an error.

    The function may still answer, but its answer is not sent.
    """
    async with AsyncExitStack() as stack:
        gateway = await begin(stack, "--order_wait=0.1", "--function_timeout=3")
        release = asyncio.Event()

        async def wait(event):
            if event.get("body") == "slow":
                await release.wait()
            return {"statusCode": 200, "body": event.get("body")}

        gateway.functions.functions["chat"] = wait
        async with websockets.connect(gateway.url) as client:
            await client.send("slow")
            await client.send("next")
            assert await receive(client) == "next"
            frame = json.loads(await receive(client))
            assert frame["message"] == "Internal server error"
            release.set()
            await client.send("last")
            assert await receive(client) == "last"


async def test_wait_for_another_invocation_is_bounded(io_loop):
    """After --delivery_timeout a message fails, and is not sent later."""
    async with AsyncExitStack() as stack:
        gateway = await begin(
            stack, "--function_concurrency=1", "--delivery_timeout=0.5"
        )
        release = asyncio.Event()

        async def wait(event):
            if event.get("body") == "slow":
                await release.wait()
            return {"statusCode": 200, "body": event.get("body")}

        gateway.functions.functions["chat"] = wait
        slow, other = [
            await stack.enter_async_context(websockets.connect(gateway.url))
            for _ in range(2)
        ]
        await slow.send("slow")
        await gateway.functions.wait_for(1, lambda e: e.get("body") == "slow")
        await other.send("late")
        frame = json.loads(await receive(other))
        assert frame["message"] == "Internal server error"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await asyncio.wait_for(websockets.connect(gateway.url), DEADLINE)
        assert caught.value.response.status_code == 502
        release.set()
        assert await receive(slow) == "slow"
        await other.send("next")
        assert await receive(other) == "next"
        bodies = [e["body"] for e in gateway.functions.of_kind("MESSAGE")]
        assert bodies == ["slow", "next"]
        assert len(gateway.functions.of_kind("CONNECT")) == 2


@pytest.mark.once
@pytest.mark.parametrize(
    "given, words",
    [
        ({"functionuri": None}, "--functionuri"),
        ({"functionuri": "lambda"}, "--functionuri=lambda"),
        ({"authorizeruri": "ftp://x"}, "--authorizeruri"),
        ({"routes": ["$other"]}, "$connect, $disconnect, $default"),
        ({"routes": ["join", "join"]}, "--routes: join"),
        ({"routes": ["join="]}, "--routes: join"),
        ({"routes": ["join=nowhere"]}, "--routes: join=nowhere"),
        ({"routes": ["=http://x/"]}, "--routes"),
        ({"route_selection": "$request.header.x"}, "$request.body.action"),
        ({"route_selection": "$request.body."}, "$request.body.action"),
        ({"route_selection": "${request.body.a"}, "$request.body.action"),
        ({"route_selection": "$request.body.a[0]"}, "$request.body.action"),
        ({"route_selection": "$request.body.action "}, "$request.body.action"),
        ({"stage": "a/b"}, "--stage=a/b"),
        ({"domain_name": "https://api.example"}, "--domain_name=https://api.example"),
        ({"domain_name": "wss://api.example/local"}, "host:port"),
        ({"domain_name": "api.example, other.example"}, "host:port"),
        ({"domain_name": "api.example:"}, "host:port"),
        ({"domain_name": "api.example:0"}, "host:port"),
        ({"domain_name": "api.example:99999"}, "host:port"),
        ({"domain_name": "fd00::1"}, "host:port"),
        ({"domain_name": "[fe80::1%eth0]"}, "host:port"),
        ({"domain_name": "me:secret@api.example"}, "host:port"),
        ({"domain_name": "api.example?stage=x"}, "host:port"),
        ({"domain_name": "/api"}, "host:port"),
        ({"domain_name": "stra\u00dfe.example"}, "xn--"),
        ({"authorizer_identity": ["route.request.header.a"]}, "--authorizeruri"),
        (
            {"authorizeruri": "http://x/", "authorizer_identity": ["header.a"]},
            "route.request.header.Authorization",
        ),
        ({}, "--domain_name"),  # since the callbacks' address is not known
    ],
)
async def test_invalid_options_are_one_line(io_loop, given, words):
    """That names the option, and says what is meant."""
    settings = {"functionuri": "http://127.0.0.1:1/", **given}
    with ExitStack() as stack, pytest.raises(OptionError) as caught:
        for name, value in settings.items():
            stack.enter_context(patch.object(options.mockable(), name, value))
        apigateway.make_backend(Relay(None, "test/0", "0"))
    assert words in str(caught.value)


@pytest.mark.once
@pytest.mark.parametrize(
    "given, expected",
    [
        ("api.example", "api.example"),
        ("localhost:8765", "localhost:8765"),
        ("[fd00::1]:8765", "[fd00::1]:8765"),
        ("api.example:443/prefix", "api.example:443/prefix"),
        ("b\u00fccher.example:80", "xn--bcher-kva.example:80"),
    ],
)
def test_domain_name_is_a_host_and_maybe_a_port(given, expected):
    """An international name is encoded, since SDKs make URLs of it."""
    with patch.object(options.mockable(), "domain_name", given):
        assert domain_name(Relay(None, "test/0", "0")) == expected
