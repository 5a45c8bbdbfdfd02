"""Makes the one or two listeners from the options."""

from tornado.options import Error as OptionError
from tornado.options import define, options

from handlers.http.listener import Listener, TLSFiles, collide

define("bindip", default="127.0.0.1", metavar="ADDRESS",
       help="address of the client listener")
define("bindport", default=8765, metavar="PORT",
       help="port of the client listener; 0: any free port")
define("callbackip", type=str, metavar="ADDRESS",
       help="address of the callback listener; none: --bindip; needs --callbackport")
define("callbackport", type=int, metavar="PORT",
       help="port of a separate callback listener; none: one listener serves clients "
            "and callbacks")

CALLBACK_TLS = ("callback_tls_cert", "callback_tls_key", "callback_client_ca")


def bind_listeners(elsewhere: bool = False) -> tuple[Listener, Listener]:
    """Return the client listener and the callback listener, perhaps the same.

    With `elsewhere` they use free ports instead of the configured ones. Raises
    `OptionError` if an address or a certificate cannot be used.
    """
    callbackip = options.callbackip or options.bindip
    if (
        options.callbackport
        and options.callbackport == options.bindport
        and collide(callbackip, options.bindip)
    ):
        raise OptionError(
            "--callbackport is --bindport; choose another, or leave it out for one"
            " listener"
        )
    clients = Listener(
        options.bindip,
        0 if elsewhere else options.bindport,
        tls_files("tls"),
        options.reuse_port,
    )
    if options.callbackport is None:
        for name in ("callbackip", *CALLBACK_TLS):
            if options[name] is not None:
                raise OptionError(f"--{name} needs --callbackport")
        if options.reuse_port and options.backend != "loopback":
            raise OptionError(
                "--reuse_port needs --callbackport: callbacks at the shared port would"
                " reach any of the processes"
            )
        return clients, clients
    return clients, Listener(
        callbackip,
        0 if elsewhere else options.callbackport,
        tls_files("callback_tls", options.callback_client_ca),
    )


def tls_files(prefix: str, client_ca: str | None = None) -> TLSFiles | None:
    """Return a listener's TLS files; None for plain TCP."""
    certificate, key = options[f"{prefix}_cert"], options[f"{prefix}_key"]
    if certificate:
        return TLSFiles(certificate, key, client_ca)
    if key or client_ca:
        raise OptionError(
            f"--{f'{prefix}_key' if key else 'callback_client_ca'}"
            f" needs --{prefix}_cert"
        )
    return None
