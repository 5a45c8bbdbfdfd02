"""Callbacks of AWS's SDKs: `/@connections` of `--backend=apigateway`."""

import asyncio
import base64
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import pytest
import websockets
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from functions import Event, RecordingFunction, own_id
from ports import free_ports
from programs import by_node
from service import DEADLINE, RecordingBackend, Service, eventually, refusal, tcp_server
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.ioloop import IOLoop
from wire import handshake

pytestmark = pytest.mark.gen_test(timeout=90)

UNKNOWN = "0" * 32
AWS_ID = "L0SM9cOFvHcCIhw="  # as API Gateway makes them
KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
OTHER = "AKIDOTHER", "o" * 40
TOKEN = "0123456789abcdef"
MAX_SIZE = 128 * 1024


class Relay(NamedTuple):
    """A relay, its function, and the address of its stage."""

    service: Service
    function: RecordingFunction

    @property
    def stage(self) -> str:
        return f"{self.service.callback_url}/local"


class Client(NamedTuple):
    """A client of a relay, and its URL in `/@connections`."""

    socket: websockets.ClientConnection
    id: str
    url: str

    async def receive(self) -> str | bytes:
        return await asyncio.wait_for(self.socket.recv(), DEADLINE)


@contextlib.asynccontextmanager
async def running(*flags: str) -> AsyncIterator[Relay]:
    """A relay in front of a function."""
    async with RecordingFunction() as function:
        chosen = ("--backend=apigateway", f"--functionuri={function.url}")
        async with Service(*chosen, *flags) as service:
            yield Relay(service, function)


@contextlib.asynccontextmanager
async def client_of(relay: Relay) -> AsyncIterator[Client]:
    """A client that has asked for its connection's id."""
    async with websockets.connect(relay.service.ws_url, max_size=None) as client:
        await client.send("which id?")
        found = await asyncio.wait_for(client.recv(), DEADLINE)
        assert isinstance(found, str)
        yield Client(client, found, f"{relay.stage}/@connections/{found}")


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests, since they share relays."""
    return module_io_loop


@pytest.fixture(scope="module")
def relay(io_loop, shared) -> Relay:
    """A relay that needs neither signatures nor tokens."""
    return io_loop.run_sync(lambda: shared.enter_async_context(running()))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of `guarded`."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY_ID} {SECRET}\n")
    return path


@pytest.fixture(scope="module")
def guarded(io_loop, shared, keys_file) -> Relay:
    """A relay that verifies signatures."""
    flags = (f"--sigv4_keys_file={keys_file}", "--logging=debug")
    return io_loop.run_sync(lambda: shared.enter_async_context(running(*flags)))


async def call(
    url: str,
    method: str = "POST",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> HTTPResponse:
    """Send a request as it is, and return the answer."""
    if body is None and method == "POST":
        body = b""
    request = HTTPRequest(
        url, method, body=body, headers=headers, allow_nonstandard_methods=True
    )
    return await AsyncHTTPClient().fetch(request, raise_error=False)


def sdk(
    endpoint: str,
    key: tuple[str, str] = (KEY_ID, SECRET),
    mode: str = "standard",
    attempts: int = 1,
) -> Any:
    """Return boto3's client for a stage."""
    key_id, secret = key
    return boto3.client(
        "apigatewaymanagementapi",
        endpoint_url=endpoint,
        region_name="eu-central-1",
        aws_access_key_id=key_id,
        aws_secret_access_key=secret,
        config=Config(retries={"mode": mode, "total_max_attempts": attempts}),
    )


async def error_of(api: Any, method: str, **arguments: object) -> ClientError:
    """Return the exception of a call."""
    with pytest.raises(ClientError) as caught:
        await asyncio.to_thread(getattr(api, method), **arguments)
    return caught.value


async def called_by_node(calls: object) -> Any:
    """Call AWS's SDK for JavaScript; see interop/connections.mjs."""
    module = "@aws-sdk/client-apigatewaymanagementapi"
    return json.loads(
        await by_node("connections.mjs", module, json.dumps(calls).encode())
    )


def assert_error(answer: HTTPResponse, status: int, error_type: str) -> None:
    """An error has AWS's headers and its JSON."""
    assert answer.code == status, answer.body
    assert answer.headers["x-amzn-ErrorType"] == error_type
    assert answer.headers["Content-Type"] == "application/json"
    document = json.loads(answer.body)
    assert document["message"]
    assert document["requestId"] == answer.headers["x-amzn-RequestId"]


