"""What is counted, and how Prometheus gets it.

`Metrics` watches the relay (`backends.Observer`) and keeps plain numbers: where
messages pass, a library's labels would cost more than all the rest of counting.
Only when somebody asks, `RelayCollector` makes metrics of them. What each one
means: docs/metrics.md.
"""

import asyncio
import gzip
import os
import re
import resource
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime, monotonic, time
from typing import get_args

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
from tornado.options import define, options

from backends import (
    Attempt,
    AttemptOutcome,
    Backend,
    Connection,
    EventName,
    HandshakeOutcome,
    Initiator,
    Observer,
    Outcome,
)
from handlers.clients.connection import Connections
from handlers.operators.guard import OperatorGuard, OperatorHandler
from handlers.telemetry.observers import Observers

define("metrics", default=True,
       help="collect metrics and serve GET /metrics; off: the path does not exist")

# Upper bounds of the histogram, in seconds: from a backend beside us to one that
# holds its answers.
BOUNDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
          30.0, 60.0)
# Attempts that tell how quick the backend is: nobody has answered the others.
TIMED = frozenset({"delivered", "refused", "error", "timeout"})

EVENTS: Sequence[str] = get_args(EventName)
CLOSE_CODES = (1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1010, 1011,
               1012, 1013, 1014)  # RFC 6455, section 7.4.1, and IANA's registry
CLOSE_LABELS = (*map(str, CLOSE_CODES), "3xxx", "4xxx", "other")
SEND_STATUSES = (200, 202, 400, 401, 410, 413, 429)
OTHER = 0  # any other status

LAG_INTERVAL = 0.1  # seconds; what holds up the loop for less may pass unseen
LAG_BUCKET = 5.0  # seconds; of each the worst is kept
LAG_BUCKETS = 12  # so that whoever asks once a minute misses none

# Over a version that is none choose_encoder() would trip.
NO_VERSION = re.compile(r"version=(?!\d{1,4}(\.\d{1,4}){0,2}\s*([;,]|$))")


class Metrics(Observer):
    """Counts what it sees, by labels of which each has few values."""

    def __init__(self) -> None:
        self.handshakes = _zeroes(HandshakeOutcome)
        self.texts_in = self.binaries_in = self.texts_out = self.binaries_out = 0
        self.bytes_in = self.bytes_out = 0
        self.events = {event: _zeroes(Outcome) for event in EVENTS}
        self.attempts = {event: _zeroes(AttemptOutcome) for event in EVENTS}
        # Of each event: how many attempts took up to each bound, and longer.
        self.durations = {event: [0] * (len(BOUNDS) + 1) for event in EVENTS}
        self.seconds = dict.fromkeys(EVENTS, 0.0)
        self.sends = dict.fromkeys((*SEND_STATUSES, OTHER), 0)
        self.closes = {code: _zeroes(Initiator) for code in CLOSE_LABELS}

    def handshake_ended(
        self, outcome: HandshakeOutcome, status: int, remote_ip: str, seconds: float
    ) -> None:
        self.handshakes[outcome] += 1

    def closed(
        self, connection: Connection, code: int, initiator: Initiator, duration: float
    ) -> None:
        self.closes[close_label(code)][initiator] += 1

    def received(self, connection: Connection, message: str | bytes, size: int) -> None:
        if isinstance(message, str):
            self.texts_in += 1
        else:
            self.binaries_in += 1
        self.bytes_in += size

    def sent(self, connection: Connection, message: str | bytes, size: int) -> None:
        if isinstance(message, str):
            self.texts_out += 1
        else:
            self.binaries_out += 1
        self.bytes_out += size

    def send_answered(self, status: int) -> None:
        self.sends[status if status in self.sends else OTHER] += 1

    def attempted(self, attempt: Attempt) -> None:
        event, outcome = attempt.event, attempt.outcome
        self.attempts[event][outcome] += 1
        if outcome in TIMED:
            seconds = attempt.seconds
            self.durations[event][bisect_left(BOUNDS, seconds)] += 1
            self.seconds[event] += seconds

    def ended(
        self, event: EventName, connection_id: str, outcome: Outcome, count: int = 1
    ) -> None:
        self.events[event][outcome] += count


def _zeroes(labels: object) -> dict[str, int]:
    """Of each value of a `Literal`."""
    return dict.fromkeys(get_args(labels), 0)


def close_label(code: int) -> str:
    """A close code as a label: those that applications choose have one for each range.

    Or a client could make up labels without end.
    """
    if code in CLOSE_CODES:
        return str(code)
    return f"{code // 1000}xxx" if 3000 <= code <= 4999 else "other"


