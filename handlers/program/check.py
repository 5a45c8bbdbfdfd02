"""`socketdock check`: finds problems before the start, and sends test events."""

import contextlib
import secrets
from collections.abc import Iterator, Sequence

from tornado.options import Error as OptionError
from tornado.options import options

import backends
from backends import Check, Finding, Observer, Relay
from backends.cluster import make_cluster_check
from handlers.callbacks.address import callback_url
from handlers.callbacks.apigateway import make_signing_keys
from handlers.callbacks.executor import CommandExecutor
from handlers.callbacks.peers.check import peer_findings
from handlers.callbacks.peers.sharing import Peers
from handlers.callbacks.tokens import CallbackTokens
from handlers.clients.paths import make_paths
from handlers.clients.policy import make_policy
from handlers.http.binding import bind_listeners
from handlers.http.listener import bindable
from handlers.process.findings import (
    certificate_finding,
    descriptors_finding,
    port_finding,
)
from handlers.process.logs import read_log_config
from handlers.program.service import DESCRIPTORS, client_paths
from handlers.telemetry import load_tracing

# The name in the instance of test events. It differs from that of each relay, since an
# event with a new boot id says that the connections of the run before are lost.
CHECK_INSTANCE = "socketdock-check"


async def check(version: str, warnings: Sequence[str], sends: bool) -> int:
    """Print problems that would disturb the relay, and how to fix them.

    `version` is SocketDock's, `warnings` are those of the options. If it `sends`, each
    URL of the backend gets a test event. Returns the exit status, 1 if there is an
    error.
    """
    found = [Finding("warning", warning) for warning in warnings]
    with _errors_added_to(found):
        make_policy()
    with _errors_added_to(found):
        make_paths(client_paths() or ())
    with _errors_added_to(found):
        if options.log_config:
            read_log_config(options.log_config)
    with _errors_added_to(found):
        if options.otel:
            load_tracing()
    found += [port_finding("--bindport", bindable(options.bindip), options.bindport,
                           options.reuse_port)]
    if options.callbackport is not None:
        address = bindable(options.callbackip or options.bindip)
        found += [port_finding("--callbackport", address, options.callbackport)]
    with _errors_added_to(found):
        await _check_ends(version, found, sends)
    with contextlib.suppress(BrokenPipeError):  # the exit status still reports it
        for finding in found:
            print(f"{finding.level + ':':<9}{finding.text}")
    return int(any(finding.level == "error" for finding in found))


async def _check_ends(version: str, found: list[Finding], sends: bool) -> None:
    # Listening on the real ports would take clients from a running relay.
    to_clients, to_backend = bind_listeners(elsewhere=True)
    on_loopback = to_backend.is_loopback
    external = callback_url(options.externalhostandport, to_backend)
    for listener in {to_clients, to_backend}:
        await listener.close()
    for path in filter(None, (options.tls_cert, options.callback_tls_cert)):
        found.append(certificate_finding(path))
    with _errors_added_to(found):
        tokens = CallbackTokens(options.callback_token, options.callback_token_file)
        signed = make_signing_keys() is not None
        access = tokens.required or options.callback_capability or signed
        if not (access or on_loopback):
            found.append(
                Finding(
                    "error",
                    f"callbacks need no token, and {to_backend.address or '*'} can be"
                    " reached from other machines; set --callback_token_file or"
                    " --callback_capability",
                )
            )
    with _errors_added_to(found):
        found += peer_findings(to_backend)
    with _errors_added_to(found):
        found += [finding async for finding in make_cluster_check().findings()]
    backend = Check()
    with _errors_added_to(found):
        module = backends.load(options.backend)
        if hasattr(module, "make_check"):
            backend = module.make_check(Relay(external, "check", version))
        for path in backend.certificates:
            found.append(certificate_finding(path))
        found += [finding async for finding in backend.findings()]
        if sends:
            found += await _test_events(version, external)
    found.append(
        descriptors_finding(
            options.max_connections + backend.descriptors + DESCRIPTORS
            + (Peers.descriptors if options.peer_address else 0),
            options.max_connections,
        )
    )


async def _test_events(version: str, external: str | None) -> list[Finding]:
    """Return what the backend answers to test events. Raises `OptionError`."""
    module = backends.load(options.backend)
    if not hasattr(module, "make_trial"):
        why = f"--backend={options.backend} sends no test events"
        return [Finding("warning", f"{why}; leave out --send")]
    relay = Relay(
        external,
        f"{CHECK_INSTANCE}/{secrets.token_hex(8)}",
        version,
        executor=CommandExecutor(
            options.max_message_size, options.max_state_size, Observer()
        ),
    )
    return [finding async for finding in module.make_trial(relay).findings()]


@contextlib.contextmanager
def _errors_added_to(found: list[Finding]) -> Iterator[None]:
    try:
        yield
    except OptionError as error:
        found.append(Finding("error", str(error)))