@pytest.mark.parametrize("path", [
    "{service}/@connections/{id}",
    "{service}/local/@connections/{id}",
    "{service}/local/%40connections/{id}",
    "{service}/%40connections/{id}",
    "{service}/%6cocal/%2540connections/{once}",
    "{service}/local/@connections/{twice}",
])
async def test_connection_is_found_by_each_path(relay, path):
    """With and without the stage, and with each encoding of the id."""
    async with client_of(relay) as client:
        once = "".join(f"%{ord(char):02X}" for char in client.id)
        url = path.format(
            service=relay.service.callback_url,
            id=client.id,
            once=once,
            twice=once.replace("%", "%25"),
        )
        answer = await call(url, body=b"hello")
        assert (answer.code, answer.body) == (200, b"")
        assert answer.headers["x-amzn-RequestId"]
        assert await client.receive() == "hello"
        assert (await call(url, "GET")).code == 200
        assert (await call(url, "DELETE")).code == 204


@pytest.mark.parametrize("content_type", [None, "application/octet-stream",
                                          "text/plain; charset=utf-16"])
@pytest.mark.parametrize(("body", "frame"), [
    (b"", ""), (b"hello", "hello"), ("\u00e9\0".encode(), "\u00e9\0"),
    (b"\xff\xfe", b"\xff\xfe"), (b"ok \xc3", b"ok \xc3"),
])
async def test_data_alone_decides_the_type_of_the_frame(
    relay, body, frame, content_type
):
    """UTF-8 is a text frame, anything else a binary one."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with client_of(relay) as client:
        assert (await call(client.url, body=body, headers=headers)).code == 200
        assert await client.receive() == frame


@pytest.mark.parametrize(("method", "path", "status", "error_type"), [
    ("POST", f"/local/@connections/{UNKNOWN}", 410, "GoneException"),
    ("GET", f"/local/@connections/{UNKNOWN}", 410, "GoneException"),
    ("DELETE", f"/local/@connections/{UNKNOWN}", 410, "GoneException"),
    ("POST", "/local/@connections/L0SM9cOFvHcCIhw%3D", 410, "GoneException"),
    ("POST", "/local/@connections/L0SM9cOFvHcCIhw%253D", 410, "GoneException"),
    ("POST", "/local/@connections/", 400, "BadRequestException"),
    ("GET", "/local/@connections/a%20b", 400, "BadRequestException"),
    ("DELETE", "/local/@connections/%0a", 400, "BadRequestException"),
    ("POST", "/local/@connections/%ff", 400, "BadRequestException"),
    ("POST", f"/local/@connections/{'a' * 200}", 400, "BadRequestException"),
    ("POST", f"/prod/@connections/{UNKNOWN}", 403, "ForbiddenException"),
    ("GET", f"/Local/@connections/{UNKNOWN}", 403, "ForbiddenException"),
    ("PUT", f"/local/@connections/{UNKNOWN}", 405, "MethodNotAllowedException"),
    ("OPTIONS", f"/local/@connections/{UNKNOWN}", 405, "MethodNotAllowedException"),
    ("TRACE", f"/local/@connections/{UNKNOWN}", 405, "MethodNotAllowedException"),
    ("QUERY", f"/local/@connections/{UNKNOWN}", 405, "MethodNotAllowedException"),
])
async def test_error_is_as_aws_sends_it(relay, method, path, status, error_type):
    """The SDKs make their exceptions from the header."""
    answer = await call(f"{relay.service.callback_url}{path}", method, body=b"x")
    assert_error(answer, status, error_type)
    if status == 405:
        assert answer.headers["Allow"] == "GET, POST, DELETE"


async def test_data_may_have_128_kib(relay):
    """One byte more is 413, with and without a declared length."""

    async def chunks(write) -> None:
        await write(b"x" * MAX_SIZE)
        await write(b"x")

    async with client_of(relay) as client:
        body = b"x" * MAX_SIZE
        sending = asyncio.ensure_future(call(client.url, body=body))
        assert await client.receive() == body.decode()
        assert (await sending).code == 200
        answer = await call(client.url, body=body + b"x")
        assert_error(answer, 413, "PayloadTooLargeException")
        request = HTTPRequest(client.url, "POST", body_producer=chunks)
        answer = await AsyncHTTPClient().fetch(request, raise_error=False)
        assert_error(answer, 413, "PayloadTooLargeException")
        assert (await call(client.url, body=b"still open")).code == 200
        assert await client.receive() == "still open"


async def test_client_that_reads_nothing_is_429(io_loop):
    """When its buffer is full; one frame always fits."""
    async with running("--max_send_buffer=100000") as relay:
        address = urlsplit(relay.service.callback_url)
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((address.hostname, address.port))
            deaf.sendall(handshake())
            event = await relay.function.event("CONNECT")
            connection_id = event["requestContext"]["connectionId"]
            url = f"{relay.stage}/@connections/{connection_id}"
            waiting = []
            async with asyncio.timeout(DEADLINE):
                while not any(task.done() and task.result().code == 429
                              for task in waiting):
                    waiting.append(asyncio.ensure_future(call(url, body=bytes(99_000))))
                    await asyncio.wait(waiting[-1:], timeout=0.1)
            refused = [task.result() for task in waiting
                       if task.done() and task.result().code == 429]
            assert_error(refused[0], 429, "LimitExceededException")
            assert int(refused[0].headers["Retry-After"]) >= 1
        await asyncio.gather(*waiting)


async def test_get_describes_the_connection(relay):
    """With exactly the members that AWS documents."""
    async with client_of(relay) as client:
        answer = await call(client.url, "GET")
        document = json.loads(answer.body)
        assert answer.headers["Content-Type"] == "application/json"
        assert document.keys() == {"connectedAt", "lastActiveAt", "identity"}
        assert document["identity"]["sourceIp"] == "127.0.0.1"
        assert "websockets" in document["identity"]["userAgent"]
        assert document["connectedAt"] <= document["lastActiveAt"]
        for name in ("connectedAt", "lastActiveAt"):
            assert document[name].endswith("Z") and document[name][10] == "T"


async def test_delete_closes_the_connection(relay):
    """With 1000; then it is gone, and the function is told."""
    async with client_of(relay) as client:
        answer = await call(client.url, "DELETE")
        assert (answer.code, answer.body) == (204, b"")
        await asyncio.wait_for(client.socket.wait_closed(), DEADLINE)
        assert client.socket.close_code == 1000
        assert_error(await call(client.url, "DELETE"), 410, "GoneException")
        await relay.function.event("DISCONNECT", client.id)


async def test_connection_does_not_exist_before_connect_has_ended(relay):
    """As on AWS: a push from within `$connect` fails, and the client is accepted."""
    answers = []

    async def push(event: Event) -> Event:
        context = event["requestContext"]
        if context["eventType"] == "CONNECT":
            url = f"{relay.stage}/@connections/{context['connectionId']}"
            for method in ("POST", "GET", "DELETE"):
                answers.append(await call(url, method))
        return await own_id(event)

    relay.function.answer = push
    try:
        async with client_of(relay) as client:
            for answer in answers:
                assert_error(answer, 410, "GoneException")
            assert len(answers) == 3
            assert (await call(client.url, body=b"now")).code == 200
            assert await client.receive() == "now"
    finally:
        relay.function.answer = own_id


async def test_attempts_of_one_call_are_carried_out_once(relay):
    """An SDK sends the same invocation id with each; other data is another call."""
    async with client_of(relay) as client:
        once = {"amz-sdk-invocation-id": "7d3f", "amz-sdk-request": "attempt=1; max=3"}
        again = {**once, "amz-sdk-request": "attempt=2; max=3"}
        for body, headers in (
            (b"a", once), (b"a", again), (b"b", again), (b"a", {}), (b"a", {}),
        ):
            assert (await call(client.url, body=body, headers=headers)).code == 200
        twice = await asyncio.gather(*[
            call(client.url, body=b"c", headers=once) for _ in range(2)
        ])
        assert [answer.code for answer in twice] == [200, 200]
        assert (await call(client.url, body=b"end")).code == 200
        frames = [await client.receive() for _ in range(6)]
        assert frames == ["a", "b", "a", "a", "c", "end"]
        for _ in range(2):
            assert (await call(client.url, "DELETE", headers=once)).code == 204


async def test_route_exists_for_this_backend_only(io_loop):
    """Other backends have 404 there, and so has a listener for clients only."""
    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        answer = await call(f"{service.callback_url}/@connections/{UNKNOWN}")
        assert answer.code == 404
    async with running("--callbackport=0") as relay, client_of(relay) as client:
        assert (await call(client.url, "GET")).code == 200
        clients = urlsplit(relay.service.ws_url).netloc
        for start in ("", "/local"):
            url = f"http://{clients}{start}/@connections/{client.id}"
            assert (await call(url, "GET")).code == 404


@pytest.mark.once
async def test_each_instance_takes_each_callback(io_loop, tmp_path):
    """Also an SDK's retry at another one, and errors; the stage is that of both."""
    secret = tmp_path / "secret"
    secret.write_text("the secret of all instances\n")
    first = free_ports(2)
    one, other = [
        running(
            f"--bindport={port}", f"--peer_address=127.0.0.1:{port}",
            f"--peer_secret_file={secret}",
        )
        for port in (first, first + 1)
    ]
    async with one as relay, other as elsewhere, client_of(relay) as client:
        url = f"{elsewhere.stage}/@connections/{client.id}"
        once = {"amz-sdk-invocation-id": "7d3f"}
        for to in (url, client.url, url):
            assert (await call(to, body=b"once", headers=once)).code == 200
        assert (await call(url, body=b"\xff")).code == 200
        assert [await client.receive(), await client.receive()] == ["once", b"\xff"]
        there = json.loads((await call(url, "GET")).body)
        here = json.loads((await call(client.url, "GET")).body)
        assert there.keys() == here.keys()
        assert there["connectedAt"] == here["connectedAt"]
        for to in (url, client.url, url):
            assert (await call(to, "DELETE", headers=once)).code == 204
        await asyncio.wait_for(client.socket.wait_closed(), DEADLINE)
        for method in ("POST", "GET", "DELETE"):
            assert_error(await call(url, method), 410, "GoneException")


