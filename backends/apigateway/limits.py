"""API Gateway's limits of WebSocket connections, as defaults of the relay's options.

See "Quotas for configuring and running a WebSocket API" in its developer guide.
"""

from collections.abc import Mapping
from types import MappingProxyType

from tornado.options import options

LIMITS: Mapping[str, float] = MappingProxyType({
    "max_message_size": 128 * 1024,  # bytes
    "max_frame_size": 32 * 1024,  # bytes
    "idle_timeout": 600.0,  # seconds
    "max_lifetime": 7200.0,  # seconds
})


def option_defaults() -> Mapping[str, float]:
    """Return the values of the relay's options that are not set."""
    return LIMITS if options.apigateway_limits else {}
