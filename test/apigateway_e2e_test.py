"""Functions of API Gateway's WebSocket APIs, unchanged, behind `socketdock dev`.

With real parts: a Python function on AWS's runtime client in AWS's runtime interface
emulator, which calls back with boto3; and the same in Node.js as an HTTP service, with
AWS's SDK for JavaScript.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

import pytest
import websockets
from dynamodb import Table
from functions import Development, developing
from ports import free_ports
from programs import INTEROP, kill, leave_out, program
from rie import EMULATOR, INVOCATIONS, Emulator
from service import DEADLINE, PROJECT, eventually
from tornado.ioloop import IOLoop

pytestmark = [pytest.mark.gen_test(timeout=90), pytest.mark.once]

KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": KEY_ID,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "eu-central-1",
    "AWS_DEFAULT_REGION": "eu-central-1",
}
SDK = "@aws-sdk/client-apigatewaymanagementapi"
AWS_ID = "L0SM9cOFvHcCIhw="  # as API Gateway makes them
TOO_LARGE = 128 * 1024 + 1


@contextlib.asynccontextmanager
async def python_function(
    port: int, variables: Mapping[str, str]
) -> AsyncIterator[None]:
    """Run the function in AWS's emulator."""
    async with Emulator(
        INTEROP, "websocket_function.handler", port, {**CREDENTIALS, **variables}
    ):
        yield


