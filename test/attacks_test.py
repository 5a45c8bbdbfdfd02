"""Peers that send without end and read nothing, in the short form of `attacks.py`."""

import pytest
from attacks import PEERS, attack, doors
from service import Service

from handlers.http.body_budget import MAX_BODY_BYTES

pytestmark = [pytest.mark.gen_test(timeout=240), pytest.mark.long]

# Peers at once: fewer for the server that works longer for each of them.
COUNTS = {"fast": 20, "tornado": 10}
CROWD = 60  # whose bodies together are twice what the process keeps
# Per peer: bytes read ahead, a head, a response, and bytes in the kernel.
EACH = 512 * 1024
SLACK = 2 * 2**20  # bytes; what a measurement may differ by


@pytest.mark.parametrize("server", ["fast", "tornado"])
@pytest.mark.parametrize("door", ["clients", "callbacks"])
async def test_peers_that_read_nothing_take_little_memory(io_loop, server, door):
    """The relay serves a client meanwhile; each kind of peer runs in turn."""
    flags = ("--callbackport=0", f"--http_server={server}")
    count = COUNTS[server]
    # A body may be as large as a message, and is kept until it is complete.
    flags += ("--max_message_size=262144",)
    async with Service(*flags) as service:
        await attack(service, doors(service)[door], "empty lines", count, 0.1)
        for kind in PEERS:
            found = await attack(service, doors(service)[door], kind, count, 0.2)
            assert found.during - found.before < count * EACH + SLACK, (kind, found)
            assert found.sent > 0, kind
            assert found.longest_echo < 10, (kind, found)


@pytest.mark.parametrize("server", ["fast", "tornado"])
@pytest.mark.parametrize("kind", ["a chunked body", "a body that is never whole"])
async def test_bodies_at_their_largest_are_bounded_together(io_loop, server, kind):
    """More peers send 4 MiB each than the process keeps bodies of."""
    async with Service("--callbackport=0", f"--http_server={server}") as service:
        url = service.callback_url
        found = await attack(service, url, kind, CROWD, 1.0)
        # What is kept, and half as much again in the gaps between; what is read.
        most = MAX_BODY_BYTES * 3 // 2 + CROWD * EACH
        assert found.during - found.before < most, found
        assert found.longest_call < 10, found
