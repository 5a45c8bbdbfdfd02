"""Leases in Redis: when a relay dies, a survivor sends its disconnect events."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cluster import (
    CLIENTS,
    TTL,
    clients_of,
    ids_of,
    instance_of,
    kill,
    lost,
    no_keys,
    relays,
    status_of,
)
from faults import SilentProxy
from redis_server import RedisServer, Server
from service import (
    DEADLINE,
    RecordingBackend,
    Service,
    eventually,
    refusal,
    withhold,
)


@pytest.mark.long
@pytest.mark.parametrize("server", ["redis", "valkey"])
@pytest.mark.gen_test
async def test_connections_of_a_killed_relay_end_once(
    tmp_path: Path, server: Server
) -> None:
    """A survivor sends each event once, with the dead run's name, and no others."""
    async with (
        RedisServer(tmp_path, server) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 3) as (dead, one, two),
    ):
        instance = await instance_of(dead, backend)
        due = await ids_of(backend, await clients_of(dead))
        living = await ids_of(
            backend, await clients_of(one) + await clients_of(two)
        )
        kill(dead)
        await no_keys(redis, instance)
        assert lost(backend) == dict.fromkeys(due, 1)
        for kind, event, headers in backend.events:
            if kind == "disconnect":
                assert event["meta"] == {
                    "connection_id": event["connection_id"], "instance": instance,
                    "code": 1006, "reason": "instance lost", "initiator": "relay",
                    "duration": 0.0, "undelivered": 0, "refused": 0,
                }  # fmt: skip
                assert headers["Webhook-Id"] == f"{event['connection_id']}-disconnect"
        for client in living.values():
            await client.close()
        await backend.wait_for("disconnect", len(due) + len(living))
        assert set(lost(backend)) == set(due)


@pytest.mark.long
@pytest.mark.gen_test
async def test_two_killed_at_once_are_both_noticed(tmp_path: Path) -> None:
    """The last one of three sends the events of both."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 3) as (one, two, survivor),
    ):
        instances = [await instance_of(relay, backend) for relay in (one, two)]
        due = await ids_of(backend, await clients_of(one) + await clients_of(two))
        kill(one, two)
        for instance in instances:
            await no_keys(redis, instance)
        assert lost(backend) == dict.fromkeys(due, 1)
        assert (await status_of(survivor, backend))["cluster"]["reaped"] == len(due)


@pytest.mark.long
@pytest.mark.gen_test
async def test_reaper_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """Another one sends what is left: events may come twice, with the same id."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 3) as (first, *others),
    ):
        instance = await instance_of(first, backend)
        due = await ids_of(backend, await clients_of(first))
        release = withhold(backend, "disconnect")
        kill(first)
        names = {await instance_of(relay, backend): relay for relay in others}
        await backend.wait_for("disconnect", len(due))
        reaper = await redis.client.get(f"socketdock:{{{instance}}}:reaper")
        kill(names[reaper])
        release.set()
        await no_keys(redis, instance)
        await no_keys(redis, reaper)
        assert set(lost(backend)) == set(due)
        assert max(lost(backend).values()) <= 2


@pytest.mark.long
@pytest.mark.parametrize("server", ["redis", "valkey"])
@pytest.mark.gen_test
async def test_paused_relay_finds_itself_taken_for_dead(
    tmp_path: Path, server: Server
) -> None:
    """It sends nothing more of what others have ended, and goes on by another name."""
    async with (
        RedisServer(tmp_path, server) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 2) as (paused, _),
    ):
        instance = await instance_of(paused, backend)
        clients = await clients_of(paused)
        due = await ids_of(backend, clients)
        async with paused.stalled(0):
            for client in clients:  # wait in its sockets when it goes on
                await client.send("too late")
            await no_keys(redis, instance)
        for client in clients:
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert client.close_code == 1012
        assert lost(backend) == dict.fromkeys(due, 1)
        renamed = await instance_of(paused, backend)
        assert renamed != instance
        assert (await status_of(paused, backend))["cluster"]["fenced"] == 1
        again = await ids_of(backend, await clients_of(paused, 1))
        (event,) = [
            event for event in backend.of("message")
            if event["meta"]["connection_id"] in again
        ]  # fmt: skip
        assert event["meta"]["instance"] == renamed
        assert await redis.client.smembers(
            f"socketdock:{{{renamed}}}:connections"
        ) == set(again)
        assert "too late" not in [event["message"] for event in backend.of("message")]
        assert len(backend.of("disconnect")) == len(due)