class LoopLag:
    """How late the loop is: the worst of the last minute, by a timer of its own.

    Not by the loop's clock, which uvloop stops while callbacks run.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worst = deque([0.0], maxlen=LAG_BUCKETS)
        self._bucket_ends = monotonic() + LAG_BUCKET
        self._start()

    def _start(self) -> None:
        self._due = monotonic() + LAG_INTERVAL
        self._timer = self._loop.call_later(LAG_INTERVAL, self._tick)

    def _tick(self) -> None:
        now = monotonic()
        if now >= self._bucket_ends:
            self._bucket_ends = now + LAG_BUCKET
            self._worst.append(0.0)
        self._worst[-1] = max(self._worst[-1], now - self._due)
        self._start()

    @property
    def seconds(self) -> float:
        """The worst lateness of the last minute."""
        return max(*self._worst, monotonic() - self._due)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()


class RelayCollector(Collector):
    """Makes metrics of what was counted, and of how things are when it is asked.

    `build` names what is running; `limits` are those of open connections and of
    events that wait.
    """

    def __init__(
        self,
        metrics: Metrics,
        connections: Connections,
        backend: Backend,
        build: Mapping[str, str],
        limits: Mapping[str, int],
    ) -> None:
        self._metrics = metrics
        self._connections = connections
        self._backend = backend
        self._lag = LoopLag()
        self._build = dict(build)
        self._limits = dict(limits)

    def registry(self) -> CollectorRegistry:
        """All that is exported: this, and what there is of any process."""
        registry = CollectorRegistry()
        registry.register(self)
        registry.register(_ProcessCollector())
        PlatformCollector(registry=registry)
        return registry

    def close(self) -> None:
        """Look after the loop no more."""
        self._lag.close()

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("socketdock_build", "What is running.", self._build)
        yield from self._gauges()
        yield from self._counters()
        yield self._histogram()

    def _gauges(self) -> Iterator[Metric]:
        connections, condition = self._connections, self._backend.condition()
        for name, help_text, value in (
            ("connections_open", "WebSockets that are open.", connections.open),
            ("connections_limit", "Most connections at once (--max_connections).",
             self._limits["connections"]),
            ("events_pending", "Events that wait for the backend.",
             connections.backlog.events),
            ("events_pending_limit", "Most events that may wait (--max_pending).",
             self._limits["pending"]),
            ("pending_bytes", "Bytes of the messages that wait for the backend.",
             connections.backlog.bytes),
            ("oldest_pending_seconds", "How long the oldest event has waited.",
             connections.oldest_pending),
            ("events_held", "Messages whose answer is overdue, and still awaited.",
             condition.held),
            ("backend_connections", "Connections to the backend.",
             condition.connections),
            ("breaker_open", "1 while the backend is taken for unreachable.",
             condition.away is not None),
            ("stopping", "1 from the stop signal on.", connections.stopping),
            ("loop_lag_seconds", "Worst delay of the event loop in the last minute.",
             self._lag.seconds),
        ):
            yield GaugeMetricFamily(f"socketdock_{name}", help_text, value)

    def _counters(self) -> Iterator[Metric]:
        seen = self._metrics
        yield _counter(
            "connections", "Handshakes, by what became of them.", ["outcome"],
            [((outcome,), count) for outcome, count in seen.handshakes.items()],
        )
        yield _counter(
            "messages", "Messages, in from clients and out to them.",
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
            "events", "Events for the backend, by what became of them.",
            ["event", "outcome"], _pairs(seen.events),
        )
        yield _counter(
            "event_attempts", "Attempts to deliver events.",
            ["event", "outcome"], _pairs(seen.attempts),
        )
        yield _counter(
            "sends", "Sends by callback, by the status of the answer.", ["status"],
            [
                ((str(status or "other"),), count)
                for status, count in seen.sends.items()
            ],
        )
        yield _counter(
            "closes", "WebSockets that have ended, by code and who began.",
            ["code", "initiator"], _pairs(seen.closes),
        )

    def _histogram(self) -> Metric:
        family = HistogramMetricFamily(
            "socketdock_event_seconds",
            "How long the backend took for one attempt.",
            labels=["event"],
        )
        bounds = [*map(floatToGoString, BOUNDS), "+Inf"]
        for event, durations in self._metrics.durations.items():
            buckets = list(zip(bounds, accumulate(durations), strict=True))
            family.add_metric([event], buckets, self._metrics.seconds[event])
        return family


def _pairs(
    counts: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[tuple[str, str], int]]:
    """Counts of two labels."""
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
    """What Prometheus' libraries tell of any process, by the names that they use.

    That of `prometheus_client` lists the descriptors to count them, which holds up
    the loop for 15 ms where there are 10,000.
    """

    def __init__(self) -> None:
        # Behind the program's name, which may have blanks (proc_pid_stat(5)).
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
            ("start_time_seconds", "When it was started, since 1970.",
             self._started_at),
            ("resident_memory_bytes", "Memory that it has.", int(resident) * page),
            ("virtual_memory_bytes", "Addresses that it has.", int(pages) * page),
            ("open_fds", "Descriptors that are open.", open_descriptors()),
            ("max_fds", "Descriptors that may be open.",
             float("inf") if soft == resource.RLIM_INFINITY else soft),
        ):
            yield GaugeMetricFamily(f"process_{name}", help_text, value)


def open_descriptors() -> int:
    """How many this process has."""
    # Since Linux 6.2 that is the folder's size; before, it is 0.
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))


class MetricsHandler(OperatorHandler):
    """`GET /metrics`: Prometheus' text format, or OpenMetrics where it is asked for."""

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


def make_collector(
    connections: Connections, backend: Backend, observers: Observers, version: str
) -> RelayCollector | None:
    """What Prometheus asks, with somebody who counts; None with --metrics=off."""
    if not options.metrics:
        return None
    metrics = Metrics()
    observers.add(metrics)
    build = {"version": version, "backend": options.backend}
    most = {"connections": options.max_connections, "pending": options.max_pending}
    return RelayCollector(metrics, connections, backend, build, most)
