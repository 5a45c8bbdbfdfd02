"""The project as files: a copy of its checkout, and what an installation puts down."""

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
    """The tree that a clone would have, without tests and what is made in it."""
    shutil.copytree(
        PROJECT,
        to,
        ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "build", "dist", "*.egg-info", "node_modules", "test"
        ),
    )
    return to


def wheel(temporary: Path) -> Path:
    """The project's wheel, built in a folder below, once per run."""
    with _alone(temporary) as shared:
        return _wheel(shared)


def installation(temporary: Path) -> Path:
    """Where the wheel is installed, with `bin` and `share` in it, once per run."""
    with _alone(temporary) as shared:
        prefix = shared / "installation"
        if not prefix.exists():
            built = _wheel(shared)
            made = shared / "installation-being-made"
            _pip("install", f"--prefix={made}", str(built))
            # Its scripts name Python's folder, not their own: it can be renamed.
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
    """The folder that all processes of a run share, while no other one is here."""
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
