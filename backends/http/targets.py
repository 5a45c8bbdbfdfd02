"""The URLs of events, from the options."""

import re

from tornado.options import Error as OptionError
from tornado.options import options

from backends import Relay
from backends.breaker import breaker_settings
from backends.http.batches import check_batch_options
from backends.http.deliveries import delivery_limits
from backends.target import Target


def make_targets(relay: Relay) -> dict[str, Target | None]:
    """Return the targets from the options, by the names of these without `uri`.

    Raises `OptionError` for an invalid URL, and for options that conflict.
    """
    targets = {
        name: target_of(f"{name}uri")
        for name in ("message", "disconnect", "connect", "batch", "instance")
    }
    if targets["batch"] is not None:
        check_batch_options()
    elif targets["message"] is None:
        raise OptionError("--backend=http needs --messageuri or --batchuri")
    else:
        delivery_limits()  # checks these options, which batches do not use
    if relay.callback_url is None:
        raise OptionError(
            "--backend=http needs --externalhostandport, since callbacks are bound"
            " to a wildcard address"
        )
    breaker_settings()
    return targets


def target_of(option: str) -> Target | None:
    """Parse the URL in an option. Raises `OptionError` if it is invalid."""
    if not options[option]:
        return None
    try:
        return Target.parse(options[option])
    except ValueError as error:
        # Shown without a password or a key that it may contain.
        shown = re.sub(r"(?s)//.*@", "//", options[option]).partition("?")[0]
        raise OptionError(f"--{option}={shown}: {error}") from None
