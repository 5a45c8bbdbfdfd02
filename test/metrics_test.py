"""/metrics: each count changes when its event happens, and only then."""

import asyncio
import gzip
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import websockets
from authorization_test import BEARER, TOKENS, Caller, ask
from faults import ScriptedBackend, send_raw
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from service import (
    DEADLINE,
    DRAINS_SLOWLY,
    PROJECT,
    RecordingBackend,
    Service,
    draining,
    withhold,
)

pytestmark = pytest.mark.gen_test(timeout=60)

EVENTS = ("connect", "message", "disconnect")
OUTCOMES = ("delivered", "refused", "failed", "abandoned")
ATTEMPTS = ("delivered", "refused", "error", "unreachable", "timeout", "abandoned")
CODES = (1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1010, 1011, 1012, 1013,
         1014, "3xxx", "4xxx", "other")

# The documented metrics, with every value of every label.
COUNTERS = {
    "connections": [
        f'outcome="{outcome}"'
        for outcome in ("opened", "refused", "rejected", "no_decision", "left")
    ],
    "messages": [
        f'direction="{direction}",type="{kind}"'
        for direction in ("in", "out")
        for kind in ("text", "binary")
    ],
    "message_bytes": ['direction="in"', 'direction="out"'],
    "events": [f'event="{e}",outcome="{o}"' for e in EVENTS for o in OUTCOMES],
    "event_attempts": [f'event="{e}",outcome="{o}"' for e in EVENTS for o in ATTEMPTS],
    "sends": [
        f'status="{status}"'
        for status in (200, 202, 400, 401, 410, 413, 422, 429, 503, 504, "other")
    ],
    "commands": [
        f'command="{command}",outcome="{outcome}",source="{source}"'
        for source in ("response", "batch", "callback", "broker")
        for command, outcomes in (
            ("none", ("invalid",)),
            *((name, ("done", "gone", "full", "invalid"))
              for name in ("send", "close", "state")),
        )
        for outcome in outcomes
    ],
    "forwarded": [
        f'outcome="{outcome}"'
        for outcome in ("answered", "gone", "unreachable", "unanswered")
    ],
    "heartbeats": ['outcome="delivered"', 'outcome="failed"'],
    "closes": [
        f'code="{code}",initiator="{initiator}"'
        for code in CODES
        for initiator in ("client", "backend", "relay")
    ],
}
GAUGES = {
    "connections_open", "connections_limit", "events_pending", "events_pending_limit",
    "pending_bytes", "oldest_pending_seconds", "events_held", "backend_connections",
    "stream_entries",
    "breaker_open", "stopping", "loop_lag_seconds",
}
LIMITS = {"connections_limit": 15000, "events_pending_limit": 100_000}

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: %b\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


async def scrape(service: Service, *headers: str) -> dict[str, float]:
    """Return each sample by its name and its sorted labels."""
    answer = await ask(service, "GET", "/metrics", *headers)
    assert answer.status == 200
    return samples(answer.body.decode())


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            name = sample.name.removeprefix("socketdock_")
            assert f"{name}{{{labels}}}" not in found
            found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found


async def counted(service: Service, expected: Mapping[str, float]) -> dict[str, float]:
    """All that is exported, once of the metrics named here these samples are not 0."""

    def moved(found: Mapping[str, float]) -> dict[str, float]:
        families = {name.partition("{")[0] for name in expected}
        return {
            name: value
            for name, value in found.items()
            if name.partition("{")[0] in families and value
        }

    found = await scrape(service)
    try:
        async with asyncio.timeout(DEADLINE):
            while moved(found) != expected:
                found = await scrape(service)
    except TimeoutError:
        assert moved(found) == expected
    return found


def series(metric: str, label: str, values: dict[str, int], **others: str) -> dict:
    """The series of `metric`, by `label`; `others` are labels that precede it."""
    before = "".join(f'{name}="{value}",' for name, value in others.items())
    return {
        f'{metric}_total{{{before}{label}="{value}"}}': count
        for value, count in values.items()
    }


