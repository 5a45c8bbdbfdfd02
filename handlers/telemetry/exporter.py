"""Exports spans by OTLP, and logs failures without text of a peer.

Imported with `--otel` only. `handlers.telemetry.spans` makes the spans.
"""

import logging
import re
from collections.abc import Sequence
from http import HTTPStatus

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

MAX_WARNINGS = 100  # distinct warnings of the SDK that are logged

STATUSES = {status.phrase: status.value for status in HTTPStatus}
PLACEHOLDER = re.compile(r"%[-#0-9.]*[a-z]")  # replaced with an argument by `logging`


class CountingExporter(SpanExporter):
    """Wraps an exporter: counts its spans, and logs a failure once until it recovers.

    The SDK's thread uses it, except for `made` and `log_summary()`.
    """

    def __init__(self, exporter: SpanExporter, sdk: "SDKLogHandler") -> None:
        self._exporter = exporter
        self._sdk = sdk
        self._failing = False
        self._exported = 0
        self.made = 0  # spans

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # older exporters raise if nothing listens
            result = SpanExportResult.FAILURE
            self._sdk.why = _root_of(error)
        if result is SpanExportResult.SUCCESS:
            self._exported += len(spans)
            if self._failing:
                logger.info("spans are exported again")
        elif not self._failing:
            logger.warning("spans can't be exported: %s", self._sdk.why)
        self._failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def log_summary(self) -> None:
        """Log how many spans were lost, if any were."""
        if lost := self.made - self._exported:
            logger.warning("%d of %d spans were not exported", lost, self.made)


class SDKLogHandler(logging.Handler):
    """Logs the SDK's warnings without their arguments, each message once.

    The arguments may quote headers and URLs with queries. The reason of a failed
    export is kept in `why`, for `CountingExporter`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.why = "not in time"
        self._logged: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.endswith("trace_exporter"):
            self.why = _reason(record) or self.why
            return
        sentence = str(record.msg)
        if record.levelno < logging.WARNING or sentence in self._logged:
            return
        if len(self._logged) < MAX_WARNINGS:
            self._logged.add(sentence)
            logger.warning("OpenTelemetry: %s", PLACEHOLDER.sub("…", sentence))


def _reason(record: logging.LogRecord) -> str | None:
    """Return why an export failed: a status or a system error; no text of a peer."""
    values = record.args if isinstance(record.args, tuple) else ()
    for value in values:
        if isinstance(value, int):
            return f"the collector answered {value}"
        if value in STATUSES:
            return f"the collector answered {STATUSES[value]}"
        if isinstance(value, BaseException):
            return _root_of(value)
    return None


def _root_of(error: BaseException) -> str:
    root: BaseException | None = error
    name = type(error).__name__
    for _ in range(10):
        if root is None:
            break
        if isinstance(root, OSError) and root.strerror:
            return root.strerror
        # urllib3 raises ValueError for a timeout that has expired before it is used.
        name = "timed out" if type(root) is ValueError else type(root).__name__
        root = root.__cause__ or root.__context__
    return name


def make_resource(version: str, instance: str) -> Resource:
    """Describe this service; the variables OTEL_* override it."""
    given = OTELResourceDetector().detect().attributes
    return Resource.create(
        {
            "service.name": "socketdock",
            "service.version": version,
            "service.instance.id": instance,
            **given,
        }
    )
