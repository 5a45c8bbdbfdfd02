"""README's steps, by test/first_use.py: the short form, on one Python."""

import subprocess
import sys

import pytest
from programs import leave_out
from service import PROJECT


@pytest.mark.long
def test_readme_steps_work():
    """In a new clone: `make run` and a client; a backend, the relay, a client."""
    ended = subprocess.run(
        [sys.executable, "test/first_use.py"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if ended.returncode and "No matching distribution" in ended.stderr:
        leave_out("the package index can't be reached")
    if ended.returncode:
        pytest.fail(ended.stdout + ended.stderr, pytrace=False)
