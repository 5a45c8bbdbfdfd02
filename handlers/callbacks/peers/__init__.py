"""Callbacks for the connections of other instances (`--peer_address`).

`sharing` makes the parts from the options. `forward` sends a callback to the instance
that has the connection, `received_hops` takes it there, and `hops` signs and verifies.
They are imported only with `--peer_address`.
"""

from typing import TYPE_CHECKING

from tornado.options import Error as OptionError
from tornado.options import define, options

from handlers.callbacks.executor import CommandExecutor

if TYPE_CHECKING:
    from handlers.callbacks.peers.sharing import Peers

define("peer_timeout", default=2.0, metavar="SECONDS",
       help="longest wait for a connection to another instance; also added to the time "
            "that a forwarded callback may take")
define("peer_tls", default=False,
       help="connect to other instances by TLS")
define("peer_ca", type=str, metavar="PATH",
       help="CA certificates (PEM) that verify other instances; re-read on SIGHUP; "
            "none: the system's")
define("peer_name", type=str, metavar="NAME",
       help="the name in the certificates of all instances; none: each has its own "
            "address")


def make_peers(instance: str, here: CommandExecutor) -> "Peers | None":
    """Return what `--peer_address` needs; None without it. Raises `OptionError`."""
    require_options()
    if not options.peer_address:
        return None
    from handlers.callbacks.peers.sharing import Peers, own_address

    return Peers(own_address(), options.peer_secret_file, instance, here)


def require_options() -> None:
    """Raise `OptionError` if an option lacks another one."""
    for name, other in (
        ("peer_address", "peer_secret_file"),
        ("peer_secret_file", "peer_address"),
        ("peer_tls", "peer_address"),
        ("peer_ca", "peer_tls"),
        ("peer_name", "peer_tls"),
    ):
        if options[name] and not options[other]:
            raise OptionError(f"--{name} needs --{other}")
    if not options.peer_timeout > 0:
        raise OptionError("--peer_timeout must be above 0")
