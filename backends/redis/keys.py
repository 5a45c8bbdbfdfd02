"""The keys in Redis, and which partition the events of a connection are in.

Their names are the contract with consumers. What is in braces decides in a Cluster
which node has a key: keys with equal braces are on one node.
"""

from typing import NamedTuple
from zlib import crc32

MAX_PARTITIONS = 16_384  # the slots of a Cluster


class Keys(NamedTuple):
    """The names of all keys of the relays that share `prefix`."""

    prefix: str

    @property
    def partitions(self) -> str:
        """The number of partitions."""
        return f"{self.prefix}:partitions"

    @property
    def janitor(self) -> str:
        """The lock of the instance that trims."""
        return f"{self.prefix}:janitor"

    def events(self, partition: int) -> str:
        """The stream of a partition's events."""
        return f"{self.prefix}:events:{{{partition}}}"

    def commands(self, instance: str) -> str:
        """The stream of the commands for an instance."""
        return f"{self.prefix}:commands:{{{instance}}}"


def count_in(stored: str) -> int:
    """Return the number of partitions in the text of its key; 0: it is none."""
    is_number = stored.isascii() and stored.isdecimal() and len(stored) < 6
    count = int(stored) if is_number else 0
    return count if count <= MAX_PARTITIONS else 0


def partition_of(connection_id: str, partitions: int) -> int:
    """Return the partition of a connection's events."""
    return crc32(connection_id.encode()) % partitions