@pytest.mark.once
async def test_boto3_raises_its_exceptions(relay):
    """Each error has the class of its name."""
    api, other = sdk(relay.stage), sdk(f"{relay.service.callback_url}/prod")
    async with client_of(relay) as client:
        given = {"ConnectionId": client.id}
        sent = asyncio.to_thread(api.post_to_connection, Data=b"\xff", **given)
        assert (await sent)["ResponseMetadata"]["HTTPStatusCode"] == 200
        assert await client.receive() == b"\xff"
        found = await asyncio.to_thread(api.get_connection, **given)
        assert found["Identity"]["SourceIp"] == "127.0.0.1"
        assert found["ConnectedAt"] <= found["LastActiveAt"]
        error = await error_of(
            api, "post_to_connection", Data=bytes(MAX_SIZE + 1), **given
        )
        assert isinstance(error, api.exceptions.PayloadTooLargeException)
        error = await error_of(other, "get_connection", **given)
        assert isinstance(error, other.exceptions.ForbiddenException)
        await asyncio.to_thread(api.delete_connection, **given)
    for method, more in (
        ("post_to_connection", {"Data": b""}), ("get_connection", {}),
        ("delete_connection", {}),
    ):
        for connection_id in (client.id, AWS_ID):
            error = await error_of(api, method, ConnectionId=connection_id, **more)
            assert isinstance(error, api.exceptions.GoneException)
    error = await error_of(api, "get_connection", ConnectionId="a b")
    assert error.response["Error"]["Code"] == "BadRequestException"


