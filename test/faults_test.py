"""For each fault, a message is delivered, or its loss is reported.

Backends, clients, the network and the relay itself fail here; `faults` makes
them.
"""

import asyncio
import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import websockets
from faults import (
    BackendProcess,
    Book,
    FaultyBackend,
    RawClient,
    Reply,
    SilentProxy,
    Talker,
    assert_complete,
    leave,
    masked,
    memory,
    talkers,
)
from programs import leave_out
from service import DEADLINE, PROJECT, RecordingBackend, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=180), pytest.mark.long]

MIB = 2**20
# What a process may grow by for reasons of its own: the allocator's arenas,
# requests being read, what is kept of a thousand connections.
CONSTANT = 48 * MIB


# Short outages.

CLIENTS, PAUSE = 200, 0.2  # numbers of clients; seconds between two messages


async def load_with_an_outage(
    service: Service, book: Book, outage, *, in_order: bool
) -> None:
    """8 s of load, with `outage` in the middle."""
    clients = await talkers(service.ws_url, CLIENTS)
    enough = asyncio.Event()
    talks = [asyncio.create_task(client.talk(PAUSE, enough)) for client in clients]
    await asyncio.sleep(3)
    await outage()
    await asyncio.sleep(3)
    enough.set()
    await asyncio.gather(*talks)
    sent = sum(client.sent for client in clients)
    assert sent > 5 * CLIENTS
    await book.wait_for("message", sent)
    assert all(client.is_open for client in clients)
    assert_complete(book, clients, in_order=in_order)
    await leave(clients)
    await book.wait_for("disconnect", CLIENTS)
    assert {meta["undelivered"] for meta in book.disconnects().values()} == {0}


@pytest.mark.parametrize("how", ["refused", "reset", "503"])
async def test_backend_restart_within_two_seconds_loses_nothing(io_loop, how):
    """Every number arrives, in order, and no client is closed."""
    async with FaultyBackend() as backend:

        async def outage() -> None:
            backend.make_unreachable(how)
            await asyncio.sleep(2)
            await backend.make_reachable()

        # A slow backend on a busy machine must not change the order.
        async with Service(*backend.flags(), "--order_wait=30") as service:
            await load_with_an_outage(service, backend, outage, in_order=True)


@pytest.mark.parametrize("flags", [[], ["--order_wait=inf", "--backend_timeout=30"]])
async def test_stopped_backend_loses_nothing(io_loop, flags):
    """Frozen for 2 s, its kernel taking connections: complete, and in order
    where one message goes at a time."""
    async with BackendProcess() as backend:

        async def outage() -> None:
            backend.stop()
            await asyncio.sleep(2)
            backend.go_on()

        async with Service(*backend.flags(), *flags) as service:
            await load_with_an_outage(
                service, backend, outage, in_order=bool(flags)
            )


# Long outages.


@pytest.mark.parametrize("how", ["refused", "503"])
async def test_each_client_of_a_lost_backend_is_closed_and_accounted_for(io_loop, how):
    """1013 after --delivery_timeout; the disconnect events count lost messages."""
    async with FaultyBackend() as backend:
        flags = [*backend.flags(), "--delivery_timeout=3"]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 100)
            await asyncio.gather(*(client.say(5) for client in clients))
            await backend.wait_for("message", 500)
            backend.make_unreachable(how)
            await asyncio.gather(*(client.say(20) for client in clients))
            ends = [client.until_closed() for client in clients]
            assert set(await asyncio.gather(*ends)) == {1013}
            await backend.make_reachable()
            await backend.wait_for("disconnect", 100)
            names = backend.names()
            assert len(backend.disconnects()) == 100
            for connection_id, meta in backend.disconnects().items():
                assert (meta["code"], meta["initiator"]) == (1013, "relay")
                delivered = backend.numbers()[names[connection_id]]
                assert delivered == list(range(len(delivered)))
                assert len(delivered) + meta["undelivered"] == 25
                assert meta["undelivered"] == 20


