"""`make test`: every test, in as many processes as there are processors.

Each part has a heading, and the end says what was left out, and why. With words
for pytest it is one plain run of pytest with them: `make test ARGS="-k callback"`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROCESSORS = len(os.sched_getaffinity(0))
# A test takes no port that another one may take, and no folder.
PARALLEL = (f"--numprocesses={PROCESSORS}", "--dist=worksteal")


@dataclass(frozen=True)
class Part:
    """One run of pytest."""

    heading: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def named(*modules: str) -> tuple[str, ...]:
    return tuple(str(TESTS / f"{module}_test.py") for module in modules)


PARTS = (
    Part(
        f"Every test, {PROCESSORS} at a time",
        (*PARALLEL, "-m", "not alone"),
    ),
    Part(
        "One at a time: what would not be quick enough beside other tests",
        ("-m", "alone"),
    ),
    # What the defaults leave unused, and the tests that meet it: another reader of
    # requests, another way of TLS, sends without their short cut, streams of another
    # loop. What is behind these (delivery, signing, limits) is the same code.
    Part(
        "Once more on asyncio's own loop and Tornado's own server",
        (
            *PARALLEL,
            *named("handshake", "bad_input", "websocket", "frames", "callback"),
            *named("authorization", "tls", "backend_tls"),
        ),
        {"TEST_FLAGS": "--event_loop=asyncio --http_server=tornado"},
    ),
)


def main() -> int:
    """Return 0 where every test passed or was left out for want of a program."""
    if words := sys.argv[1:]:
        return pytest(words, {})
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        left_out = Path(folder) / "left_out"
        left_out.touch()
        failed = []
        for part in PARTS:
            print(f"\n=== {part.heading} ===", flush=True)
            environment = {**part.environment, "LEFT_OUT": str(left_out)}
            if pytest(["--quiet", *part.words], environment):
                failed.append(part.heading)
        print(f"\n=== {time.monotonic() - started:.0f} s in all ===")
        for reason in dict.fromkeys(left_out.read_text("utf-8").splitlines()):
            print(f"Left out: {reason}")
    for heading in failed:
        print(f"Failed: {heading}")
    return 1 if failed else 0


def pytest(words: list[str], environment: Mapping[str, str]) -> int:
    """Run it in the project's folder; its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=TESTS.parent,
        env={**os.environ, **environment},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
