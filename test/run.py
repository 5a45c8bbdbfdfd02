"""`make test`: runs every test, several at a time.

Each part has a heading, and a summary lists skipped tests and the reasons. `--relay`,
for further Pythons, runs only the tests of the relay, `--relay=half` fewer, and
`--core` those of the core. Other arguments are passed to one run of pytest:
`make test ARGS="-k callback"`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROCESSORS = len(os.sched_getaffinity(0))
# More than there are processors, since tests often wait for deadlines.
WORKERS = PROCESSORS * 4
# Tests share no ports and no folders.
PARALLEL = (f"--numprocesses={WORKERS}", "--dist=worksteal")


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
        f"Every test, {WORKERS} at a time",
        PARALLEL,
    ),
    # The code that the defaults do not use: another HTTP server, another way of TLS,
    # sends without the fast path, streams of another loop. The code behind these
    # (frames, tokens, delivery, signing, limits) is the same.
    Part(
        "Again on asyncio's own loop and Tornado's own server",
        (
            *PARALLEL,
            "-m",
            "not once",
            *named(
                "handshake", "bad_input", "callback", "connections_api", "tls",
                "backend_tls",
            ),
        ),
        {"TEST_FLAGS": "--event_loop=asyncio --http_server=tornado"},
    ),
)
# Tests that do not depend on the version of Python: docs, pages in a browser, proxies
# in front of the relay, programs in other languages. And tests that take long: floods,
# measurements, new environments.
NOT_OF_THE_RELAY = named(
    "acapy_transport", "apigateway_e2e", "balancer", "bench", "commands", "compose",
    "compose_redis", "conformance", "console_page", "development", "docs", "examples",
    "first_use", "guides", "imports", "interop", "kubernetes", "makefile", "monitoring",
    "openapi", "packaging", "proxies", "reply_examples", "soaking", "supervisord",
    "systemd", "workflow",
)
TOO_LONG = named(
    "attacks", "faults", "fuzz_frames", "fuzz_http", "order", "resolver", "slowloris",
    "soak",
)
# Tests of what depends on the kernel or on other servers, more than on Python.
OF_THE_SYSTEM = named(
    "console", "files", "lease", "peers_setups", "redis_access", "redis_outage",
    "redis_worker", "stall", "tunnel", "turns", "uptake",
)
# These use the most of what differs between Pythons, and from compiled modules: loops,
# TLS, typing.
CORE = named(
    "backend_tls", "callback", "client", "delivery", "frames", "handshake", "server",
    "socketdock", "tls", "websocket",
)


def relay(is_half: bool) -> tuple[Part, ...]:
    """The relay's tests; or of the modules beside the core every second one.

    Python 3.12 and 3.13 then have different halves.
    """
    left_out = {*NOT_OF_THE_RELAY, *TOO_LONG, *OF_THE_SYSTEM}
    modules = sorted({str(path) for path in TESTS.glob("*_test.py")} - left_out)
    if is_half:
        others = [module for module in modules if module not in CORE]
        modules = [*CORE, *others[sys.version_info[1] % 2 :: 2]]
    return (
        Part(f"The relay's tests, {WORKERS} at a time, {form()}",
             (*PARALLEL, *modules)),
    )


def core() -> tuple[Part, ...]:
    """The tests of the core."""
    return (
        Part(f"The core's tests, {WORKERS} at a time, {form()}", (*PARALLEL, *CORE)),
    )


def form() -> str:
    """Return "compiled" or "pure": what the relay of this Python says of itself."""
    version = subprocess.check_output(
        [sys.executable, "socketdock.py", "--version"], cwd=TESTS.parent, text=True
    )
    return version.split()[-1].strip("()")


def main() -> int:
    """Return 0 if every test passed, or was skipped since a program is missing."""
    words = sys.argv[1:]
    if words in (["--relay"], ["--relay=half"]):
        return run(relay(words == ["--relay=half"]))
    if words == ["--core"]:
        return run(core())
    if words:
        return pytest(words, {})
    return run(PARTS)


def run(parts: Sequence[Part]) -> int:
    """Run `parts` one after the other, print a summary, and return the exit status."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        left_out = Path(folder) / "left_out"
        left_out.touch()
        failed = []
        for part in parts:
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
    """Run pytest in the project's folder, and return its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=TESTS.parent,
        env={**os.environ, **environment},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
