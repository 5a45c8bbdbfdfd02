"""A relay that was stopped for longer than its deadlines hears first, then judges."""

import asyncio
import os
import signal

import pytest
import websockets
from service import DEADLINE, RecordingBackend, Service, eventually

pytestmark = pytest.mark.gen_test(timeout=60)

LOOPS = pytest.mark.parametrize("loop_name", ["uvloop", "asyncio"])


class Stopped:
    """A relay that is stopped while the block runs, and then until `seconds` passed."""

    def __init__(self, service: Service, seconds: float) -> None:
        self.process = service.process
        self.seconds = seconds

    async def __aenter__(self) -> None:
        self.due = asyncio.get_running_loop().time() + self.seconds
        self.process.send_signal(signal.SIGSTOP)
        state = f"/proc/{self.process.pid}/stat"

        def is_stopped() -> bool:
            with open(state) as file:
                return file.read().rpartition(") ")[2].startswith("T")

        await eventually(is_stopped)

    async def __aexit__(self, *error: object) -> None:
        loop = asyncio.get_running_loop()
        await eventually(lambda: loop.time() > self.due)  # time is what is tested
        os.kill(self.process.pid, signal.SIGCONT)


@LOOPS
async def test_verdict_that_came_during_a_stall_counts(io_loop, loop_name):
    """Though --handshake_timeout has passed."""
    asked, go_on, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def decide(handler, event) -> None:
        asked.set()
        await go_on.wait()
        asyncio.get_running_loop().call_soon(answered.set)

    async with RecordingBackend() as backend:
        backend.answers["connect"] = decide
        flags = ("--handshake_timeout=1.5", f"--event_loop={loop_name}")
        async with Service(*backend.flags(), *flags) as service:
            connecting = asyncio.ensure_future(websockets.connect(service.ws_url))
            await asyncio.wait_for(asked.wait(), DEADLINE)
            async with Stopped(service, 2.5):
                go_on.set()
                await asyncio.wait_for(answered.wait(), DEADLINE)
            async with await connecting:
                pass
