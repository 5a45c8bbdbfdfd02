"""Follows the README: a new clone, a new environment, a backend, a client.

    .venv/bin/python test/first_use.py                # as the tests do: one Python
    .venv/bin/python test/first_use.py --minor=13     # Python 3.13
    .venv/bin/python test/first_use.py --all          # each Python that is there

The clone is in a path with a space. Where root runs it, a user without rights does
all of that, unless he can't reach the Python. What it types are README's own blocks;
only the ports are others. `--all` runs `make test` for two modules, too, for which
make installs what they need: that takes minutes.
"""

import argparse
import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ports import free_ports

PROJECT = Path(__file__).resolve().parent.parent
INSTALLING = 600.0  # seconds
STARTING = 60.0  # seconds
USER = "nobody"


PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
Who = dict[str, object]  # for `subprocess`: empty is who runs this


def pythons() -> dict[int, tuple[str, Who]]:
    """Return a Python of each version from 3.11 to 3.13, by minor number, and its user.

    For root, the user is an unprivileged one, if it can execute that Python.
    """
    people: list[Who] = [{}]
    if os.geteuid() == 0:
        user = pwd.getpwnam(USER)
        people.insert(
            0, {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        )
    candidates = [shutil.which(f"python3.{minor}", path=PATH) for minor in (11, 12, 13)]
    candidates += map(str, Path.home().glob(".pyenv/versions/3.1[123].*/bin/python3"))
    found: dict[int, tuple[str, Who]] = {}
    for who in people:
        for python in filter(None, candidates):
            with contextlib.suppress(subprocess.CalledProcessError, PermissionError):
                version = subprocess.check_output(
                    [python, "-c", "import ensurepip, sys; print(sys.version_info[1])"],
                    stderr=subprocess.DEVNULL,
                    text=True,
                    **who,
                )
                found.setdefault(int(version), (python, who))
    return found


def blocks() -> list[str]:
    """Return README's blocks of commands."""
    text = (PROJECT / "README.md").read_text("utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S)


def block(beginning: str) -> str:
    """Return the block that begins with `beginning`."""
    (found,) = [block for block in blocks() if block.startswith(beginning)]
    return found


class Newcomer:
    """Runs README's commands in a new clone."""

    def __init__(self, folder: Path, python: str, who: Who) -> None:
        self.who = who
        self.clone = folder / "my clone"
        self.relay_port = free_ports(2)
        self.backend_port = self.relay_port + 1
        self.environment = {
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            "PATH": PATH,
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "PYTHON": python,
            "SOCKETDOCK_BINDPORT": str(self.relay_port),
            "PORT": str(self.backend_port),
        }
        # The files of a clone: committed ones, and those that may be committed.
        listed = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=PROJECT,
            text=True,
        )
        for name in filter(None, listed.split("\0")):
            if (PROJECT / name).exists():
                (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / name, self.clone / name)
        if who:
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, who["user"], who["group"])

    def here(self, command: str) -> str:
        """Replace the ports of a command with free ones."""
        command = command.replace(":8000", f":{self.backend_port}")
        return command.replace(
            "examples/client.py",
            f"examples/client.py --url=ws://127.0.0.1:{self.relay_port}/ws",
        )

    def runs(self, command: str) -> str:
        """Run a command to its end, and return its output. Raises if it fails."""
        ended = subprocess.run(
            ["bash", "-ec", self.here(command)],
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALLING,
            check=False,
            **self.who,
        )
        if ended.returncode:
            raise RuntimeError(f"{command}\n{ended.stdout}")
        return ended.stdout

    @contextlib.contextmanager
    def keeps(self, command: str, says: str, deadline: float) -> Iterator[None]:
        """Run a command in its own terminal during the block; then press Ctrl-C."""
        with tempfile.TemporaryFile("w+b") as output:
            process = subprocess.Popen(
                ["bash", "-c", self.here(command)],
                cwd=self.clone,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self.who,
            )

            def said() -> str:
                return os.pread(output.fileno(), 2**20, 0).decode()

            try:
                limit = time.monotonic() + deadline
                while says not in said():
                    if process.poll() is not None or time.monotonic() > limit:
                        raise RuntimeError(f"{command}\n{said()}")
                    time.sleep(0.05)
                yield
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
                process.wait(STARTING)
                if "clients at" in said() and "Traceback" in said():
                    raise RuntimeError(said())


# Variables that are passed on, to reach the package index.
PASSED_ON = (
    "PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS",
    "PIP_TRUSTED_HOST", "PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)


def go(python: str, who: Who, tests: bool) -> None:
    """Follow README from its beginning to the first answer that a client gets."""
    run, test = block("make run").splitlines()
    client = block(".venv/bin/python examples/client.py")
    with tempfile.TemporaryDirectory(prefix="first use ") as folder:
        newcomer = Newcomer(Path(folder), python, who)
        with newcomer.keeps(run, "clients at", INSTALLING):
            assert newcomer.runs(client) == "Hello\n"
        with newcomer.keeps(block(". .venv/bin/activate"), "clients at", STARTING):
            assert newcomer.runs(client) == "Hello\n"
        backend = block("python3 examples/reply.py")
        relay = block(".venv/bin/socketdock --backend=http")
        with newcomer.keeps(backend, "backend at", STARTING):
            with newcomer.keeps(relay, "clients at", STARTING):
                assert newcomer.runs(client) == "you said: Hello\n"
        if tests:
            words = 'ARGS="-q test/imports_test.py test/event_loop_test.py"'
            assert " passed" in newcomer.runs(f"{test.partition('#')[0]} {words}")


def main() -> None:
    """Print one line for each Python; raise if something failed."""
    # A background shell (`... &`) may ignore SIGINT; the started programs must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true")
    which.add_argument("--minor", type=int)
    arguments = parser.parse_args()
    found = list(pythons().items())
    if arguments.minor is not None:
        found = [(minor, one) for minor, one in found if minor == arguments.minor]
    if not found:
        sys.exit("no such Python from 3.11 to 3.13")
    for _, (python, who) in found if arguments.all else found[:1]:
        started = time.monotonic()
        go(python, who, tests=arguments.all)
        name = USER if who else pwd.getpwuid(os.geteuid()).pw_name
        print(f"{python} as {name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
