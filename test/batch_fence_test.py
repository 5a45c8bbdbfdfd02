"""Batches of a relay that was taken for dead."""

import asyncio
from collections import defaultdict

import pytest
import websockets
from batches_test import BatchBackend
from redis_server import RedisServer
from service import DEADLINE, Service, eventually

pytestmark = [pytest.mark.gen_test(timeout=120), pytest.mark.once, pytest.mark.long]


async def test_retried_batch_lacks_what_others_have_ended(io_loop, tmp_path):
    """Messages and disconnect events wait for a retry; others end the connections."""
    failing = True
    async with RedisServer(tmp_path) as redis, BatchBackend() as backend:
        backend.answer = lambda batch: 503 if failing else 200
        flags = (*backend.flags(), f"--cluster={redis.url}", "--lease_ttl=1")
        async with Service(*flags) as paused, Service(*flags) as other:
            for relay in (paused, other):
                await eventually(lambda r=relay: "holds its lease" in str(r.log))
            clients = [await websockets.connect(paused.ws_url) for _ in range(6)]
            for client in clients:
                await client.send("again and again")
            for client in clients[::2]:
                await client.close()
            await eventually(lambda: any(batch.messages for batch in backend.batches))
            async with paused.stalled(0):
                failing = False
                await backend.wait_for("disconnect", len(clients))
            await eventually(lambda: "was taken for dead" in str(paused.log))
            for client in clients:
                await asyncio.wait_for(client.wait_closed(), DEADLINE)
            async with websockets.connect(paused.ws_url) as client:
                await client.send("in time")
            await backend.wait_for("disconnect", len(clients) + 1)
    kinds: dict[str, list[str]] = defaultdict(list)
    for event in backend.accepted:
        kinds[event["meta"]["connection_id"]].append(event["event"])
    assert len(kinds) == len(clients) + 1
    for seen in kinds.values():
        assert seen[-1] == "disconnect" and seen.count("disconnect") == 1, kinds
