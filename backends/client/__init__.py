"""The HTTP/1.1 client: POSTs over pooled keep-alive connections.

Ours, because delivery needs what no library reports: when a whole request has been
sent, and how to abandon one (docs/decisions/003-own-http-client.md). `pool` chooses
or opens a connection for each request, `connection` sends it, and `response` reads
the answer.
"""

from backends.client.exchange import Exchange, NoConnection
from backends.client.pool import Client
from backends.client.response import Response

__all__ = ["Client", "Exchange", "NoConnection", "Response"]