@pytest.mark.long
@pytest.mark.gen_test
async def test_retries_stop_when_others_have_ended_the_connection(
    tmp_path: Path,
) -> None:
    """A message or disconnect event that waits for its retry does not leave."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 2) as (paused, _),
    ):
        instance = await instance_of(paused, backend)
        clients = await clients_of(paused, 2)
        due = await ids_of(backend, clients)
        failing: list[str] = []

        async def fail(handler: Any, event: Any) -> None:
            failing.append(event["meta"]["connection_id"])
            handler.set_status(503)
            handler.set_header("Retry-After", "3")

        backend.answers["message"] = backend.answers["disconnect"] = fail
        await clients[0].send("again and again")
        await clients[1].close()
        await eventually(lambda: len(failing) == 2)
        async with paused.stalled(0):
            backend.answers.clear()
            seen = len(backend.of("message"))
            await no_keys(redis, instance)
        await asyncio.wait_for(clients[0].wait_closed(), DEADLINE)
        await ids_of(backend, await clients_of(paused, 1))
        assert lost(backend) == dict.fromkeys(due, 1)
        assert len(backend.of("message")) == seen + 1
        assert len(backend.of("disconnect")) == 1 + len(due)


@pytest.mark.long
@pytest.mark.gen_test
async def test_stall_without_lease_or_tombstone_closes_the_connections(
    tmp_path: Path,
) -> None:
    """With their own disconnect events: nobody else has sent one."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 1) as (paused,),
    ):
        instance = await instance_of(paused, backend)
        clients = await clients_of(paused)
        await ids_of(backend, clients)
        async with paused.stalled(0):
            await no_lease(redis, instance)
        for client in clients:
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert client.close_code == 1012
        await backend.wait_for("disconnect", len(clients))
        assert {event["meta"]["code"] for event in backend.of("disconnect")} == {1012}
        await no_keys(redis, instance)


async def no_lease(redis: RedisServer, instance: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while await redis.client.exists(f"socketdock:{{{instance}}}:lease"):
            await asyncio.sleep(0.05)


@pytest.mark.long
@pytest.mark.gen_test
async def test_events_wait_a_few_seconds_for_redis(tmp_path: Path) -> None:
    """After a stall; then relaying goes on, and Redis decides when it answers."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 1) as (paused,),
    ):
        instance = await instance_of(paused, backend)
        clients = await clients_of(paused, 2)
        await ids_of(backend, clients)
        async with paused.stalled(0):
            await clients[0].send("goes on")
            await no_lease(redis, instance)
            redis.pause()
        try:
            await backend.wait_for("message", 3)
            assert any("stood still" in line for line in paused.log)
        finally:
            redis.resume()
        for client in clients:
            await asyncio.wait_for(client.wait_closed(), DEADLINE)
            assert client.close_code == 1012
        await backend.wait_for("disconnect", 2)


@pytest.mark.long
@pytest.mark.gen_test
async def test_relay_that_is_cut_off_relays_on_until_redis_is_back(
    tmp_path: Path,
) -> None:
    """Others send its events meanwhile; what it took since then ends by itself."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 1) as (_,),
        SilentProxy(redis.url) as network,
    ):
        address = network.url.replace("ws://", "redis://")
        async with relays(redis, backend, 1, f"--cluster={address}") as (cut_off,):
            instance = await instance_of(cut_off, backend)
            clients = await clients_of(cut_off, 3)
            due = await ids_of(backend, clients)
            network.stop_forwarding()
            await no_keys(redis, instance)
            assert lost(backend) == dict.fromkeys(due, 1)
            clients += await clients_of(cut_off, 2)
            all_of_them = await ids_of(backend, clients)  # relaying goes on
            own = set(all_of_them) - set(due)
            network.go_on()
            for client in clients:
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
                assert client.close_code == 1012
            await backend.wait_for("disconnect", len(due) + len(own))
            assert await instance_of(cut_off, backend) != instance
        ends = {
            event["connection_id"]: event["meta"]["code"]
            for event in backend.of("disconnect")
        }
        assert ends == dict.fromkeys(due, 1006) | dict.fromkeys(own, 1012)
        assert len(backend.of("disconnect")) == len(ends)


