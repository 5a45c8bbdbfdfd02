"""The limits and features of each client: the options as typed values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tornado.options import Error as OptionError
from tornado.options import define, options

from handlers.clients.headers import HOP_BY_HOP_HEADERS, withheld_names
from handlers.clients.origins import AllowedOrigins
from handlers.clients.proxies import TrustedProxies
from handlers.rates import Rates, Stalls
from handlers.websocket.deflate import Compression
from handlers.websocket.negotiation import subprotocols

define("max_message_size", default=4 * 1024 * 1024, metavar="BYTES",
       help="largest message in either direction; a larger one closes with 1009, or "
            "gets 413")
define("max_frame_size", default=0, metavar="BYTES",
       help="largest frame in either direction: a larger one of a client closes with "
            "1009, larger messages to clients are fragmented; 0: no limit")
define("subprotocols", multiple=True, metavar="NAMES",
       help="subprotocols to select from when the backend selected none; the first "
            "one that the client offers is used")
define("compression", default=False,
       help="accept permessage-deflate (RFC 7692)")
define("compression_level", default=6, metavar="LEVEL",
       help="zlib level, 1 (fast) to 9 (small)")
define("max_send_buffer", default=1024 * 1024, metavar="BYTES",
       help="most bytes that wait to be sent to one client; above it a send gets 429")
define("send_timeout", default=10.0, metavar="SECONDS",
       help="longest time that a client may receive nothing while frames wait for it; "
            "then it is closed with 1008")
define("connection_queue_messages", default=64, metavar="COUNT",
       help="most messages of one client that wait for the backend; then reading from "
            "it stops")
define("connection_queue_bytes", default=1024 * 1024, metavar="BYTES",
       help="most bytes of one client's messages that wait for the backend; a single "
            "message is always accepted")


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """The limits and features of each client."""

    max_message_size: int = 4 * 1024 * 1024
    max_frame_size: int = 0
    allowed_origins: AllowedOrigins = field(default_factory=AllowedOrigins)
    require_origin: bool = False
    trusted_proxies: TrustedProxies = field(default_factory=TrustedProxies)
    withheld_headers: frozenset[str] = HOP_BY_HOP_HEADERS
    subprotocols: Sequence[str] = ()
    compression: Compression | None = None
    max_send_buffer: int = 1024 * 1024
    send_timeout: float = 10.0
    queue_messages: int = 64
    queue_bytes: int = 1024 * 1024
    rates: Rates = field(default_factory=Rates)
    stalls: Stalls = field(default_factory=Stalls)
    trust_traceparent: bool = True

    def allows(self, origins: Sequence[str], host: str, scheme: str | None) -> bool:
        """Whether a handshake with these Origin headers is allowed.

        `host` and `scheme` are those that it requested; see `AllowedOrigins`.
        """
        if not origins:
            return not self.require_origin
        return len(origins) == 1 and (
            self.allowed_origins.allow(origins[0], host, scheme)
        )


def make_policy() -> ClientPolicy:
    """Create the policy from the options. Raises `OptionError` for invalid ones."""
    try:
        allowed_origins = AllowedOrigins(options.allowed_origins)
    except ValueError as error:
        raise OptionError(f"--allowed_origins: {error}") from None
    try:
        trusted_proxies = TrustedProxies(options.trusted_proxies)
    except ValueError as error:
        raise OptionError(f"--trusted_proxies: {error}") from None
    try:
        withheld_headers = withheld_names(options.withhold_headers)
    except ValueError as error:
        raise OptionError(f"--withhold_headers: {error}") from None
    try:
        subprotocols(options.subprotocols)
    except ValueError as error:
        raise OptionError(f"--subprotocols: {error}") from None
    if options.max_queued_bytes < options.max_message_size:
        raise OptionError(
            f"--max_queued_bytes={options.max_queued_bytes} is less than one"
            f" message of --max_message_size={options.max_message_size}"
        )
    return ClientPolicy(
        max_message_size=options.max_message_size,
        max_frame_size=options.max_frame_size,
        allowed_origins=allowed_origins,
        require_origin=options.require_origin,
        trusted_proxies=trusted_proxies,
        withheld_headers=withheld_headers,
        subprotocols=tuple(options.subprotocols),
        compression=(
            Compression(options.compression_level) if options.compression else None
        ),
        max_send_buffer=options.max_send_buffer,
        send_timeout=options.send_timeout,
        queue_messages=options.connection_queue_messages,
        queue_bytes=options.connection_queue_bytes,
        rates=Rates(
            options.messages_per_second,
            options.bytes_per_second,
            options.rate_patience,
        ),
        trust_traceparent=options.trust_traceparent,
    )
