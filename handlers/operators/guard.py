"""Decides who may use the operators' routes.

With `--callback_token`, a request needs a token. Without tokens, it must come from
this machine. `OperatorHandler` applies that to each route.
"""

import ipaddress
import re
from dataclasses import dataclass
from http import HTTPStatus

from tornado.httputil import HTTPHeaders

from handlers.callbacks.tokens import TOKEN_REQUIRED, CallbackTokens
from handlers.http.body import BodyHandler

# Headers in which a proxy names its client, in addition to X-Forwarded-*.
FORWARDING_HEADERS = frozenset(
    ("forwarded", "via", "x-real-ip", "client-ip", "x-client-ip", "true-client-ip",
     "x-cluster-client-ip", "x-original-forwarded-for", "x-original-host",
     "cf-connecting-ip", "cf-connecting-ipv6", "cdn-loop", "fastly-client-ip",
     "fly-client-ip", "x-appengine-user-ip", "x-azure-clientip", "x-azure-socketip",
     "x-envoy-external-address")
)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # RFC 9110, section 9.2.1

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class OperatorGuard:
    """Accepts a request with a token; without tokens, a request of this machine.

    `on_loopback` says that the listener is bound to loopback addresses only. That is
    not sufficient: a proxy on this machine may forward anybody's request, and a page in
    a browser on it may send one (DNS rebinding, request forgery).
    """

    tokens: CallbackTokens
    on_loopback: bool

    def refusal(self, method: str, scheme: str, headers: HTTPHeaders) -> str | None:
        """Return why a request without a token is rejected; None if it is accepted.

        `scheme` is that of the listener, http or https.
        """
        if not self.on_loopback:
            return (
                "Set --callback_token, or bind this listener to a loopback address."
            )
        if any(map(_is_of_a_proxy, headers)):
            return "Requests through a proxy need --callback_token."
        hosts = headers.get_list("Host")
        if len(hosts) != 1 or not is_loopback_host(hosts[0]):
            return (
                "Use a loopback name, such as localhost, or set --callback_token."
            )
        if not _is_same_origin(method, f"{scheme}://{hosts[0]}", headers):
            return (
                "A request that changes something needs an Origin, which must be this"
                " one; or set --callback_token."
            )
        return None


def _is_of_a_proxy(name: str) -> bool:
    name = name.lower().replace("_", "-")
    return name.startswith("x-forwarded") or name in FORWARDING_HEADERS


def is_loopback_host(host: str) -> bool:
    """Whether `host`, a `Host` header, is a loopback name (RFC 6761, section 6.3)."""
    if (match := HOST.fullmatch(host)) is None:
        return False
    name = match[1].lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_same_origin(method: str, own: str, headers: HTTPHeaders) -> bool:
    """Whether no page of another origin can have sent the request.

    Browsers send `Origin` with each request that may change something, and with a
    WebSocket's GET. If there is one, it must be the relay's own.
    """
    if origins := headers.get_list("Origin"):
        return [origin.lower() for origin in origins] == [own.lower()]
    return method in SAFE_METHODS or (
        headers.get_list("Sec-Fetch-Site") == ["same-origin"]
    )


class OperatorHandler(BodyHandler):
    """The base of all operators' routes: `prepare()` rejects everybody else."""

    def initialize(self, guard: OperatorGuard) -> None:
        self.guard = guard

    async def prepare(self) -> None:
        request, tokens = self.request, self.guard.tokens
        self.set_header("Cache-Control", "no-store")
        if tokens.required:
            challenge = tokens.challenge(request.headers.get_list("Authorization"))
            if challenge is not None:
                self.set_header("Connection", "close")  # the body is not read
                self.unauthorized(challenge, TOKEN_REQUIRED)
                return
        elif (
            refusal := self.guard.refusal(
                str(request.method), request.protocol, request.headers
            )
        ) is not None:
            self.set_header("Connection", "close")
            self.problem(HTTPStatus.FORBIDDEN, refusal)
            return
        await super().prepare()
