"""`GET /metrics`: exports what `handlers.operators.metrics` counts to Prometheus.

`RelayCollector` builds metrics only when it is asked, from the counts and from the
current state of the relay.
"""

import gzip
import os
import re
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime, time
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, PlatformCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from backends import Backend
from handlers.clients.connection import Connections
from handlers.operators.guard import OperatorGuard, OperatorHandler
from handlers.operators.metrics import BOUNDS, LoopLag, Metrics

# choose_encoder() raises for a version that is not a number.
NO_VERSION = re.compile(r"version=(?!\d{1,4}(\.\d{1,4}){0,2}\s*([;,]|$))")


class Described(Protocol):
    """The leases of --cluster."""

    def describe(self) -> Mapping[str, Any]:
        """Return their state, as `/status` shows it."""


class RelayCollector(Collector):
    """Builds metrics from the counts and from the current state.

    `build` describes what is running; `limits` has those of open connections and of
    waiting events.
    """

    def __init__(
        self,
        metrics: Metrics,
        connections: Connections,
        backend: Backend,
        build: Mapping[str, str],
        limits: Mapping[str, int],
        cluster: Described | None = None,
    ) -> None:
        self._metrics = metrics
        self._connections = connections
        self._backend = backend
        self._lag = LoopLag()
        self._build = dict(build)
        self._limits = dict(limits)
        self._cluster = cluster

    def registry(self) -> CollectorRegistry:
        """Return the registry of all metrics, those of the process included."""
        registry = CollectorRegistry()
        registry.register(self)
        registry.register(_ProcessCollector())
        PlatformCollector(registry=registry)
        return registry

    def close(self) -> None:
        """Stop measuring the loop."""
        self._lag.close()

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "socketdock_build",
            "Version, form and backend of this process.",
            self._build,
        )
        yield from self._gauges()
        yield from self._counters()
        if self._cluster is not None:
            yield from _of_cluster(self._cluster.describe())
        yield self._histogram()

    def _gauges(self) -> Iterator[Metric]:
        connections, condition = self._connections, self._backend.condition()
        for name, help_text, value in (
            ("connections_open", "Open client connections.", connections.open),
            ("connections_limit", "Limit of open connections (--max_connections).",
             self._limits["connections"]),
            ("events_pending", "Events that wait for the backend.",
             connections.backlog.events),
            ("events_pending_limit", "Limit of waiting events (--max_pending).",
             self._limits["pending"]),
            ("pending_bytes", "Bytes of the messages that wait for the backend.",
             connections.backlog.bytes),
            ("oldest_pending_seconds", "Time for which the oldest event has waited.",
             connections.oldest_pending),
            ("events_held", "Messages whose response is overdue and still expected.",
             condition.held),
            ("backend_connections", "Connections to the backend.",
             condition.connections),
            ("stream_entries", "Entries of the longest stream of the redis backend.",
             condition.entries),
            ("breaker_open", "1 while the breaker is open: backend unreachable.",
             condition.away is not None),
            ("stopping", "1 during the shutdown.", connections.stopping),
            ("loop_lag_seconds", "Worst delay of the event loop in the last minute.",
             self._lag.seconds),
        ):
            yield GaugeMetricFamily(f"socketdock_{name}", help_text, value)

    def _counters(self) -> Iterator[Metric]:
        seen = self._metrics
        yield _counter(
            "connections", "Handshakes, by outcome.", ["outcome"],
            [((outcome,), count) for outcome, count in seen.handshakes.items()],
        )
        yield _counter(
            "messages", "Messages from clients (in) and to clients (out).",
            ["direction", "type"],
            [
                (("in", "text"), seen.texts_in),
                (("in", "binary"), seen.binaries_in),
                (("out", "text"), seen.texts_out),
                (("out", "binary"), seen.binaries_out),
            ],
        )
        yield _counter(
            "message_bytes", "Bytes of messages, before compression.", ["direction"],
            [(("in",), seen.bytes_in), (("out",), seen.bytes_out)],
        )
        yield _counter(
            "events", "Events for the backend, by outcome.",
            ["event", "outcome"], _pairs(seen.events),
        )
        yield _counter(
            "event_attempts", "Attempts to deliver events, by outcome.",
            ["event", "outcome"], _pairs(seen.attempts),
        )
        yield _counter(
            "sends", "Send callbacks, by the status of the response.", ["status"],
            [
                ((str(status or "other"),), count)
                for status, count in seen.sends.items()
            ],
        )
        yield _counter(
            "commands", "Commands of backends, by source, command and outcome.",
            ["source", "command", "outcome"], seen.commands.items(),
        )
        yield _counter(
            "forwarded", "Callbacks forwarded to other instances, by outcome.",
            ["outcome"],
            [((outcome,), count) for outcome, count in seen.forwards.items()],
        )
        yield _counter(
            "heartbeats", "Heartbeats to --instanceuri, by outcome.", ["outcome"],
            [((outcome,), count) for outcome, count in seen.heartbeats.items()],
        )
        yield _counter(
            "closes", "Closed client connections, by close code and initiator.",
            ["code", "initiator"], _pairs(seen.closes),
        )

    def _histogram(self) -> Metric:
        family = HistogramMetricFamily(
            "socketdock_event_seconds",
            "Duration of an attempt to deliver an event.",
            labels=["event"],
        )
        bounds = [*map(floatToGoString, BOUNDS), "+Inf"]
        for event, durations in self._metrics.durations.items():
            buckets = list(zip(bounds, accumulate(durations), strict=True))
            family.add_metric([event], buckets, self._metrics.seconds[event])
        return family