def events(event: str, **outcomes: int) -> dict[str, float]:
    return series("events", "outcome", outcomes, event=event)


def attempts(event: str, **outcomes: int) -> dict[str, float]:
    return series("event_attempts", "outcome", outcomes, event=event)


def connections(**outcomes: int) -> dict[str, float]:
    return series("connections", "outcome", outcomes)


def messages(direction: str, **types: int) -> dict[str, float]:
    return series("messages", "type", types, direction=direction)


def closes(code: object, initiator: str, count: int = 1) -> dict[str, float]:
    return {f'closes_total{{code="{code}",initiator="{initiator}"}}': count}


# What is exported.


async def test_all_labels_exist_before_the_first_event(io_loop):
    """With value 0, so that Prometheus sees the first event as an increase."""
    async with Service() as service:
        found = await scrape(service)
    for name, labels in COUNTERS.items():
        assert {key for key in found if key.startswith(f"{name}_total")} == {
            f"{name}_total{{{label}}}" for label in labels
        }
        assert not any(found[f"{name}_total{{{label}}}"] for label in labels)
    for event in EVENTS:
        for part in ("count", "sum"):
            assert found[f'event_seconds_{part}{{event="{event}"}}'] == 0
        assert found[f'event_seconds_bucket{{event="{event}",le="+Inf"}}'] == 0
    for name in GAUGES - {"loop_lag_seconds"}:
        assert found[name] == LIMITS.get(name, 0), name
    assert found["loop_lag_seconds"] >= 0
    (build,) = (name for name in found if name.startswith("build_info"))
    assert re.fullmatch(
        r'build_info\{backend="loopback",form="(compiled|pure)",'
        r'version="\d+\.\d+\.\d+"\}',
        build,
    )
    assert found[build] == 1


async def test_process_metrics_have_their_usual_names(io_loop):
    """As in Prometheus' own libraries, for dashboards of all programs."""
    before = time.time()
    async with Service() as service:
        found = await scrape(service)
        async with websockets.connect(service.ws_url):
            more = await scrape(service)
        process = Path("/proc") / str(service.process.pid)
        resident = int((process / "statm").read_text().split()[1]) * 4096
        (limit,) = re.findall(
            r"Max open files +(\d+)", (process / "limits").read_text()
        )
    assert more["process_open_fds"] == found["process_open_fds"] + 1
    assert found["process_max_fds"] == int(limit)
    assert 0.5 < found["process_resident_memory_bytes"] / resident < 2
    assert found["process_virtual_memory_bytes"] > resident
    assert found["process_cpu_seconds_total"] > 0
    # Both clocks are the machine's, but one has a resolution of ticks.
    assert before - 1 < found["process_start_time_seconds"] < time.time() + 1
    assert any(name.startswith("python_info{") for name in found)


async def test_every_metric_is_explained(io_loop):
    """In docs/metrics.md, with type and labels; the page has no other metric."""
    async with Service("--cluster=redis://127.0.0.1:1") as service:
        answer = await ask(service, "GET", "/metrics")
    exported = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        suffix = "_total" if family.type == "counter" else ""
        labels = {label for sample in family.samples for label in sample.labels}
        exported[family.name + suffix] = (family.type, labels - {"le"})
    page = (PROJECT / "docs" / "metrics.md").read_text("utf-8")
    explained = {}
    for name, kind, labels in re.findall(
        r"^\| `(\w+)` \| (\w+) \| (.*?) \| .{20,} \|$", page, flags=re.MULTILINE
    ):
        assert name not in explained
        explained[name] = (kind, set(re.findall(r"`(\w+)`:", labels)))
    assert explained == exported


def test_every_value_of_a_label_is_explained():
    """In the row of its metric."""
    page = (PROJECT / "docs" / "metrics.md").read_text("utf-8")
    for name, labels in COUNTERS.items():
        (row,) = re.findall(rf"^\| `socketdock_{name}_total` .*$", page, re.MULTILINE)
        for value in set(re.findall('"(.+?)"', " ".join(labels))):
            assert f"`{value}`" in row, (name, value)


