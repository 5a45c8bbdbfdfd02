"""`socketdock health`: asks whether the relay with these options serves."""

import contextlib
import http.client
import ssl

from tornado.options import options

from handlers.http.listener import bindable, is_wildcard

PROBE_TIMEOUT = 2.0  # seconds for each step of a probe


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


def probe(address: str, port: int, tls: bool) -> str | None:
    """Request `/livez` at an address. Returns why it does not serve, or None.

    It ignores proxies in the environment. It does not verify the certificate, which
    may not name this address.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = (
        http.client.HTTPSConnection(
            address, port, timeout=PROBE_TIMEOUT, context=context
        )
        if tls
        else http.client.HTTPConnection(address, port, timeout=PROBE_TIMEOUT)
    )
    try:
        connection.request("GET", "/livez")
        status = connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    finally:
        connection.close()
    return None if status == 200 else f"it answers {status}"