def _of_cluster(state: Mapping[str, Any]) -> Iterator[Metric]:
    for name, help_text in (
        ("lease", "1 while this instance holds its lease in Redis."),
        ("instances", "Instances that are known in Redis."),
    ):
        full = f"socketdock_cluster_{name}"
        yield GaugeMetricFamily(full, help_text, float(state[name]))
    for name, help_text in (
        ("reaped", "Disconnect events sent for connections of dead instances."),
        ("fenced", "How often this instance was taken for dead."),
    ):
        yield _counter(f"cluster_{name}", help_text, [], [((), state[name])])


def _pairs(
    counts: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield both labels with their count."""
    for first, inner in counts.items():
        for second, count in inner.items():
            yield (first, second), count


def _counter(
    name: str,
    help_text: str,
    labels: list[str],
    counts: Iterable[tuple[Sequence[str], int]],
) -> Metric:
    family = CounterMetricFamily(f"socketdock_{name}", help_text, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


class _ProcessCollector(Collector):
    """Exports the usual process metrics, by the names of Prometheus' libraries.

    The collector of `prometheus_client` counts descriptors by listing them, which
    blocks the loop for 15 ms with 10,000 of them.
    """

    def __init__(self) -> None:
        # The fields follow the program's name, which may contain spaces
        # (proc_pid_stat(5)).
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = clock_gettime(CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        self._started_at = time() - age

    def collect(self) -> Iterator[Metric]:
        pages, resident = Path("/proc/self/statm").read_text().split()[:2]
        page = resource.getpagesize()  # bytes
        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield CounterMetricFamily(
            "process_cpu_seconds", "Processor time.", usage.ru_utime + usage.ru_stime
        )
        for name, help_text, value in (
            ("start_time_seconds", "Start time, in seconds since 1970.",
             self._started_at),
            ("resident_memory_bytes", "Resident memory.", int(resident) * page),
            ("virtual_memory_bytes", "Virtual memory.", int(pages) * page),
            ("open_fds", "Open file descriptors.", open_descriptors()),
            ("max_fds", "Limit of open file descriptors.",
             float("inf") if soft == resource.RLIM_INFINITY else soft),
        ):
            yield GaugeMetricFamily(f"process_{name}", help_text, value)


def open_descriptors() -> int:
    """Return the number of open descriptors of this process."""
    # Since Linux 6.2 the folder's size is that number; before, it was 0.
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))


class MetricsHandler(OperatorHandler):
    """`GET /metrics`: Prometheus' text format, or OpenMetrics if requested."""

    def initialize(  # type: ignore[override] # each route's own keywords
        self, guard: OperatorGuard, registry: CollectorRegistry
    ) -> None:
        super().initialize(guard)
        self.registry = registry

    def get(self) -> None:
        headers = self.request.headers
        accept = headers.get("Accept", "")
        if NO_VERSION.search(accept):
            accept = ""
        encode, content_type = choose_encoder(accept)
        body = encode(self.registry)
        self.set_header("Content-Type", content_type)
        self.set_header("Vary", "Accept, Accept-Encoding")
        if gzip_accepted(headers.get("Accept-Encoding", "")):
            body = gzip.compress(body, compresslevel=1)
            self.set_header("Content-Encoding", "gzip")
        self.finish(body)

    head = get
