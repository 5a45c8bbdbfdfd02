"""Selecting backends by name, including those of third parties."""

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import websockets
from project import copy_project, installation, library
from service import DEADLINE, PROJECT, Service, ended, refusal

SHOUT = """
    from tornado.options import define, options

    from backends import Backend

    define("shout_with", default="!", help="what is put behind each message")

    class ShoutBackend(Backend):
        def __init__(self, mark):
            self.mark = mark

        async def message(self, connection, message):
            sent = connection.send(message.upper() + self.mark)
            if sent is not None:
                await sent

    def make_backend(relay):
        return ShoutBackend(options.shout_with)
"""


def write_module(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))


@pytest.fixture
def elsewhere(tmp_path):
    """The environment in which `company.shout` can be imported."""
    write_module(tmp_path / "company" / "__init__.py", "")
    write_module(tmp_path / "company" / "shout.py", SHOUT)
    return {"PYTHONPATH": str(tmp_path)}


async def answer(service: Service, message: str) -> str | bytes:
    async with websockets.connect(service.ws_url) as client:
        await client.send(message)
        return await asyncio.wait_for(client.recv(), DEADLINE)


@pytest.mark.gen_test
async def test_backend_module_may_define_an_option(io_loop, elsewhere):
    """Any importable module with a dot in its name can be the backend."""
    flags = ("--backend=company.shout", "--shout_with=?")
    async with Service(*flags, environment=elsewhere) as service:
        assert await answer(service, "hello") == "HELLO?"


@pytest.mark.gen_test
async def test_backend_option_has_its_default(io_loop, elsewhere):
    """If no source sets it."""
    async with Service("--backend", "company.shout", environment=elsewhere) as service:
        assert await answer(service, "hello") == "HELLO!"


@pytest.mark.gen_test
async def test_backend_option_is_read_from_the_environment(io_loop, elsewhere):
    """The backend's name is read from there, too."""
    environment = {
        **elsewhere,
        "SOCKETDOCK_BACKEND": "company.shout",
        "SOCKETDOCK_SHOUT_WITH": "...",
    }
    async with Service(environment=environment) as service:
        assert await answer(service, "hello") == "HELLO..."


@pytest.mark.gen_test
async def test_backend_option_is_read_from_the_options_file(
    io_loop, elsewhere, tmp_path
):
    """Its line may be before or after that of `backend`."""
    path = tmp_path / "options.conf"
    path.write_text("shout_with = '#'\nbackend = 'company.shout'\n")
    async with Service(f"--config={path}", environment=elsewhere) as service:
        assert await answer(service, "hello") == "HELLO#"


def test_help_all_lists_options_of_the_selected_backend(elsewhere):
    """Under the backend's module name."""
    text = subprocess.check_output(
        [sys.executable, "socketdock.py", "--backend=company.shout", "--help-all"],
        cwd=PROJECT,
        env={**os.environ, **elsewhere},
        text=True,
        timeout=DEADLINE,
    )
    assert "company.shout:\n\n  --shout_with" in text


@pytest.mark.gen_test
async def test_module_in_backends_is_a_backend(io_loop, tmp_path):
    """`backends/mine.py` is `--backend=mine`."""
    tree = copy_project(tmp_path / "tree")
    write_module(tree / "backends" / "mine.py", SHOUT)
    async with Service("--backend=mine", cwd=tree) as service:
        assert await answer(service, "hello") == "HELLO!"


@pytest.mark.gen_test
async def test_installed_relay_finds_a_backend_in_the_current_folder(
    io_loop, elsewhere, tmp_path, tmp_path_factory
):
    """The console script itself is in another folder."""
    prefix = installation(tmp_path_factory.getbasetemp())
    async with Service(
        "--backend=company.shout",
        command=[str(prefix / "bin" / "socketdock")],
        environment={"PYTHONPATH": library(prefix)},
        cwd=tmp_path,
    ) as service:
        assert await answer(service, "hello") == "HELLO!"


def test_current_folder_hides_no_module_of_python_s_path(elsewhere, tmp_path):
    """It is last in the path: a writable folder cannot replace other modules."""
    here = tmp_path / "here"
    write_module(here / "company" / "__init__.py", "")
    write_module(here / "company" / "shout.py", "raise RuntimeError('from here')")
    write_module(here / "json.py", "raise RuntimeError('from here')")
    environment = {"PYTHONPATH": f"{elsewhere['PYTHONPATH']}:{PROJECT}"}
    checked = ended(
        "--backend=company.shout",
        "--version",
        command=(sys.executable, str(PROJECT / "socketdock.py")),
        cwd=here,
        **environment,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_deleted_current_folder_causes_no_traceback(tmp_path):
    """The backend is searched in all other places."""
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'rmdir {shlex.quote(str(gone))}; exec "$@"'
    started = ended(
        "--backend=company.shout",
        command=("sh", "-c", command, "-", sys.executable, f"{PROJECT}/socketdock.py"),
        cwd=gone,
    )
    assert started.returncode == 2
    (line,) = started.stderr.splitlines()
    assert "there is no backend 'company.shout'" in line


@pytest.mark.parametrize("name", ["nothing", "company.nothing", "nothing.at_all"])
def test_unknown_backend_is_one_line(name, elsewhere):
    """The error names the unknown backend and the known ones."""
    line = refusal(f"--backend={name}", **elsewhere)
    assert f"there is no backend {name!r}" in line
    assert "apigateway, http, loopback" in line
    assert "failed to import" not in line
    assert ("the current folder" in line and "PYTHONPATH" in line) == ("." in name)


def test_built_in_backend_that_cannot_be_read_is_not_unknown(tmp_path):
    """Python does not say whether a file is missing or may not be read."""
    tree = copy_project(tmp_path / "tree")
    shutil.rmtree(tree / "backends" / "apigateway")
    line = refusal("--backend=apigateway", cwd=tree)
    assert line.endswith(
        "there is no backend 'apigateway':"
        f" its file in {tree}/backends is missing or may not be read"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def make_backend(", "SyntaxError"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        (
            "from tornado.options import define; define('bindport', default=1)",
            "bindport",
        ),
    ],
)
def test_backend_that_fails_to_import_is_one_line(source, reason, tmp_path):
    """The error has the reason, and there is no traceback."""
    write_module(tmp_path / "company" / "broken.py", source)
    line = refusal("--backend=company.broken", PYTHONPATH=str(tmp_path))
    assert "'company.broken' failed to import" in line
    assert reason in line
    assert "there is no backend" not in line


def test_missing_dependency_is_not_an_unknown_backend(tmp_path):
    """The error names the module that the backend could not import."""
    write_module(tmp_path / "company" / "__init__.py", "import no_such_library")
    write_module(tmp_path / "company" / "shout.py", SHOUT)
    line = refusal("--backend=company.shout", PYTHONPATH=str(tmp_path))
    assert "'company.shout' failed to import" in line


def test_module_without_make_backend_is_rejected(tmp_path):
    """Such a module is not a backend."""
    write_module(tmp_path / "company" / "other.py", "x = 1")
    line = refusal("--backend=company.other", PYTHONPATH=str(tmp_path))
    assert "company.other is no backend" in line
    assert "make_backend" in line
