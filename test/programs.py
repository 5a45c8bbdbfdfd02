"""Programs of others that tests use, and that may be missing on a machine."""

import asyncio
import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import NoReturn

import pytest
from service import DEADLINE

INTEROP = Path(__file__).resolve().parent / "interop"


def leave_out(reason: str) -> NoReturn:
    """Skip this test; fail if TEST_ALL requires every program."""
    if os.environ.get("TEST_ALL"):
        pytest.fail(f"{reason} (TEST_ALL is set)", pytrace=False)
    pytest.skip(reason)


def program(package: str, *names: str) -> str:
    """Return the path of the first of these programs that is installed."""
    for name in names:
        if path := shutil.which(name):
            return path
    leave_out(f"{names[0]} is missing: apt-get install {package}")


def listens(port: int) -> bool:
    """Whether a server on this machine accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()
    except ConnectionRefusedError:
        return False
    return True


async def by_node(
    script: str, module: str, said: bytes, deadline: float = DEADLINE
) -> bytes:
    """Run a script of `interop/` with `said` as input; it needs npm's `module`."""
    node = program("nodejs npm", "node")
    if not (INTEROP / "node_modules" / module).is_dir():
        leave_out(f"npm's {module} is missing: npm ci --prefix test/interop")
    process = await asyncio.create_subprocess_exec(
        node,
        INTEROP / script,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline):
            stdout, stderr = await process.communicate(said)
    finally:
        await kill(process)
    assert process.returncode == 0, stderr.decode()
    return stdout


async def kill(process: asyncio.subprocess.Process) -> None:
    """End a process that may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
