"""Every command in README, docs, conf and examples works as written.

Each is run in a copy of the project, in a path with a space, as after `make run`;
its ports and other machines' addresses are replaced by free ones of this machine.
What is not run has its reason in `NOT_RUN`. A command that is in neither table fails.
"""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_ports
from project import copy_project
from service import PROJECT

pytestmark = pytest.mark.gen_test(timeout=120)

LONG = 60.0  # seconds for a start on a busy machine

PROGRAMS = (
    r"(\.venv/bin/\S+|\. \.venv|make|python[\d.]*|socketdock|pipx?|docker|npm|curl"
    r"|supervisor(d|ctl)|openssl|echo|systemctl|apt-get|useradd|opentelemetry-\w+|mkdir"
    r"|[A-Z_]+=\S+|export|cp|php|node|kubectl|go|npx|zip|nginx"
    r"|haproxy|caddy) "
)

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.M | re.S)

# Commands that keep running, by what they print once they work.
STAYS = {
    r"(.*\n)*.*(\.venv/bin/socketdock|python socketdock\.py) (?!check|config|health)":
        "clients at",
    r"make run( |$)": "clients at",
    r"python3 examples/\w+\.py": "backend at",
    r"WEBHOOK_SECRET=whsec_\.\.\.": "backend at",
}

# Commands that end, with these exit statuses.
ENDS = {
    r"\.venv/bin/socketdock check": (0, 1),  # 2 is for a command line that is wrong
    r"\.venv/bin/socketdock health$": (0, 1),
    r"\.venv/bin/socketdock config$": (0,),
    r'echo "whsec_|openssl rand': (0,),
    r"(make demo|\.venv/bin/python examples/demo\.py)$": (0,),
    r"make PYTHON=python3\.12": None,  # with a target that `…` stands for
    r"make (?!run|demo|PYTHON)\w+": None,
}

NOT_RUN = {
    r"\.venv/bin/python examples/client\.py": "first_use_test runs it, with a backend",
    r"make run     # an echo server": "first_use_test runs these two, in a new clone",
    r"python -m cProfile ": "it stays until it is stopped, and profiles meanwhile",
    r"python socketdock\.py$": "README's block with its environment is run",
    r"\.venv/bin/python examples/redis_consumer": "redis_backend_test runs it",
    r"\.venv/bin/python -m bench\.(crowd |storm)": "bench_test runs it, smaller",
    r"(\.venv/bin/)?socketdock (--backend=redis|redis-partitions|worker) ?":
        "it needs Redis; redis_backend_test and redis_worker_test run these",
    r"curl ": "it needs the id of a connection; callback_test sends the same",
    r"(\.venv/bin/python -m |SOCKETDOCK_COMPILE=1 )?pip install|pipx install|npm ci":
        "it downloads",
    r"\.venv/bin/python -m pip install supervisor\n|(\.venv/bin/)?supervisor(d|ctl) ":
        "supervisord_test runs the real one with this file",
    r"docker |CALLBACK_TOKEN_FILE=": "it needs Docker; compose_test has the files",
    r"openssl rand -base64 32 > /etc/": "peers_test does it elsewhere",
    r"(.*\n)*.*PEER_SECRET_FILE=": "it needs Docker; compose_redis_test has the file",
    r"make -C /tmp/before compile": "it needs another checkout, and takes minutes",
    r"socketdock dev": "development_test runs it",
    r"socketdock (check( --send)?|--backend=apigateway)$":
        "it is in a sentence, without options",
    r"cp ~/.local/state/socketdock/dev/ca-bundle.pem chat/\nsam ": "it needs SAM",
    r"kubectl ": "it needs a cluster; kubernetes_test has the files",
    r"(PYTHONPATH=\. )?aca-py ": "it needs ACA-Py; acapy_transport_test runs the code",
    r"(/etc|mkdir /etc|cp conf|systemctl|useradd|chown|apt-get|python3 -m venv /opt)":
        "it changes this machine; systemd_test runs what the unit runs",
    r"(nginx|haproxy|caddy) ": "balancer_test runs it",
    r"npx wrangler|zip ": "it needs an account; reply_examples_test runs the code",
    r"PORT=8000 go run": "reply_examples_test runs it where Go is installed",
    r"opentelemetry-instrument": "it is a program of the backend's side",
    r"\.venv/bin/python (-m (flask|uvicorn)|examples/reply_django\.py) |php |node ":
        "reply_examples_test runs it",
    r"WEBHOOK_SECRET=\S+ CALLBACK_TOKEN=\S+ node ": "examples_test runs it",
    r"python3 -m venv \.venv|\.venv/bin/python -m pip": "make runs it; makefile_test",
}


