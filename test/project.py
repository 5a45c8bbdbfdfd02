"""The project as files: a copy of its checkout, and what an installation puts down."""

import functools
import shutil
import subprocess
import sys
import sysconfig
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


@functools.cache
def wheel(temporary: Path) -> Path:
    """The project's wheel, built in a folder below, once per run."""
    folder = temporary / "wheel"
    tree = copy_project(folder / "tree")
    _pip("wheel", "--no-build-isolation", f"--wheel-dir={folder}", str(tree))
    (built,) = folder.glob("*.whl")
    return built


@functools.cache
def installation(temporary: Path) -> Path:
    """Where the wheel is installed, with `bin` and `share` in it, once per run."""
    prefix = temporary / "installation"
    _pip("install", f"--prefix={prefix}", str(wheel(temporary)))
    return prefix


def library(prefix: Path) -> str:
    """`PYTHONPATH` for an installation."""
    return sysconfig.get_path("purelib", vars={"base": str(prefix)})


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*command, *words, "--no-deps", "--no-index"], check=True, timeout=120
    )
