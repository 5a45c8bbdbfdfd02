"""What the options say about the API: its functions, its stage and its names."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from tornado.options import Error as OptionError
from tornado.options import options

from backends import Relay
from backends.apigateway.authorizer import identity_sources
from backends.apigateway.routes import Routes, function_target, make_routes
from backends.hosts import encoded_host, is_host
from backends.target import Target

logger = logging.getLogger(__name__)

WITHOUT_EFFECT = ("messageuri", "disconnecturi", "backend_timeout")
STAGE = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Settings(NamedTuple):
    """An API. `targets` are all functions, by where they are named in the options."""

    routes: Routes
    authorizer: Target | None
    identity: Sequence[tuple[str, str]]
    stage: str
    api_id: str
    domain_name: str
    targets: Mapping[str, Target]


def make_settings(relay: Relay) -> Settings:
    """Read them from the options. Raises `OptionError`."""
    _warn_of_unused()
    routes = make_routes()
    targets = dict(routes.named)
    authorizer = None
    if options.authorizeruri:
        authorizer = function_target("--authorizeruri", options.authorizeruri)
        targets["--authorizeruri"] = authorizer
    elif options.authorizer_identity:
        raise OptionError("--authorizer_identity needs --authorizeruri")
    return Settings(
        routes,
        authorizer,
        identity_sources(),
        stage_name(),
        options.api_id,
        domain_name(relay),
        targets,
    )


def _warn_of_unused() -> None:
    """Warn of options of the http backend that stand beside those in use here."""
    unused = [f"--{name}" for name in WITHOUT_EFFECT if options[name]]
    if unused:
        logger.warning(
            "with --backend=apigateway, %s has no effect", " or ".join(unused)
        )


def stage_name() -> str:
    """Return the name of the stage. Raises `OptionError` if it is invalid."""
    if not STAGE.fullmatch(options.stage):
        raise OptionError(
            f"--stage={options.stage} is not a name of letters, digits, - and _"
        )
    return str(options.stage)


def domain_name(relay: Relay) -> str:
    """Return `domainName` of events. Raises `OptionError` if it is not known."""
    if options.domain_name:
        return _checked_domain(options.domain_name)
    if relay.callback_url is None:
        raise OptionError(
            "--backend=apigateway needs --domain_name or --externalhostandport, since"
            " callbacks are bound to a wildcard address"
        )
    return urlsplit(relay.callback_url).netloc


def _checked_domain(name: str) -> str:
    """Return a host, maybe with a port and a path, whose name is encoded.

    Functions put `https://` before it, and a stage behind it. Raises `OptionError`.
    """
    what = "--domain_name" + ("" if "@" in name else f"={name}")
    host = re.split("[:/]", name, maxsplit=1)[0]
    try:
        name = encoded_host(host) + name[len(host):]
    except ValueError as error:
        raise OptionError(f"{what}: {error}") from None
    try:
        parts = urlsplit(f"//{name}")
        host = parts.hostname or ""
        wrong = (
            not is_host(host)
            or "%" in host  # a zone is valid on one machine only
            or parts.netloc.endswith(":")
            or parts.port == 0
            or re.search(r"[@?#\\]|[^!-~]", name)
        )
    except ValueError:
        wrong = True
    if wrong:
        raise OptionError(
            f"{what} is not like host:port; an IPv6 address needs brackets"
        )
    return name.rstrip("/")
