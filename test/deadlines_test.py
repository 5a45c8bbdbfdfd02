"""What has arrived is read before a deadline is checked."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

# Sets a timer, is stopped beyond it by its parent, and says what it did first.
STALLED = """
import asyncio, socket, sys
import uvloop
from backends.deadlines import after_reading

async def main():
    loop = asyncio.get_running_loop()
    sock = socket.socket(fileno=0)
    sock.setblocking(False)
    done = []
    judged = loop.create_future()

    def read():
        done.append("read")
        sock.recv(1)

    def judge():
        done.append("judged")
        judged.set_result(None)

    loop.add_reader(sock, read)
    loop.call_later(0.3, after_reading, loop, judge)
    print("ready", flush=True)
    await judged
    print(" ".join(done))

(uvloop if sys.argv[1] == "uvloop" else asyncio).run(main())
"""


@pytest.mark.parametrize("event_loop", ["asyncio", "uvloop"])
def test_input_during_a_stall_is_read_before_deadlines(event_loop):
    """SIGSTOP beyond the deadline; a byte arrives meanwhile."""
    ours, its = socket.socketpair()
    with ours, its, subprocess.Popen(
        [sys.executable, "-c", STALLED, event_loop],
        stdin=its, stdout=subprocess.PIPE, text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        ours.send(b"x")
        time.sleep(0.6)  # past the deadline
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "read judged\n"
