"""`--backend=apigateway`: the REQUEST authorizer, and emulators with one invocation."""

import asyncio
import gzip
import json
from contextlib import AsyncExitStack

import pytest
import websockets
from lambda_server import Gateway, Result, begin, connection_of, kind
from service import DEADLINE
from tornado.ioloop import IOLoop

pytestmark = pytest.mark.gen_test(timeout=60)

IDENTITY = {"HeaderAuth1": "headerValue1"}
SOURCES = "route.request.header.HeaderAuth1,route.request.querystring.QueryString1"
QUERY = "?QueryString1=queryValue1"


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests, which share a relay."""
    return module_io_loop


@pytest.fixture(scope="module")
def shared_gateway(io_loop, shared) -> Gateway:
    """Authorizer and function are one emulator, which dies of two invocations."""

    async def start() -> Gateway:
        return await begin(
            shared,
            "--authorizeruri={url}function/invocations",
            f"--authorizer_identity={SOURCES}",
            name="function",
        )

    return io_loop.run_sync(start)


@pytest.fixture
def gateway(shared_gateway) -> Gateway:
    """Its function allows every client, and returns the bodies of messages."""
    shared_gateway.reset().functions.functions["function"] = echo
    return shared_gateway


def policy(event, effect="Allow", resource=None, action="execute-api:Invoke", **more):
    statement = {
        "Action": action,
        "Effect": effect,
        "Resource": resource or event["methodArn"],
    }
    document = {"Version": "2012-10-17", "Statement": [statement]}
    return {"principalId": "me", "policyDocument": document} | more


def sized(result, size):
    """Return `result` as JSON of `size` bytes."""
    return Result(json.dumps(result).encode().ljust(size))


def zipped(result):
    body = gzip.compress(json.dumps(result).encode())
    return Result(body, headers={"Content-Encoding": "gzip"})


def echo(event):
    if kind(event) == "REQUEST":
        return policy(event)
    return {"statusCode": 200, "body": event.get("body")}


def authorizing(answer):
    """A function that authorizes by `answer(event)`."""
    return lambda event: answer(event) if kind(event) == "REQUEST" else echo(event)


def connect(gateway, query=QUERY, headers=IDENTITY, **options):
    return websockets.connect(
        gateway.url + query, additional_headers=headers, **options
    )


async def refused(gateway, **options):
    """Return the response to a handshake that is refused."""
    with pytest.raises(websockets.InvalidStatus) as caught:
        await asyncio.wait_for(connect(gateway, **options), DEADLINE)
    return caught.value.response


async def receive(client):
    """Return the next frame."""
    return await asyncio.wait_for(client.recv(), DEADLINE)


async def test_context_is_in_every_later_event(gateway):
    """As strings. The authorizer is asked once, before `$connect`."""
    context = {"name": "me", "level": 7, "share": 0.5, "admin": True, "none": None}
    gateway.functions.functions["function"] = authorizing(
        lambda event: policy(event, context=context)
    )
    async with connect(gateway) as client:
        await client.send("hello")
        assert await receive(client) == "hello"
    await gateway.functions.wait_for(1, lambda e: kind(e) == "DISCONNECT")
    events = [event for _, event, _ in gateway.functions.invoked]
    assert [kind(event) for event in events] == [
        "REQUEST", "CONNECT", "MESSAGE", "DISCONNECT"
    ]
    assert len({connection_of(event) for event in events}) == 1
    for event in events[1:]:
        authorizer = event["requestContext"]["authorizer"]
        latency = authorizer.pop("integrationLatency")
        assert isinstance(latency, int) and latency >= 0
        assert authorizer == {
            "principalId": "me",
            "name": "me",
            "level": "7",
            "share": "0.5",
            "admin": "true",
        }
    assert "authorizer" not in events[0]["requestContext"]


async def test_authorizer_gets_the_handshake(gateway):
    """With the ARN of `$connect`, headers and query."""
    async with connect(gateway):
        pass
    (event,) = gateway.functions.of_kind("REQUEST")
    assert event["methodArn"].startswith("arn:aws:execute-api:")
    assert event["methodArn"].endswith(":socketdock/local/$connect")
    assert event["queryStringParameters"] == {"QueryString1": "queryValue1"}
    assert event["multiValueQueryStringParameters"] == {"QueryString1": ["queryValue1"]}
    names = {name.lower() for name in event["headers"]}
    assert {"host", "headerauth1", "sec-websocket-key"} <= names
    assert event["requestContext"]["routeKey"] == "$connect"
    assert event["requestContext"]["eventType"] == "CONNECT"
    assert event["stageVariables"] == {}


@pytest.mark.parametrize(
    "resource, action",
    [
        ("*", "*"),
        ("arn:aws:execute-api:*:*:*/*", "execute-api:*"),
        ("arn:aws:execute-api:*/local/$connect", "EXECUTE-API:Invoke"),
        ("arn:aws:execute-api:us-east-1:123456789012:socketdoc?/*", "execute-api:Inv*"),
        (["arn:aws:s3:::none", "*"], ["s3:Get", "execute-api:Invoke"]),
    ],
)
async def test_policy_that_matches_allows(gateway, resource, action):
    """With the wildcards of IAM."""
    gateway.functions.functions["function"] = authorizing(
        lambda event: policy(event, resource=resource, action=action)
    )
    async with connect(gateway) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


def denied_and_allowed(event):
    answer = policy(event)
    answer["policyDocument"]["Statement"] += policy(event, "Deny")["policyDocument"][
        "Statement"
    ]
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        lambda event: policy(event, "Deny"),
        lambda event: policy(event, resource="arn:aws:execute-api:*/prod/*"),
        lambda event: policy(event, resource="arn:aws:execute-api:*/local/$connec"),
        lambda event: policy(event, action="s3:Get"),
        lambda event: policy(event) | {"policyDocument": {"Statement": []}},
        denied_and_allowed,
    ],
)
async def test_denied_client_gets_403(gateway, answer):
    """`$connect` is not invoked."""
    gateway.functions.functions["function"] = authorizing(answer)
    response = await refused(gateway)
    assert response.status_code == 403
    ((_, event, _),) = gateway.functions.invoked
    assert json.loads(response.body) == {
        "message": "Forbidden",
        "connectionId": connection_of(event),
        "requestId": event["requestContext"]["requestId"],
    }


@pytest.mark.parametrize(
    "query, headers",
    [
        ("", IDENTITY),
        ("?QueryString1=", IDENTITY),
        (QUERY, {}),
        (QUERY, {"HeaderAuth1": ""}),
    ],
)
async def test_missing_identity_is_401(gateway, query, headers):
    """Nobody is asked."""
    response = await refused(gateway, query=query, headers=headers)
    assert response.status_code == 401
    assert not gateway.functions.invoked


async def test_identity_may_be_a_header_of_the_websocket(io_loop):
    """Browsers can send a token only as a subprotocol."""
    async with AsyncExitStack() as stack:
        gateway = await begin(
            stack,
            "--authorizeruri={url}chat/invocations",
            "--authorizer_identity=route.request.header.sec-websocket-protocol",
        )
        gateway.functions.functions["chat"] = echo
        with pytest.raises(websockets.InvalidStatus) as caught:
            await asyncio.wait_for(websockets.connect(gateway.url), DEADLINE)
        assert caught.value.response.status_code == 401
        async with websockets.connect(gateway.url, subprotocols=["token"]) as client:
            await client.send("hello")
            assert await receive(client) == "hello"


async def test_authorizer_may_answer_unauthorized(gateway):
    """By the error that AWS documents for it."""
    gateway.functions.functions["function"] = authorizing(
        lambda event: {"errorMessage": "Unauthorized"}
    )
    assert (await refused(gateway)).status_code == 401


@pytest.mark.parametrize(
    "answer",
    [
        lambda event: {"errorMessage": "no"},
        lambda event: Result(b"", 500),
        lambda event: Result(b"Allow"),
        lambda event: {"isAuthorized": True},
        lambda event: policy(event) | {"principalId": None},
        lambda event: policy(event, context={"nested": {}}),
        lambda event: policy(event, context=["list"]),
        lambda event: policy(event) | {"policyDocument": "Allow"},
        lambda event: policy(event) | {"policyDocument": {"Statement": ["Allow"]}},
        lambda event: policy(event) | {
            "policyDocument": {"Statement": {"Effect": "Allow"}}
        },
        lambda event: policy(event) | {
            "policyDocument": {
                "Statement": {
                    "Effect": "Allow", "Action": "*", "Resource": "*", "Condition": {}
                }
            }
        },
        lambda event: policy(event, "allow"),
        lambda event: policy(event, ["Allow"]),
        lambda event: policy(event, resource={"Ref": "Function"}),
        lambda event: sized(policy(event, context={"a": "x"}), 8 * 1024 + 1),
        lambda event: zipped(policy(event, context={"a": "x" * 9000})),
        lambda event: None,
    ],
)
async def test_broken_authorizer_is_500(gateway, answer):
    """What it returns cannot be used, or it has failed."""
    gateway.functions.functions["function"] = authorizing(answer)
    response = await refused(gateway)
    assert response.status_code == 500
    assert json.loads(response.body)["message"] == "Internal server error"
    assert len(gateway.functions.invoked) == 1


async def test_result_of_an_authorizer_may_have_8_kib(gateway):
    """As on AWS, since it is kept for each connection."""
    gateway.functions.functions["function"] = authorizing(
        lambda event: sized(policy(event, context={"name": "me"}), 8 * 1024)
    )
    async with connect(gateway) as client:
        await client.send("go")
        await receive(client)
    (message,) = gateway.functions.of_kind("MESSAGE")
    assert message["requestContext"]["authorizer"]["name"] == "me"


# Emulators.


async def test_emulator_has_one_invocation_at_a_time(gateway):
    """Of all clients, authorizer included; each gets the answers to its messages."""

    async def wait(event):
        await asyncio.sleep(0.01)  # the time that the function takes
        return echo(event)

    gateway.functions.functions["function"] = wait

    async def talk(name):
        async with connect(gateway) as client:
            for number in range(5):
                await client.send(f"{name}-{number}")
                assert await receive(client) == f"{name}-{number}"

    await asyncio.gather(*(talk(name) for name in "abcd"))
    assert gateway.functions.most_running == 1


async def test_emulator_ends_an_invocation_before_the_next(io_loop):
    """Also one that nobody waits for any more, since it was too slow."""
    async with AsyncExitStack() as stack:
        gateway = await begin(stack, "--function_timeout=3", name="function")
        release = asyncio.Event()

        async def wait(event):
            if event.get("body") == "slow":
                await release.wait()
            return echo(event)

        gateway.functions.functions["function"] = wait
        client, other = [
            await stack.enter_async_context(websockets.connect(gateway.url))
            for _ in range(2)
        ]
        await client.send("slow")
        await gateway.functions.wait_for(1, lambda e: e.get("body") == "slow")
        await other.send("next")
        frame = json.loads(await receive(client))
        assert frame["message"] == "Internal server error"
        assert len(gateway.functions.of_kind("MESSAGE")) == 1
        release.set()
        assert await receive(other) == "next"
        assert gateway.functions.most_running == 1
