"""The project's files: a copy of its checkout, and an installation."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from service import PROJECT


def copy_project(to: Path) -> Path:
    """Copy the files of a clone, without tests and generated files."""
    shutil.copytree(
        PROJECT,
        to,
        ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "build", "dist", "*.egg-info", "node_modules", "test"
        ),
    )
    return to


def wheel(temporary: Path) -> Path:
    """Return the project's wheel, built once per run."""
    with _alone(temporary) as shared:
        return _wheel(shared)


def source_distribution(temporary: Path) -> Path:
    """Build the project's sdist in a copy of the checkout, and return it."""
    tree = temporary / "sdist" / "tree"
    shutil.copytree(
        PROJECT,
        tree,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", ".*_cache", ".hypothesis",
            "node_modules", "build", "dist", "*.egg-info",
        ),
    )
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir=.."],
        cwd=tree,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )
    (built,) = tree.parent.glob("*.tar.gz")
    return built


def installation(temporary: Path) -> Path:
    """Return the folder of the installed wheel, made once per run."""
    with _alone(temporary) as shared:
        prefix = shared / "installation"
        if not prefix.exists():
            built = _wheel(shared)
            made = shared / "installation-being-made"
            _pip("install", f"--prefix={made}", str(built))
            # It can be renamed, since its scripts contain only Python's path.
            made.rename(prefix)
        return prefix


def _wheel(shared: Path) -> Path:
    folder = shared / "wheel"
    if not folder.exists():
        tree = copy_project(shared / "wheel-being-made" / "tree")
        made = tree.parent
        _pip("wheel", "--no-build-isolation", f"--wheel-dir={made}", str(tree))
        made.rename(folder)
    (built,) = folder.glob("*.whl")
    return built


@contextlib.contextmanager
def _alone(temporary: Path) -> Iterator[Path]:
    """Lock and return the folder that all processes of a run share."""
    shared = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary
    with open(shared / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared


def library(prefix: Path) -> str:
    """`PYTHONPATH` for an installation."""
    return sysconfig.get_path("purelib", vars={"base": str(prefix)})


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*command, *words, "--no-deps", "--no-index"], check=True, timeout=120
    )