async def test_client_that_left_before_the_deadline_is_accounted_for(io_loop):
    """Its disconnect event counts the messages that were not delivered."""
    async with FaultyBackend() as backend:
        flags = [*backend.flags(), "--delivery_timeout=2"]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 20)
            await asyncio.gather(*(client.say() for client in clients))
            await backend.wait_for("message", 20)
            backend.make_unreachable("refused")
            await asyncio.gather(*(client.say(3) for client in clients))
            await leave(clients)
            await asyncio.sleep(3)  # beyond the deadline
            await backend.make_reachable()
            await backend.wait_for("disconnect", 20)
        for meta in backend.disconnects().values():
            assert (meta["code"], meta["initiator"]) == (1000, "client")
            assert meta["undelivered"] == 3


async def test_failing_backend_gets_one_probe_at_a_time(io_loop):
    """While it answers 503, about one attempt at a time; a 500 stops nobody."""
    async with FaultyBackend() as backend:
        async with Service(*backend.flags()) as service:
            clients = await talkers(service.ws_url, 100)
            poisoned = clients[0].name
            backend.make_unreachable("503")
            await asyncio.gather(*(client.say(3) for client in clients))
            # Each message had a first attempt, and some had a second one.
            await eventually(lambda: len(backend.attempts) >= 20)
            await asyncio.sleep(1)
            before = len(backend.attempts)
            await asyncio.sleep(6)
            assert 1 <= len(backend.attempts) - before <= 12
            probes = backend.attempts[before:]
            assert len({probe.connection_id for probe in probes}) == len(probes)
            await backend.make_reachable()
            backend.decide = lambda attempt: Reply(
                500
                if attempt.kind == "message"
                and attempt.event["message"].startswith(f"{poisoned} ")
                else 200
            )
            await backend.wait_for("message", 99 * 3)
            assert poisoned not in backend.numbers()
            backend.decide = lambda attempt: Reply()
            await backend.wait_for("message", 100 * 3)
            assert_complete(backend, clients)
            await leave(clients)


async def test_visits_to_a_dead_backend_are_bounded_and_accounted_for(io_loop):
    """Connect, send, close, at full speed: at most --max_pending events wait."""
    accepted, refused = Counter(), Counter()
    padding = " " + "x" * 5000

    async def visit_until(name: str, over: asyncio.Event) -> None:
        number = 0
        while not over.is_set():
            visitor = Talker(service.ws_url, f"{name}-{number}", padding=padding)
            number += 1
            try:
                await visitor.connect()
            except websockets.InvalidStatus as error:
                assert error.response.status_code == 503
                assert int(error.response.headers["Retry-After"]) >= 1
                refused[visitor.name] += 1
                await asyncio.sleep(0.05)
                continue
            await visitor.say()
            accepted[visitor.name] += 1
            # While reading is paused, no close frame is answered.
            visitor.client.close_timeout = 0.5
            await visitor.client.close()

    async with FaultyBackend() as backend:
        flags = [*backend.flags(), "--max_pending=2000", "--delivery_timeout=90"]
        async with Service(*flags) as service:
            before = memory(service.process.pid)
            backend.make_unreachable("refused")
            over = asyncio.Event()
            visitors = [
                asyncio.create_task(visit_until(f"visitor-{index}", over))
                for index in range(50)
            ]
            await eventually(lambda: len(refused) >= 200, 60)
            await asyncio.sleep(2)
            over.set()
            await asyncio.gather(*visitors)
            growth = memory(service.process.pid, "VmHWM") - before
            assert growth < 2000 * 10_000 + CONSTANT
            assert len(accepted) >= 1000
            await backend.make_reachable()
            await backend.wait_for("disconnect", len(accepted), 90)
            # One more message is relayed immediately: nothing blocks it.
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await eventually(lambda: talker.name in backend.numbers())
            await leave([talker])
        # The relay has exited, after every disconnect event.
        lost = sum(meta["undelivered"] for meta in backend.disconnects().values())
        assert lost == 0
        assert set(backend.numbers()) == {*accepted, talker.name}
        assert len(backend.disconnects()) == len(accepted) + 1


# The stop.


