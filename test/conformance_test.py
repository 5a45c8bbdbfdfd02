"""Autobahn's quick test cases; `make conformance` runs all."""

import asyncio
import re
import sys

import pytest
from service import PROJECT

pytestmark = [pytest.mark.gen_test(timeout=240), pytest.mark.long]

SECONDS = [f"{group}.*" for group in (1, 2, 3, 4, 5, 6, 7, 10)]
# 1,000 messages of 16 bytes, of each kind and with each parameter.
SMALLEST = [f"12.{kind}.1" for kind in range(1, 6)]
SMALLEST += [f"13.{parameters}.1" for parameters in range(1, 8)]


async def test_no_case_fails_and_what_is_less_than_ok_is_explained(io_loop):
    """Every case of groups 1 to 7 and 10 is OK, and compression of each kind."""
    # In a process of its own: kosoku puts modules of its own before others.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "test/conformance.py",
        *SECONDS,
        *SMALLEST,
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    (number,) = re.findall(rb"(\d+) cases", output)
    assert int(number) == 259


def test_conformance_document_has_no_failure():
    """docs/conformance.md is the output of `make conformance`."""
    text = (PROJECT / "docs" / "conformance.md").read_text("utf-8")
    rows = [x.split("|") for x in text.splitlines() if re.match(r"\| \d+ \|", x)]
    results = "".join(cell for row in rows for cell in row[3:])
    assert len(rows) == 11
    assert set(re.findall(r"[A-Z][A-Z-]+", results)) == {
        "OK", "INFORMATIONAL", "UNIMPLEMENTED",
    }