@contextlib.asynccontextmanager
async def node_function(
    port: int, variables: Mapping[str, str]
) -> AsyncIterator[None]:
    """Run the function as an HTTP service."""
    process = await asyncio.create_subprocess_exec(
        program("nodejs npm", "node"),
        INTEROP / "websocket_function.mjs",
        str(port),
        env={**os.environ, **CREDENTIALS, **variables},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            assert await process.stdout.readline() == f"{port}\n".encode()
        yield
    finally:
        await kill(process)


FUNCTIONS = {"python": (python_function, INVOCATIONS), "node": (node_function, "/")}


def require(runtime: str) -> None:
    """Leave a test out if what runs its function is missing."""
    if runtime == "python" and not EMULATOR.exists():
        leave_out("AWS's emulator is missing: python test/rie.py")
    if runtime == "node" and not (INTEROP / "node_modules" / SDK).is_dir():
        leave_out(f"npm's {SDK} is missing: npm ci --prefix test/interop")


@pytest.fixture(scope="module")
def io_loop(module_io_loop: IOLoop) -> IOLoop:
    """One loop for all tests, since they share relays."""
    return module_io_loop


@pytest.fixture(scope="module", params=FUNCTIONS)
def relay(request, io_loop, shared, tmp_path_factory) -> Development:
    """A relay that verifies signatures, in front of a function with an authorizer."""
    require(request.param)
    function, path = FUNCTIONS[request.param]
    port = free_ports(2)
    uri = f"http://127.0.0.1:{port}{path}"
    folder = tmp_path_factory.mktemp(request.param)
    keys = folder / "keys"
    keys.write_text(f"{KEY_ID} {SECRET}\n")

    async def begin() -> Development:
        flags = (
            f"--functionuri={uri}",
            f"--authorizeruri={uri}",
            "--routes=attempt,broadcast,echo,kick,own",
            f"--sigv4_keys_file={keys}",
        )
        relay = await shared.enter_async_context(developing(folder, *flags))
        await shared.enter_async_context(function(port, relay.variables))
        return relay

    return io_loop.run_sync(begin, timeout=3 * DEADLINE)


class Client:
    """A client of the function, during the block."""

    def __init__(self, relay: Development, user: str) -> None:
        self._connecting = relay.connect(f"?user={user}")

    async def __aenter__(self) -> Self:
        self.socket = await self._connecting.__aenter__()
        await self.send("own", None)
        self.own: dict[str, Any] = json.loads(await self.receive())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connecting.__aexit__(*error)

    @property
    def id(self) -> str:
        connection_id: str = self.own["id"]
        return connection_id

    async def send(self, action: str, data: object) -> None:
        await self.socket.send(json.dumps({"action": action, "data": data}))

    async def receive(self) -> str | bytes:
        return await asyncio.wait_for(self.socket.recv(), 2 * DEADLINE)


async def test_function_answers_in_its_response(relay):
    """And it knows what the authorizer said of the client."""
    async with Client(relay, "ann") as client:
        assert client.own["user"] == "ann"
        await client.send("echo", "hello \u00e9")
        assert await client.receive() == "hello \u00e9"


async def test_function_sends_to_all(relay):
    """By the SDK, over TLS, to `https://{domainName}/{stage}` with a signature."""
    async with Client(relay, "ann") as ann, Client(relay, "bob") as bob:
        await ann.send("broadcast", "hello all")
        assert await ann.receive() == await bob.receive() == "hello all"
        await bob.send("attempt", {"id": ann.id, "size": 40_000})  # several frames
        assert await ann.receive() == "x" * 40_000
        assert await bob.receive() == "sent"


async def test_function_closes_another_client(relay):
    """By DeleteConnection."""
    async with Client(relay, "ann") as ann, Client(relay, "bob") as bob:
        await ann.send("kick", bob.id)
        await asyncio.wait_for(bob.socket.wait_closed(), DEADLINE)
        assert bob.socket.close_code == 1000
        # What the SDK raises for a connection that has ended.
        await ann.send("attempt", {"id": bob.id, "size": 1})
        assert await ann.receive() == "GoneException"


async def test_sdk_raises_its_exceptions_in_the_function(relay):
    """For an id from AWS, and for data that is too large."""
    async with Client(relay, "ann") as ann:
        await ann.send("attempt", {"id": AWS_ID, "size": 1})
        assert await ann.receive() == "GoneException"
        await ann.send("attempt", {"id": ann.id, "size": TOO_LARGE})
        assert await ann.receive() == "PayloadTooLargeException"


@pytest.mark.parametrize(("user", "status"), [("refused", 418), ("nobody", 403)])
async def test_function_refuses_clients(relay, user, status):
    """`$connect` by its status, the authorizer by its policy."""
    with pytest.raises(websockets.InvalidStatus) as caught:
        async with relay.connect(f"?user={user}"):
            pass
    assert caught.value.response.status_code == status


async def test_clients_that_send_at_once_get_their_own_answers(relay):
    """The emulator takes one invocation at a time, and loses the others."""
    async with Client(relay, "ann") as ann, Client(relay, "bob") as bob:
        wanted = [str(number) for number in range(3)]

        async def exchange(client: Client, name: str) -> None:
            for number in wanted:
                await client.send("echo", f"{name} {number}")
            got = [await client.receive() for _ in wanted]
            assert got == [f"{name} {number}" for number in wanted]

        await asyncio.gather(exchange(ann, "ann"), exchange(bob, "bob"))


async def test_chat_in_the_shape_of_the_sample_of_aws(io_loop, tmp_path):
    """With its table, in which an id of AWS is left; the function forgets that one."""
    require("python")
    port = free_ports(2)
    flags = (
        f"--functionuri=http://127.0.0.1:{port}{INVOCATIONS}",
        "--routes=sendmessage",
    )
    message = json.dumps({"action": "sendmessage", "data": "hello \u00e9"})
    async with Table("chat") as table, developing(tmp_path, *flags) as relay:
        table.ids.append(AWS_ID)
        environment = {
            **CREDENTIALS,
            **relay.variables,
            "TABLE_NAME": table.name,
            "AWS_ENDPOINT_URL_DYNAMODB": table.url,
        }
        folder = PROJECT / "examples" / "apigateway_chat"
        async with Emulator(folder, "app.handler", port, environment):
            async with relay.connect() as one, relay.connect() as other:
                assert len(table.ids) == 3
                await one.send(message)
                for client in (one, other):
                    frame = await asyncio.wait_for(client.recv(), 2 * DEADLINE)
                    assert frame == "hello \u00e9"
                await eventually(lambda: AWS_ID not in table.ids)
            await eventually(lambda: not table.ids)
