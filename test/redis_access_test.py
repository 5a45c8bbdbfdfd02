"""The backend `redis` with TLS, users, Sentinels, a Cluster; its check; an example."""

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest
import websockets
from certificates import Authority
from redis_client_test import Sentinel
from redis_server import RedisServer
from redis_streams import Streams
from redis_worker_test import WorkerService
from service import DEADLINE, PROJECT, RecordingBackend, Service

pytestmark = [pytest.mark.gen_test(timeout=120), pytest.mark.once]


async def works(streams: Streams, url: str = "") -> None:
    """Relay a message and a command, and trim what is acknowledged."""
    client = streams.redis.client
    for stream in streams.names:
        await client.xgroup_create(stream, "workers", "0", mkstream=True)
    async with streams.relay(url=url) as service:
        async with websockets.connect(service.ws_url) as peer:
            await peer.send("up")
            (message,) = await streams.wait_for("message")
            await streams.command(
                message.meta["reply"],
                {"connection_id": message.connection_id, "send": "down"},
            )
            assert await asyncio.wait_for(peer.recv(), DEADLINE) == "down"
        await streams.wait_for("disconnect")
        for stream in streams.names:
            read = await client.xreadgroup("workers", "c", {stream: ">"})
            for entries in read.values():
                ids = [entry_id for entry_id, _ in entries[0]]
                await client.xack(stream, "workers", *ids)
        async with asyncio.timeout(DEADLINE):
            while await streams.length():
                await asyncio.sleep(0.05)
    assert not [line for line in service.log if "NOPERM" in line]


def documented_user(name: str, prefix: str) -> str:
    """Return a user of docs/redis.md, for another prefix."""
    text = (PROJECT / "docs" / "redis.md").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"user {name} ")]
    assert "change-this-password" in line
    return line.replace("~socketdock:*", f"~{prefix}:*")


async def test_documented_user_may_do_all_that_a_relay_does(io_loop, tmp_path):
    """With TLS; and the check finds neither an error nor a missing permission."""
    authority = Authority(tmp_path)
    user = documented_user("socketdock", "acl")
    async with RedisServer(
        tmp_path, users=(user,), certificate=authority.server(), aof=True
    ) as redis:
        streams = Streams(redis, 2, "acl")
        url = (f"rediss://socketdock:change-this-password@{redis.place}"
               f"?ssl_ca_certs={authority.path}")  # fmt: skip
        await works(streams, url)
        status, output = await check(*streams.flags(url=url))
        assert status == 0, output
        assert "permissions that a relay needs" in output
        assert "change-this-password" not in output
        await redis.client.execute_command("ACL", "SETUSER", "socketdock", "-xtrim")
        status, output = await check(*streams.flags(url=url))
        assert status == 1
        assert "may not run xtrim" in output


async def test_documented_user_may_do_all_that_a_worker_does(io_loop, tmp_path):
    """Take partitions, deliver, acknowledge, bury, and send dead events again."""
    user = documented_user("socketdock-worker", "acl")
    name = "socketdock-worker:change-this-password"

    async def refuse_bad(handler, event):
        if event["message"] == "bad":
            handler.set_status(500)

    async with (
        RedisServer(tmp_path, users=(user,)) as redis, RecordingBackend() as backend
    ):
        streams = Streams(redis, 2, "acl")
        backend.answers["message"] = refuse_bad
        flags = (
            f"--redis_url=redis://{name}@{redis.place}",
            f"--messageuri={backend.url('message')}",
            "--event_timeout=0.5",
        )
        admin = f"redis://admin:admin@{redis.place}"
        async with streams.relay(url=admin) as relay:
            async with WorkerService(streams, *flags) as worker:
                async with websockets.connect(relay.ws_url) as client:
                    await client.send("bad")
                    async with websockets.connect(relay.ws_url) as other:
                        async with asyncio.timeout(DEADLINE):
                            while not await redis.client.exists("acl:dead"):
                                await other.send("good")
                                await asyncio.sleep(0.1)
            async with WorkerService(streams, *flags, "--replay_dead") as again:
                async with asyncio.timeout(DEADLINE):
                    while await redis.client.xlen("acl:dead"):
                        await asyncio.sleep(0.05)
        assert not [line for line in worker.log + again.log if "NOPERM" in line]