def commands() -> Iterator[tuple[str, str]]:
    """Each with the name of its file: blocks of sh, `$ ` lines, and `code` in text."""
    for path in sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")]):
        if path.name == "CHANGELOG.md":  # the original
            continue
        text = path.read_text("utf-8")
        for indent, language, block in FENCED.findall(text):
            if language == "sh":
                yield path.name, re.sub(rf"^{indent}", "", block, flags=re.M).strip()
            else:
                lines = re.findall(r"^\$ (.*)$", block, flags=re.M)
                yield from ((path.name, line) for line in lines)
        prose = FENCED.sub("", text)
        indented = re.findall(r"^    (\S.*)$", prose, flags=re.M)
        for code in [*re.findall(r"`([^`\n]+)`", prose), *indented]:
            if re.match(PROGRAMS, code):
                yield path.name, code
    conf = [path for path in PROJECT.glob("conf/**/*") if path.is_file()]
    examples = [path for path in PROJECT.glob("examples/**/*") if is_source(path)]
    for path in sorted([*conf, *examples]):
        text = path.read_text("utf-8")
        if text.startswith('"""'):
            head = text.split('"""')[1].replace("\\\\\n", "\\\n")
        else:
            head = re.sub(r"^(//|[#;]) ?", "", text, flags=re.M)
        found = re.findall(r"^    (\S(?:.*\\\n)*.*)", head, flags=re.M)
        if path not in examples:
            found = [part for line in found for part in line.split(" && ")]
        yield from ((path.name, code) for code in found if re.match(PROGRAMS, code))


def is_source(path: Path) -> bool:
    """Whether an example is a program, and no module of npm."""
    sources = (".py", ".mjs", ".php", ".go")
    return path.suffix in sources and "node_modules" not in path.parts


ALL = sorted(set(commands()))


def of(table) -> list[str]:
    """Return each command once."""
    return [
        command
        for command in dict.fromkeys(command for _, command in ALL)
        if match(table, command) is not None and match(NOT_RUN, command) is None
    ]


def match(table, command: str) -> str | None:
    return next((pattern for pattern in table if re.match(pattern, command)), None)


def test_every_command_is_run_or_has_its_reason():
    """Each command in the docs is tested, or the test says why not."""
    assert len(ALL) > 40
    unknown = [
        f"{file}: {command}"
        for file, command in ALL
        if not any(match(table, command) for table in (STAYS, ENDS, NOT_RUN))
    ]
    assert unknown == []


@pytest.mark.parametrize("table", [STAYS, ENDS, NOT_RUN])
def test_every_row_of_the_tables_is_of_a_command(table):
    """A command that was removed from the docs needs no row."""
    for pattern in table:
        assert any(re.match(pattern, command) for _, command in ALL), pattern


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as after `make run`, in a path with a space."""
    tree = copy_project(tmp_path_factory.mktemp("commands") / "my socketdock")
    (tree / "test").mkdir()
    scripts = tree / ".venv" / "bin"
    scripts.mkdir(parents=True)
    python = shlex.quote(sys.executable)
    for name, words in (
        ("python", python),
        ("socketdock", f"{python} {shlex.quote(str(tree / 'socketdock.py'))}"),
        ("pip", f"{python} -m pip"),
    ):
        script = scripts / name
        # By the last line make sees that the environment was not moved.
        script.write_text(f'#!/bin/sh\nexec {words} "$@"\n# {script}\n')
        script.chmod(0o755)
    (scripts / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for stamp in ("run", "test", "bench"):
        (tree / ".venv" / f"{stamp}.stamp").touch()
    return tree


def here(command: str) -> tuple[str, dict[str, str]]:
    """The command and its environment, with ports and addresses of this machine."""
    first = free_ports(3)
    for there, port in (("8765", first), ("8766", first + 1), ("8000", first + 2)):
        command = re.sub(rf"(?<=[:=]){there}\b", str(port), command)
    others = r"\b10\.0\.0\.\d\b|\b[\w.-]+\.(internal|on\.aws|workers\.dev)\b"
    command = re.sub(others, "127.0.0.1", command)
    command = re.sub(
        r"(examples/\w+_?backend\.py)(?! --port)", rf"\1 --port={first + 2}", command
    )
    command = command.replace("whsec_...", "whsec_" + "a" * 32)
    command = command.replace("CALLBACK_TOKEN=...", "CALLBACK_TOKEN=" + "a" * 16)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SOCKETDOCK_", "MAKE"))
    }
    ports = {"SOCKETDOCK_BINDPORT": str(first), "PORT": str(first + 2)}
    return command, {**inherited, **ports}


@pytest.mark.parametrize("command", of(STAYS))
async def test_long_running_command_starts(io_loop, tree, command):
    """It prints that it serves, and exits on a signal."""
    serves = STAYS[match(STAYS, command) or ""]
    command, environment = here(command)
    command = command.replace("--messageuri=…", "--messageuri=http://127.0.0.1:9/")
    command = command.replace("…", "")
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", command,
        cwd=tree,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    said = ""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(LONG):
            while serves not in said:
                line = (await process.stdout.readline()).decode()
                assert line, said
                said += line
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        async with asyncio.timeout(LONG):
            said += (await process.stdout.read()).decode()
            await process.wait()
    assert "Traceback" not in said


@pytest.mark.parametrize("command", of(ENDS))
def test_command_succeeds(tree, command):
    """Targets of make that take minutes, or write to the project, are not run."""
    statuses = ENDS[match(ENDS, command) or ""]
    command, environment = here(command)
    if statuses is None:
        command = command.replace("make ", "make --dry-run ").removesuffix(" …")
    process = subprocess.run(
        ["bash", "-c", command],
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert process.returncode in (statuses or (0,)), process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