@pytest.mark.long
@pytest.mark.gen_test
async def test_without_redis_nothing_is_closed_or_reaped(tmp_path: Path) -> None:
    """Relaying goes on; Redis that is back empty gets the connections again."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 2) as (dead, survivor),
    ):
        clients = await clients_of(dead) + await clients_of(survivor)
        await redis.kill()
        for relay in (dead, survivor):
            await eventually(lambda relay=relay: "is away" in str(relay.log))
        await asyncio.sleep(1.5 * TTL)  # longer than any lease
        clients += await clients_of(dead, 1)
        due = await ids_of(backend, clients)
        assert not (await status_of(dead, backend))["cluster"]["lease"]
        response = await backend.call(f"{dead.callback_url}/metrics", "GET")
        assert b"socketdock_cluster_lease 0.0" in response.body
        assert not backend.of("disconnect")
        await redis.start()
        instances = [await instance_of(relay, backend) for relay in (dead, survivor)]
        for instance in instances:
            await has_ids(redis, instance, CLIENTS)
        kill(dead)
        await no_keys(redis, instances[0])
        assert len(lost(backend)) == CLIENTS + 1
        assert set(lost(backend)) <= set(due)
        assert max(lost(backend).values()) == 1


async def has_ids(redis: RedisServer, instance: str, least: int) -> None:
    """Wait until an instance has written its connections."""
    async with asyncio.timeout(DEADLINE):
        key = f"socketdock:{{{instance}}}:connections"
        while await redis.client.scard(key) < least:
            await asyncio.sleep(0.05)


@pytest.mark.long
@pytest.mark.gen_test
async def test_flushed_redis_gets_leases_and_connections_again(
    tmp_path: Path,
) -> None:
    """Nobody is taken for dead meanwhile."""
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 2) as (one, two),
    ):
        clients = await clients_of(one) + await clients_of(two)
        await redis.client.flushall()
        for relay in (one, two):
            await has_ids(redis, await instance_of(relay, backend), CLIENTS)
        await asyncio.sleep(1.5 * TTL)
        await ids_of(backend, clients)
        assert not backend.of("disconnect")


@pytest.mark.parametrize("server", ["redis", "valkey"])
@pytest.mark.gen_test
async def test_stop_leaves_nothing_behind(tmp_path: Path, server: Server) -> None:
    """Ids are there while connections are open, and all keys go at the stop."""
    async with RedisServer(tmp_path, server) as redis, RecordingBackend() as backend:
        async with relays(redis, backend, 1) as (relay,):
            instance = await instance_of(relay, backend)
            clients = await clients_of(relay, 3)
            due = await ids_of(backend, clients)
            key = f"socketdock:{{{instance}}}:connections"
            assert await redis.client.smembers(key) == set(due)
            await clients[0].close()
            await backend.wait_for("disconnect", 1)
            await until_scard(redis, key, 2)
        assert await redis.client.keys("*") == []
        assert len(backend.of("disconnect")) == 3


async def until_scard(redis: RedisServer, key: str, number: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while await redis.client.scard(key) != number:
            await asyncio.sleep(0.02)


@pytest.mark.gen_test
async def test_without_redis_at_the_start_clients_are_accepted(tmp_path: Path) -> None:
    """The lease is taken when Redis is there."""
    async with RedisServer(tmp_path) as redis, RecordingBackend() as backend:
        await redis.kill()
        async with Service(
            *backend.flags("message", "disconnect"),
            f"--cluster={redis.url}", f"--lease_ttl={TTL}",
        ) as relay:  # fmt: skip
            due = await ids_of(backend, await clients_of(relay, 2))
            await redis.start()
            instance = await instance_of(relay, backend)
            await has_ids(redis, instance, 2)
            key = f"socketdock:{{{instance}}}:connections"
            assert await redis.client.smembers(key) == set(due)


@pytest.mark.long
@pytest.mark.gen_test
async def test_restart_with_a_state_dir_sends_what_nobody_has_sent(
    tmp_path: Path,
) -> None:
    """It takes the lock of its dead run at once, though the lease has not run out."""
    state = (f"--state_dir={tmp_path / 'state'}", "--lease_ttl=600")
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 1) as (survivor,),
    ):
        async with relays(redis, backend, 1, *state) as (dead,):
            instance = await instance_of(dead, backend)
            due = await ids_of(backend, await clients_of(dead))
            kill(dead)
            await dead.process.wait()
        async with relays(redis, backend, 1, *state) as (restarted,):
            await no_keys(redis, instance)
            assert lost(backend) == dict.fromkeys(due, 1)
            assert (await status_of(restarted, backend))["cluster"]["reaped"] == 0
        assert (await status_of(survivor, backend))["cluster"]["reaped"] == 0


@pytest.mark.long
@pytest.mark.gen_test
async def test_late_restart_with_a_state_dir_sends_nothing_again(
    tmp_path: Path,
) -> None:
    """A survivor has sent the events of its dead run."""
    state = f"--state_dir={tmp_path / 'state'}"
    async with (
        RedisServer(tmp_path) as redis,
        RecordingBackend() as backend,
        relays(redis, backend, 1) as (survivor,),
    ):
        async with relays(redis, backend, 1, state) as (dead,):
            instance = await instance_of(dead, backend)
            due = await ids_of(backend, await clients_of(dead))
            kill(dead)
            await dead.process.wait()
        await no_keys(redis, instance)
        async with relays(redis, backend, 1, state) as (restarted,):
            await eventually(lambda: "lost by" in str(restarted.log))
            await eventually(lambda: not journals(tmp_path / "state", instance))
            assert lost(backend) == dict.fromkeys(due, 1)
        assert (await status_of(survivor, backend))["cluster"]["reaped"] == len(due)


def journals(folder: Path, instance: str) -> list[Path]:
    return list(folder.glob(f"{instance.rpartition('/')[2]}*"))


def test_without_redis_py_the_start_names_what_to_install(tmp_path: Path) -> None:
    """One line; without --cluster nothing needs it."""
    (tmp_path / "redis.py").write_text("raise ImportError('it is not here')\n")
    line = refusal("--cluster=redis://h", PYTHONPATH=str(tmp_path))
    assert "pip install socketdock[redis]" in line
    assert "--cluster" in line


def test_invalid_options_are_rejected(tmp_path: Path) -> None:
    """The URL is not shown."""
    line = refusal("--cluster=http://user:s3cret@host")
    assert "--cluster" in line
    assert "s3cret" not in line
    for ttl in "0.5", "1e300":
        assert "--lease_ttl" in refusal("--cluster=redis://h", f"--lease_ttl={ttl}")
    assert "--cluster_prefix" in refusal("--cluster=redis://h", "--cluster_prefix={x}")
