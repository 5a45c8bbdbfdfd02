"""`--backend=apigateway`: handshakes and ends of connections, and their events."""

import asyncio
import json

import pytest
import websockets
from aws_lambda_powertools.utilities.parser.models import (
    APIGatewayWebSocketConnectEventModel,
    APIGatewayWebSocketDisconnectEventModel,
    APIGatewayWebSocketMessageEventModel,
)
from faults import send_raw
from lambda_server import OK, Gateway, Result, begin, connection_of, kind
from service import DEADLINE
from tornado.ioloop import IOLoop
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=60)


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests, which share a relay."""
    return module_io_loop


@pytest.fixture(scope="module")
def shared_gateway(io_loop, shared) -> Gateway:
    async def start() -> Gateway:
        return await begin(shared, "--api_id=abcdef1234")

    return io_loop.run_sync(start)


@pytest.fixture
def gateway(shared_gateway) -> Gateway:
    return shared_gateway.reset()


def on_connect(answer):
    """A function that answers `$connect` by `answer(event)`, and others with 200."""
    return lambda event: answer(event) if kind(event) == "CONNECT" else OK


async def refused(url, **options):
    """Return the response to a handshake that is refused."""
    with pytest.raises(websockets.InvalidStatus) as caught:
        await asyncio.wait_for(websockets.connect(url, **options), DEADLINE)
    return caught.value.response


# Paths.


@pytest.mark.parametrize("path", ["/local", "/local/", "/ws", "/local?room=1"])
async def test_clients_connect_to_the_stage_or_to_ws(gateway, path):
    """As on AWS, and as to other backends."""
    async with websockets.connect(gateway.url.removesuffix("/local") + path):
        assert len(gateway.functions.of_kind("CONNECT")) == 1


@pytest.mark.parametrize("path", ["/prod", "/", "/local/more", "/LOCAL", "/prod/ws"])
async def test_another_stage_is_403(gateway, path):
    """Nothing is invoked."""
    response = await refused(gateway.url.removesuffix("/local") + path)
    assert response.status_code == 403
    assert not gateway.functions.invoked


# $connect.


async def test_handshake_is_answered_after_connect(gateway):
    """Not before; whoever is refused has never been connected."""
    release = asyncio.Event()

    async def wait(event):
        await release.wait()
        return OK

    gateway.functions.functions["chat"] = on_connect(wait)
    connecting = asyncio.ensure_future(websockets.connect(gateway.url))
    await gateway.functions.wait_for(1, lambda event: kind(event) == "CONNECT")
    assert not connecting.done()
    release.set()
    async with await asyncio.wait_for(connecting, DEADLINE):
        pass


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 418, 429, 500, 503])
async def test_status_of_connect_passes_to_the_client(gateway, status):
    """With its body; no other event follows."""
    gateway.functions.functions["chat"] = on_connect(
        lambda event: {
            "statusCode": status,
            "headers": {"Content-Type": "text/plain", "WWW-Authenticate": "Basic"},
            "body": "go away",
        }
    )
    response = await refused(gateway.url)
    assert response.status_code == status
    assert response.body == b"go away"
    assert response.headers["Content-Type"] == "text/plain"
    assert response.headers["WWW-Authenticate"] == "Basic"
    # An accepted client's events come after those of the refused one.
    gateway.functions.functions.clear()
    async with websockets.connect(gateway.url):
        pass
    await gateway.functions.wait_for(1, lambda event: kind(event) == "DISCONNECT")
    assert [kind(event) for _, event, _ in gateway.functions.invoked] == [
        "CONNECT", "CONNECT", "DISCONNECT"
    ]


@pytest.mark.parametrize(
    "refusal",
    [
        {"statusCode": 304, "body": "not modified"},
        {"statusCode": "403"},
        {"statusCode": 403.0},
        {"statusCode": 403, "headers": {"Content-Type": "text/\u20ac", "Location": 7}},
        {"statusCode": 403, "headers": {"Retry-After": "1\r\nX-Injected: 1"}},
        {"statusCode": 403, "headers": {"Connection": "x", "Content-Length": "7"}},
        {"statusCode": 403, "headers": None, "multiValueHeaders": []},
        {"statusCode": 403, "body": "x" * 100_000},
        {"statusCode": 403, "body": "/w==", "isBase64Encoded": True},
    ],
    ids=lambda refusal: str(refusal)[:60],
)
async def test_any_refusal_passes_to_the_client(gateway, refusal):
    """Whatever its headers and body are."""
    gateway.functions.functions["chat"] = on_connect(lambda event: refusal)
    response = await refused(gateway.url)
    assert response.status_code == int(refusal["statusCode"])
    assert "X-Injected" not in response.headers
    assert len(response.body) <= 4096


async def test_refusal_with_too_large_headers_is_502(gateway):
    """A client could not read it."""
    headers = {"WWW-Authenticate": f"Basic realm={'x' * 6000}"}
    gateway.functions.functions["chat"] = on_connect(
        lambda event: {"statusCode": 401, "headers": headers}
    )
    assert (await refused(gateway.url)).status_code == 401
    headers["Location"] = "/" + "x" * 6000
    assert (await refused(gateway.url)).status_code == 502


@pytest.mark.parametrize(
    "answer",
    [
        {"errorMessage": "no"},
        Result(b'{"statusCode": 200}', headers={"X-Amz-Function-Error": "Unhandled"}),
        Result(b"", 500),
        Result(b"", 404),
        Result(b"OK"),
        {"body": "no status"},
        {"statusCode": 101},
        {"statusCode": 999},
        {"statusCode": 200, "headers": {"Sec-WebSocket-Protocol": "not-offered"}},
        None,
    ],
    ids=str,
)
async def test_function_error_at_connect_is_502(gateway, answer):
    """In API Gateway's words. It is not invoked again."""
    gateway.functions.functions["chat"] = on_connect(lambda event: answer)
    response = await refused(gateway.url, subprotocols=["offered"])
    assert response.status_code == 502
    ((_, event, _),) = gateway.functions.invoked
    assert json.loads(response.body) == {
        "message": "Internal server error",
        "connectionId": connection_of(event),
        "requestId": event["requestContext"]["requestId"],
    }