# The backend `http`.


async def test_connection_and_messages_are_counted(io_loop):
    """One connection with messages both ways."""
    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("grüße")
            await client.send(b"\xff\x00")
            await client.send("")
            event = (await backend.wait_for("message", 3))[0]
            for kind, body in (("text", "hello"), ("binary", "x"), ("binary", "yz")):
                answer = await backend.call(
                    f"{event['meta']['send']}?type={kind}", body=body
                )
                assert answer.code == 200
                await client.recv()
            found = await counted(service, events("connect", delivered=1)
                                  | events("message", delivered=3))
            assert found["connections_open"] == 1
            assert found["backend_connections"] >= 1
        found = await counted(
            service,
            events("connect", delivered=1)
            | events("message", delivered=3)
            | events("disconnect", delivered=1)
            | attempts("connect", delivered=1)
            | attempts("message", delivered=3)
            | attempts("disconnect", delivered=1)
            | connections(opened=1)
            | messages("in", text=2, binary=1)
            | messages("out", text=1, binary=2)
            | {'message_bytes_total{direction="in"}': 9,
               'message_bytes_total{direction="out"}': 8}
            | {'sends_total{status="200"}': 3}
            | closes(1000, "client"),
        )
        assert found["connections_open"] == 0
        for event, count in (("connect", 1), ("message", 3), ("disconnect", 1)):
            assert found[f'event_seconds_count{{event="{event}"}}'] == count
            assert found[f'event_seconds_bucket{{event="{event}",le="+Inf"}}'] == count
            assert found[f'event_seconds_bucket{{event="{event}",le="60.0"}}'] == count


async def test_histogram_buckets_are_cumulative(io_loop):
    """Each includes the smaller ones; the sum is in seconds."""
    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        held = withhold(backend, "disconnect")
        async with websockets.connect(service.ws_url):
            pass
        await backend.wait_for("disconnect", 1)
        await asyncio.sleep(0.3)  # the delay that the relay must measure
        held.set()
        found = await counted(service, events("disconnect", delivered=1)
                              | events("connect", delivered=1))
    buckets = [
        value for name, value in found.items()
        if name.startswith('event_seconds_bucket{event="disconnect"')
    ]
    assert buckets == sorted(buckets)
    assert found['event_seconds_bucket{event="disconnect",le="0.25"}'] == 0
    assert found['event_seconds_bucket{event="disconnect",le="60.0"}'] == 1
    assert found['event_seconds_sum{event="disconnect"}'] >= 0.25


async def test_refused_events_are_counted(io_loop):
    """A refused connect event, message and disconnect event."""
    async def refuse(handler, event):
        handler.set_status(403)

    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        backend.answers["connect"] = refuse
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(service.ws_url)
        del backend.answers["connect"]
        backend.answers["message"] = backend.answers["disconnect"] = refuse
        async with websockets.connect(service.ws_url) as client:
            await client.send("no")
            await backend.wait_for("message", 1)
        await counted(
            service,
            connections(opened=1, refused=1)
            | events("connect", delivered=1, refused=1)
            | events("message", refused=1)
            | events("disconnect", refused=1)
            | attempts("connect", delivered=1, refused=1)
            | attempts("message", refused=1)
            | attempts("disconnect", refused=1),
        )


async def test_retried_events_are_counted_once(io_loop):
    """Each attempt has its outcome, and the event has one."""
    asked = []

    async def fail_all(handler, event):
        asked.append(event)
        if len(asked) in (1, 2, 4):
            handler.set_status(500)

    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        backend.answers["message"] = backend.answers["disconnect"] = fail_all
        async with websockets.connect(service.ws_url) as client:
            await client.send("again")
            await backend.wait_for("message", 3)
        await counted(
            service,
            events("connect", delivered=1)
            | events("message", delivered=1)
            | events("disconnect", delivered=1)
            | attempts("connect", delivered=1)
            | attempts("message", error=2, delivered=1)
            | attempts("disconnect", error=1, delivered=1),
        )


