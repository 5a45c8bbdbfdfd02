"""`socketdock health`: asks whether the relay with these options serves."""

import contextlib

from tornado.options import options

from handlers.http.listener import bindable, is_wildcard
from handlers.probes import probe


def health() -> int:
    """Print whether the relay with these options serves. Returns the exit status."""
    host = bindable(options.bindip)
    if is_wildcard(host):
        host = "::1" if ":" in host else "127.0.0.1"
    where = f"port {options.bindport} of {host}"
    if not options.bindport:
        why: str | None = "the port is unknown: --bindport=0"
    else:
        why = probe(host, options.bindport, bool(options.tls_cert))
    with contextlib.suppress(BrokenPipeError):
        print(f"{where}: {why or 'ok'}")
    return int(why is not None)
