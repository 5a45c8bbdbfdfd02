"""Lets this instance and others take each other's callbacks, as the options say."""

import ssl
from dataclasses import dataclass
from typing import ClassVar

from tornado.options import Error as OptionError
from tornado.options import options

from backends import Backend
from backends.pem import load_certificate, verifying_context
from handlers.callbacks.capabilities import Capabilities
from handlers.callbacks.executor import CommandExecutor
from handlers.callbacks.peers.fast_hop import FastHop
from handlers.callbacks.peers.forward import MAX_CONNECTIONS, Forwarder, PeerSettings
from handlers.callbacks.peers.hops import Hops
from handlers.callbacks.peers.outgoing import Outgoing, SharedExecutor
from handlers.callbacks.peers.received_hops import ReceivedHops, hop_routes
from handlers.callbacks.peers.shared_bulk import (
    Fast,
    SharedBulk,
    SharedBulkHandler,
    without_trace,
)
from handlers.callbacks.repeats import Repeats
from handlers.clients.connection import Connections
from handlers.http.application import Routes
from handlers.owners import Address, SharedOwners, read_secrets


class Peers:
    """What this instance shares with others: secrets, and how to reach them.

    `executor` carries out the commands in a backend's responses.
    """

    descriptors = MAX_CONNECTIONS

    def __init__(
        self, own: Address, secret_file: str, instance: str, here: CommandExecutor
    ) -> None:
        self._secret_file = secret_file
        self.address = str(own)
        keys = read_secrets(secret_file)
        self.owners = SharedOwners(own, keys)
        self.hops = Hops(instance, keys)
        self.capabilities: Capabilities | None = None
        if options.callback_capability:
            self.capabilities = Capabilities.derived(keys)
        self._here = here
        self.executor = SharedExecutor(here)
        self._tls = client_context() if options.peer_tls else None
        self._forwarder: Forwarder | None = None

    def share(
        self,
        connections: Connections,
        backend: Backend,
        repeats: Repeats,
        prefix: str,
    ) -> "Sharing":
        """Make what takes the callbacks of other instances, and gives them theirs."""
        settings = PeerSettings(
            timeout=options.peer_timeout,
            send_timeout=options.send_timeout,
            tls=options.peer_tls,
            certificate_name=options.peer_name,
        )
        forwarder = Forwarder(connections, self.hops, settings)
        forwarder.client.trust(self._tls)
        self._forwarder = forwarder
        outgoing = Outgoing(forwarder, connections.observer)
        self.executor.begin(forwarder, outgoing, connections.turns)
        bulk = SharedBulk(self._here, connections, forwarder, repeats)
        received = ReceivedHops(
            prefix, self.hops, connections, backend, bulk, repeats
        )
        return Sharing(forwarder, outgoing, bulk, received)

    def reload(self) -> None:
        """Read the files again. Raises `OptionError`; then nothing has changed."""
        keys = read_secrets(self._secret_file)
        self._tls = client_context() if options.peer_tls else None
        self.owners.use(keys)
        self.hops.use(keys)
        if self.capabilities is not None:
            self.capabilities.derive(keys)
        if self._forwarder is not None:
            self._forwarder.client.trust(self._tls)


@dataclass(frozen=True, slots=True)
class Sharing:
    """The parts that serve callbacks together with other instances."""

    forwarder: Forwarder
    outgoing: Outgoing
    bulk: SharedBulk
    received: ReceivedHops

    bulk_handler: ClassVar = SharedBulkHandler

    def routes(self) -> Routes:
        """Return the route of callbacks that were forwarded here."""
        # In JSON a character may take six bytes.
        largest = max(6 * options.max_message_size, 2 * options.max_bulk_size)
        return hop_routes(self.received, largest)

    def fast_hop(self, otherwise: Fast) -> FastHop:
        """Return what answers forwarded sends without a handler."""
        return FastHop(self.received, options.max_message_size, otherwise)

    def fast_bulk(self, fast: Fast) -> Fast:
        """Return what answers bulk callbacks without a handler, by `fast` if it can."""
        return without_trace(fast)

    async def close(self) -> None:
        """Close the connections to other instances."""
        await self.outgoing.close()
        await self.forwarder.close()


def own_address() -> Address:
    """Return `--peer_address`. Raises `OptionError`."""
    try:
        return Address.parse(options.peer_address)
    except ValueError:
        raise OptionError(
            f"--peer_address={options.peer_address} is not the IP address and the port"
            " at which other instances reach this one, such as 10.0.0.3:8765"
        ) from None


def client_context() -> ssl.SSLContext:
    """Return the context that verifies other instances. Raises `OptionError`.

    Where callers need a certificate (`--callback_client_ca`), each instance shows that
    of its own callback listener.
    """
    context = verifying_context(options.peer_ca, "peer_ca")
    certificate, key = options.callback_tls_cert, options.callback_tls_key
    if options.callback_client_ca and certificate:
        where = f"--callback_tls_cert={certificate}"
        load_certificate(context, certificate, key, where)
    return context

