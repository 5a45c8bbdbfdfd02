"""Whoever observes: counts, traces."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from tornado.options import Error as OptionError
from tornado.options import options

if TYPE_CHECKING:
    from handlers.telemetry.tracing import Tracing


def make_tracing(version: str, instance: str) -> "Tracing | None":
    """What makes spans; None without --otel, and then nothing of it is imported."""
    if not options.otel:
        return None
    tracing: Tracing = load_tracing().Tracing(version, instance)
    return tracing


def load_tracing() -> ModuleType:
    """What --otel needs. Raises `OptionError` where it is not installed."""
    try:
        return importlib.import_module("handlers.telemetry.tracing")
    except ImportError as error:
        raise OptionError(
            "--otel needs OpenTelemetry's SDK and OTLP exporter, which"
            f" socketdock[otel] brings: {error}"
        ) from None