@pytest.mark.parametrize("name", ["Sec-WebSocket-Protocol", "sec-websocket-protocol"])
@pytest.mark.parametrize("member", ["headers", "multiValueHeaders"])
async def test_connect_chooses_the_subprotocol(gateway, name, member):
    """One of those that the client offers."""
    value = "second" if member == "headers" else ["second"]
    gateway.functions.functions["chat"] = on_connect(
        lambda event: {"statusCode": 200, member: {name: value}}
    )
    offers = ["first", "second"]
    async with websockets.connect(gateway.url, subprotocols=offers) as client:
        assert client.subprotocol == "second"
    (event,) = gateway.functions.of_kind("CONNECT")
    assert event["headers"]["Sec-WebSocket-Protocol"] == "first, second"


async def test_connect_has_query_parameters(gateway):
    """The last value of each, and all of them."""
    async with websockets.connect(gateway.url + "?room=1&name=%C3%A4+b&room=2&empty="):
        pass
    (event,) = gateway.functions.of_kind("CONNECT")
    assert event["queryStringParameters"] == {
        "room": "2", "name": "\u00e4 b", "empty": ""
    }
    assert event["multiValueQueryStringParameters"] == {
        "room": ["1", "2"], "name": ["\u00e4 b"], "empty": [""]
    }


async def test_connect_has_headers_as_they_were_sent(gateway, request):
    """With the case of names, and each value of those that are repeated."""
    sent = handshake(
        "HeaderAuth1: secret",
        "Cookie: a=1",
        "X-Twice: 1",
        "x-twice: 2",
        "X-Forwarded-For: 192.0.2.1",
        line="GET /local HTTP/1.1",
    )
    await send_raw(gateway.service.ws_url, sent, answers=1)
    (event,) = await gateway.functions.wait_for(1, lambda e: kind(e) == "CONNECT")
    headers, lists = event["headers"], event["multiValueHeaders"]
    assert headers["Host"] == "relay.example"
    assert headers["Sec-WebSocket-Version"] == "13"
    assert headers["X-Forwarded-For"] == "127.0.0.1"
    names = {name.lower(): name for name in headers}
    assert headers[names["headerauth1"]] == "secret"
    assert lists[names["x-twice"]] == ["1", "2"]
    assert headers[names["x-twice"]] == "2"
    assert headers["Cookie"] == "a=1"
    assert not {"connection", "upgrade"} & names.keys()
    assert lists.keys() == headers.keys()
    if "tornado" not in " ".join(gateway.service.flags):
        assert "HeaderAuth1" in headers


