"""The `apigateway` backend: API Gateway's WebSocket APIs, without AWS.

It invokes Lambda functions, or HTTP services that take the same requests, with events
in API Gateway's proxy format (`events`). `routes` selects a function for each message,
`answers` reads what functions return, `authorizer` asks who may connect, and
`functions` has the HTTP client. Order and accounting are those of `backends.http`.
These modules are imported only with this backend: their options are defined here.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tornado.options import define

from backends import Relay

if TYPE_CHECKING:
    from backends.apigateway.backend import ApiGatewayBackend
    from backends.apigateway.trial import FunctionTrial
    from backends.http.check import HTTPCheck

# The modules of others whose options this backend reads.
OPTION_MODULES = (
    "backends.client",
    "backends.http.credentials",
    "backends.http.deliveries",
    "backends.http.disconnects",
    "backends.journal",
)

define("functionuri", type=str, metavar="URL",
       help="URL that invokes the Lambda function of all routes, or of an HTTP service "
            "that takes the same requests; required")
define("routes", multiple=True, metavar="ROUTES",
       help="route keys, each with =URL if its function is not that of --functionuri; "
            "$connect, $disconnect and $default always exist, except with = and no URL")
define("route_selection", default="$request.body.action", metavar="EXPRESSION",
       help="where a message has its route key: $request.body and the path of a member "
            "of its JSON")

define("authorizeruri", type=str, metavar="URL",
       help="URL that invokes a REQUEST authorizer for each handshake; none: all may "
            "connect")
define("authorizer_identity", multiple=True, metavar="SOURCES",
       help="what a handshake must have, else it gets 401 and the authorizer is not "
            "asked: route.request.header.<name>, route.request.querystring.<name>")

define("stage", default="local", metavar="NAME",
       help="the stage: clients connect to /<stage>, or to --ws_path")
define("api_id", default="socketdock", metavar="ID",
       help="apiId in events")
define("domain_name", type=str, metavar="NAME",
       help="domainName in events, by which functions reach /@connections; none: host "
            "and port of --externalhostandport")

define("function_timeout", default=29.0, metavar="SECONDS",
       help="longest wait for the answer of a function, from sending its request")
define("function_retries", default=0, metavar="COUNT",
       help="how often a failed invocation for a message or $disconnect is repeated")
define("function_concurrency", type=int, metavar="COUNT",
       help="most invocations at once at one host and port, authorizer included; none: "
            "1 for URLs that end in /functions/function/invocations, else no limit")

define("route_response", default=True,
       help="send the body that a function returns for a message to its client")

define("apigateway_limits", default=True,
       help="whether the apigateway backend has API Gateway's limits of messages, "
            "frames and connections, where options do not set others; off: the "
            "relay's own")


def option_defaults() -> Mapping[str, float]:
    """Return API Gateway's limits, for the relay's options that are not set."""
    from backends.apigateway import limits

    return limits.option_defaults()


def client_paths() -> Sequence[str]:
    """Return the path of the stage; handshakes to others get 403."""
    from backends.apigateway.settings import stage_name

    return [f"/{stage_name()}"]


def make_check(relay: Relay) -> "HTTPCheck":
    """Make the checks of `socketdock check`, from the options."""
    from backends.apigateway import backend

    return backend.make_check(relay)


def make_trial(relay: Relay) -> "FunctionTrial":
    """Make the test invocations of `socketdock check --send`, from the options."""
    from backends.apigateway import backend

    return backend.make_trial(relay)


def make_backend(relay: Relay) -> "ApiGatewayBackend":
    """Make the backend for `--backend=apigateway`, from the options."""
    from backends.apigateway import backend

    return backend.make_backend(relay)
