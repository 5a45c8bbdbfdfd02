"""What `socketdock check` says of `--peer_address` and its secrets."""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator

from tornado.options import options

from backends.check import Finding
from handlers.callbacks.peers import require_options
from handlers.callbacks.peers.sharing import client_context, own_address
from handlers.http.listener import Listener
from handlers.owners import Address, read_secrets


def peer_findings(listener: Listener) -> Iterator[Finding]:
    """Yield what was found; raises `OptionError` as the start would.

    `listener` is that of callbacks, perhaps at another port.
    """
    require_options()
    if not options.peer_address:
        return
    yield _address_finding(own_address(), listener)
    path = options.peer_secret_file
    where = f"--peer_secret_file={path}"
    number = len(read_secrets(path))
    if os.stat(path).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(
            "warning", f"{where}: other users can write to it; chmod go-w {path}"
        )
    else:
        secrets = "1 secret" if number == 1 else f"{number} secrets, the first signs"
        yield Finding("ok", f"{where}: {secrets}")
    if options.peer_tls:
        client_context()
    if options.peer_tls != listener.has_tls:
        yield Finding(
            "error",
            "--peer_tls is off, but callbacks are served with TLS; set --peer_tls=on"
            if listener.has_tls
            else "--peer_tls is on, but callbacks are served without TLS; give"
            " --callback_tls_cert, or leave --peer_tls out",
        )


def _address_finding(own: Address, listener: Listener) -> Finding:
    where = f"--peer_address={own}"
    if listener.is_loopback and not ipaddress.ip_address(own.host).is_loopback:
        return Finding(
            "error",
            f"{where}: callbacks are served at {listener.address} only, which other"
            " machines cannot reach; set --callbackip, or --bindip",
        )
    port = options.bindport if options.callbackport is None else options.callbackport
    if port not in (0, own.port):  # 0: any port
        return Finding(
            "warning",
            f"{where}: callbacks are served at port {port}; this is right only if"
            " something in between translates the port",
        )
    if not _is_own(own.host):
        return Finding(
            "warning",
            f"{where}: this machine does not have this address; this is right only if"
            " something in between translates it",
        )
    return Finding("ok", f"{where} is an address of this machine")


def _is_own(host: str) -> bool:
    """Whether this machine has an IP address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as sock:
            sock.bind((host, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True