async def test_cluster(io_loop, tmp_path):
    """Streams are on the nodes of their hash tags."""
    async with RedisServer(tmp_path, cluster=True) as redis:
        await redis.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        async with asyncio.timeout(DEADLINE):
            while True:
                info = await redis.client.execute_command("CLUSTER INFO")
                if info["cluster_state"] == "ok":
                    break
                await asyncio.sleep(0.02)
        url = f"redis+cluster://{redis.place}"
        streams = Streams(redis)
        await works(streams, url)
        status, output = await check(*streams.flags(url=url))
        assert status == 0, output


async def test_sentinel(io_loop, tmp_path):
    """The master is found by the name that Sentinels have for it."""
    async with RedisServer(tmp_path) as redis, Sentinel(tmp_path, redis) as sentinel:
        await works(Streams(redis), f"redis+sentinel://{sentinel.place}/socketdock")


async def test_valkey(io_loop, tmp_path):
    """Valkey is used like Redis."""
    async with RedisServer(tmp_path, "valkey", aof=True) as redis:
        streams = Streams(redis)
        await works(streams)
        status, output = await check(*streams.flags())
        assert status == 0, output
        assert "Valkey" in output


async def test_check_finds_what_loses_messages(io_loop, tmp_path):
    """Policy, persistence, another number, abandoned groups, and no Redis."""
    async with RedisServer(
        tmp_path, "redis", "--maxmemory-policy", "allkeys-lru",
        "--enable-debug-command", "yes",
    ) as redis:
        streams = Streams(redis, 2)
        for stream in streams.names:
            await redis.client.xadd(stream, {"event": "message"})
        await redis.client.xgroup_create(streams.names[0], "old", "0")
        await redis.client.set(f"{streams.prefix}:partitions", 3)
        await redis.client.xadd(f"{streams.prefix}:dead", {"event": "message"})
        before = await everything(redis)
        status, output = await check(*streams.flags())
        assert await everything(redis) == before
    assert status == 1
    for text in (
        "maxmemory-policy is allkeys-lru",
        "set appendonly to yes",
        f"{streams.prefix}:partitions is 3",
        f"{streams.prefix}:dead has 1 events",
        "group old has no consumer",
        f"XGROUP DESTROY {streams.names[0]} old",
        f"{streams.names[1]} has 1 entries and no group",
    ):
        assert text in output
    status, output = await check(*streams.flags())
    assert status == 1
    assert "start Redis, or correct the URL" in output


async def everything(redis: RedisServer) -> list[tuple[str, bytes]]:
    """Return all keys, with their types and numbers of changes."""
    keys = sorted(await redis.client.keys())
    return [
        (key, await redis.client.execute_command("DEBUG DIGEST-VALUE", key))
        for key in keys
    ]


async def check(*flags: str) -> tuple[int | None, str]:
    """Run `socketdock check`; return its status and its output."""
    service = Service()
    process = await asyncio.create_subprocess_exec(
        *service.command, "check", "--bindport=0", *flags,
        cwd=service.cwd, env=service.environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
    return process.returncode, output.decode()


async def test_example_consumer_echoes(io_loop, tmp_path):
    """It answers by commands."""
    async with RedisServer(tmp_path) as redis:
        streams = Streams(redis)
        async with streams.relay() as service, consumer(streams):
            async with websockets.connect(service.ws_url) as client:
                await client.send("hello")
                answer = await asyncio.wait_for(client.recv(), DEADLINE)
                assert answer == "you said: hello"


@contextlib.asynccontextmanager
async def consumer(streams: Streams):
    """Run the example during the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path("examples") / "redis_consumer.py"),
        f"--url={streams.redis.url}", f"--prefix={streams.prefix}", "--partitions=0-3",
        cwd=PROJECT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE)
        assert line.startswith(b"consumer of")
        yield
    finally:
        process.kill()
        await process.wait()
