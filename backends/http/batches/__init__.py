"""Batches: with `--batchuri` one request has the events of many connections.

A connection belongs to one `lane`, which sends one batch at a time. `delivery` keeps
the order of a connection's messages, `disconnects` has the disconnect events. What
does not differ from single events is shared with `backends.http`.
"""

import logging

from tornado.options import Error as OptionError
from tornado.options import define, options

from backends import Connection
from backends.http.batches.delivery import BatchDelivery as BatchDelivery
from backends.http.batches.disconnects import BatchDisconnects as BatchDisconnects
from backends.http.batches.lane import BATCH_TIMEOUT, BatchLimits, Lane
from backends.http.batches.lane import LaneContext as LaneContext

logger = logging.getLogger(__name__)

define("batchuri", type=str, metavar="URL",
       help="URL to which message and disconnect events of all connections are POSTed "
            "in batches, instead of --messageuri and --disconnecturi")
define("batch_lanes", default=4, metavar="COUNT",
       help="batches that are under way at once; a connection always uses the same one")
define("batch_max_events", default=256, metavar="COUNT",
       help="most events of a batch")
define("batch_max_bytes", default=1024 * 1024, metavar="BYTES",
       help="most bytes of the body of a batch; a single event is always sent")

# They concern held answers, of which batches have none.
WITHOUT_EFFECT = {"order_wait": 1.0, "max_unanswered": 16}


class BatchDeliveries:
    """The lanes, and the deliveries of connections on them."""

    overdue = 0  # no response is held
    failed = 0

    def __init__(self, context: LaneContext, lanes: int) -> None:
        self._context = context
        self._lanes = [Lane(number, context) for number in range(lanes)]
        self.client = context.client
        self.requests = context.requests
        self.breaker = context.breaker
        self.observer = context.observer

    def new(self, connection: Connection) -> BatchDelivery:
        """Return the delivery of a connection that sends its first message."""
        return BatchDelivery(self.lane_of(connection.id), self._context, connection)

    def lane_of(self, connection_id: str) -> Lane:
        """Return the lane of a connection, always the same one."""
        return self._lanes[int(connection_id[:8], 16) % len(self._lanes)]

    def disconnects(self, timeout: float) -> BatchDisconnects:
        """Return what delivers disconnect events on these lanes."""
        return BatchDisconnects(self._context, self.lane_of, timeout)

    def close(self) -> None:
        """Retry nothing more, and abandon what is under way."""
        self._context.closing = True
        for lane in self._lanes:
            lane.close()


def batch_limits() -> BatchLimits:
    """Read the limits from the options."""
    return BatchLimits(
        options.batch_max_events,
        options.batch_max_bytes,
        options.backend_timeout or BATCH_TIMEOUT,
        options.delivery_timeout,
    )


def check_batch_options() -> None:
    """Raise `OptionError` for options that contradict `--batchuri`; warn of others."""
    for name in ("messageuri", "disconnecturi"):
        if options[name]:
            raise OptionError(f"--batchuri and --{name} exclude each other")
    unused = [
        f"--{name}" for name, value in WITHOUT_EFFECT.items() if options[name] != value
    ]
    if unused:
        logger.warning("with --batchuri, %s has no effect", " or ".join(unused))


def boot_id_of(instance: str) -> str:
    """Return the part of `Relay.instance` that is new at each start."""
    return instance.rpartition("/")[2]