async def test_sigterm_under_load_loses_nothing(io_loop):
    """Each read message arrives; clients get 1001 one after another; exit 0."""
    async with FaultyBackend(lambda attempt: Reply(delay=0.02)) as backend:
        flags = [*backend.flags(), "--drain_spread=4"]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, CLIENTS)
            enough = asyncio.Event()
            talks = [asyncio.create_task(c.talk(PAUSE, enough)) for c in clients]
            ends = [asyncio.create_task(client.until_closed()) for client in clients]
            await asyncio.sleep(2)
            service.process.send_signal(signal.SIGTERM)
            assert set(await asyncio.gather(*ends)) == {1001}
            await asyncio.gather(*talks)
            assert await asyncio.wait_for(service.process.wait(), 60) == 0
        # What a client's socket took before the close frame came, was read: the
        # relay reads up to the answering close frame.
        assert_complete(backend, clients)
        assert len(backend.disconnects()) == CLIENTS
        for meta in backend.disconnects().values():
            assert (meta["code"], meta["undelivered"]) == (1001, 0)
        closed_at = sorted(client.closed_at for client in clients)
        assert closed_at[-1] - closed_at[0] > 2.5
        # Never two fifths of them within that time.
        for first, last in zip(closed_at, closed_at[2 * CLIENTS // 5 :], strict=False):
            assert last - first > 0.4


async def test_handshakes_are_accepted_during_drain_delay(io_loop):
    """/readyz is 503 at once; handshakes are rejected only after --drain_delay."""
    async with RecordingBackend() as backend:
        flags = [*backend.flags("message", "disconnect"), "--drain_delay=3"]
        async with Service(*flags) as service:
            ready = f"{service.callback_url}/readyz"
            assert (await backend.call(ready, "GET")).code == 200
            service.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE):
                while (await backend.call(ready, "GET")).code != 503:
                    await asyncio.sleep(0.01)
            (late,) = await talkers(service.ws_url, 1)
            await late.say()
            assert await late.until_closed() == 1001
            assert await asyncio.wait_for(service.process.wait(), 30) == 0
        assert len(backend.of("message")) == len(backend.of("disconnect")) == 1


# A crash.


async def crash(service: Service) -> None:
    """End it as a bug in C or the out-of-memory killer would."""
    service.process.kill()
    await service.process.wait()


async def test_restart_after_sigkill_reports_each_connection_once(io_loop, tmp_path):
    """The next run sends one disconnect event each, for the dead run."""
    state = f"--state_dir={tmp_path}"
    async with FaultyBackend() as backend:
        flags = [*backend.flags("connect", "message", "disconnect"), state]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 500)
            early = await talkers(service.ws_url, 50, "early")
            await asyncio.gather(*(client.say() for client in clients[:250]))
            await backend.wait_for("message", 250)
            await leave(early)
            await backend.wait_for("disconnect", 50)
            # The relay has read the responses.
            (journal,) = tmp_path.glob("*.journal")
            await eventually(lambda: journal.read_bytes().count(b"\n-") == 50)
            reported = set(backend.disconnects())
            opened = {a.connection_id: a.event["meta"] for a in backend.of("connect")}
            await crash(service)
        ends = await asyncio.gather(*(client.until_closed() for client in clients))
        assert set(ends) == {1006}

        async with Service(*flags) as service:
            (talker,) = await talkers(service.ws_url, 1)  # accepted at once
            await talker.say()
            await backend.wait_for("disconnect", 550)
            await leave([talker])
        async with Service(*flags) as service:  # it has no events to send
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await backend.wait_for("message", 252)
            await leave([talker])

        attempts = Counter(
            a.connection_id for a in backend.attempts if a.kind == "disconnect"
        )
        assert set(attempts.values()) == {1}
        assert len(attempts) == 552
        for connection_id in opened.keys() - reported:
            meta = backend.disconnects()[connection_id]
            assert (meta["code"], meta["reason"]) == (1006, "instance lost")
            assert meta["initiator"] == "relay"
            assert meta["instance"] == opened[connection_id]["instance"]