async def test_given_up_events_are_counted(io_loop):
    """Messages that waited behind a failed one count, too; the client gets 1013."""
    async def fail_all(handler, event):
        handler.set_status(500)

    flags = ("--delivery_timeout=2", "--disconnect_timeout=0.3")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags(), *flags) as service:
            backend.answers["message"] = backend.answers["disconnect"] = fail_all
            async with websockets.connect(service.ws_url) as client:
                for number in range(3):
                    await client.send(f"{number}")
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            found = await counted(
                service,
                events("connect", delivered=1)
                | events("message", failed=3)
                | events("disconnect", failed=1)
                | closes(1013, "relay"),
            )
            for event in ("message", "disconnect"):
                name = f'event_attempts_total{{event="{event}",outcome="error"}}'
                assert found[name] >= 1
                # They were answered, so there is a time.
                assert found[f'event_seconds_count{{event="{event}"}}'] == found[name]


async def test_unreachable_attempts_are_counted(io_loop):
    """Their duration is not a response time of the backend."""
    flags = ("--delivery_timeout=0.2", "--breaker_attempts=1000")
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            found = await counted(service, events("message", failed=1))
    assert found['event_attempts_total{event="message",outcome="unreachable"}'] >= 1
    assert found['event_seconds_count{event="message"}'] == 0


async def test_timeouts_are_counted(io_loop):
    """Their duration is the timeout."""
    flags = ("--delivery_timeout=0.2", "--backend_timeout=0.2", "--order_wait=inf")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            withhold(backend, "message")
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            found = await counted(service, events("message", failed=1))
    late = found['event_attempts_total{event="message",outcome="timeout"}']
    assert late >= 1
    assert found['event_seconds_count{event="message"}'] == late
    assert found['event_seconds_bucket{event="message",le="0.1"}'] == 0


async def test_held_messages_are_counted(io_loop):
    """Held while they are unanswered, then abandoned."""
    flags = ("--order_wait=0.05", "--max_unanswered=2")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            withhold(backend, "message")
            async with websockets.connect(service.ws_url) as client:
                for number in range(2):
                    await client.send(f"{number}")
                event = (await backend.wait_for("message", 2))[0]
                async with asyncio.timeout(DEADLINE):
                    while (await scrape(service))["events_held"] != 2:
                        pass
                # After this sign of life the oldest is abandoned for the next message.
                assert (await backend.call(event["meta"]["send"], body="x")).code == 200
                await client.send("2")
                await backend.wait_for("message", 3)
                found = await counted(
                    service,
                    events("message", abandoned=1) | attempts("message", abandoned=1),
                )
                assert found['event_seconds_count{event="message"}'] == 0
            service.process.kill()  # do not wait for held requests
            await service.process.wait()


async def test_handshakes_are_counted_by_outcome(io_loop):
    """Each handshake has one outcome."""
    async def decide(handler, event):
        handler.set_status({"": 200, "sick": 500, "no": 401}[event["meta"]["query"]])

    async with RecordingBackend() as backend:
        async with Service(*backend.flags("connect", "message")) as service:
            backend.answers["connect"] = decide
            await send_raw(service.ws_url, HANDSHAKE % b"12", answers=1)
            for query, headers in (
                ("?", {"Origin": "http://evil.example"}), ("?sick", {}), ("?no", {})
            ):
                with pytest.raises(websockets.InvalidStatus):
                    await websockets.connect(
                        service.ws_url + query, additional_headers=headers
                    )
            async with websockets.connect(service.ws_url):
                pass
            await counted(
                service, connections(opened=1, refused=1, rejected=2, no_decision=1)
            )


