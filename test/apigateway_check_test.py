"""`socketdock check`, a crash, and the stop, with `--backend=apigateway`."""

import asyncio
import sys
from contextlib import AsyncExitStack

import pytest
import websockets
from lambda_server import OK, FunctionServer, begin, connection_of, kind
from service import DEADLINE, PROJECT, Service

pytestmark = pytest.mark.gen_test(timeout=60)


async def check(*flags, status):
    """Run a check that exits with `status`; return its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "socketdock.py",
        "check",
        "--bindport=0",
        "--backend=apigateway",
        *flags,
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == status, out.decode() + err.decode()
    return out.decode()


@pytest.mark.once
async def test_check_reaches_functions_without_invoking_them(io_loop):
    """It names the option of each that it cannot reach."""
    async with FunctionServer() as functions:
        found = await check(
            f"--functionuri={functions.url()}",
            "--routes=join=http://127.0.0.1:1/functions/join/invocations",
            status=1,
        )
        assert f"--functionuri: http://127.0.0.1:{functions.port} is reached" in found
        assert "error:   --routes: join: http://127.0.0.1:1:" in found
        assert not functions.invoked


@pytest.mark.once
async def test_check_invokes_functions_if_asked(io_loop):
    """The authorizer, `$connect` and `$disconnect`, with a mark; no message."""
    async with FunctionServer() as functions:
        functions.functions["authorizer"] = lambda event: {
            "principalId": "me", "policyDocument": {"Statement": []}
        }
        functions.functions["chat"] = lambda event: (
            {"statusCode": 401} if kind(event) == "CONNECT" else {"errorMessage": "no"}
        )
        found = await check(
            "--send",
            f"--functionuri={functions.url()}",
            f"--authorizeruri={functions.url('authorizer')}",
            status=1,
        )
        events = [event for _, event, _ in functions.invoked]
        assert [kind(event) for event in events] == ["REQUEST", "CONNECT", "DISCONNECT"]
        assert len({connection_of(event) for event in events}) == 1
        assert all(event["requestContext"]["test"] for event in events)
        assert "denied a client without credentials" in found
        assert "refused a client without credentials with 401" in found
        assert "the function has failed; see the function's log" in found


async def test_disconnect_is_sent_after_a_crash(io_loop, tmp_path):
    """With --state_dir, by the next start."""
    async with AsyncExitStack() as stack:
        state = f"--state_dir={tmp_path}"
        gateway = await begin(stack, state)
        async with websockets.connect(gateway.url):
            (connect,) = gateway.functions.of_kind("CONNECT")
            gateway.service.process.kill()
            await gateway.service.process.wait()
            url = gateway.functions.url()
            async with Service("--backend=apigateway", f"--functionuri={url}", state):
                (end,) = await gateway.functions.wait_for(
                    1, lambda event: kind(event) == "DISCONNECT"
                )
        assert connection_of(end) == connection_of(connect)
        assert end["requestContext"]["disconnectStatusCode"] == 1006
        assert end["requestContext"]["disconnectReason"] == "instance lost"


async def test_stop_closes_clients_and_waits_for_disconnects(io_loop):
    """Each has been invoked, and answered, when the process ends."""
    async with AsyncExitStack() as stack:
        gateway = await begin(stack, name="function")

        async def slowly(event):
            await asyncio.sleep(0.01)  # the time that the function takes
            return OK

        gateway.functions.functions["function"] = slowly
        for _ in range(5):
            await stack.enter_async_context(websockets.connect(gateway.url))
        gateway.service.process.terminate()
        assert await asyncio.wait_for(gateway.service.process.wait(), DEADLINE) == 0
        ends = gateway.functions.of_kind("DISCONNECT")
        assert len({connection_of(event) for event in ends}) == len(ends) == 5
        assert {e["requestContext"]["disconnectStatusCode"] for e in ends} == {1001}
        assert gateway.functions.most_running == 1