async def test_recovered_disconnects_survive_an_unreachable_backend(
    io_loop, tmp_path
):
    """The backend is down at the restart, and the relay restarts once more."""
    flags = [f"--state_dir={tmp_path}"]
    async with FaultyBackend() as backend:
        flags += backend.flags()
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 50)
            await asyncio.gather(*(client.say() for client in clients))
            await backend.wait_for("message", 50)
            await crash(service)
        backend.make_unreachable("refused")
        async with Service(*flags) as service:
            (late,) = await talkers(service.ws_url, 1)
            await crash(service)
        async with Service(*flags) as service:
            await backend.make_reachable()
            await backend.wait_for("disconnect", 50)
        assert {meta["reason"] for meta in backend.disconnects().values()} == {
            "instance lost"
        }
        assert set(backend.names()) <= set(backend.disconnects())
        await late.until_closed()
        await asyncio.gather(*(client.until_closed() for client in clients))


def truncate(file: Path) -> None:
    """Truncate a journal, as a full disk would."""
    file.write_bytes(file.read_bytes()[: -(file.stat().st_size // 2) - 1])


def corrupt(file: Path) -> None:
    """Corrupt a journal, as a bad disk would."""
    file.write_bytes(bytes(range(255, -1, -1)) * (file.stat().st_size // 256 + 1))


def empty(file: Path) -> None:
    """Empty a journal, as a power loss might."""
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncate, corrupt, empty])
async def test_corrupt_journal_is_reported_and_never_fatal(io_loop, tmp_path, spoil):
    """The relay starts, logs one error, and serves."""
    async with FaultyBackend() as backend:
        flags = [*backend.flags(), f"--state_dir={tmp_path}"]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 20)
            await asyncio.gather(*(client.say() for client in clients))
            await backend.wait_for("message", 20)
            await crash(service)
        for client in clients:
            await client.until_closed()
        spoilt = [file for file in tmp_path.iterdir() if file.stat().st_size]
        assert spoilt
        for file in spoilt:
            spoil(file)
        async with Service(*flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            await talker.say()
            await backend.wait_for("message", 21)
            await leave([talker])
            said = [line for line in service.log if str(tmp_path) in line]
            assert said and "journal" in said[0]
        known = set(backend.names())
        assert set(backend.disconnects()) <= known  # no unknown id
        async with Service(*flags) as service:
            assert not [line for line in service.log if str(tmp_path) in line]


async def test_state_directory_is_for_one_process(io_loop, tmp_path):
    """A second one exits with one line; the first is not affected."""
    async with FaultyBackend() as backend:
        flags = [*backend.flags(), f"--state_dir={tmp_path}"]
        async with Service(*flags) as service:
            (talker,) = await talkers(service.ws_url, 1)
            second = await asyncio.create_subprocess_exec(
                *service.command,
                *service.flags,
                cwd=PROJECT,
                stderr=asyncio.subprocess.PIPE,
            )
            _, said = await asyncio.wait_for(second.communicate(), DEADLINE)
            assert second.returncode == 1
            assert said.count(b"\n") == 1 and str(tmp_path).encode() in said
            await talker.say()
            await backend.wait_for("message", 1)
            await leave([talker])
        async with Service(*flags):  # the clean stop has released it
            pass


# Clients that fail.


async def test_client_that_stops_reading_is_bounded(io_loop):
    """256 MiB are sent to it: 429, then 410; other clients are not affected."""
    push, total = bytes(256 * 1024), 256 * MIB
    answers: Counter[int] = Counter()

    async with RecordingBackend() as backend:
        sends: dict[str, str] = {}

        async def answer(handler, event) -> None:
            sends[event["message"]] = event["meta"]["send"]
            if event["message"].startswith("ping"):
                reply = await backend.call(event["meta"]["send"], body=b"pong")
                assert reply.code == 200

        backend.answers["message"] = answer
        flags = [*backend.flags("message", "disconnect"), "--send_timeout=4"]
        async with Service(*flags) as service, contextlib.AsyncExitStack() as stack:
            slow = stack.enter_context(await RawClient.connect(service.ws_url))
            await slow.send("slow")
            others = await talkers(service.ws_url, 20, "ping")
            await backend.wait_for("message", 1)
            exchanges, over = 0, asyncio.Event()

            async def exchange(talker: Talker) -> None:
                nonlocal exchanges
                while not over.is_set():
                    await talker.say()
                    assert await asyncio.wait_for(talker.client.recv(), DEADLINE)
                    exchanges += 1
                    await asyncio.sleep(0.1)

            async def pump() -> None:
                while not answers[410] or pushed() < total:
                    reply = await backend.call(sends["slow"], body=push)
                    answers[reply.code] += 1
                    if reply.code == 429:
                        assert int(reply.headers["Retry-After"]) >= 1

            def pushed() -> int:
                return sum(answers.values()) * len(push)

            before = memory(service.process.pid)
            talks = [asyncio.create_task(exchange(talker)) for talker in others]
            await asyncio.gather(*(pump() for _ in range(8)))
            over.set()
            await asyncio.gather(*talks)
            growth = memory(service.process.pid, "VmHWM") - before
            assert growth < 1 * MIB + CONSTANT
            assert set(answers) == {200, 429, 410}
            assert exchanges >= 20
            (event,) = await backend.wait_for("disconnect", 1)
            assert (event["meta"]["code"], event["meta"]["initiator"]) == (
                1008,
                "relay",
            )
            await leave(others)


async def test_client_that_vanishes_is_reported(io_loop):
    """No FIN, no pong: 1006 after the ping's interval and timeout."""
    async with FaultyBackend() as backend:
        flags = [*backend.flags(), "--ping_interval=1", "--ping_timeout=1"]
        async with Service(*flags) as service, SilentProxy(service.ws_url) as proxy:
            vanishing = await talkers(proxy.url, 20, "vanishing")
            staying = await talkers(service.ws_url, 20, "staying")
            for client in (*vanishing, *staying):
                await client.say(3)
            await backend.wait_for("message", 120)
            proxy.stop_forwarding()
            await backend.wait_for("disconnect", 20)
            names = backend.names()
            for connection_id, meta in backend.disconnects().items():
                assert names[connection_id].startswith("vanishing")
                assert (meta["code"], meta["initiator"]) == (1006, "relay")
            assert all(client.is_open for client in staying)
            await leave(staying)
            for client in vanishing:
                client.client.transport.abort()


@pytest.mark.parametrize("size", [400, 60_000])
async def test_flood_into_a_stopped_backend_is_bounded(io_loop, size):
    """A client that sends at full speed uses only its queue, and stays."""
    async with BackendProcess() as backend:
        async with (
            Service(*backend.flags()) as service,
            contextlib.AsyncExitStack() as stack,
        ):
            client = stack.enter_context(await RawClient.connect(service.ws_url))
            await client.send("flood 0")
            await backend.wait_for("message", 1)
            backend.stop()
            before = memory(service.process.pid)
            sent = 1

            async def flood() -> None:
                nonlocal sent
                while True:
                    count = 600_000 // size
                    await client.send_frames(
                        b"".join(
                            masked(f"flood {number}".ljust(size))
                            for number in range(sent, sent + count)
                        )
                    )
                    sent += count

            # Its sending stops, since the relay reads nothing more.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(flood(), 6)
            growth = memory(service.process.pid, "VmHWM") - before
            assert growth < 4 * MIB + CONSTANT
            backend.go_on()
            await eventually(lambda: backend.counts["message"] >= sent, 60)
            assert not backend.counts["disconnect"]
            client.close()
            await backend.wait_for("disconnect", 1)
        numbers = backend.numbers()["flood"]
        assert sorted(numbers) == list(range(len(numbers)))


# A backend that is slow, or fails during responses.


@pytest.mark.parametrize("flags", [[], ["--order_wait=inf", "--backend_timeout=30"]])
async def test_slow_backend_closes_no_client(io_loop, flags):
    """8 s per response, pings every 2 s, and a client whose queue is full."""
    slow = True

    def decide(attempt) -> Reply:
        return Reply(delay=8 if slow and attempt.kind == "message" else 0)

    async with FaultyBackend(decide) as backend:
        flags = [*backend.flags(), "--ping_interval=2", "--ping_timeout=2", *flags,
                 "--connection_queue_messages=2"]
        async with Service(*flags) as service:
            clients = await talkers(service.ws_url, 50)
            for client in clients[:10]:
                await client.say(25)
            for client in clients[10:]:
                await client.say(2)
            await asyncio.sleep(12)
            assert all(client.is_open for client in clients)
            assert not backend.counts["disconnect"]
            slow = False
            backend.release()
            await backend.wait_for("message", 10 * 25 + 40 * 2)
            assert all(client.is_open for client in clients)
            assert_complete(backend, clients, in_order="--order_wait=inf" in flags)
            await leave(clients)


async def test_every_kind_of_failure_in_turn(io_loop):
    """Half of the requests fail, each in another way; all messages arrive."""
    faults = [
        Reply(500), Reply(503, headers=("Retry-After: 1",)), Reply(429),
        Reply(delay=0.3), Reply(fault="reset"), Reply(fault="reset", delay=0.1),
        Reply(fault="cut"), Reply(fault="garbage"), Reply(fault="endless"),
        Reply(503, fault="cut"), Reply(503, fault="endless"),
    ]
    seen: Counter[str] = Counter()

    def decide(attempt) -> Reply:
        seen[attempt.webhook_id] += 1
        if seen[attempt.webhook_id] > 1:
            return Reply()
        return faults[sum(seen.values()) % len(faults)]

    async with FaultyBackend(decide) as backend:
        async with Service(*backend.flags()) as service:
            clients = await talkers(service.ws_url, 20)
            await asyncio.gather(*(client.say(10) for client in clients))
            await backend.wait_for("message", 200)
            assert all(client.is_open for client in clients)
            assert_complete(backend, clients)
            await leave(clients)
            await backend.wait_for("disconnect", 20)
        assert backend.largest_body < 32 * MIB


# Hosts that vanish.

def test_vanished_hosts_are_detected():
    """Runs `vanished_host.py` in its own network namespace."""
    command = ["unshare", "--net", *(["--map-root-user"] if os.getuid() else [])]
    probe = [*command, "ip", "link", "add", "near", "type", "veth", "peer", "far"]
    try:
        subprocess.run(probe, check=True, capture_output=True, timeout=DEADLINE)
    except (OSError, subprocess.CalledProcessError) as error:
        leave_out(f"no network namespace can be made here: {error}")
    inner = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-q", *inherited_warnings(),
         str(Path(__file__).with_name("vanished_host.py"))],
        check=False, cwd=PROJECT, capture_output=True, text=True,
    )
    assert inner.returncode == 0, inner.stdout + inner.stderr
    assert "2 passed" in inner.stdout


def inherited_warnings() -> list[str]:
    """The -W flags of this Python."""
    return [
        part
        for pair in itertools.pairwise(sys.argv[1:])
        if pair[0] == "-W"
        for part in pair
    ]


async def test_messages_wait_for_a_descriptor(io_loop):
    """A lack of descriptors does not count as an unreachable backend."""
    flags = ("--breaker_attempts=1", "--breaker_connections=1", "--log_format=text")
    async with FaultyBackend() as backend:
        async with Service(*backend.flags("message"), *flags) as service:
            clients = [await websockets.connect(service.ws_url) for _ in range(5)]
            process = service.process.pid
            limits = resource.prlimit(process, resource.RLIMIT_NOFILE)
            open_files = len(os.listdir(f"/proc/{process}/fd"))
            resource.prlimit(process, resource.RLIMIT_NOFILE, (open_files, limits[1]))
            for number, client in enumerate(clients):
                await client.send(str(number))
            await eventually(
                lambda: any("too many open files" in line for line in service.log)
            )
            resource.prlimit(process, resource.RLIMIT_NOFILE, limits)
            await eventually(lambda: len(backend.attempts) == len(clients))
            for client in clients:
                await client.close()
    for unwanted in ("backend unavailable", "cannot connect"):
        assert not any(unwanted in line for line in service.log)