async def test_client_that_left_counts_as_left(io_loop):
    """Before its handshake was answered; it has no connection and no close."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def decide(handler, event):
        asked.set()
        await answer.wait()

    async with RecordingBackend() as backend:
        async with (
            Service(*backend.flags("connect", "message")) as service,
            Caller(service) as caller,
        ):
            backend.answers["connect"] = decide

            async def descriptors() -> float:
                body = (await caller.ask("GET", "/metrics")).body
                found = samples(body.decode())
                assert found["connections_open"] == 0  # its handshake is undecided
                return found["process_open_fds"]

            _, writer = await asyncio.open_connection(caller.address, caller.port)
            writer.write(HANDSHAKE % b"13")
            await asyncio.wait_for(asked.wait(), DEADLINE)
            before = await descriptors()
            writer.transport.abort()
            async with asyncio.timeout(DEADLINE):  # the relay has noticed it
                while await descriptors() >= before:
                    pass
            answer.set()
            found = await counted(service, connections(left=1))
    assert not any(value for name, value in found.items() if name.startswith("closes"))


# Gauges.


async def test_status_reports_pending_events(io_loop):
    """The number and age of waiting events; none after they were accepted."""
    strictly = ("--order_wait=inf", "--backend_timeout=60")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags("message"), *strictly) as service:
            taken = withhold(backend, "message")
            async with websockets.connect(service.ws_url) as client:
                await client.send("four")
                await client.send("twelve bytes")
                await backend.wait_for("message", 1)
                found = await scrape(service)
                async with asyncio.timeout(DEADLINE):
                    while found["events_pending"] < 2:
                        found = await scrape(service)
                assert found["pending_bytes"] == 16
                first = found["oldest_pending_seconds"]
                async with asyncio.timeout(DEADLINE):
                    while found["oldest_pending_seconds"] <= first:
                        found = await scrape(service)
                status = json.loads((await ask(service, "GET", "/status")).body)
                assert status["pending"]["events"] == 2
                assert status["pending"]["oldest"] > first
                taken.set()
                await counted(service, events("message", delivered=2))
            found = await scrape(service)
    assert found["events_pending"] == found["pending_bytes"] == 0
    assert found["oldest_pending_seconds"] == 0


async def test_second_message_has_waited_since_it_was_read(io_loop):
    """Its age counts from when it was read, not from the previous acceptance."""
    answers = [asyncio.Event(), asyncio.Event()]
    asked = iter(answers)

    async def hold(handler, event):
        await next(asked).wait()

    strictly = ("--order_wait=inf", "--backend_timeout=60")
    async with RecordingBackend() as backend:
        async with Service(*backend.flags("message"), *strictly) as service:
            backend.answers["message"] = hold
            async with websockets.connect(service.ws_url) as client:
                await client.send("first")
                await client.send("second")
                found = await scrape(service)
                async with asyncio.timeout(DEADLINE):
                    while found["oldest_pending_seconds"] < 0.5:
                        found = await scrape(service)
                answers[0].set()
                await backend.wait_for("message", 2)
                found = await counted(service, events("message", delivered=1))
                assert found["events_pending"] == 1
                assert found["oldest_pending_seconds"] >= 0.4
                answers[1].set()


async def test_accepted_events_are_no_longer_pending(io_loop):
    """Only waiting events count, for example of another client."""
    taken = asyncio.Event()

    async def hold(handler, event):
        if event["message"] == "later":
            await taken.wait()

    strictly = ("--order_wait=inf", "--backend_timeout=60")
    async with RecordingBackend() as backend:
        async with (
            Service(*backend.flags("message"), *strictly) as service,
            websockets.connect(service.ws_url) as early,
            websockets.connect(service.ws_url) as late,
        ):
            backend.answers["message"] = hold
            await early.send("now")
            await counted(service, events("message", delivered=1))
            until = await uptime(service) + 1
            async with asyncio.timeout(DEADLINE):
                while await uptime(service) < until:
                    pass
            began = await uptime(service)
            await late.send("later")
            await backend.wait_for("message", 2)
            found = await scrape(service)
            assert found["events_pending"] == 1
            longest = await uptime(service) - began + 0.1
            assert found["oldest_pending_seconds"] <= longest
            taken.set()


async def test_disconnect_events_are_pending(io_loop):
    """A disconnect event that waits counts as pending."""
    async with RecordingBackend() as backend, Service(*backend.flags()) as service:
        release = withhold(backend, "disconnect")
        async with websockets.connect(service.ws_url):
            pass
        await backend.wait_for("disconnect", 1)
        found = await scrape(service)
        async with asyncio.timeout(DEADLINE):
            while not found["oldest_pending_seconds"]:
                found = await scrape(service)
        assert (found["events_pending"], found["pending_bytes"]) == (1, 0)
        assert found["connections_open"] == 0
        release.set()
        await counted(service, events("disconnect", delivered=1)
                      | events("connect", delivered=1))


async def test_breaker_metric_shows_its_state(io_loop):
    """In /metrics and /status, while it is open and after it has closed."""
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    breaker = ("--breaker_attempts=1", "--breaker_connections=1",
               "--breaker_first_probe=0.1", "--breaker_last_probe=0.1")
    async with ScriptedBackend(lambda kind: ScriptedBackend.CUT) as backend:
        async with Service(*backend.flags("message"), *breaker) as service:
            async with websockets.connect(service.ws_url) as client:
                await client.send("anybody there?")
                async with asyncio.timeout(DEADLINE):
                    while not (await scrape(service))["breaker_open"]:
                        pass
                status = json.loads((await ask(service, "GET", "/status")).body)
                assert status["backend"]["away"] >= 0
                backend.script = lambda kind: ok
                async with asyncio.timeout(DEADLINE):
                    while (await scrape(service))["breaker_open"]:
                        pass
                status = json.loads((await ask(service, "GET", "/status")).body)
                assert status["backend"]["away"] is None


BLOCKING = """
import time
from backends import Backend

