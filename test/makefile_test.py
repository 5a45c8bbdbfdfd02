"""`make` if something is missing: one line, and a working retry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import program
from service import DEADLINE, PROJECT

VENV = ".venv/bin/pip"  # the target that makes the environment, and nothing more


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What `make` reads of the project, in a path with a space."""
    tree = tmp_path / "my socketdock"
    for name in (
        "Makefile", "setup.py", "pyproject.toml", "test/run.py", "test/rie.py",
        "test/interop/package.json", "test/interop/package-lock.json",
        "examples/express_backend/package.json",
        "examples/express_backend/package-lock.json",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, tree / name)
    return tree


def make(
    tree: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", *words],
        cwd=tree,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10 * DEADLINE,
        check=False,
    )


def assert_usable(tree: Path) -> None:
    """pip runs, in this folder, on a Python that is there."""
    version = subprocess.run(
        [tree / VENV, "--version"],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
        check=False,
    )
    assert str(tree) in version.stdout, version.stderr


@pytest.mark.long
def test_python_without_venv_is_explained(tree, tmp_path):
    """As on Debian without python3-venv; after its installation make works."""
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    made = make(tree, VENV, PYTHONPATH=str(tmp_path))
    assert made.returncode == 2
    assert "apt-get install python" in made.stderr
    assert "-venv" in made.stderr
    assert not (tree / ".venv").exists()

    made = make(tree, VENV)
    assert made.returncode == 0, made.stderr
    assert_usable(tree)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.venv` as make leaves it, in a folder of its own; copied, it has moved.

    Of pip it has only the script's first line, which is what make looks at.
    """
    folder = tmp_path_factory.mktemp("made")
    words = [sys.executable, "-m", "venv", "--without-pip", ".venv"]
    subprocess.run(words, cwd=folder, check=True, timeout=DEADLINE)
    (folder / VENV).write_text(f"#!{folder}/.venv/bin/python\n")
    return folder / ".venv"


def put(environment: Path, tree: Path) -> None:
    """Copy it into `tree` as if it had been created there."""
    shutil.copytree(environment, tree / ".venv", symlinks=True)
    pip = tree / VENV
    pip.write_text(pip.read_text().replace(str(environment.parent), str(tree)))


def incomplete(environment: Path, tree: Path) -> None:
    put(environment, tree)
    (tree / VENV).unlink()


def moved(environment: Path, tree: Path) -> None:
    shutil.copytree(environment, tree / ".venv", symlinks=True)


def without_its_python(environment: Path, tree: Path) -> None:
    put(environment, tree)
    for name in (tree / ".venv" / "bin").glob("python*"):
        name.unlink()
        name.symlink_to("/nowhere/python3")


@pytest.mark.parametrize("spoil", [incomplete, moved, without_its_python])
def test_broken_environment_is_recreated(tree, environment, spoil):
    """Everything is installed again, whatever the stamps say."""
    spoil(environment, tree)
    (tree / ".venv" / "run.stamp").touch()
    made = make(tree, "--dry-run", "run")
    assert "-m venv --clear .venv" in made.stdout
    assert "pip install" in made.stdout


def test_working_environment_is_reused(tree, environment):
    """Nothing is installed twice."""
    put(environment, tree)
    (tree / ".venv" / "run.stamp").touch()
    made = make(tree, "--dry-run", "run")
    assert "venv --clear" not in made.stdout
    assert "pip install" not in made.stdout


def test_make_reports_an_old_python(tree, tmp_path):
    """Immediately, with make's own message instead of pip's."""
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.10.13\n")
    old.chmod(0o755)
    made = make(tree, "run", f"PYTHON={old}")
    assert made.returncode == 2
    assert "needs Python 3.11 or newer" in made.stderr
    assert "Python 3.10.13" in made.stderr
    assert not (tree / ".venv").exists()


def test_make_reports_a_missing_python(tree):
    """The message has the remedy."""
    made = make(tree, "run", "PYTHON=python3.99")
    assert made.returncode == 2
    assert "needs Python 3.11 or newer" in made.stderr
    assert "make PYTHON=" in made.stderr


WHAT_COMPILING_NEEDS = {
    "compiler": (["CC=my-cc -x"], "needs a C compiler, and there is no my-cc."),
    "headers": (["CC=true", 'HEADERS=print("/nowhere")'], "needs Python.h"),
    # The environment of the test has no pip.
    "all-else": (["CC=true", 'HEADERS=print(".")'], "not compiled: the reason is"),
}


@pytest.mark.parametrize("row", WHAT_COMPILING_NEEDS)
def test_compiling_that_fails_ends_with_the_reason(tree, environment, row):
    """And what else is to be had, in make's own message."""
    put(environment, tree)
    (tree / "Python.h").touch()
    for name in ("backends", "handlers"):
        (tree / name).mkdir()
    words, message = WHAT_COMPILING_NEEDS[row]
    made = make(tree, "compile", *words)
    assert made.returncode == 2
    *_, said, from_make = made.stderr.splitlines()
    assert message in said
    assert from_make.startswith("make: ***")
    assert not (tree / ".venv" / "compile.stamp").exists()


def test_tests_run_without_registries(tree, environment, tmp_path):
    """Tests with Node.js or AWS's emulator are skipped, and a line says so."""
    program("nodejs npm", "npm")
    put(environment, tree)
    (tree / ".venv" / "test.stamp").touch()
    made = make(
        tree, "test", "ARGS=--version",
        npm_config_registry="http://127.0.0.1:9/",
        npm_config_cache=str(tmp_path / "cache"),
        npm_config_fetch_retry_mintimeout="10",
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
        PYTHONPATH=str(Path(pytest.__file__).parent.parent),
    )
    assert made.returncode == 0, made.stderr
    assert "the tests with Node.js are left out" in made.stderr
    assert "emulator is missing, so the tests with it are left out" in made.stderr
    assert "pytest " in made.stdout + made.stderr
