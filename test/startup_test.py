"""A feature that is off is not imported, so it takes neither time nor memory."""

import asyncio
import sys

import pytest
import websockets
from service import DEADLINE, RecordingBackend, Service

pytestmark = [pytest.mark.gen_test(timeout=60), pytest.mark.once]

COMMAND = [sys.executable, "-X", "importtime", "socketdock.py"]
# The parts of features that are off by default. Their packages are imported, since
# these define the options.
OFF = (
    "backends.apigateway.",
    "backends.cluster.",
    "backends.http.check",
    "backends.http.trial",
    "backends.redis.",
    "backends.redis_client",
    "handlers.callbacks.apigateway.",
    "handlers.callbacks.peers.forward",
    "handlers.callbacks.peers.hops",
    "handlers.callbacks.peers.sharing",
    "handlers.http.development",
    "handlers.http.tornado_server",
    "handlers.program.check",
    "handlers.program.health",
    "handlers.telemetry.spans",
    "logging.config",
    "opentelemetry",
    "redis",
)
ON_BY_DEFAULT = ("handlers.operators.console.", "prometheus_client")


def imported(service: Service) -> list[str]:
    """Return the modules that an ended relay has imported."""
    lines = [line for line in service.log if line.startswith("import time:")]
    return [line.rpartition("|")[2].strip() for line in lines]


def of(parts: tuple[str, ...], names: list[str]) -> list[str]:
    """Return those of `names` that are one of `parts`, or below it.

    A part with a dot at its end is a package, of which only what is below counts.
    """
    return [
        name
        for name in names
        for part in parts
        if name == part or name.startswith(f"{part.rstrip('.')}.")
    ]


async def test_what_is_off_by_default_is_not_imported(io_loop):
    """The echo server has what relays clients, and the operators' pages."""
    async with Service(command=COMMAND) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("hello")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
    names = imported(service)
    assert of(ON_BY_DEFAULT, names)
    assert not of(OFF, names)


async def test_http_backend_without_metrics_and_console_imports_neither(io_loop):
    """Nor does it import the other backends."""
    async with RecordingBackend() as backend:
        flags = *backend.flags(), "--metrics=off", "--console=off"
        async with Service(*flags, command=COMMAND) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                await backend.wait_for("message", 1)
    names = imported(service)
    assert "backends.http.delivery" in names
    assert not of((*OFF, *ON_BY_DEFAULT), names)