class Blocking(Backend):
    def message(self, connection, message):
        time.sleep(float(message))
        connection.send("done")

def make_backend(relay):
    return Blocking()
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_loop_lag_is_reported(io_loop, tmp_path, loop):
    """For a minute, so that a scrape every 15 seconds sees it."""
    package = tmp_path / "blocking"
    package.mkdir()
    (package / "backend.py").write_text(BLOCKING)
    flags = ("--backend=blocking.backend", f"--event_loop={loop}")
    async with Service(*flags, environment={"PYTHONPATH": str(tmp_path)}) as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("1.0")
            await client.recv()
        until = await uptime(service) + 0.5  # without any delay of the loop
        async with asyncio.timeout(DEADLINE):
            while await uptime(service) < until:
                pass
        assert (await scrape(service))["loop_lag_seconds"] >= 0.8


async def uptime(service: Service) -> float:
    """The relay's own uptime in seconds."""
    return json.loads((await ask(service, "GET", "/status")).body)["uptime"]


async def test_stopping_metric_shows_the_shutdown(io_loop):
    """While the relay drains."""
    async with Service(DRAINS_SLOWLY) as service, Caller(service) as caller:
        answer = await caller.ask("GET", "/metrics")
        assert samples(answer.body.decode())["stopping"] == 0
        async with draining(service):
            answer = await caller.ask("GET", "/metrics")
            assert samples(answer.body.decode())["stopping"] == 1


# Other backends and sends.


async def test_loopback_events_are_counted(io_loop):
    """A backend that calls no observer is wrapped."""
    async with Service("--logging=debug") as service:
        async with websockets.connect(service.ws_url) as client:
            for message in ("hello", b"\x00" * 10, "again"):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), DEADLINE) == message
        found = await counted(
            service,
            connections(opened=1)
            | messages("in", text=2, binary=1)
            | messages("out", text=2, binary=1)
            | {'message_bytes_total{direction="in"}': 20,
               'message_bytes_total{direction="out"}': 20}
            | events("connect", delivered=1)
            | events("message", delivered=3)
            | events("disconnect", delivered=1)
            | attempts("connect", delivered=1)
            | attempts("message", delivered=3)
            | attempts("disconnect", delivered=1)
            | closes(1000, "client"),
        )
        assert found['event_seconds_count{event="message"}'] == 3


