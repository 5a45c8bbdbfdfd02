"""Connections to Redis: their URLs, pipelines, and what happens without Redis."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from certificates import Authority
from redis_server import RedisServer, Server
from service import DEADLINE, eventually
from tornado.options import Error as OptionError

from backends.redis_client import RedisAway, RedisClient, RedisError, TurnPipeline
from backends.redis_url import parse_address

SERVERS = ("redis", "valkey")


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(parse_address(url, "--cluster"), "--cluster")
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def pipeline_of(redis: RedisServer) -> AsyncIterator[TurnPipeline]:
    async with client_of(redis.url) as client:
        pipeline = client.pipeline()
        try:
            yield pipeline
        finally:
            await pipeline.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h", "redis://h:6379"),
        ("redis://u:s3cret@h:7/2", "redis://h:7"),
        ("rediss://:s3cret@[::1]?ssl_ca_certs=/ca", "rediss://[::1]:6379"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis+sentinel://:s3cret@a,b:2/mymaster/1",
         "redis+sentinel://a:26379,b:2/mymaster"),
        ("rediss+cluster://u:s3cret@a,b:2", "rediss+cluster://a:6379,b:2"),
    ],
)  # fmt: skip
def test_url_is_shown_without_its_secret(url: str, shown: str) -> None:
    """The forms of URLs are parsed; text of them has no password."""
    address = parse_address(url, "--cluster")
    assert str(address) == shown
    assert "s3cret" not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://s3cret@h", "s3cret", "redis://u:s3cret@", "redis://u:s3cret@h:99999",
        "redis://u:s3cret@h/x", "redis://u:s3cret@h/1/2", "redis://u:s3cret@a,b",
        "redis://u:s3cret@h?timeout=1", "redis://u:s3cret@h?ssl_ca_certs=/ca",
        "redis+sentinel://u:s3cret@h", "redis+cluster://u:s3cret@h/1",
        "unix://s3cret", "redis://u:s3cret#x@h",
    ],
)  # fmt: skip
def test_invalid_url_is_rejected_without_its_secret(url: str) -> None:
    """The error names the option and the reason, and not the URL."""
    with pytest.raises(OptionError) as raised:
        parse_address(url, "--cluster")
    assert str(raised.value).startswith("--cluster: ")
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.gen_test
async def test_commands_of_one_turn_go_in_one_write(
    tmp_path: Path, server: Server
) -> None:
    """Their replies come in order; an error reply fails its command only."""
    async with RedisServer(tmp_path, server) as redis, pipeline_of(redis) as pipeline:
        await pipeline.execute("SET", "key", "text")
        before = await processed_reads(redis)
        outcomes = await asyncio.gather(
            *(pipeline.execute("RPUSH", "list", n) for n in range(100)),
            pipeline.execute("RPUSH", "key", "x"),
            pipeline.execute("LRANGE", "list", 0, 1),
            return_exceptions=True,
        )
        assert await processed_reads(redis) - before <= 5
    assert outcomes[:100] == list(range(1, 101))
    assert isinstance(outcomes[100], RedisError)
    assert outcomes[100].code == "WRONGTYPE"
    assert outcomes[101] == [b"0", b"1"]


async def processed_reads(redis: RedisServer) -> int:
    return int((await redis.client.info("stats"))["total_reads_processed"])


@pytest.mark.gen_test
async def test_unanswered_commands_fail_once_and_are_not_repeated(
    tmp_path: Path,
) -> None:
    """While Redis is away commands fail immediately; back, they are sent again."""
    told: list[str] = []
    async with RedisServer(tmp_path, aof=True) as redis, client_of(redis.url) as client:
        pipeline = client.pipeline(
            lambda: told.append("connected"), lambda error: told.append("lost")
        )
        assert await pipeline.execute("RPUSH", "list", 1) == 1
        await redis.kill()
        with pytest.raises(RedisAway):
            await pipeline.execute("RPUSH", "list", 2)
        with pytest.raises(RedisAway):
            await asyncio.wait_for(pipeline.execute("RPUSH", "list", 3), DEADLINE)
        assert told == ["connected", "lost"]
        await redis.start()
        await eventually(lambda: pipeline.connected)
        assert told == ["connected", "lost", "connected"]
        assert await pipeline.execute("RPUSH", "list", 4) == 2
        await pipeline.close()


@pytest.mark.gen_test
async def test_hung_server_counts_as_away(tmp_path: Path) -> None:
    """A server that answers nothing fails the commands after `reply_timeout`."""
    async with RedisServer(tmp_path) as redis, client_of(redis.url) as client:
        pipeline = client.pipeline(reply_timeout=0.5)
        await pipeline.execute("PING")
        redis.pause()
        try:
            with pytest.raises(RedisAway, match=r"no reply in 0\.5 s"):
                await pipeline.execute("PING")
        finally:
            redis.resume()
            await pipeline.close()


@pytest.mark.long
@pytest.mark.gen_test
async def test_blocking_command_may_take_longer_than_a_default_of_redis_py(
    tmp_path: Path,
) -> None:
    """A read that blocks for 6 s returns; the default socket timeout is 5 s."""
    async with RedisServer(tmp_path) as redis, client_of(redis.url) as client:
        assert await client.execute("BLPOP", "list", 6) is None
        with pytest.raises(RedisAway):
            await client.execute("BLPOP", "list", 60, timeout=0.1)
        assert await client.execute("PING") == b"PONG"


@pytest.mark.gen_test
async def test_login_and_tls(tmp_path: Path) -> None:
    """User, password and TLS of a URL are used; wrong ones are `RedisAway`."""
    authority = Authority(tmp_path)
    async with RedisServer(
        tmp_path, users=("user relay on >s3cret ~* +ping",),
        certificate=authority.server(),
    ) as redis:  # fmt: skip
        good = f"rediss://relay:s3cret@{redis.place}?ssl_ca_certs={authority.path}"
        for url, failure in (
            (good, ""),
            (good.replace("s3cret", "s3cret2"), "WRONGPASS"),
            (good.partition("?")[0], "certificate"),
            (good.replace("rediss", "redis").partition("?")[0], "onnection"),
        ):
            async with client_of(url) as client:
                pipeline = client.pipeline()
                if url == good:
                    assert await pipeline.execute("PING") == b"PONG"
                    with pytest.raises(RedisError, match="NOPERM") as refused:
                        await pipeline.execute("GET", "key")
                    assert refused.value.code == "NOPERM"
                else:
                    with pytest.raises(RedisAway, match=failure) as away:
                        await pipeline.execute("PING")
                    assert "s3cret" not in str(away.value)
                await pipeline.close()


@pytest.mark.gen_test
async def test_cluster_is_found_from_one_node(tmp_path: Path) -> None:
    """Commands go to the nodes of their keys, and their replies come in order."""
    async with (
        RedisServer(tmp_path, cluster=True) as one,
        RedisServer(tmp_path, cluster=True) as two,
    ):
        await one.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8191)
        await two.client.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
        await one.client.execute_command(
            "CLUSTER MEET", "127.0.0.1", two.port, two.cluster_port
        )
        for node in (one, two):
            await until(lambda node=node: cluster_is_ok(node))
        async with client_of(f"redis+cluster://{one.place}") as client:
            pipeline = client.pipeline()
            keys = [f"{{{n}}}:key" for n in range(50)]
            assert await asyncio.gather(
                *(pipeline.execute("APPEND", key, key) for key in keys + keys)
            ) == [len(key) for key in keys] + [2 * len(key) for key in keys]
            assert await pipeline.execute("EVAL", "return KEYS[1]", 1, "a") == b"a"
            entry = await client.execute("XADD", "stream", "*", "field", "text")
            read = await client.execute("XREAD", "STREAMS", "stream", "0")
            assert read == {b"stream": [[entry, [b"field", b"text"]]]}
            await pipeline.close()
        assert await one.client.dbsize() and await two.client.dbsize()


async def cluster_is_ok(node: RedisServer) -> bool:
    info = await node.client.execute_command("CLUSTER INFO")
    return (info["cluster_state"], info["cluster_known_nodes"]) == ("ok", "2")


@pytest.mark.gen_test
async def test_sentinel_names_the_master_again_after_a_failover(
    tmp_path: Path,
) -> None:
    """A master that became a replica is left, and the Sentinels are asked again."""
    async with RedisServer(tmp_path) as one, RedisServer(tmp_path) as two:
        async with Sentinel(tmp_path, one) as sentinel:
            url = f"redis+sentinel://{sentinel.place}/socketdock"
            async with client_of(url) as client:
                pipeline = client.pipeline()
                await pipeline.execute("SET", "key", "one")
                await sentinel.client.execute_command("SENTINEL REMOVE", "socketdock")
                await sentinel.monitor(two)
                await one.client.replicaof("127.0.0.1", two.port)
                with pytest.raises(RedisAway):
                    await pipeline.execute("SET", "key", "two")
                await eventually(lambda: pipeline.connected)
                await pipeline.execute("SET", "key", "two")
                await pipeline.close()
        assert await two.client.get("key") == "two"


class Sentinel(RedisServer):
    """A Sentinel that watches `master`, and begins no failover by itself."""

    def __init__(self, folder: Path, master: RedisServer) -> None:
        super().__init__(folder)
        self.master = master
        config = self.folder / "sentinel.conf"
        config.touch()
        self.flags = ["--sentinel"]
        self.program_words = [str(config)]

    async def start(self) -> None:
        await super().start()
        await self.monitor(self.master)

    async def monitor(self, master: RedisServer) -> None:
        await self.client.execute_command(
            "SENTINEL MONITOR", "socketdock", "127.0.0.1", master.port, 3
        )


async def until(claim: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `claim()` holds, which asks a server."""
    async with asyncio.timeout(DEADLINE):
        while not await claim():
            await asyncio.sleep(0.02)
