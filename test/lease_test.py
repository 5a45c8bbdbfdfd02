"""Decisions on leases, each a script in Redis; and what `check` says of Redis."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis_server import RedisServer, Server
from service import DEADLINE, ended, eventually

from backends.cluster.keys import Keys
from backends.cluster.lease import Lease, LeaseSettings
from backends.cluster.reaper import Living, Lock, OwnDeadRuns, Redis
from backends.cluster.stall import StallHold
from backends.redis_client import RedisClient
from backends.redis_url import parse_address

SERVERS = ("redis", "valkey")
KEYS = Keys("test")
DEAD = "dead/0"


@contextlib.asynccontextmanager
async def client_of(redis: RedisServer) -> AsyncIterator[RedisClient]:
    client = RedisClient(parse_address(redis.url, "--cluster"), "--cluster")
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def lease_of(
    client: RedisClient, ttl: float = 30.0, address: str = ""
) -> AsyncIterator[Lease]:
    """A lease of this process, that is held."""
    settings = LeaseSettings(ttl, address)
    lease = Lease(client, KEYS, "here/1", settings, StallHold(ttl))
    try:
        await eventually(lambda: lease.held)
        yield lease
    finally:
        await lease.release()


async def written(lease: Lease, connection_id: str) -> None:
    """Add an id, and wait until Redis has answered."""
    answered = lease.ids.add(connection_id)
    assert answered is not None
    await answered


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.gen_test
async def test_ids_are_not_added_behind_a_tombstone(
    tmp_path: Path, server: Server
) -> None:
    """The run finds itself taken for dead, and writes them under its new name."""
    async with (
        RedisServer(tmp_path, server) as redis,
        client_of(redis) as client,
        lease_of(client) as lease,
    ):
        reaped: list[set[str]] = []
        lease.on_fenced = lambda instance, ids: reaped.append(set(ids))
        await written(lease, "before")
        assert await redis.client.smembers(KEYS.connections("here/1")) == {"before"}
        await redis.client.delete(KEYS.lease("here/1"))
        other = Lock(Redis(client, KEYS, DEADLINE), "here/1", "other/1", 30.0)
        assert await other.take() == "taken"
        await written(lease, "after")
        await eventually(lambda: bool(reaped) and lease.held)
        assert reaped == [{"before"}]
        assert await redis.client.smembers(KEYS.connections("here/1")) == {"before"}
        renamed = lease.instance
        assert renamed.startswith("here/") and renamed != "here/1"
        assert await redis.client.smembers(KEYS.connections(renamed)) == {"after"}
        await other.give_back(finished=True)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.gen_test
async def test_no_tombstone_where_a_lease_is_and_one_reaper_at_a_time(
    tmp_path: Path, server: Server
) -> None:
    """The lock of a reaper that ends nothing runs out."""
    async with RedisServer(tmp_path, server) as server_, client_of(server_) as client:
        redis = Redis(client, KEYS, DEADLINE)
        first, second = (Lock(redis, DEAD, name, 60.0) for name in ("a/1", "b/1"))
        await server_.client.set(KEYS.lease(DEAD), "", px=60_000)
        await server_.client.sadd(KEYS.connections(DEAD), "id")
        assert await first.take() == "alive"
        assert not await server_.client.exists(KEYS.dead(DEAD))
        await server_.client.delete(KEYS.lease(DEAD))
        assert await first.take() == "taken"
        assert await server_.client.smembers(KEYS.dead(DEAD)) == {"", "id"}
        assert 0 < await server_.client.pttl(KEYS.reaper(DEAD)) <= 5_000
        assert await second.take() == "busy"
        await first.give_back(finished=False)
        assert await server_.client.smembers(KEYS.connections(DEAD)) == {"id"}
        assert await second.take() == "taken"
        await second.give_back(finished=True)
        assert await server_.client.keys("*") == [KEYS.dead(DEAD)]


@pytest.mark.gen_test
async def test_start_takes_over_its_own_dead_run(tmp_path: Path) -> None:
    """Though the lease has not run out; ids that others have ended are not due."""
    async with RedisServer(tmp_path) as server, client_of(server) as client:
        runs = OwnDeadRuns(Redis(client, KEYS, DEADLINE), "here/1", 60.0)
        await server.client.set(KEYS.lease(DEAD), "", px=60_000)
        await server.client.sadd(KEYS.connections(DEAD), "left", "sent")
        assert await runs.claim(DEAD, ["left", "sent", "unknown"]) == {
            "left", "sent", "unknown",
        }  # fmt: skip
        assert not await server.client.exists(KEYS.lease(DEAD))
        await runs.sent(DEAD, "sent")
        await runs.finish(DEAD, finished=False)
        assert await runs.claim(DEAD, ["left", "sent", "unknown"]) == {
            "left", "unknown",
        }  # fmt: skip
        await runs.finish(DEAD, finished=True)
        assert await server.client.keys("*") == [KEYS.dead(DEAD)]


@pytest.mark.gen_test
async def test_connections_that_ended_without_redis_are_not_reaped(
    tmp_path: Path,
) -> None:
    """When Redis is back, it has exactly the connections that are open."""
    async with (
        RedisServer(tmp_path, aof=True) as redis,
        client_of(redis) as client,
        lease_of(client, ttl=1.5) as lease,
    ):
        for id_ in ("stays", "ends"):
            await written(lease, id_)
        await redis.kill()
        await eventually(lambda: not lease.held)
        lease.ids.remove("ends")
        assert lease.ids.add("begins") is None  # nothing waits
        await redis.start()
        await eventually(lambda: lease.held)
        key = KEYS.connections("here/1")
        assert await redis.client.smembers(key) == {"stays", "begins"}
        assert not lease.may_reap


@pytest.mark.gen_test
async def test_lease_is_given_back_before_its_pipeline_reconnects(
    tmp_path: Path,
) -> None:
    """Redis is back, but the pipeline waits for its next try: nothing is left."""
    async with RedisServer(tmp_path, aof=True) as redis, client_of(redis) as client:
        lease = Lease(client, KEYS, "here/1", LeaseSettings(30.0), StallHold(30.0))
        await eventually(lambda: lease.held)
        await written(lease, "ended meanwhile")
        await written(lease, "due")
        await redis.kill()
        await eventually(lambda: lease.ids.add("away") is None)
        for ended in ("ended meanwhile", "away"):
            lease.ids.remove(ended)
        await redis.start()
        await lease.release()
        assert await redis.client.smembers(KEYS.connections("here/1")) == {"due"}
        assert not await redis.client.exists(KEYS.lease("here/1"))


@pytest.mark.gen_test
async def test_lease_of_an_address_is_found(tmp_path: Path) -> None:
    """For callbacks: None while Redis is away."""
    async with RedisServer(tmp_path) as redis, client_of(redis) as client:
        living = Living(Redis(client, KEYS, DEADLINE))
        async with lease_of(client, address="10.0.0.3:8765") as lease:
            asked = [living.has_lease("10.0.0.3:8765") for _ in range(3)]
            assert await asyncio.gather(*asked) == [True] * 3
            assert await living.has_lease("10.0.0.4:8765") is False
            await redis.client.delete(KEYS.lease(lease.instance))
            assert await living.has_lease("10.0.0.3:8765") is False
        await redis.kill()
        assert await living.has_lease("10.0.0.3:8765") is None


@pytest.mark.gen_test
async def test_leases_in_a_cluster(tmp_path: Path) -> None:
    """The keys of an instance share a slot; that of all instances has another."""
    async with RedisServer(tmp_path, cluster=True) as redis:
        await redis.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        async with asyncio.timeout(DEADLINE):
            info = {}
            while info.get("cluster_state") != "ok":
                await asyncio.sleep(0.05)
                info = await redis.client.execute_command("CLUSTER INFO")
        address = parse_address(f"redis+cluster://{redis.place}", "--cluster")
        client = RedisClient(address, "--cluster")
        async with lease_of(client) as lease:
            await written(lease, "id")
            assert await redis.client.hkeys(KEYS.instances) == ["here/1"]
            await redis.client.delete(KEYS.lease("here/1"))
            lock = Lock(Redis(client, KEYS, DEADLINE), "here/1", "other/1", 30.0)
            assert await lock.take() == "taken"
            assert await redis.client.smembers(KEYS.dead("here/1")) == {"", "id"}
            await lock.give_back(finished=True)
        await client.close()


def checked(*flags: str) -> tuple[int, str]:
    result = ended("check", "--bindport=0", *flags)
    assert not result.stderr
    return result.returncode, result.stdout


@pytest.mark.once
@pytest.mark.gen_test
async def test_check_names_what_is_wrong_with_redis(tmp_path: Path) -> None:
    """Unreachable; a policy that drops leases; missing permissions; and all is well."""
    async with RedisServer(
        tmp_path, "redis", "--maxmemory", "100mb",
        "--maxmemory-policy", "allkeys-lru",
        users=(
            "user good on >s3cret ~socketdock:* +eval +exists +get +set +del +pexpire"
            " +sadd +srem +scard +smembers +sunionstore +hset +hdel +hgetall +time"
            " +info +ping +hello",
            "user bad on >s3cret ~socketdock:* +info",
        ),
    ) as redis:  # fmt: skip
        good, bad = (f"redis://{user}:s3cret@{redis.place}" for user in ("good", "bad"))
        run = asyncio.to_thread
        (status, text), (bad_status, bad_text) = await asyncio.gather(
            run(checked, f"--cluster={good}"), run(checked, f"--cluster={bad}")
        )
        assert status == bad_status == 1
        assert "allkeys-lru" in text and "set noeviction" in text
        assert "this user may do what leases need" in text
        assert "NOPERM" in bad_text and "+sunionstore" in bad_text
        assert "s3cret" not in text + bad_text
        await redis.client.config_set("maxmemory-policy", "noeviction")
        secret = tmp_path / "url"
        secret.write_text(f"{good}\n")
        status, text = await run(checked, f"--cluster_file={secret}")
        assert status == 0, text
        assert await redis.client.keys("*") == []
        await redis.kill()
        status, text = await run(checked, f"--cluster={good}")
        assert status == 1
        assert f"redis://{redis.place}" in text