@pytest.mark.parametrize("server", ["fast", "tornado"])
async def test_sends_are_counted_by_status(io_loop, server):
    """By handler and by the fast path, on both servers; other routes are not."""
    flags = (TOKENS, f"--http_server={server}", "--max_message_size=1000",
             "--max_send_buffer=1000")
    held, early = asyncio.Event(), asyncio.Event()

    async def decide(handler, event):
        if event["meta"]["query"] == "hold":
            early.set()
            await held.wait()

    async with RecordingBackend() as backend:
        async with Service(*backend.flags("connect", "message"), *flags) as service:
            backend.answers["connect"] = decide

            async def send(number: int, *headers: str, body: bytes = b"x") -> int:
                meta = backend.of("connect")[number]["meta"]
                path = "/" + meta["send"].split("/", 3)[3]
                async with Caller(service) as caller:
                    return (await caller.ask("POST", path, *headers, body=body)).status

            async with websockets.connect(service.ws_url):
                assert await send(0, BEARER) == 200
                assert await send(0) == 401
                text = "Content-Type: text/plain"
                assert await send(0, BEARER, text, body=b"\xff") == 400
                assert await send(0, BEARER, body=b"x" * 1001) == 413
            await eventually_gone(send)
            second = asyncio.ensure_future(
                websockets.connect(f"{service.ws_url}?hold")
            )
            await asyncio.wait_for(early.wait(), DEADLINE)
            assert await send(1, BEARER, body=b"x" * 900) == 202
            assert await send(1, BEARER, body=b"x" * 900) == 429
            held.set()
            client = await second
            await client.recv()
            path = f"/socket/{'0' * 32}"
            async with Caller(service) as caller:
                assert (await caller.ask("GET", f"{path}/send", BEARER)).status == 405
                assert (await caller.ask("GET", path, BEARER)).status == 410
                closing = await caller.ask(
                    "POST", f"{path}/disconnect", BEARER, body=b""
                )
                assert closing.status == 410
                assert (await caller.ask("POST", "/send", body=b"")).status == 404
            async with Caller(service) as caller:
                closing = await caller.ask("POST", f"{path}/disconnect", body=b"")
                assert closing.status == 401
            found = await scrape(service, BEARER)
            await client.close()
    sends = {
        name: value for name, value in found.items() if name.startswith("sends_total")
    }
    gone = sends.pop('sends_total{status="410"}')
    assert gone >= 1
    assert {name for name, value in sends.items() if value == 1} == {
        f'sends_total{{status="{status}"}}' for status in (200, 202, 400, 401, 413, 429)
    }
    assert sum(sends.values()) == 6


async def eventually_gone(send) -> None:
    """Once the relay knows that the client has left."""
    async with asyncio.timeout(DEADLINE):
        while await send(0, BEARER) != 410:
            pass


async def test_closes_are_counted_by_code_and_initiator(io_loop):
    """Application codes count by range: a client cannot create labels."""
    async with RecordingBackend() as backend, Service(
        *backend.flags("connect", "message"), "--max_message_size=1000"
    ) as service:
        for code in (1000, 3999, 4000, 4001, 4999):
            async with websockets.connect(service.ws_url) as client:
                await client.close(code)
        async with websockets.connect(service.ws_url) as client:
            await client.send("x" * 1001)
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
        async with websockets.connect(service.ws_url) as client:
            event = backend.of("connect")[-1]
            body = b'{"code": 4321, "reason": "enough"}'
            await backend.call(event["meta"]["disconnect"], body=body)
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
        async with websockets.connect(service.ws_url) as client:
            client.transport.abort()
        empty_close = b"\x88\x80\0\0\0\0"
        await send_raw(service.ws_url, HANDSHAKE % b"13" + empty_close)
        found = await counted(
            service,
            closes(1000, "client")
            | closes("3xxx", "client")
            | closes("4xxx", "client", 3)
            | closes(1009, "relay")
            | closes("4xxx", "backend")
            | closes(1006, "client")
            | closes(1005, "client"),
        )
        assert found["connections_open"] == 0