# The end.


@pytest.mark.parametrize(
    "code, reason, status, text",
    [
        (1000, "bye", 1000, "bye"),
        (1001, "", 1001, ""),
        (4321, "\u00e4", 4321, "\u00e4"),
        (None, "", 1005, "Client-side close frame status not set"),
        ("cut", "", 1006, "Connection closed abnormally"),
    ],
)
async def test_disconnect_says_how_the_client_left(gateway, code, reason, status, text):
    """1006 without a close frame, and 1005 for one without a status."""
    async with websockets.connect(gateway.url) as client:
        if code == "cut":
            client.transport.abort()
        elif code is None:
            client.protocol.send_close()
            client.send_data()
        else:
            await client.close(code, reason)
    (event,) = await gateway.functions.wait_for(1, lambda e: kind(e) == "DISCONNECT")
    context = event["requestContext"]
    assert context["disconnectStatusCode"] == status
    assert context["disconnectReason"] == text


async def test_disconnect_is_not_repeated(gateway):
    """As on AWS it is sent once, whatever the function answers."""
    gateway.functions.functions["chat"] = lambda event: (
        Result(b"", 500) if kind(event) == "DISCONNECT" else OK
    )
    for _ in range(2):
        async with websockets.connect(gateway.url):
            pass
    events = await gateway.functions.wait_for(2, lambda e: kind(e) == "DISCONNECT")
    assert len({connection_of(event) for event in events}) == 2


# The format.


async def test_events_have_the_members_of_api_gateway(gateway):
    """As the models of AWS's Powertools library have them, and nothing more."""
    async with websockets.connect(gateway.url, user_agent_header="agent/1") as client:
        await client.send("hello")
        await gateway.functions.wait_for(1, lambda e: kind(e) == "MESSAGE")
    await gateway.functions.wait_for(1, lambda e: kind(e) == "DISCONNECT")
    connect, message, disconnect = (event for _, event, _ in gateway.functions.invoked)
    APIGatewayWebSocketConnectEventModel.model_validate(connect)
    APIGatewayWebSocketMessageEventModel.model_validate(message)
    APIGatewayWebSocketDisconnectEventModel.model_validate(disconnect)
    both = {
        "routeKey", "eventType", "extendedRequestId", "requestTime", "messageDirection",
        "stage", "connectedAt", "requestTimeEpoch", "identity", "requestId",
        "domainName", "connectionId", "apiId",
    }
    assert connect["requestContext"].keys() == both
    assert message["requestContext"].keys() == both | {"messageId"}
    assert disconnect["requestContext"].keys() == both | {
        "disconnectStatusCode", "disconnectReason"
    }
    assert connect.keys() == disconnect.keys() == {
        "headers", "multiValueHeaders", "requestContext", "isBase64Encoded"
    }
    assert message.keys() == {"requestContext", "body", "isBase64Encoded"}
    contexts = [each["requestContext"] for each in (connect, message, disconnect)]
    for name, value in {
        "messageDirection": "IN",
        "stage": "local",
        "apiId": "abcdef1234",
        "domainName": gateway.service.callback_url.removeprefix("http://"),
        "identity": {"sourceIp": "127.0.0.1", "userAgent": "agent/1"},
        "connectionId": connection_of(connect),
        "connectedAt": connect["requestContext"]["connectedAt"],
    }.items():
        assert [context[name] for context in contexts] == [value] * 3
    assert len({context["requestId"] for context in contexts}) == 3
    times = [context["requestTimeEpoch"] for context in contexts]
    assert times == sorted(times)
    assert contexts[0]["connectedAt"] <= times[0]
    assert disconnect["headers"].keys() == {
        "Host", "x-api-key", "X-Forwarded-For", "x-restapi"
    }
