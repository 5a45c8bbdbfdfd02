"""Cloudflare's runtime, workerd, which npm has."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ports import free_ports
from programs import INTEROP, leave_out, listens, program
from service import DEADLINE

WORKERD = INTEROP / "node_modules" / ".bin" / "workerd"
CONFIG = """
using Workerd = import "/workerd/workerd.capnp";

const config :Workerd.Config = (
  services = [(name = "main", worker = .worker)],
  sockets = [
    (name = "http", address = "127.0.0.1:{port}", http = (), service = "main"),
  ],
);

const worker :Workerd.Worker = (
  modules = [(name = "worker", esModule = embed "{module}")],
  compatibilityDate = "2026-01-01",
);
"""


@contextlib.contextmanager
def worker(module: Path) -> Iterator[str]:
    """Run a Worker during the block; yields its URL, without a path."""
    program("nodejs npm", "node")  # npm's script may start the program by it
    if not WORKERD.exists():
        leave_out("npm's workerd is missing: npm ci --prefix test/interop")
    port = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "worker.mjs")  # capnp embeds files by relative paths only
        copy.write_bytes(module.read_bytes())
        config = Path(folder, "config.capnp")
        config.write_text(CONFIG.format(port=port, module=copy.name))
        process = subprocess.Popen(
            [WORKERD, "serve", str(config)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            limit = time.monotonic() + DEADLINE
            while not listens(port):
                assert process.poll() is None and time.monotonic() < limit
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE)
