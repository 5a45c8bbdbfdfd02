"""The relay runs compiled or pure, says which, and never with old compiled code."""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from project import copy_project
from service import DEADLINE, PROJECT, Service
from tornado.httpclient import AsyncHTTPClient

from handlers.process.form import LIBRARY, form, require_unchanged_sources
from handlers.websocket import frames

FORM = "pure" if frames.__file__.endswith(".py") else "compiled"


@pytest.mark.gen_test(timeout=4 * DEADLINE)
async def test_relay_says_in_which_form_it_runs(io_loop):
    """In the start line, in /status and in `--version`."""
    async with Service("--event_loop=asyncio") as service:
        (line,) = (line for line in service.log if "clients at" in line)
        assert re.search(rf"SocketDock \d+\.\d+\.\d+ \({FORM}\): clients at", line)
        fetched = await AsyncHTTPClient().fetch(f"{service.callback_url}/status")
    status = json.loads(fetched.body)
    assert status["form"] == FORM == form()
    version = subprocess.check_output(
        [sys.executable, "socketdock.py", "--version"],
        cwd=PROJECT, text=True, timeout=DEADLINE,
    )
    assert version == f"SocketDock {status['version']} ({FORM})\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that seems to be compiled into the library of this process."""
    source = tmp_path / "handlers" / "frames.py"
    source.parent.mkdir()
    source.write_bytes(b"SIZE = 1\n")
    digest = hashlib.sha256(b"SIZE = 1\n").hexdigest()
    record = tmp_path / f"{LIBRARY}.abi.json"
    record.write_text(json.dumps({"handlers/frames.py": digest}))
    library = importlib.machinery.ModuleSpec(
        LIBRARY, None, origin=str(record.with_suffix(".so"))
    )
    monkeypatch.setattr(importlib.util, "find_spec", {LIBRARY: library}.get)
    return source


def test_unchanged_source_may_run_compiled(source):
    """Whatever its times are: an installation sets them."""
    os.utime(source)
    require_unchanged_sources()


@pytest.mark.parametrize("change", ["edited", "removed", "unknown"])
def test_changed_source_does_not_run_with_old_compiled_code(
    source, tmp_path, capsys, change
):
    """The relay does not start, and says what to do."""
    if change == "edited":
        source.write_bytes(b"SIZE = 2\n")
    elif change == "removed":
        source.unlink()
    else:
        (tmp_path / f"{LIBRARY}.abi.json").unlink()
    with pytest.raises(SystemExit) as exited:
        require_unchanged_sources()
    assert exited.value.code == 2
    line = r"socketdock: \S+\.(py|json) has changed since .*'make compile', .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_uncompiled_sources_may_change(monkeypatch):
    """There is nothing to compare them with."""
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    require_unchanged_sources()


@pytest.mark.once
@pytest.mark.long
def test_compiled_wheel_has_sources_and_runs_without_a_compiler(tmp_path):
    """Here with a single module, since all of them take a minute and a half."""
    tree = copy_project(tmp_path / "tree")
    setup = (tree / "setup.py").read_text("utf-8")
    name = "backends/waiting.py"
    setup = setup.replace("\nclass Build", f'\nCOMPILED = ["{name}"]\n\nclass Build', 1)
    (tree / "setup.py").write_text(setup)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index",
         f"--wheel-dir={tmp_path}", str(tree)],
        env={**os.environ, "SOCKETDOCK_COMPILE": "1"},
        timeout=20 * DEADLINE,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert name in names
    assert any(re.fullmatch(r"backends/waiting\.\S+\.(so|pyd)", name) for name in names)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "socketdock", "--version"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    version = run()
    assert version.stdout.endswith(" (compiled)\n"), version.stderr
    with open(tmp_path / "site" / name, "a") as edited:
        edited.write("# edited\n")
    refused = run()
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"socketdock: {name} has changed since")
    assert len(refused.stderr.splitlines()) == 1


def test_no_interpreted_class_is_derived_from_a_compiled_one():
    """Python would not import it: of such classes both are listed, or neither is."""
    listed = set(compiled_modules())
    modules = [
        ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        for package in ("backends", "handlers")
        for path in (PROJECT / package).rglob("[a-z]*.py")
    ]
    assert listed < set(modules)
    found = subprocess.run(
        [sys.executable, "-c", BASES, *sorted(set(modules) - listed)],
        cwd=PROJECT, capture_output=True, text=True, timeout=2 * DEADLINE, check=False,
    )
    assert found.returncode == 0, found.stderr
    bases = found.stdout.splitlines()
    assert len(bases) > 50
    for line in bases:
        _, base = line.split()
        assert base not in listed, line


# Prints the interpreted classes and the module of each of their bases.
BASES = """
import importlib, sys
for name in sys.argv[1:]:
    for each in vars(importlib.import_module(name)).values():
        if isinstance(each, type) and each.__module__ == name:
            for base in each.__mro__[1:]:
                if not getattr(base, "_is_protocol", False):
                    print(f"{name}.{each.__name__}", base.__module__)
"""


def test_listed_modules_exist():
    """setup.py would fail with a name that is not a module."""
    listed = compiled_modules()
    assert len(listed) >= 30
    assert listed == sorted(set(listed))
    for name in listed:
        assert Path(PROJECT, *name.split(".")).with_suffix(".py").is_file(), name


def compiled_modules() -> list[str]:
    """Return the names in setup.py's `COMPILED`."""
    text = (PROJECT / "setup.py").read_text("utf-8")
    return re.findall(r'^        "((?:backends|handlers)\.\S+)",$', text, re.M)


def test_compiled_modules_name_themselves_in_their_options():
    """Tornado finds a module's name by its frame, and compiled code has none."""
    count = 0
    for name in compiled_modules():
        source = Path(PROJECT, *name.split(".")).with_suffix(".py").read_text("utf-8")
        for call in re.findall(r"^define\(.*", source, flags=re.MULTILINE):
            assert "group=__name__" in call, f"{name}: {call}"
            count += 1
    assert count
