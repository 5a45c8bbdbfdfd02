"""Observers of the relay, and tracing."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from tornado.options import Error as OptionError
from tornado.options import options

if TYPE_CHECKING:
    from handlers.telemetry.spans import Tracing


def make_tracing(version: str, instance: str) -> "Tracing | None":
    """Make the tracing of --otel; without it return None, and import nothing of it."""
    if not options.otel:
        return None
    tracing: Tracing = load_tracing().Tracing(version, instance)
    return tracing


def load_tracing() -> ModuleType:
    """Import what --otel needs. Raises `OptionError` if it is not installed."""
    try:
        return importlib.import_module("handlers.telemetry.spans")
    except ImportError as error:
        raise OptionError(
            "--otel needs OpenTelemetry's SDK and OTLP exporter, which"
            f" socketdock[otel] brings: {error}"
        ) from None