# Requests of a scrape.


async def test_format_is_negotiated(io_loop):
    """Prometheus' own by default; OpenMetrics and gzip on request."""
    async with Service() as service:
        plain = await ask(service, "GET", "/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert plain.headers["cache-control"] == "no-store"
        wanted = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.3"
        other = await ask(service, "GET", "/metrics", wanted)
        assert other.headers["content-type"].startswith("application/openmetrics-text")
        assert other.body.endswith(b"# EOF\n")
        families = list(openmetrics.text_string_to_metric_families(other.body.decode()))
        assert {family.name for family in families} >= {"socketdock_messages"}
        packed = await ask(service, "GET", "/metrics", "Accept-Encoding: gzip")
        assert packed.headers["content-encoding"] == "gzip"
        assert samples(gzip.decompress(packed.body).decode()).keys() == (
            samples(plain.body.decode()).keys()
        )
        head = await ask(service, "HEAD", "/metrics")
        assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize(
    "accept",
    ["version=", "version=x", "version=1.x", "version=" + "9" * 5000, "version=-1",
     "version=1..0", "version=\xff", ";;;,,=", "escaping=x", "*/*;q=x", "version=0"],
)
async def test_any_accept_header_is_answered(io_loop, accept):
    """The library's parser raises for some values."""
    async with Service() as service:
        for kind in ("application/openmetrics-text", "text/plain"):
            header = f"Accept: {kind}; {accept}"
            answer = await ask(service, "GET", "/metrics", header)
            assert answer.status == 200
            assert b"socketdock_connections_open" in answer.body


async def test_metrics_are_for_operators(io_loop):
    """With the access rules of /status."""
    far = "Host: relay.example"
    async with Service() as service:
        assert (await ask(service, "GET", "/metrics", far)).status == 403
        evil = "Origin: http://evil.example"
        assert (await ask(service, "GET", "/metrics", evil)).status == 403
    async with Service(TOKENS, "--bindip=0.0.0.0") as service:
        here = "127.0.0.1"
        assert (await ask(service, "GET", "/metrics", host=here)).status == 401
        answer = await ask(service, "GET", "/metrics", far, BEARER, host=here)
        assert answer.status == 200
    async with Service("--callbackport=0") as service:
        assert (await ask(service, "GET", "/metrics")).status == 200
        service.callback_url = service.ws_url.replace("ws:", "http:")[:-3]
        assert (await ask(service, "GET", "/metrics")).status == 404


async def test_metrics_can_be_off(io_loop):
    """Then the path does not exist, and everything else works."""
    async with Service("--metrics=off") as service:
        async with websockets.connect(service.ws_url) as client:
            await client.send("hello")
            assert await asyncio.wait_for(client.recv(), DEADLINE) == "hello"
        assert (await ask(service, "GET", "/metrics")).status == 404
        assert (await ask(service, "GET", "/status")).status == 200


async def test_counts_do_not_depend_on_who_asks(io_loop):
    """A scrape changes nothing, and no label has text of a client."""
    async with Service() as service:
        url = f"{service.ws_url}?secret=leak"
        async with websockets.connect(
            url, subprotocols=["leak"], user_agent_header="leak"
        ) as client:
            await client.send("leak")
            await client.recv()
            await client.close(4242, "leak")
        before = await counted(service, closes("4xxx", "client"))
        after = await scrape(service)
        counts = [
            name for name in before
            if "_total" in name and not name.startswith("process_")
        ]
        assert len(counts) > 80
        assert [before[name] for name in counts] == [after[name] for name in counts]
        answer = await ask(service, "GET", "/metrics")
        assert b"leak" not in answer.body
        assert len(answer.body) < 20_000