@contextlib.asynccontextmanager
async def losing_the_first_answer(
    address: str,
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that closes instead of passing on the first answer; and the answers."""
    target = urlsplit(address)
    answers: list[bytes] = []

    async def serve(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        to_relay = await asyncio.open_connection(target.hostname, target.port)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        to_relay[1].write(head + await reader.readexactly(length))
        answer = await to_relay[0].readuntil(b"\r\n\r\n")
        to_relay[1].close()
        answers.append(answer)
        if len(answers) > 1:
            writer.write(answer)
            await writer.drain()

    async with tcp_server(serve) as port:
        yield f"http://127.0.0.1:{port}/local", answers


@pytest.mark.once
@pytest.mark.parametrize("mode", ["legacy", "standard"])
async def test_retry_of_boto3_sends_no_frame_twice(guarded, mode):
    """The first answer is lost, and boto3 sends the request again."""
    async with losing_the_first_answer(guarded.service.callback_url) as (url, answers):
        async with client_of(guarded) as client:
            api = sdk(url, mode=mode, attempts=3)
            for data in (b"once", b"end"):
                await asyncio.to_thread(
                    api.post_to_connection, ConnectionId=client.id, Data=data
                )
            assert [answer.split()[1] for answer in answers] == [b"200"] * 3
            assert [await client.receive(), await client.receive()] == ["once", "end"]


@pytest.mark.once
async def test_retry_of_the_javascript_sdk_sends_no_frame_twice(guarded):
    """As those of boto3."""
    async with losing_the_first_answer(guarded.service.callback_url) as (url, answers):
        async with client_of(guarded) as client:
            calls = [{
                "endpoint": url,
                "credentials": {"accessKeyId": KEY_ID, "secretAccessKey": SECRET},
                "command": "PostToConnectionCommand",
                "input": {
                    "ConnectionId": client.id,
                    "Data": base64.b64encode(data).decode(),
                },
                "maxAttempts": 3,
            } for data in (b"once", b"end")]
            assert await called_by_node(calls) == [{"status": 200}] * 2
            assert [answer.split()[1] for answer in answers] == [b"200"] * 3
            assert [await client.receive(), await client.receive()] == ["once", "end"]


# Who may call.


async def test_token_is_required_if_there_is_one(io_loop):
    """Without it 401, from which SDKs make ForbiddenException."""
    async with running(f"--callback_token={TOKEN}") as relay:
        async with client_of(relay) as client:
            for headers in ({}, {"Authorization": "Bearer wrong-0123456789"}):
                for method in ("POST", "GET", "DELETE", "PUT"):
                    answer = await call(client.url, method, headers=headers)
                    assert_error(answer, 401, "ForbiddenException")
                    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
            too_large = await call(client.url, body=bytes(MAX_SIZE + 1))
            assert_error(too_large, 401, "ForbiddenException")
            right = {"Authorization": f"Bearer {TOKEN}"}
            assert (await call(client.url, body=b"hello", headers=right)).code == 200
            assert await client.receive() == "hello"


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PUT"])
async def test_signature_is_required_if_there_are_keys(guarded, method):
    """Without one it is 403, whatever the path and the size; so is any other scheme."""
    async with client_of(guarded) as client:
        for url in (client.url, client.url.replace("local", "prod")):
            for body in (b"x", bytes(MAX_SIZE + 1)):
                answer = await call(url, method, body=body)
                assert_error(answer, 403, "MissingAuthenticationTokenException")
                assert json.loads(answer.body)["message"] == (
                    "Missing Authentication Token"
                )


async def test_keys_close_the_other_callbacks(guarded):
    """Keys without tokens leave no callback open to everybody."""
    async with client_of(guarded) as client:
        url = f"{guarded.service.callback_url}/socket/{client.id}"
        assert (await call(f"{url}/send", body=b"x")).code == 401
        assert (await call(url, "DELETE")).code == 401
        api = sdk(guarded.stage)
        await asyncio.to_thread(
            api.post_to_connection, ConnectionId=client.id, Data=b"signed"
        )
        assert await client.receive() == "signed"


@pytest.mark.once
async def test_signatures_of_boto3_are_verified(guarded, keys_file):
    """Each method; a wrong secret or an unknown key is 403, as AWS words it."""
    api = sdk(guarded.stage)
    async with client_of(guarded) as client:
        given = {"ConnectionId": client.id}
        await asyncio.to_thread(api.post_to_connection, Data=b"hello", **given)
        assert await client.receive() == "hello"
        await asyncio.to_thread(api.get_connection, **given)
        error = await error_of(api, "get_connection", ConnectionId=AWS_ID)
        assert isinstance(error, api.exceptions.GoneException)  # %3D is in the path
        wrong = sdk(guarded.stage, (KEY_ID, "x" * 40))
        error = await error_of(wrong, "post_to_connection", Data=b"no", **given)
        assert error.response["Error"]["Code"] == "InvalidSignatureException"
        assert error.response["Error"]["Message"].startswith(
            "The request signature we calculated does not match"
        )
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 403
        error = await error_of(sdk(guarded.stage, OTHER), "get_connection", **given)
        assert error.response["Error"]["Code"] == "UnrecognizedClientException"
        error = await error_of(
            api, "post_to_connection", Data=bytes(MAX_SIZE + 1), **given
        )
        assert isinstance(error, api.exceptions.PayloadTooLargeException)
        await asyncio.to_thread(api.delete_connection, **given)
        await asyncio.wait_for(client.socket.wait_closed(), DEADLINE)
    log = "\n".join(guarded.service.log)
    assert f"/@connections/{client.id}" in log  # each request has a line
    assert SECRET not in log and "Signature" not in log and KEY_ID not in log


@pytest.mark.once
async def test_presigned_url_is_verified(guarded):
    """The signature is in the query, which is not logged."""
    async with client_of(guarded) as client:
        request = AWSRequest("GET", client.url)
        credentials = Credentials(KEY_ID, SECRET)
        SigV4QueryAuth(credentials, "execute-api", "eu-central-1").add_auth(request)
        assert (await call(request.url, "GET")).code == 200
        assert_error(
            await call(request.url, "DELETE"), 403, "InvalidSignatureException"
        )
        signature = request.url.partition("X-Amz-Signature=")[2]
        assert signature and signature not in "\n".join(guarded.service.log)


@pytest.mark.once
async def test_keys_are_read_again_on_sighup(io_loop, tmp_path):
    """Old keys are then unknown; an unusable file changes nothing."""
    path = tmp_path / "keys"
    path.write_text(f"{KEY_ID} {SECRET}\n")
    async with running(f"--sigv4_keys_file={path}") as relay:
        old, new = sdk(relay.stage), sdk(relay.stage, OTHER)

        async def reload() -> None:
            before = len(relay.service.log)
            relay.service.process.send_signal(signal.SIGHUP)
            await eventually(
                lambda: any("reloaded: " in line for line in relay.service.log[before:])
            )

        async def code(api: Any) -> str:
            error = await error_of(api, "get_connection", ConnectionId=UNKNOWN)
            return error.response["Error"]["Code"]

        assert await code(new) == "UnrecognizedClientException"
        path.write_text(" ".join(OTHER))
        await reload()
        assert await code(new) == "GoneException"
        assert await code(old) == "UnrecognizedClientException"
        path.write_text("")
        await reload()
        assert await code(new) == "GoneException"
        assert not any(OTHER[1] in line for line in relay.service.log)


@pytest.mark.once
def test_keys_need_this_backend(tmp_path):
    """They would have no effect."""
    path = tmp_path / "keys"
    path.write_text(f"{KEY_ID} {SECRET}\n")
    line = refusal("--backend=loopback", f"--sigv4_keys_file={path}")
    assert "--sigv4_keys_file" in line and "--backend=apigateway" in line


@pytest.mark.once
async def test_javascript_sdk_has_its_exceptions(guarded):
    """AWS's other SDK signs and encodes in its own way."""
    right = {"accessKeyId": KEY_ID, "secretAccessKey": SECRET, "sessionToken": "t/+="}
    wrong = {"accessKeyId": KEY_ID, "secretAccessKey": "x" * 40}
    async with client_of(guarded) as client:

        def one(
            command: str, to: str = client.id, keys: object = right, **more: str
        ) -> Mapping[str, object]:
            return {
                "endpoint": guarded.stage,
                "credentials": keys,
                "command": command,
                "input": {"ConnectionId": to, **more},
            }

        def post(data: bytes, to: str = client.id, keys: object = right) -> object:
            encoded = base64.b64encode(data).decode()
            return one("PostToConnectionCommand", to, keys, Data=encoded)

        calls = [
            post(b"hello"),
            post(b"\xff"),
            one("GetConnectionCommand"),
            post(b"no", keys=wrong),
            post(bytes(MAX_SIZE + 1)),
            post(b"no", to=AWS_ID),
            one("DeleteConnectionCommand"),
            one("GetConnectionCommand"),
        ]
        answers = await called_by_node(calls)
        sent, binary, found, forged, large, gone, deleted, closed = answers
        assert (sent, binary) == ({"status": 200}, {"status": 200})
        assert [await client.receive(), await client.receive()] == ["hello", b"\xff"]
        assert found["Identity"]["SourceIp"] == "127.0.0.1"
        assert found["ConnectedAt"] <= found["LastActiveAt"]
        assert (forged["status"], forged["name"]) == (403, "InvalidSignatureException")
        assert (large["name"], large["typed"]) == ("PayloadTooLargeException", True)
        assert (gone["name"], gone["typed"]) == ("GoneException", True)
        assert deleted == {"status": 204}
        assert (closed["name"], closed["typed"]) == ("GoneException", True)
        await asyncio.wait_for(client.socket.wait_closed(), DEADLINE)
